/*
 * The log of guest stores, for the migration: which pages were stored to since it was last collected.
 *
 * What keeps it exact is one invariant: while logging, a TLB entry that lets stores pass unseen belongs to a
 * page that is in the log. memory.c sees to it for each new entry and each logged store; here, where pages are
 * taken out of the log, all entries are armed again in the same safe point. No store is half done at one, so
 * none can lie between the look at its entry and the bytes.
 *
 *   vCPU               slow store: bit in `log`, log_used = 1, then the bytes
 *   collect, 1st part  nothing was logged: nothing to do, the vCPU runs on and is not asked
 *   2nd, safe point    swap `log` with the empty `taken`, arm all TLB entries
 *   3rd                the vCPU runs on; `taken` goes into the caller's bitmaps and is empty again
 *
 * A store that comes while the 1st part looks has its bit before its bytes, so what the caller reads of that
 * page afterwards, old or new, is read again after the next collection.
 */
#include <errno.h>
#include <stdlib.h>

#include "engine_private.h"

#define WORD_BITS 64

static uint64_t words_of(const struct pf_ram *ram)
{
    return ((ram->length >> PAGE_SHIFT) + WORD_BITS - 1) / WORD_BITS;
}

static void free_logs(struct pf_engine *engine)
{
    for (uint32_t i = 0; i < engine->ram_count; i++) {
        free(engine->ram[i].log);
        free(engine->ram[i].taken);
        engine->ram[i].log = engine->ram[i].taken = NULL;
    }
}

static void arm_all_entries(struct pf_engine *engine)
{
    tlb_reset_dirty_x86_64(engine->cpu, 0, UINT64_MAX);
}

static int64_t start_log_work(struct pf_engine *engine, void *unused)
{
    (void)unused;
    if (engine->logging)
        return -EALREADY;
    for (uint32_t i = 0; i < engine->ram_count; i++) {
        struct pf_ram *ram = &engine->ram[i];
        ram->log = calloc(words_of(ram), sizeof *ram->log);
        ram->taken = calloc(words_of(ram), sizeof *ram->taken);
        if (!ram->log || !ram->taken) {
            free_logs(engine);
            return -ENOMEM;
        }
    }
    engine->log_used = 0;
    engine->logging = 1;
    arm_all_entries(engine);
    return 0;
}

int pf_start_log(struct pf_engine *engine, int64_t timeout_ns)
{
    return (int)pf_at_safe_point(engine, start_log_work, NULL, timeout_ns);
}

static int64_t stop_log_work(struct pf_engine *engine, void *unused)
{
    (void)unused;
    engine->logging = 0;
    free_logs(engine);
    return 0;
}

int pf_stop_log(struct pf_engine *engine, int64_t timeout_ns)
{
    return (int)pf_at_safe_point(engine, stop_log_work, NULL, timeout_ns);
}

static int64_t take_log_work(struct pf_engine *engine, void *unused)
{
    (void)unused;
    for (uint32_t i = 0; i < engine->ram_count; i++) {
        uint64_t *empty = engine->ram[i].taken;
        engine->ram[i].taken = engine->ram[i].log;
        engine->ram[i].log = empty;
    }
    __atomic_store_n(&engine->log_used, 0, __ATOMIC_RELAXED);
    arm_all_entries(engine);
    return 0;
}

static int count_bits(uint64_t word)
{
    return word == UINT64_MAX ? WORD_BITS : __builtin_popcountll(word); /* that is a call without -mpopcnt */
}

/* ORs the bits into the caller's bitmap; how many are new there. */
static int64_t move_bits(uint64_t *from, uint64_t words, uint64_t *to, uint64_t first_bit)
{
    unsigned shift = first_bit % WORD_BITS;
    int64_t added = 0;

    to += first_bit / WORD_BITS;
    for (uint64_t i = 0; i < words; i++) {
        uint64_t low = from[i] << shift, high = shift ? from[i] >> (WORD_BITS - shift) : 0;

        if (!from[i])
            continue;
        from[i] = 0;
        added += count_bits(low & ~to[i]);
        to[i] |= low;
        if (high) {
            added += count_bits(high & ~to[i + 1]);
            to[i + 1] |= high;
        }
    }
    return added;
}

/* Every range must have its bitmap: what is taken out of the log must go somewhere. */
static int fits(const struct pf_engine *engine, const struct pf_log_target *targets, uint32_t count)
{
    if (count != engine->ram_count)
        return 0;
    for (uint32_t i = 0; i < count; i++)
        if (targets[i].guest != engine->ram[i].guest || (targets[i].bitmap & 7) ||
            targets[i].pages != engine->ram[i].length >> PAGE_SHIFT)
            return 0;
    return 1;
}

int64_t pf_collect_log(struct pf_engine *engine, const struct pf_log_target *targets, uint32_t count,
                       int64_t timeout_ns)
{
    int64_t added = 0, result;

    if (!engine->logging)
        return -ENOENT;
    if (!fits(engine, targets, count))
        return -EINVAL;
    if (!__atomic_load_n(&engine->log_used, __ATOMIC_SEQ_CST))
        return 0;
    result = pf_at_safe_point(engine, take_log_work, NULL, timeout_ns);
    if (result < 0)
        return result;
    for (uint32_t i = 0; i < count; i++)
        added += move_bits(engine->ram[i].taken, words_of(&engine->ram[i]),
                           (uint64_t *)(uintptr_t)targets[i].bitmap, targets[i].first_bit);
    return added;
}
