/* XBZRLE: a page as its difference to what was sent before, and the source's cache of what was sent.
 *
 *     (uleb128 bytes that stay, uleb128 bytes that change, those bytes) ...   the bytes that stay at the end left out
 *
 * Rules
 * 1. A cached page is exactly what the destination has. So a page that goes into the cache is sent from a copy:
 *    the guest may write to it at any time, and what it writes is in the dirty log.
 * 2. The decoder writes nothing before the whole encoding is known to stay inside the page.
 *
 * Sources: QEMU docs/xbzrle.txt, 7.2 migration/xbzrle.c, page_cache.c; the Python twin is vmm/migration/xbzrle.py.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "page_pump.h"

#define LIFETIME 2 /* syncs for which a page in the cache is not replaced by another one (CACHED_PAGE_LIFETIME) */

static uint32_t put_uleb(uint8_t *out, uint32_t value)
{
    if (value < 0x80) {
        out[0] = (uint8_t)value;
        return 1;
    }
    out[0] = (uint8_t)(value | 0x80);
    out[1] = (uint8_t)(value >> 7);
    return 2;
}

static uint32_t equal_bytes(const uint8_t *a, const uint8_t *b, uint32_t from)
{
    uint32_t i = from;
    uint64_t x, y;

    for (; i + 8 <= PP_PAGE_SIZE; i += 8) {
        memcpy(&x, a + i, 8);
        memcpy(&y, b + i, 8);
        if (x != y)
            break;
    }
    while (i < PP_PAGE_SIZE && a[i] == b[i])
        i++;
    return i - from;
}

/* Bytes written to `out` (PP_PAGE_SIZE long), 0 = the pages are equal, -EMSGSIZE = as long as a page or longer. */
int pp_xbzrle_encode(const uint8_t *before, const uint8_t *now, uint8_t *out)
{
    uint32_t i = 0, used = 0;

    for (;;) {
        uint32_t same = equal_bytes(before, now, i), first, changed;

        i += same;
        if (i == PP_PAGE_SIZE)
            return (int)used;
        for (first = i; i < PP_PAGE_SIZE && before[i] != now[i]; i++)
            ;
        changed = i - first;
        if (used + 4 + changed >= PP_PAGE_SIZE)
            return -EMSGSIZE;
        used += put_uleb(out + used, same);
        used += put_uleb(out + used, changed);
        memcpy(out + used, now + first, changed);
        used += changed;
    }
}

static int take_uleb(const uint8_t *in, uint32_t length, uint32_t *at, uint32_t *value)
{
    if (*at >= length)
        return -EPROTO;
    *value = in[(*at)++];
    if (*value < 0x80)
        return 0;
    if (*at >= length || in[*at] >= 0x80)
        return -EPROTO;
    *value = (*value & 0x7f) | (uint32_t)in[(*at)++] << 7;
    return 0;
}

/* Over the old content in `page`, or only looked at if that is NULL. 0, or -EPROTO and nothing was written. */
static int walk(const uint8_t *in, uint32_t length, uint8_t *page)
{
    uint32_t at = 0, place = 0;

    while (at < length) {
        uint32_t same, changed, is_first = at == 0;

        if (take_uleb(in, length, &at, &same) || take_uleb(in, length, &at, &changed))
            return -EPROTO;
        if ((!same && !is_first) || !changed || place + same + changed > PP_PAGE_SIZE || changed > length - at)
            return -EPROTO;
        place += same;
        if (page)
            memcpy(page + place, in + at, changed);
        place += changed;
        at += changed;
    }
    return 0;
}

int pp_xbzrle_decode(const uint8_t *in, uint32_t length, uint8_t *page)
{
    int error = walk(in, length, NULL);

    return error ? error : walk(in, length, page);
}

/* ---- the source's cache: one place for a page, as in QEMU ---- */

int pp_xbzrle_init(struct pp_xbzrle *x, uint64_t cache_bytes)
{
    memset(x, 0, sizeof(*x));
    x->slots = cache_bytes / PP_PAGE_SIZE;
    x->keys = calloc(x->slots, sizeof(*x->keys));
    x->ages = calloc(x->slots, sizeof(*x->ages));
    x->scratch = malloc((size_t)PP_BATCH * PP_PAGE_SIZE);
    /* Not touched, not taken: what the guest never writes again costs nothing. */
    x->pages = mmap(NULL, x->slots * PP_PAGE_SIZE, PROT_READ | PROT_WRITE,
                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (x->pages == MAP_FAILED)
        x->pages = NULL;
    if (x->keys && x->ages && x->scratch && x->pages)
        return 0;
    pp_xbzrle_free(x);
    return -ENOMEM;
}

void pp_xbzrle_free(struct pp_xbzrle *x)
{
    free(x->keys);
    free(x->ages);
    free(x->scratch);
    if (x->pages)
        munmap(x->pages, x->slots * PP_PAGE_SIZE);
    memset(x, 0, sizeof(*x));
}

static uint64_t key_of(uint32_t block, uint64_t page)
{
    return ((uint64_t)block << 40 | page) + 1; /* 0 = nobody */
}

static uint64_t slot_of(const struct pp_xbzrle *x, uint64_t key)
{
    return (key + (key >> 40) * 0x9e3779b97f4a7c15ull) % x->slots;
}

void pp_xbzrle_zero(struct pp_xbzrle *x, uint32_t block, uint64_t page)
{
    uint64_t key = key_of(block, page), slot = slot_of(x, key);

    if (x->keys[slot] == key)
        memset(x->pages + slot * PP_PAGE_SIZE, 0, PP_PAGE_SIZE);
}

/* What goes out for a page: 0 = nothing, the destination has it; PP_PAGE_SIZE = *data as it is; less = *data is
 * an encoding. `place` is one of PP_BATCH; *data is valid until that is used again. */
uint32_t pp_xbzrle_page(struct pp_xbzrle *x, uint32_t block, uint64_t page, uint32_t place,
                        uint8_t **data)
{
    uint64_t key = key_of(block, page), slot = slot_of(x, key);
    uint8_t *cached = x->pages + slot * PP_PAGE_SIZE, *copy = x->scratch + (size_t)place * PP_PAGE_SIZE;
    uint8_t encoded[PP_PAGE_SIZE];
    int length;

    x->asked++;
    if (x->keys[slot] != key) {
        x->misses++;
        if (x->keys[slot] && x->ages[slot] + LIFETIME > x->age)
            return PP_PAGE_SIZE;
        x->keys[slot] = key;
        x->ages[slot] = x->age;
        memcpy(cached, *data, PP_PAGE_SIZE);
        memcpy(copy, cached, PP_PAGE_SIZE);
        *data = copy;
        return PP_PAGE_SIZE;
    }
    memcpy(copy, *data, PP_PAGE_SIZE);
    *data = copy;
    length = pp_xbzrle_encode(cached, copy, encoded);
    x->ages[slot] = x->age;
    if (length)
        memcpy(cached, copy, PP_PAGE_SIZE);
    if (length < 0) {
        x->overflows++;
        return PP_PAGE_SIZE;
    }
    memcpy(copy, encoded, (size_t)length);
    x->sent_pages++;
    x->sent_bytes += (uint64_t)length;
    return (uint32_t)length;
}
