/* The dirty log made of write-protect faults: a bit a page, and the loop that answers the faults.
 *
 * `lock` covers "set the bit and let the page be written" on one side, "take the bits and protect
 * the pages" on the other. Without it a write is lost like this:
 *
 *   1. protect_log_run      sets the bit of page P, whose writer waits
 *   2. protect_log_collect  takes the bit, protects P (it still is)
 *   3. protect_log_run      lets P be written; from now on nobody sees the writes to P
 *
 * Taken bits need no more than this: a write between "take" and "protect" is in the bytes that the
 * caller reads after protect_log_collect has returned, and a write after "protect" faults again.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

#include "bits.h"
#include "kernel.h"

#include "api.h"

enum { PAGE_SHIFT = 12, CHUNK_WORDS = 64, FAULTS_PER_READ = 64 };

/* After an answer the next fault is usually near. To look out for it this long before going to sleep
 * spares the wake-up of this thread: 18 us a write instead of 35 to 70, measured on two cores. */
enum { SPIN_NS = 30 * 1000 };

struct range {
    uint64_t start;
    uint64_t pages;
    uint64_t *written; /* under the lock */
};

struct protect_log {
    pthread_mutex_t lock;
    int userfaultfd;
    int cancel;
    uint64_t faults; /* atomic */
    uint64_t capacity;
    uint64_t count;
    struct range ranges[];
};

/* NULL if memory is short. The descriptors stay the caller's and must outlive protect_log_run. */
struct protect_log *protect_log_new(int userfaultfd, int cancel_eventfd, uint64_t ranges)
{
    struct protect_log *log = calloc(1, sizeof *log + ranges * sizeof log->ranges[0]);
    if (log == NULL)
        return NULL;
    pthread_mutex_init(&log->lock, NULL);
    log->userfaultfd = userfaultfd;
    log->cancel = cancel_eventfd;
    log->capacity = ranges;
    return log;
}

/* Before protect_log_run; returns the number that protect_log_collect knows the range by. */
int protect_log_add(struct protect_log *log, uint64_t start, uint64_t pages)
{
    if (log->count == log->capacity)
        return -ENOSPC;
    struct range *range = &log->ranges[log->count];
    range->written = calloc((pages + 63) / 64, sizeof *range->written);
    if (range->written == NULL)
        return -ENOMEM;
    range->start = start;
    range->pages = pages;
    return (int)log->count++;
}

static int answer(struct protect_log *log, const struct uffd_fault *fault)
{
    uint64_t address = fault->address & ~((UINT64_C(1) << PAGE_SHIFT) - 1);
    struct range *range = NULL;
    for (uint64_t i = 0; i < log->count && range == NULL; i++) {
        uint64_t page = (address - log->ranges[i].start) >> PAGE_SHIFT;
        if (address >= log->ranges[i].start && page < log->ranges[i].pages)
            range = &log->ranges[i];
    }
    if (fault->event != UFFD_EVENT_PAGEFAULT || !(fault->flags & UFFD_PAGEFAULT_FLAG_WP) || range == NULL)
        return -EPROTO;
    pthread_mutex_lock(&log->lock);
    bits_set(range->written, (address - range->start) >> PAGE_SHIFT, 1);
    __atomic_fetch_add(&log->faults, 1, __ATOMIC_RELAXED); /* before its writer can go on and ask */
    int error = uffd_writeprotect(log->userfaultfd, address, UINT64_C(1) << PAGE_SHIFT, 0);
    pthread_mutex_unlock(&log->lock);
    if (error == -ENOENT) /* unregistered while the message was on its way; its writer may still sleep */
        return uffd_wake(log->userfaultfd, address, UINT64_C(1) << PAGE_SHIFT);
    return error;
}

