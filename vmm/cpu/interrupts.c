/*
 * Interrupts: from the lines of the controllers, and NMIs, to the vCPU.
 *
 * What the vCPU has yet to take stands in `pending`, written under `lock`; exec_interrupt() in run.c looks at it
 * between two blocks, halt.c before it waits.
 */
#include <errno.h>

#include "engine_private.h"

/* Lock held, which all writers hold; the vCPU reads without it. */
static void set_pending(struct pf_engine *engine, uint32_t interrupt, int pending)
{
    __atomic_store_n(&engine->pending, (engine->pending & ~interrupt) | (pending ? interrupt : 0), __ATOMIC_SEQ_CST);
}

/* Lock held. The controllers' output is the truth. */
static void update_request(struct pf_engine *engine)
{
    set_pending(engine, INTERRUPT_HARD, pf_pics_output(&engine->pics));
}

uint32_t pf_deliverable(const struct pf_engine *engine)
{
    uint32_t pending = __atomic_load_n(&engine->pending, __ATOMIC_SEQ_CST);

    if (!pending || !(ENV(uint32_t, engine, ENV_HFLAGS2) & HF2_GIF))
        return 0;
    if ((pending & INTERRUPT_NMI) && !(ENV(uint32_t, engine, ENV_HFLAGS2) & HF2_NMI))
        return INTERRUPT_NMI;
    if ((pending & INTERRUPT_HARD) && (ENV(uint64_t, engine, ENV_EFLAGS) & EFLAGS_IF) &&
        !(ENV(uint32_t, engine, ENV_HFLAGS) & HF_INHIBIT_IRQ))
        return INTERRUPT_HARD;
    return 0;
}

static int is_asked_for(const struct pf_engine *engine, int irq)
{
    return engine->pics.pic[irq >> 3].irr >> (irq & 7) & 1;
}

/* Lock held. The next pulse of each line whose last one was taken. */
static void pay_owed(struct pf_engine *engine)
{
    for (int irq = 0; irq < 16; irq++) {
        if (!engine->owed[irq] || is_asked_for(engine, irq))
            continue;
        engine->owed[irq]--;
        pf_pics_set_line(&engine->pics, irq, 0);
        pf_pics_set_line(&engine->pics, irq, 1);
        pf_pics_set_line(&engine->pics, irq, 0);
    }
}

/* An NMI, as x86_cpu_exec_interrupt has it. Both calls may longjmp: a nested guest's host wants it, or a fault. */
static void deliver_nmi(struct pf_engine *engine)
{
    engine->watched = 0; /* whatever it measured was interrupted */
    cpu_svm_check_intercept_param_x86_64(engine->env, SVM_EXIT_NMI, 0, 0);
    pthread_mutex_lock(&engine->lock);
    set_pending(engine, INTERRUPT_NMI, 0);
    pthread_mutex_unlock(&engine->lock);
    ENV(uint32_t, engine, ENV_HFLAGS2) |= HF2_NMI;
    do_interrupt_x86_hardirq_x86_64(engine->env, EXCP_NMI, 1);
}

static bool deliver_hard(struct pf_engine *engine)
{
    int vector = -1;

    engine->watched = 0; /* as above */
    pthread_mutex_lock(&engine->lock);
    if (pf_pics_output(&engine->pics)) {
        vector = pf_pics_acknowledge(&engine->pics);
        pay_owed(engine);
    }
    update_request(engine);
    pthread_mutex_unlock(&engine->lock);
    if (vector < 0)
        return false;
    do_interrupt_x86_hardirq_x86_64(engine->env, vector, 1); /* may longjmp: a fault while pushing */
    return true;
}

bool pf_deliver(struct pf_engine *engine)
{
    switch (pf_deliverable(engine)) {
    case INTERRUPT_NMI:
        deliver_nmi(engine);
        return true;
    case INTERRUPT_HARD:
        return deliver_hard(engine);
    default:
        return false;
    }
}

int pf_enable_pics(struct pf_engine *engine)
{
    if (engine->sealed)
        return -EBUSY;
    engine->has_pics = 1;
    return 0;
}

void pf_put_line(struct pf_engine *engine, int irq, int level)
{
    pf_pics_set_line(&engine->pics, irq, level);
    update_request(engine);
    if (engine->running && level)
        pf_kick(engine);
}

int pf_set_irq(struct pf_engine *engine, int irq, int level)
{
    if (irq < 0 || irq > 15)
        return -EINVAL;
    pthread_mutex_lock(&engine->lock);
    pf_put_line(engine, irq, level);
    pthread_mutex_unlock(&engine->lock);
    return 0;
}

void pf_owe_pulses(struct pf_engine *engine, int irq, uint32_t count, uint32_t limit)
{
    engine->owed[irq] += count;
    if (engine->owed[irq] > limit)
        engine->owed[irq] = limit;
    if (engine->owed[irq] && engine->pics.pic[irq >> 3].imr >> (irq & 7) & 1)
        engine->owed[irq] = 1; /* masked: nobody counts them */
    pay_owed(engine);
    update_request(engine);
    if (engine->running)
        pf_kick(engine);
}

int64_t pf_owed_irqs(struct pf_engine *engine, int irq)
{
    int64_t owed;

    if (irq < 0 || irq > 15)
        return -EINVAL;
    pthread_mutex_lock(&engine->lock);
    owed = engine->owed[irq];
    pthread_mutex_unlock(&engine->lock);
    return owed;
}

int pf_reset_pics(struct pf_engine *engine)
{
    pthread_mutex_lock(&engine->lock);
    pf_pics_reset(&engine->pics);
    for (int irq = 0; irq < 16; irq++)
        engine->owed[irq] = 0;
    set_pending(engine, INTERRUPT_NMI, 0);
    update_request(engine);
    pthread_mutex_unlock(&engine->lock);
    return 0;
}

int pf_get_pics(struct pf_engine *engine, struct pf_pics *pics)
{
    pthread_mutex_lock(&engine->lock);
    *pics = engine->pics;
    pthread_mutex_unlock(&engine->lock);
    return 0;
}

int pf_set_pics(struct pf_engine *engine, const struct pf_pics *pics)
{
    pthread_mutex_lock(&engine->lock);
    engine->pics = *pics;
    update_request(engine);
    pthread_mutex_unlock(&engine->lock);
    return 0;
}

/* vCPU thread: IN and OUT of the controllers' ports. */
uint8_t pf_pic_port_read(struct pf_engine *engine, uint32_t port)
{
    uint8_t value;

    pthread_mutex_lock(&engine->lock);
    value = pf_pics_read(&engine->pics, port);
    update_request(engine);
    pthread_mutex_unlock(&engine->lock);
    return value;
}

void pf_pic_port_write(struct pf_engine *engine, uint32_t port, uint8_t value)
{
    pthread_mutex_lock(&engine->lock);
    pf_pics_write(&engine->pics, port, value);
    update_request(engine);
    if (pf_pics_output(&engine->pics))
        pf_kick(engine); /* the block goes on after OUT; it must not take long until the interrupt comes */
    pthread_mutex_unlock(&engine->lock);
}

int pf_inject_nmi(struct pf_engine *engine)
{
    pthread_mutex_lock(&engine->lock);
    set_pending(engine, INTERRUPT_NMI, 1);
    if (engine->running)
        pf_kick(engine);
    pthread_mutex_unlock(&engine->lock);
    return 0;
}

uint32_t pf_get_interrupt_request(struct pf_engine *engine)
{
    return __atomic_load_n(&engine->pending, __ATOMIC_SEQ_CST);
}
