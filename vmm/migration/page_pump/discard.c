/* The source's discards: before postcopy, what the destination has and must not keep. */
#include <string.h>

#include "page_pump.h"

static int put_discard(struct pp_source *s, const char *name, const uint8_t *ranges, uint32_t count)
{
    size_t n = strlen(name), payload = 3 + n + 16 * count;
    uint8_t head[5 + 3 + PP_NAME];
    int error;

    head[0] = RECORD_COMMAND;
    pp_put16(head + 1, COMMAND_DISCARD);
    pp_put16(head + 3, (uint16_t)payload);
    head[5] = 0;
    head[6] = (uint8_t)n;
    memcpy(head + 7, name, n);
    head[7 + n] = 0;
    error = pp_writer_put(s->writer, head, 8 + n);
    return error ? error : pp_writer_put(s->writer, ranges, 16ull * count);
}

/* Discard commands for every page set in `stale`. Returns the number of pages. */
int64_t pp_source_discard(struct pp_source *s, uint32_t block, const uint64_t *stale)
{
    struct pp_block *b = &s->blocks[block];
    uint8_t ranges[16 * DISCARD_RANGES];
    uint32_t count = 0;
    int64_t total = 0;
    int error = 0;

    for (uint64_t first = pp_bitmap_find(stale, b->pages, 0, 1), end; first < b->pages && !error;
         first = pp_bitmap_find(stale, b->pages, end, 1)) {
        end = pp_bitmap_find(stale, b->pages, first, 0);
        pp_put64(ranges + 16 * count, first * PP_PAGE_SIZE);
        pp_put64(ranges + 16 * count + 8, (end - first) * PP_PAGE_SIZE);
        total += (int64_t)(end - first);
        if (++count == DISCARD_RANGES) {
            error = put_discard(s, b->name, ranges, count);
            count = 0;
        }
    }
    if (count && !error)
        error = put_discard(s, b->name, ranges, count);
    return error ? error : total;
}
