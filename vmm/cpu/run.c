/*
 * Starting and stopping the vCPU.
 *
 * uc_emu_stop() is not used: it is lost before uc_emu_start(), and Unicorn 2.1.4 leaves after each load and
 * store on a late exit request, which runs read-modify-write instructions twice. Instead:
 *
 *   any thread   stop = 1, or work, or `pending`, under the lock
 *                kick: kicked = 1, icount_decr.high = -1
 *   vCPU         the next block starts by looking at icount_decr and leaves to the main loop, which clears it
 *                and calls exec_interrupt() below: safe point. It sees `stop` and ends the run there.
 *
 * The library's main loop changes interrupt_request by plain reads and writes, which would undo what another
 * thread writes to it in between. So nobody else does: one bit of it is always set, for exec_interrupt() to be
 * called each time, and what others want stands in `kicked` and `pending`, which only atomic accesses change.
 *
 * No kick is lost. Both sides write, then read (or write) what the other one writes, with a full barrier
 * between: either the main loop clears icount_decr before the kick sets it, and the next block leaves again, or
 * exec_interrupt() sees `kicked`. `stop` holds without a kick, too: pf_run() tests it under the lock before it
 * starts. Who waits kicks again each millisecond all the same.
 */
#include <string.h>
#include <stddef.h>
#include <errno.h>
#include <time.h>

#include "engine_private.h"

__thread struct pf_engine *pf_current __attribute__((tls_model("initial-exec")));

#define KICK_NS 1000000
#define SPIN_NS 50000 /* as long as it takes to wake a thread up */

static void kick(struct pf_engine *engine)
{
    uint16_t *high = (uint16_t *)(AT(char *, engine->cpu, CPU_ICOUNT_DECR_PTR)) + 1;

    if (engine->waiting) {
        pthread_cond_broadcast(&engine->changed);
        return;
    }
    __atomic_store_n(&engine->kicked, 1, __ATOMIC_SEQ_CST);
    __atomic_store_n(high, 0xffff, __ATOMIC_SEQ_CST);
}

/* vCPU thread, inside the run: leave at the end of this block. */
void pf_leave(struct pf_engine *engine)
{
    AT(uint8_t, engine->uc, UC_STOP_REQUEST) = 1;
    AT(uint8_t, engine->cpu, CPU_EXIT_REQUEST) = 1;
    *((uint16_t *)AT(char *, engine->cpu, CPU_ICOUNT_DECR_PTR) + 1) = 0xffff;
}

static void do_work(struct pf_engine *engine) /* lock held, at a safe point */
{
    struct pf_work *work = engine->work;

    engine->work = NULL;
    while (work) {
        struct pf_work *next = work->next;
        work->result = work->function(engine, work->argument);
        __atomic_store_n(&work->done, 1, __ATOMIC_RELEASE); /* the waiter may be gone with it at once */
        work = next;
    }
    pthread_cond_broadcast(&engine->changed);
}

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

static __attribute__((noinline)) bool deliver(struct pf_engine *engine)
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

/*
 * vCPU thread, around a call into Python: a safe point, during which others' work is done by themselves. A
 * handler may wait for a lock whose owner waits for a safe point.
 */
void pf_enter_handler(struct pf_engine *engine)
{
    pthread_mutex_lock(&engine->lock);
    do_work(engine);
    engine->in_handler = 1;
    pthread_mutex_unlock(&engine->lock);
}

void pf_leave_handler(struct pf_engine *engine)
{
    pthread_mutex_lock(&engine->lock);
    engine->in_handler = 0;
    pthread_mutex_unlock(&engine->lock);
}

/* False if the run shall end. Not inline, nor deliver(): exec_interrupt() is called often, and seldom for these. */
static __attribute__((noinline)) bool answer_kick(struct pf_engine *engine)
{
    __atomic_store_n(&engine->kicked, 0, __ATOMIC_SEQ_CST);
    __atomic_store_n(&engine->translating, 0, __ATOMIC_RELEASE); /* the library may have left by longjmp */
    pthread_mutex_lock(&engine->lock);
    do_work(engine);
    pthread_mutex_unlock(&engine->lock);
    if (!__atomic_load_n(&engine->stop, __ATOMIC_SEQ_CST))
        return true;
    pf_leave(engine);
    return false;
}

