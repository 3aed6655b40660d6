/*
 * The guest's time: its TSC, its clock, and reads of the timer by which it measures the one with the other.
 *
 * A guest calibrates its TSC by reading the timer in a loop for some milliseconds. A host that runs something
 * else in between spoils that; Linux then keeps its time by counting ticks, wakes up for each, and falls
 * behind when it misses some. So while a guest reads the timer again and again, time that the host took away
 * does not pass for it, neither on the TSC nor on its clock: up to HIDDEN_LIMIT_NS in the life of an engine.
 */
#include <errno.h>
#include <time.h>
#include <x86intrin.h>

#include "engine_private.h"

#define GAP_NS 5000                /* far more than a read takes, far less than what spoils a calibration */
#define HIDDEN_LIMIT_NS 2000000000 /* arbitrary: hundreds of calibrations */
#define TSC_SLACK 2000

int64_t pf_now_ns(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000000ll + now.tv_nsec;
}

/* Both host clocks at one instant. */
static int64_t both_clocks(int64_t *tsc)
{
    int64_t before, ns;
    int tries = 8;

    do {
        before = (int64_t)__rdtsc();
        ns = pf_now_ns();
        *tsc = (int64_t)__rdtsc();
    } while (*tsc - before > TSC_SLACK && --tries);
    return ns;
}

/*
 * vCPU thread. What is read within a calibration is read here, once: `seen_ns` and `seen_tsc`. Were a clock read
 * again, the host could take time away in between, and that would pass and be hidden, too.
 */
void pf_hide_gap(struct pf_engine *engine)
{
    uint32_t turns = __atomic_load_n(&engine->clock_turns, __ATOMIC_ACQUIRE); /* before the clocks */
    int64_t tsc, ns = both_clocks(&tsc), gap = ns - engine->seen_ns;

    if (engine->seen_turns != turns)
        engine->watched = 0; /* the guest was stopped meanwhile: that has not passed for it anyway */
    engine->seen_turns = turns;
    if (engine->watched && gap > GAP_NS && engine->hidden_ns + gap < HIDDEN_LIMIT_NS) {
        pthread_mutex_lock(&engine->lock);
        if (engine->ticks_enabled) {
            __atomic_store_n(&engine->hidden_ns, engine->hidden_ns + gap, __ATOMIC_RELAXED);
            engine->ticks_offset -= tsc - engine->seen_tsc;
        }
        pthread_mutex_unlock(&engine->lock);
    }
    engine->seen_ns = ns;
    engine->seen_tsc = tsc;
}

int64_t pf_get_hidden_ns(struct pf_engine *engine)
{
    return __atomic_load_n(&engine->hidden_ns, __ATOMIC_RELAXED);
}

/*
 * ---- the clock, as stock's cpu_get_ticks() has it ----
 *
 * Its fields are read and written under `lock`: it is stopped while the vCPU runs, which must not read one of
 * before with one of after.
 */

static int64_t ticks_at(struct pf_engine *engine, int64_t host_tsc) /* lock held */
{
    int64_t ticks = engine->ticks_offset;

    if (!engine->ticks_enabled)
        return ticks;
    ticks += host_tsc;
    if (ticks < engine->ticks_last) { /* the host's counter went back: host suspend, another socket */
        engine->ticks_offset += engine->ticks_last - ticks;
        ticks = engine->ticks_last;
    }
    engine->ticks_last = ticks;
    return ticks;
}

int64_t pf_get_ticks(struct pf_engine *engine)
{
    int64_t ticks;

    pthread_mutex_lock(&engine->lock);
    ticks = ticks_at(engine, (int64_t)__rdtsc());
    pthread_mutex_unlock(&engine->lock);
    return ticks;
}

/* vCPU thread: RDTSC. */
int64_t pf_read_ticks(struct pf_engine *engine)
{
    int64_t ticks;

    if (!engine->watched)
        return pf_get_ticks(engine);
    engine->watched--;
    pf_hide_gap(engine);
    pthread_mutex_lock(&engine->lock);
    ticks = ticks_at(engine, engine->seen_tsc);
    pthread_mutex_unlock(&engine->lock);
    return ticks;
}

int pf_enable_ticks(struct pf_engine *engine)
{
    pthread_mutex_lock(&engine->lock);
    if (!engine->ticks_enabled) {
        engine->ticks_last = engine->ticks_offset;
        engine->ticks_offset -= (int64_t)__rdtsc();
        engine->ticks_enabled = 1;
    }
    pthread_mutex_unlock(&engine->lock);
    return 0;
}

int pf_disable_ticks(struct pf_engine *engine)
{
    pthread_mutex_lock(&engine->lock);
    engine->ticks_offset = ticks_at(engine, (int64_t)__rdtsc());
    engine->ticks_enabled = 0;
    pthread_mutex_unlock(&engine->lock);
    return 0;
}

int64_t pf_get_ticks_offset(struct pf_engine *engine)
{
    int64_t offset;

    pthread_mutex_lock(&engine->lock);
    offset = engine->ticks_offset;
    pthread_mutex_unlock(&engine->lock);
    return offset;
}

int pf_set_ticks_offset(struct pf_engine *engine, int64_t offset)
{
    pthread_mutex_lock(&engine->lock);
    engine->ticks_offset = offset;
    engine->ticks_last = INT64_MIN;
    pthread_mutex_unlock(&engine->lock);
    return 0;
}
