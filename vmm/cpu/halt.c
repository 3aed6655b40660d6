/*
 * A halted vCPU waits here, inside of the run, for an interrupt that may end the halt.
 *
 * It waits for `changed`, which gives up `lock`: so it counts as being in a handler, where others do work for
 * which they need a safe point by themselves. Who raises an interrupt or wants a stop does so under `lock`
 * and tells `changed`: nothing is lost between the look and the wait.
 */
#include <time.h>

#include "engine_private.h"

static int is_wakeable(const struct pf_engine *engine)
{
    return !engine->halted || pf_deliverable(engine);
}

static void wait_for_change(struct pf_engine *engine)
{
    int64_t until = pf_tick_at(engine);
    struct timespec at = {.tv_sec = until / 1000000000, .tv_nsec = until % 1000000000};

    if (until < 0)
        pthread_cond_wait(&engine->changed, &engine->lock);
    else
        pthread_cond_timedwait(&engine->changed, &engine->lock, &at);
}

int pf_pass_halt(struct pf_engine *engine)
{
    int result = -1;

    if (is_wakeable(engine))
        return -1;
    if (!engine->waits)
        return PF_HALTED;
    pf_enter_handler(engine);
    pthread_mutex_lock(&engine->lock);
    engine->waiting = 1;
    engine->watched = 0; /* who halts measures nothing */
    pf_arm_tick(engine); /* it takes the ticks itself */
    while (result < 0) {
        pf_take_tick(engine);
        if (engine->stop)
            result = PF_STOPPED;
        else if (is_wakeable(engine))
            break;
        else
            wait_for_change(engine);
    }
    engine->waiting = 0;
    pf_arm_tick(engine);
    engine->in_handler = 0;
    pthread_mutex_unlock(&engine->lock);
    return result;
}
