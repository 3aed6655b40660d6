/* Who waits for which page since when: latencies of requested pages, and the time that the vCPU is blocked. */
#include "page_pump.h"

/* A thread in the table waits for one page at most; a fault reported twice (a signal woke it) counts once. */
void pp_wait_begin(struct pp_destination *d, uint64_t address, uint32_t thread)
{
    for (uint32_t i = 0; i < d->in_flight; i++) {
        if (d->in_flight_page[i] == address && d->in_flight_thread[i] == thread)
            return;
    }
    if (d->in_flight == PP_IN_FLIGHT)
        return;
    d->in_flight_page[d->in_flight] = address;
    d->in_flight_thread[d->in_flight] = thread;
    d->in_flight_since[d->in_flight++] = pp_now_ns();
}

static void count(struct pp_destination *d, uint32_t thread, uint64_t took)
{
    int bucket = 0;

    for (uint64_t us = took / 1000; us > 1 && bucket < 23; us >>= 1)
        bucket++;
    d->latency_buckets[bucket]++;
    d->samples[d->latency_count++ % PP_SAMPLES] = took > UINT32_MAX ? UINT32_MAX : (uint32_t)took;
    d->latency_sum_ns += took;
    if (took > d->latency_max_ns)
        d->latency_max_ns = took;
    if (thread && thread == d->vcpu_thread) {
        d->vcpu_latency_count++;
        d->vcpu_latency_sum_ns += took;
        d->vcpu_blocked_ns += took;
    }
}

/* The page is placed and its waiters are awake. */
void pp_wait_end(struct pp_destination *d, uint64_t address)
{
    uint64_t now = pp_now_ns();

    for (uint32_t i = 0; i < d->in_flight;) {
        if (d->in_flight_page[i] != address) {
            i++;
            continue;
        }
        count(d, d->in_flight_thread[i], now - d->in_flight_since[i]);
        d->in_flight--;
        d->in_flight_page[i] = d->in_flight_page[d->in_flight];
        d->in_flight_thread[i] = d->in_flight_thread[d->in_flight];
        d->in_flight_since[i] = d->in_flight_since[d->in_flight];
    }
}
