/*
 * Safe points: where no guest instruction is half done, and others may do what the vCPU must not run across.
 *
 * The vCPU is at one between two blocks when it was kicked (run.c), while a handler answers the guest, while it
 * waits in a halt, and while it does not run at all.
 */
#include <errno.h>
#include <time.h>

#include "engine_private.h"

#define KICK_NS 1000000
#define SPIN_NS 50000 /* as long as it takes to wake a thread up */

/* Lock held, at a safe point. */
void pf_do_work(struct pf_engine *engine)
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

/*
 * vCPU thread, around a call into Python: a safe point, during which others' work is done by themselves. A
 * handler may wait for a lock whose owner waits for a safe point.
 */
void pf_enter_handler(struct pf_engine *engine)
{
    pthread_mutex_lock(&engine->lock);
    pf_do_work(engine);
    engine->in_handler = 1;
    pthread_mutex_unlock(&engine->lock);
}

void pf_leave_handler(struct pf_engine *engine)
{
    pthread_mutex_lock(&engine->lock);
    engine->in_handler = 0;
    pthread_mutex_unlock(&engine->lock);
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
            pf_kick(engine);
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
            pf_kick(engine);
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
