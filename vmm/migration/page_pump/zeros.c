/* Runs of zero pages at the source: how far one goes, and its records.
 *
 * Guests leave gigabytes of zeroes, written or never touched. A page that was never touched is known from the page
 * table; one that exists must be read, and then the memory bus is the limit, which one core does not fill. So
 * where some pages in a row were zeroes, two threads look at the next ones, farther each time:
 *
 *     pages    | 0 0 0 0 0 0 0 0 | 0 0 0 0 0 0 0 0 | 0 0 0 1 0 1 1 0 | ...
 *     chunks     taken by whoever comes first         ^ the run ends here; nobody takes chunks behind it
 *
 * What was found holds while the dirty bitmap is not synced: a page that is written to after it was looked at is in
 * the dirty log, and will be sent again. So a run is never kept beyond the call that found it.
 */
#include "page_pump.h"

enum {
    CHUNK = 128,           /* pages; 512 KiB take some 17 us: so long does one thread wait for the other at most */
    CHUNKS = 64,           /* looked at in one go: 32 MiB */
    FIRST_LOOK = CHUNK,
    SHARED = 8 * CHUNK,    /* from here on a second thread is worth to be woken for */
    RECORD = 8 + 1,
};

struct look {
    const struct pp_block *block;
    uint64_t first, end;   /* pages */
    uint32_t next, chunks;
    uint32_t zero[CHUNKS]; /* how many pages of each chunk come before the first that must be sent whole */
};

static int is_zero(const struct pp_block *b, uint64_t page)
{
    return !pp_test(b->dirty, page) || !pp_test(b->populated, page) || pp_is_zero_page(b->host + page * PP_PAGE_SIZE);
}

static void look_at_chunks(void *argument)
{
    struct look *look = argument;
    uint32_t i;

    while ((i = __atomic_fetch_add(&look->next, 1, __ATOMIC_RELAXED)) < look->chunks) {
        uint64_t first = look->first + (uint64_t)i * CHUNK, page = first;
        uint64_t end = first + CHUNK < look->end ? first + CHUNK : look->end;

        while (page < end && is_zero(look->block, page))
            page++;
        look->zero[i] = (uint32_t)(page - first);
        if (page < end)
            __atomic_store_n(&look->next, CHUNKS, __ATOMIC_RELAXED);
    }
}

/* The first page from `page` on that must be read: those that are not dirty, or never existed, go by. */
static uint64_t pass_over(const struct pp_block *b, uint64_t page)
{
    uint64_t before = ~0ull << page % 64;

    for (uint64_t i = page / 64; i * 64 < b->pages; i++, before = ~0ull) {
        uint64_t word = b->dirty[i] & b->populated[i] & before;

        if (word)
            return i * 64 + (uint64_t)__builtin_ctzll(word);
    }
    return b->pages;
}

/* The page that ends the run of zero pages from `page` on, as far as it is worth to look now: of those that must be
 * read `most` at most. Pages that are not dirty do not count. */
uint64_t pp_zero_run(struct pp_source *s, const struct pp_block *b, uint64_t page, uint64_t most)
{
    uint64_t passed = pass_over(b, page), pages = s->zero_look < FIRST_LOOK ? FIRST_LOOK : s->zero_look;
    struct look look = {.block = b, .first = page};
    int shared;

    if (passed > page)
        return passed;
    pages = pages < most ? pages : most;
    look.end = page + (pages < b->pages - page ? pages : b->pages - page);
    look.chunks = (uint32_t)((look.end - page + CHUNK - 1) / CHUNK);
    shared = look.end - page >= SHARED && pp_helper_begin(&s->helper, "mig/zero", look_at_chunks, &look);
    look_at_chunks(&look);
    if (shared)
        pp_helper_wait(s->helper);
    for (uint32_t i = 0; i < look.chunks && page < look.end; i++) {
        uint64_t whole = page + CHUNK < look.end ? CHUNK : look.end - page;

        page += look.zero[i];
        if (look.zero[i] < whole)
            break;
    }
    s->zero_look = page < look.end ? FIRST_LOOK : 2 * pages < CHUNKS * CHUNK ? 2 * pages : CHUNKS * CHUNK;
    return page;
}

/* ZERO records of the dirty ones among the pages from `page` to `end`, all of the block under way, up to `most`, into
 * `out`. Returns the page it has come to; `*count` = how many records. */
uint64_t pp_zero_records(struct pp_source *s, struct pp_block *b, uint64_t page, uint64_t end, uint64_t most,
                         uint8_t *out, uint64_t *count)
{
    *count = 0;
    while (page < end) {
        uint64_t bit = page % 64, base = page - bit, mask = ~0ull << bit, claimed;

        if (end - base < 64)
            mask &= (1ull << (end - base)) - 1;
        if (*count + (uint64_t)__builtin_popcountll(b->dirty[base / 64] & mask) > most)
            return page;
        /* Atomically: over the second channel somebody else may be taking pages. */
        claimed = __atomic_fetch_and(&b->dirty[base / 64], ~mask, __ATOMIC_SEQ_CST) & mask;
        s->resent_pages += (uint64_t)__builtin_popcountll(claimed & b->sent[base / 64]);
        b->sent[base / 64] |= claimed;
        *count += (uint64_t)__builtin_popcountll(claimed);
        for (; claimed; claimed &= claimed - 1, out += RECORD) {
            pp_put64(out, (base + (uint64_t)__builtin_ctzll(claimed)) * PP_PAGE_SIZE | RAM_CONTINUE | RAM_ZERO);
            out[8] = 0;
        }
        page = base + 64;
    }
    return end;
}
