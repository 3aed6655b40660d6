/* Words of a page bitmap. Nothing here takes a lock. */
#ifndef PAGEFERRY_UFFD_BITS_H
#define PAGEFERRY_UFFD_BITS_H

#include <stdint.h>

/* Set bits [first, first + count) and return how many of them were clear. Not atomic. */
static inline int64_t bits_set(uint64_t *words, uint64_t first, uint64_t count)
{
    int64_t fresh = 0;
    while (count > 0) {
        uint64_t shift = first % 64;
        uint64_t take = 64 - shift < count ? 64 - shift : count;
        uint64_t mask = (take == 64 ? ~UINT64_C(0) : (UINT64_C(1) << take) - 1) << shift;
        uint64_t *word = words + first / 64;
        fresh += __builtin_popcountll(mask & ~*word);
        *word |= mask;
        first += take;
        count -= take;
    }
    return fresh;
}

/* Set those bits of [first, first + count) that are set in `which`; how many of them were clear. */
static inline int64_t bits_set_masked(uint64_t *words, const uint64_t *which, uint64_t first, uint64_t count)
{
    int64_t fresh = 0;
    for (uint64_t bit = first; bit < first + count; bit++) {
        if (which[bit / 64] >> (bit % 64) & 1)
            fresh += bits_set(words, bit, 1);
    }
    return fresh;
}

#endif
