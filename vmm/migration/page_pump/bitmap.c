/* Bitmaps of pages and the test for a zero page. */
#include "page_pump.h"

static void fill_range(uint64_t *map, uint64_t first, uint64_t count, int value)
{
    while (count > 0) {
        uint64_t bit = first % 64, n = 64 - bit < count ? 64 - bit : count;
        uint64_t mask = (n == 64 ? ~0ull : (1ull << n) - 1) << bit;

        if (value)
            map[first / 64] |= mask;
        else
            map[first / 64] &= ~mask;
        first += n;
        count -= n;
    }
}

void pp_bitmap_set_range(uint64_t *map, uint64_t first, uint64_t count) { fill_range(map, first, count, 1); }
void pp_bitmap_clear_range(uint64_t *map, uint64_t first, uint64_t count) { fill_range(map, first, count, 0); }

/* Bits beyond `pages` in the last word are never set (every writer of a map keeps to it). */
uint64_t pp_bitmap_count(const uint64_t *map, uint64_t pages)
{
    uint64_t total = 0;

    for (uint64_t i = 0; i < (pages + 63) / 64; i++)
        total += (uint64_t)__builtin_popcountll(map[i]);
    return total;
}

static uint64_t count_range(const uint64_t *map, uint64_t first, uint64_t count)
{
    uint64_t total = 0, end = first + count;

    for (; first < end && first % 64; first++)
        total += (uint64_t)pp_test(map, first);
    for (; first + 64 <= end; first += 64)
        total += (uint64_t)__builtin_popcountll(map[first / 64]);
    for (; first < end; first++)
        total += (uint64_t)pp_test(map, first);
    return total;
}

void pp_bitmap_count_stretches(const uint64_t *map, uint64_t pages, uint64_t step, uint64_t *counts)
{
    for (uint64_t first = 0; first < pages; first += step)
        *counts++ = count_range(map, first, step < pages - first ? step : pages - first);
}

uint64_t pp_bitmap_find(const uint64_t *map, uint64_t pages, uint64_t from, int value)
{
    uint64_t flip = value ? 0 : ~0ull;

    for (uint64_t i = from / 64; i * 64 < pages; i++) {
        uint64_t word = map[i] ^ flip;

        if (i == from / 64)
            word &= ~0ull << (from % 64);
        if (word) {
            uint64_t found = i * 64 + (uint64_t)__builtin_ctzll(word);
            return found < pages ? found : pages;
        }
    }
    return pages;
}

void pp_bitmap_combine(uint64_t *into, const uint64_t *other, uint64_t pages, int operation)
{
    uint64_t words = (pages + 63) / 64;

    for (uint64_t i = 0; i < words; i++) {
        switch (operation) {
        case PP_OR: into[i] |= other[i]; break;
        case PP_AND: into[i] &= other[i]; break;
        case PP_ANDNOT: into[i] &= ~other[i]; break;
        case PP_ORNOT: into[i] |= ~other[i]; break;
        }
    }
    if (operation == PP_ORNOT && pages % 64)
        into[words - 1] &= (1ull << (pages % 64)) - 1;
}

void pp_bitmap_pour(uint64_t *from, uint64_t *into, uint64_t *also, uint64_t pages)
{
    for (uint64_t i = 0, words = (pages + 63) / 64; i < words; i++) {
        if (!from[i])
            continue;
        into[i] |= from[i];
        also[i] |= from[i];
        from[i] = 0;
    }
}

typedef uint64_t vector __attribute__((vector_size(32)));

#define ALL_ZERO(page)                                                                                    \
    for (const vector *v = (const vector *)(page), *end = v + PP_PAGE_SIZE / sizeof(*v); v < end; v += 8) { \
        vector any = v[0] | v[1] | v[2] | v[3] | v[4] | v[5] | v[6] | v[7];                               \
                                                                                                          \
        if (any[0] | any[1] | any[2] | any[3])                                                            \
            return 0;                                                                                     \
    }                                                                                                     \
    return 1

static int all_zero(const uint8_t *page) { ALL_ZERO(page); }

#ifdef __x86_64__
__attribute__((target("avx2"))) static int all_zero_avx2(const uint8_t *page) { ALL_ZERO(page); }
#endif

int pp_is_zero_page(const uint8_t *page)
{
    const uint64_t *words = (const uint64_t *)page;

    /* Most pages that are not zero show it in the first, the middle or the last word. */
    if (words[0] || words[255] || words[511])
        return 0;
#ifdef __x86_64__
    if (__builtin_cpu_supports("avx2"))
        return all_zero_avx2(page);
#endif
    return all_zero(page);
}