/*
 * In place of x86_cpu_exec_interrupt (which always uses vector 0): called between two blocks. `request` has our
 * own bit and what the library asks itself for, a nested guest's virtual interrupt.
 */
static bool exec_interrupt(void *cpu, int request)
{
    struct pf_engine *engine = pf_current;
    uint32_t rest = (uint32_t)request & ~INTERRUPT_OURS;

    __atomic_thread_fence(__ATOMIC_SEQ_CST); /* after icount_decr was cleared; see the top */
    if (__atomic_load_n(&engine->kicked, __ATOMIC_SEQ_CST) && !answer_kick(engine))
        return false;
    if (__atomic_load_n(&engine->pending, __ATOMIC_SEQ_CST) && deliver(engine))
        return true;
    return rest ? x86_cpu_exec_interrupt_x86_64(cpu, (int)rest) : false;
}

void pf_hook_interrupts(struct pf_engine *engine)
{
    AT(exec_interrupt_fn, AT(char *, engine->cpu, CPU_CLASS), CLASS_EXEC_INTERRUPT) = exec_interrupt;
}

static int enter(struct pf_engine *engine) /* 1: may run, 0: a stop is wanted, or -errno */
{
    int result = 1;

    pthread_mutex_lock(&engine->lock);
    if (engine->running)
        result = -EBUSY;
    else if (engine->stop)
        result = 0;
    else {
        AT(uint32_t, engine->cpu, CPU_INTERRUPT_REQUEST) |= INTERRUPT_OURS;
        engine->running = 1;
        engine->runner = pthread_self();
        pf_current = engine;
    }
    pthread_mutex_unlock(&engine->lock);
    return result;
}

static void leave(struct pf_engine *engine)
{
    pthread_mutex_lock(&engine->lock);
    do_work(engine);
    engine->running = 0;
    pf_current = NULL;
    pthread_mutex_unlock(&engine->lock);
}

static int one_start(struct pf_engine *engine, int *detail) /* an exit, or -1: go on */
{
    int halt = pf_pass_halt(engine);
    uc_err error;

    if (halt >= 0)
        return halt;
    engine->halted = 0;
    engine->starts++;
    error = uc_emu_start(engine->uc, ENV(uint64_t, engine, ENV_EIP), 0, 0, 0);
    engine->halted = AT(uint32_t, engine->cpu, CPU_HALTED) != 0 && !engine->triple_fault;
    if (engine->failed)
        return PF_FAILED;
    if (engine->latched)
        return PF_LATCHED;
    if (engine->triple_fault)
        return PF_TRIPLE_FAULT;
    if (error != UC_ERR_OK) {
        *detail = (int)error;
        return PF_FAILED;
    }
    return __atomic_load_n(&engine->stop, __ATOMIC_SEQ_CST) ? PF_STOPPED : -1;
}

int pf_run(struct pf_engine *engine, int waits, int *detail)
{
    int result = pf_seal(engine);

    if (result < 0)
        return result;
    result = enter(engine);
    if (result <= 0)
        return result < 0 ? result : PF_STOPPED;
    *detail = 0;
    engine->waits = waits;
    engine->latched = engine->failed = engine->triple_fault = 0;
    do
        result = one_start(engine, detail);
    while (result < 0);
    leave(engine);
    return result;
}

int pf_request_stop(struct pf_engine *engine)
{
    pthread_mutex_lock(&engine->lock);
    __atomic_store_n(&engine->stop, 1, __ATOMIC_SEQ_CST);
    if (engine->running)
        kick(engine);
    pthread_mutex_unlock(&engine->lock);
    return 0;
}

