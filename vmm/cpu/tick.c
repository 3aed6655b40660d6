/*
 * The timer's interrupt: line 0 rises when channel 0 of the 8254 is due.
 *
 *   vCPU halted       it waits until then, and takes the tick itself (halt.c)
 *   vCPU not halted   `tick_fd` goes off; the thread in pf_serve_ticks() takes the tick, which kicks the vCPU
 *
 * So a guest that sleeps costs one wake-up of one thread a tick, and arming is a system call, not a wake-up.
 */
#include <errno.h>
#include <sys/timerfd.h>
#include <unistd.h>

#include "engine_private.h"

#define TIMER_IRQ 0
#define NEVER (-1)

static int64_t guest_ns(const struct pf_engine *engine, int64_t host_ns) /* lock held; offsets wrap around */
{
    return engine->clock_runs ? (int64_t)((uint64_t)engine->clock_offset + (uint64_t)(host_ns - engine->hidden_ns))
                              : engine->clock_offset;
}

int64_t pf_tick_at(const struct pf_engine *engine)
{
    int64_t at = engine->pit.channels[0].next_transition_time;

    if (!engine->has_pit || !engine->clock_runs || at == NEVER)
        return NEVER;
    at = (int64_t)((uint64_t)at - (uint64_t)engine->clock_offset + (uint64_t)engine->hidden_ns);
    return at > 0 ? at : 1;
}

void pf_arm_tick(struct pf_engine *engine)
{
    int64_t at = engine->waiting ? NEVER : pf_tick_at(engine);
    struct itimerspec when = {.it_value = {0, 0}};

    if (at == engine->tick_armed || engine->ticks_end) /* what tells of the end must stay armed */
        return;
    engine->tick_armed = at;
    if (at != NEVER) {
        when.it_value.tv_sec = at / 1000000000;
        when.it_value.tv_nsec = at % 1000000000;
    }
    timerfd_settime(engine->tick_fd, TFD_TIMER_ABSTIME, &when, NULL);
}

void pf_take_tick(struct pf_engine *engine)
{
    struct pf_pit_due due;

    if (!engine->has_pit || !engine->clock_runs ||
        !pf_pit_take(&engine->pit, guest_ns(engine, pf_now_ns()), &due))
        return;
    if (due.limit) {
        pf_owe_pulses(engine, TIMER_IRQ, due.count, due.limit);
        return;
    }
    pf_put_line(engine, TIMER_IRQ, 0); /* a peer may have left it high */
    pf_put_line(engine, TIMER_IRQ, 1);
    if (!due.stays_high)
        pf_put_line(engine, TIMER_IRQ, 0); /* the controller has kept the edge */
}

int pf_serve_ticks(struct pf_engine *engine)
{
    uint64_t times;
    int ends = 0;

    while (!ends) {
        if (read(engine->tick_fd, &times, sizeof times) < 0 && errno != EINTR)
            return -errno;
        pthread_mutex_lock(&engine->lock);
        ends = engine->ticks_end;
        engine->tick_armed = NEVER;
        if (!engine->waiting)
            pf_take_tick(engine);
        if (!ends)
            pf_arm_tick(engine);
        pthread_mutex_unlock(&engine->lock);
    }
    return 0;
}

int pf_end_ticks(struct pf_engine *engine)
{
    struct itimerspec at_once = {.it_value = {.tv_nsec = 1}};

    pthread_mutex_lock(&engine->lock);
    engine->ticks_end = 1;
    timerfd_settime(engine->tick_fd, TFD_TIMER_ABSTIME, &at_once, NULL);
    pthread_mutex_unlock(&engine->lock);
    return 0;
}

/* ---- the timer's registers ---- */

int pf_enable_pit(struct pf_engine *engine)
{
    if (engine->sealed)
        return -EBUSY;
    engine->has_pit = 1;
    return 0;
}

int pf_get_pit(struct pf_engine *engine, struct pf_pit *pit)
{
    pthread_mutex_lock(&engine->lock);
    *pit = engine->pit;
    pthread_mutex_unlock(&engine->lock);
    return 0;
}

int pf_set_pit(struct pf_engine *engine, const struct pf_pit *pit)
{
    pthread_mutex_lock(&engine->lock);
    engine->pit = *pit;
    engine->owed[TIMER_IRQ] = 0;
    pf_arm_tick(engine);
    pthread_mutex_unlock(&engine->lock);
    return 0;
}

int pf_set_clock(struct pf_engine *engine, int64_t offset, int runs)
{
    pthread_mutex_lock(&engine->lock);
    engine->clock_offset = offset;
    engine->clock_runs = runs;
    __atomic_add_fetch(&engine->clock_turns, 1, __ATOMIC_RELEASE);
    if (engine->waiting)
        pthread_cond_broadcast(&engine->changed); /* it waits for another instant now */
    else
        pf_arm_tick(engine);
    pthread_mutex_unlock(&engine->lock);
    return 0;
}

uint8_t pf_pit_port_read(struct pf_engine *engine, uint32_t port)
{
    uint8_t value;

    pf_hide_gap(engine);
    engine->watched = WATCHED_READS;
    pthread_mutex_lock(&engine->lock);
    value = pf_pit_read(&engine->pit, port, guest_ns(engine, engine->seen_ns));
    pthread_mutex_unlock(&engine->lock);
    return value;
}

void pf_pit_port_write(struct pf_engine *engine, uint32_t port, uint8_t value)
{
    pthread_mutex_lock(&engine->lock);
    if (pf_pit_write(&engine->pit, port, value, guest_ns(engine, pf_now_ns()))) {
        engine->owed[TIMER_IRQ] = 0;
        pf_put_line(engine, TIMER_IRQ, 0);
        pf_arm_tick(engine);
    }
    pthread_mutex_unlock(&engine->lock);
}
