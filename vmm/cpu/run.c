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
 * starts. Who waits kicks again each millisecond all the same (safe_point.c).
 */
#include <errno.h>

#include "engine_private.h"

__thread struct pf_engine *pf_current __attribute__((tls_model("initial-exec")));

void pf_kick(struct pf_engine *engine)
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

/* False if the run shall end. Not inline: exec_interrupt() is called often, and seldom for these. */
static __attribute__((noinline)) bool answer_kick(struct pf_engine *engine)
{
    __atomic_store_n(&engine->kicked, 0, __ATOMIC_SEQ_CST);
    __atomic_store_n(&engine->translating, 0, __ATOMIC_RELEASE); /* the library may have left by longjmp */
    pthread_mutex_lock(&engine->lock);
    pf_do_work(engine);
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
    if (__atomic_load_n(&engine->pending, __ATOMIC_SEQ_CST) && pf_deliver(engine))
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
    pf_do_work(engine);
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
        pf_kick(engine);
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