int pf_clear_stop(struct pf_engine *engine)
{
    pthread_mutex_lock(&engine->lock);
    __atomic_store_n(&engine->stop, 0, __ATOMIC_SEQ_CST);
    engine->parked = 0;
    pthread_mutex_unlock(&engine->lock);
    return 0;
}

int pf_set_parked(struct pf_engine *engine, int parked)
{
    pthread_mutex_lock(&engine->lock);
    __atomic_store_n(&engine->parked, parked, __ATOMIC_RELEASE);
    pthread_cond_broadcast(&engine->changed);
    pthread_mutex_unlock(&engine->lock);
    return 0;
}

/* Without the lock. Mostly the vCPU is there within some microseconds, less than it takes to wake a thread up. */
static void spin_until(const int *done)
{
    int64_t end = pf_now_ns() + SPIN_NS;

    while (!__atomic_load_n(done, __ATOMIC_ACQUIRE) && pf_now_ns() < end)
        __builtin_ia32_pause();
}

/*
 * Lock held, before and after. Kicks and waits until `*done` is set: spins, then sleeps and kicks each
 * millisecond. False when the time is over.
 */
static int kick_until(struct pf_engine *engine, const int *done, int64_t deadline)
{
    if (!*done) {
        if (engine->running)
            kick(engine);
        pthread_mutex_unlock(&engine->lock);
        spin_until(done);
        pthread_mutex_lock(&engine->lock);
    }
    while (!*done) {
        int64_t now = pf_now_ns(), until = now + KICK_NS;
        struct timespec at;

        if (deadline >= 0 && now >= deadline)
            return 0;
        if (deadline >= 0 && until > deadline)
            until = deadline;
        if (engine->running)
            kick(engine);
        at.tv_sec = until / 1000000000;
        at.tv_nsec = until % 1000000000;
        pthread_cond_timedwait(&engine->changed, &engine->lock, &at);
    }
    return 1;
}

int pf_wait_parked(struct pf_engine *engine, int64_t timeout_ns)
{
    int64_t deadline = timeout_ns < 0 ? -1 : pf_now_ns() + timeout_ns;
    int parked;

    pthread_mutex_lock(&engine->lock);
    parked = kick_until(engine, &engine->parked, deadline);
    pthread_mutex_unlock(&engine->lock);
    return parked;
}

static void forget(struct pf_engine *engine, struct pf_work *work)
{
    struct pf_work **link = &engine->work;

    while (*link && *link != work)
        link = &(*link)->next;
    if (*link)
        *link = work->next;
}

/*
 * Runs `function` at a safe point and returns its result. Three ways to one: the vCPU is not running (then
 * here, under the lock, which it needs to start); it is in a handler (the current instruction touches no
 * memory any more; here, too, under the lock that it needs to leave it); or the work is queued and the vCPU does
 * it at its next block or handler.
 */
int64_t pf_at_safe_point(struct pf_engine *engine, int64_t (*function)(struct pf_engine *, void *), void *argument,
                         int64_t timeout_ns)
{
    struct pf_work work = {.function = function, .argument = argument};
    int64_t deadline = timeout_ns < 0 ? -1 : pf_now_ns() + timeout_ns;
    struct pf_engine *before = pf_current;

    pthread_mutex_lock(&engine->lock);
    if (engine->running && !engine->in_handler && !pthread_equal(engine->runner, pthread_self())) {
        work.next = engine->work;
        engine->work = &work;
        if (!kick_until(engine, &work.done, deadline)) {
            forget(engine, &work);
            work.result = -ETIMEDOUT;
        }
        pthread_mutex_unlock(&engine->lock);
        return work.result;
    }
    pf_current = engine;
    work.result = function(engine, argument);
    pf_current = before;
    pthread_mutex_unlock(&engine->lock);
    return work.result;
}

int pf_latch(struct pf_engine *engine)
{
    if (pf_current != engine)
        return -EPERM;
    engine->latched = 1;
    pf_leave(engine);
    return 0;
}