/* Answer the faults that wait; returns how many there were. */
static int answer_waiting(struct protect_log *log)
{
    struct uffd_fault faults[FAULTS_PER_READ];
    int count = uffd_read_faults(log->userfaultfd, faults, FAULTS_PER_READ);
    for (int i = 0; i < count; i++) {
        int error = answer(log, &faults[i]);
        if (error < 0)
            return error;
    }
    return count;
}

static int64_t now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * INT64_C(1000000000) + now.tv_nsec;
}

/* Answer write-protect faults until the cancel eventfd is readable. */
int protect_log_run(struct protect_log *log)
{
    struct pollfd wait[2] = {{log->userfaultfd, POLLIN, 0}, {log->cancel, POLLIN, 0}};
    for (;;) {
        if (poll(wait, 2, -1) < 0) {
            if (errno == EINTR)
                continue;
            return -errno;
        }
        if (wait[0].revents & (POLLERR | POLLHUP | POLLNVAL))
            return -EBADF;
        int count = answer_waiting(log);
        if (count < 0)
            return count;
        if (count == 0 && (wait[1].revents & POLLIN))
            return 0;
        for (int64_t end = now_ns() + SPIN_NS; count > 0 || now_ns() < end;) {
            if (count > 0)
                end = now_ns() + SPIN_NS;
            count = answer_waiting(log);
            if (count < 0)
                return count;
        }
    }
}

/* Protect each run of set bits in `words`, which are the pages from `address` on. */
static int protect_runs(int fd, const uint64_t *words, uint64_t count, uint64_t address)
{
    uint64_t page = 0;
    while (page < count * 64) {
        if (words[page / 64] >> (page % 64) == 0) {
            page = (page / 64 + 1) * 64;
            continue;
        }
        page += (uint64_t)__builtin_ctzll(words[page / 64] >> (page % 64));
        uint64_t end = page;
        while (end < count * 64 && (words[end / 64] >> (end % 64) & 1))
            end++;
        int error = uffd_writeprotect(fd, address + (page << PAGE_SHIFT), (end - page) << PAGE_SHIFT,
                                      UFFDIO_WRITEPROTECT_MODE_WP);
        if (error < 0)
            return error;
        page = end;
    }
    return 0;
}

/* Move the pages written since the last time into the bitmap and protect them again; returns how many
 * bits are new there. The lock is held for 16 MiB of pages at a time. */
int64_t protect_log_collect(struct protect_log *log, uint64_t index, uint64_t bitmap)
{
    if (index >= log->count)
        return -EINVAL;
    struct range *range = &log->ranges[index];
    uint64_t total = (range->pages + 63) / 64;
    uint64_t *target = (uint64_t *)(uintptr_t)bitmap;
    int64_t fresh = 0;
    for (uint64_t first = 0; first < total; first += CHUNK_WORDS) {
        uint64_t taken[CHUNK_WORDS];
        uint64_t count = total - first < CHUNK_WORDS ? total - first : CHUNK_WORDS;
        uint64_t any = 0;
        pthread_mutex_lock(&log->lock);
        for (uint64_t i = 0; i < count; i++) {
            any |= taken[i] = range->written[first + i];
            range->written[first + i] = 0;
        }
        int error = 0;
        if (any)
            error = protect_runs(log->userfaultfd, taken, count, range->start + (first * 64 << PAGE_SHIFT));
        pthread_mutex_unlock(&log->lock);
        for (uint64_t i = 0; i < count; i++) {
            fresh += __builtin_popcountll(taken[i] & ~target[first + i]);
            target[first + i] |= taken[i];
        }
        if (error < 0)
            return error;
    }
    return fresh;
}

uint64_t protect_log_faults(struct protect_log *log)
{
    return __atomic_load_n(&log->faults, __ATOMIC_RELAXED);
}

/* After protect_log_run has returned. */
void protect_log_free(struct protect_log *log)
{
    for (uint64_t i = 0; i < log->count; i++)
        free(log->ranges[i].written);
    pthread_mutex_destroy(&log->lock);
    free(log);
}