int pf_fail(struct pf_engine *engine)
{
    engine->failed = 1;
    return pf_latch(engine);
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
        kick(engine);
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
        kick(engine);
}

int pf_pulse_irq(struct pf_engine *engine, int irq, uint32_t count, uint32_t limit)
{
    if (irq < 0 || irq > 15)
        return -EINVAL;
    pthread_mutex_lock(&engine->lock);
    pf_owe_pulses(engine, irq, count, limit);
    pthread_mutex_unlock(&engine->lock);
    return 0;
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
        kick(engine); /* the block goes on after OUT; it must not take long until the interrupt comes */
    pthread_mutex_unlock(&engine->lock);
}

/* ---- the UART ---- */

int pf_enable_uart(struct pf_engine *engine, uint32_t port, int irq)
{
    if (engine->sealed)
        return -EBUSY;
    if ((port & 7) || irq < 0 || irq > 15)
        return -EINVAL;
    engine->uart_port = port;
    engine->uart_irq = irq;
    engine->has_uart = 1;
    return 0;
}

int pf_take_uart(struct pf_engine *engine, struct pf_uart *uart)
{
    pthread_mutex_lock(&engine->lock);
    memcpy(uart, &engine->uart, offsetof(struct pf_uart, output) + engine->uart.count);
    engine->uart.is_open = 0;
    engine->uart.count = 0;
    pthread_mutex_unlock(&engine->lock);
    return 0;
}

int pf_give_uart(struct pf_engine *engine, const struct pf_uart *uart)
{
    pthread_mutex_lock(&engine->lock);
    memcpy(&engine->uart, uart, offsetof(struct pf_uart, output));
    engine->uart.count = 0;
    pthread_mutex_unlock(&engine->lock);
    return 0;
}

static void uart_line(struct pf_engine *engine, int before) /* under `lock` */
{
    int level = pf_uart_output(&engine->uart);

    if (level == before)
        return;
    pf_pics_set_line(&engine->pics, engine->uart_irq, level);
    update_request(engine);
    if (level)
        kick(engine); /* as after OUT to an interrupt controller */
}

int pf_uart_port_read(struct pf_engine *engine, uint32_t port)
{
    int before, value;

    pthread_mutex_lock(&engine->lock);
    before = pf_uart_output(&engine->uart);
    value = pf_uart_read(&engine->uart, port & 7);
    if (value >= 0)
        uart_line(engine, before);
    pthread_mutex_unlock(&engine->lock);
    return value;
}

int pf_uart_port_write(struct pf_engine *engine, uint32_t port, uint8_t value)
{
    int before, done;

    pthread_mutex_lock(&engine->lock);
    before = pf_uart_output(&engine->uart);
    done = pf_uart_write(&engine->uart, port & 7, value);
    if (done)
        uart_line(engine, before);
    pthread_mutex_unlock(&engine->lock);
    return done;
}

int pf_inject_nmi(struct pf_engine *engine)
{
    pthread_mutex_lock(&engine->lock);
    set_pending(engine, INTERRUPT_NMI, 1);
    if (engine->running)
        kick(engine);
    pthread_mutex_unlock(&engine->lock);
    return 0;
}

uint32_t pf_get_interrupt_request(struct pf_engine *engine)
{
    return __atomic_load_n(&engine->pending, __ATOMIC_SEQ_CST);
}

int pf_get_halted(struct pf_engine *engine)
{
    return engine->halted;
}

int pf_set_halted(struct pf_engine *engine, int halted)
{
    int result = -EBUSY;

    pthread_mutex_lock(&engine->lock);
    if (!engine->running) {
        engine->halted = halted != 0;
        result = 0;
    }
    pthread_mutex_unlock(&engine->lock);
    return result;
}

int pf_counters(struct pf_engine *engine, uint64_t *starts, uint64_t *slow_stores)
{
    *starts = engine->starts;
    *slow_stores = engine->slow_stores;
    return 0;
}
