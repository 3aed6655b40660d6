/* The destination's side before LISTEN: page records into plain memory, where nothing can be missing. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>

#include "destination.h"

enum {
    RUN = 16,            /* pages in a row before the next ones are read ahead, and how many at first; arbitrary */
    ZERO_RECORD = 8 + 1, /* bytes */
};

/* A page record's header at buffer[head + at ...]; `*length` = its bytes with the name. Returns 0, -EAGAIN if
 * the buffer ends too early, or -EPROTO. `also`: a kind that is taken beside PAGE and ZERO; RAM_CHECKSUM in it: every
 * page must have that flag, else none may. `*block` is the last block on entry and the record's on return. */
int64_t pp_page_header(struct pp_reader *r, uint32_t at, uint32_t *length, int32_t *block,
                       struct pp_block *blocks, uint32_t block_count, uint64_t *offset, uint32_t *flags,
                       struct pp_fault *fault, uint32_t also)
{
    const uint8_t *p = r->buffer + r->head + at;
    uint32_t have = r->tail - r->head - at;
    uint64_t word, where = r->offset + at;
    uint32_t kind;

    if (have < 8)
        return -EAGAIN;
    word = pp_be64(p);
    *flags = word & (PP_PAGE_SIZE - 1);
    *offset = word & ~(uint64_t)(PP_PAGE_SIZE - 1);
    *length = 8;
    if (word == RAM_EOS)
        return 0;
    kind = *flags & ~(uint32_t)(RAM_CONTINUE | RAM_CHECKSUM);
    if ((*flags ^ also) & RAM_CHECKSUM ||
        (kind != RAM_PAGE && kind != RAM_ZERO && (!kind || kind != (also & ~(uint32_t)RAM_CHECKSUM))))
        return pp_bad(fault, PP_BAD_FLAGS, *flags, where);
    if (!(*flags & RAM_CONTINUE)) {
        if (have < 9 || have < 9u + p[8])
            return -EAGAIN;
        *length = 9u + p[8];
        *block = -1;
        for (uint32_t i = 0; i < block_count && *block < 0; i++) {
            if (strlen(blocks[i].name) == p[8] && !memcmp(blocks[i].name, p + 9, p[8]))
                *block = (int32_t)i;
        }
        if (*block < 0) {
            memcpy(fault->name, p + 9, p[8]);
            fault->name[p[8]] = 0;
            return pp_bad(fault, PP_BAD_BLOCK, 0, where);
        }
    }
    if (*block < 0)
        return pp_bad(fault, PP_BAD_NO_BLOCK, 0, where);
    if (*offset / PP_PAGE_SIZE >= blocks[*block].pages)
        return pp_bad(fault, PP_BAD_OFFSET, *offset, where);
    *flags = kind;
    return 0;
}

static void load_zero(struct pp_block *b, uint64_t page, uint8_t fill)
{
    if (!pp_test(b->received, page) && !fill)
        pp_set(b->zero, page);  /* never touched: the kernel's zero page already says it */
    else if (fill || !pp_test(b->zero, page))
        memset(b->host + page * PP_PAGE_SIZE, fill, PP_PAGE_SIZE);
    if (fill)
        pp_clear(b->zero, page);
    pp_set(b->received, page);
}

/* ZERO records of the block under way that stand in the buffer whole: mostly there are thousands in a row. */
static void load_zeros(struct pp_destination *d)
{
    struct pp_block *b = &d->blocks[d->last_block];
    struct pp_reader *r = d->reader;
    uint32_t at = r->head;

    for (; r->tail - at >= ZERO_RECORD; at += ZERO_RECORD) {
        uint64_t word = pp_be64(r->buffer + at), page = word / PP_PAGE_SIZE;

        if (word % PP_PAGE_SIZE != (RAM_ZERO | RAM_CONTINUE) || r->buffer[at + 8] || page >= b->pages)
            break; /* something else, and the parser's turn */
        load_zero(b, page, 0);
        d->zero_pages++;
    }
    consume(r, at - r->head);
}

/* The record's bytes behind the header: 3 and an encoding that ends inside the page it is laid over. */
static int load_xbzrle(struct pp_destination *d, struct pp_block *b, uint64_t page, uint32_t at, uint32_t *length)
{
    struct pp_reader *r = d->reader;
    uint8_t copy[PP_PAGE_SIZE], *place = b->host + page * PP_PAGE_SIZE, *into = d->checks ? copy : place;
    int error = pp_reader_need(r, at + XBZRLE_HEAD);
    const uint8_t *p = r->buffer + r->head + at;

    if (error)
        return error;
    *length = XBZRLE_HEAD + pp_be16(p + 1);
    if (p[0] != XBZRLE_ENCODING || pp_be16(p + 1) > PP_PAGE_SIZE)
        return pp_bad(&d->fault, PP_BAD_ENCODING, page * PP_PAGE_SIZE, r->offset + at);
    if (!pp_test(b->received, page))
        return pp_bad(&d->fault, PP_BAD_NO_PAGE, page * PP_PAGE_SIZE, r->offset);
    error = pp_reader_need(r, at + *length + (d->checks ? PP_CHECKSUM : 0));
    if (error)
        return error;
    p = r->buffer + r->head + at;
    if (d->checks)
        memcpy(copy, place, PP_PAGE_SIZE);
    if (pp_xbzrle_decode(p + XBZRLE_HEAD, *length - XBZRLE_HEAD, into))
        return pp_bad(&d->fault, PP_BAD_ENCODING, page * PP_PAGE_SIZE, r->offset + at);
    if (d->checks) {
        error = pp_verify(d, b, page * PP_PAGE_SIZE, RAM_XBZRLE, copy, PP_PAGE_SIZE, p + *length, r->offset);
        if (error)
            return error;
        memcpy(place, copy, PP_PAGE_SIZE);
    }
    pp_clear(b->zero, page);
    d->normal_pages++;
    return 0;
}

/* The next pages of a run, straight into guest RAM: only pages that have not been received, and the one after the
 * last good header is missing again if bytes of something else went there. 1 = look again, 0 = the parser's turn. */
static int load_ahead(struct pp_destination *d)
{
    struct pp_block *b = &d->blocks[d->last_block];
    struct pp_reader *r = d->reader;
    struct pp_ahead a = {.first = d->run_next, .wait = 1, .to = b->host + d->run_next * PP_PAGE_SIZE};
    uint64_t end;
    int pages, error = 0;

    d->window = d->window < PP_AHEAD ? d->window : PP_AHEAD;
    d->window = d->window < r->size / (8 + PP_PAGE_SIZE) ? d->window : r->size / (8 + PP_PAGE_SIZE);
    end = a.first + d->window < b->pages ? a.first + d->window : b->pages;
    if (a.first >= end || (a.count = (uint32_t)(pp_bitmap_find(b->received, end, a.first, 1) - a.first)) == 0)
        return d->run = 0;
    pages = pp_read_ahead(r, &a);
    if (pages < 0)
        return pages;
    pp_bitmap_set_range(b->received, a.first, (uint64_t)pages);
    d->normal_pages += (uint64_t)pages;
    d->run_next += (uint64_t)pages;
    if (a.written > (uint64_t)pages)
        error = pp_destination_discard(d, (uint32_t)d->last_block, a.first + (uint64_t)pages,
                                       a.written - (uint64_t)pages);
    if (r->tail > 0 || r->eof)
        return d->run = 0, error;
    d->window *= 2;
    error = pages ? 0 : pp_wait(r->fd, 0, r->cancel_fd, r->timeout_ms);
    return error ? error : 1;
}

/* One whole record that is no EOS, its header read. */
static int load_record(struct pp_destination *d, uint32_t length, uint64_t offset, uint32_t flags)
{
    struct pp_block *b = &d->blocks[d->last_block];
    uint64_t page = offset / PP_PAGE_SIZE;
    uint32_t data = flags == RAM_PAGE ? PP_PAGE_SIZE : 1, sum = d->checks ? PP_CHECKSUM : 0;
    struct pp_reader *r = d->reader;
    int error = flags == RAM_XBZRLE ? load_xbzrle(d, b, page, length, &data)
                                    : pp_reader_need(r, length + data + sum);

    if (!error && sum && flags != RAM_XBZRLE)
        error = verify_whole(d, r, b, offset, flags, length, data);
    if (error)
        return error;
    if (flags == RAM_PAGE) {
        memcpy(b->host + offset, r->buffer + r->head + length, PP_PAGE_SIZE);
        pp_clear(b->zero, page);
        pp_set(b->received, page);
        d->normal_pages++;
    } else if (flags == RAM_ZERO) {
        load_zero(b, page, r->buffer[r->head + length]);
        d->zero_pages++;
    }
    consume(r, length + data + sum);
    return 0;
}

int pp_destination_load(struct pp_destination *d, int ahead)
{
    struct pp_reader *r = d->reader;

    for (;;) {
        int32_t block = d->last_block;
        uint32_t length, flags;
        uint64_t offset;
        int64_t error;

        if (ahead && d->run >= RUN && r->tail - r->head < 8 + PP_PAGE_SIZE) {
            error = load_ahead(d);
            if (error < 0)
                return (int)error;
            if (error)
                continue;
        }
        error = pp_page_header(r, 0, &length, &d->last_block, d->blocks, d->block_count, &offset, &flags,
                               &d->fault, RAM_XBZRLE | d->checks);
        if (error == -EAGAIN) {
            error = pp_reader_need(r, r->tail - r->head + 1);
        } else if (!error && flags == RAM_EOS) {
            consume(r, 8);
            d->run = 0;
            return 0;
        } else if (!error) {
            error = load_record(d, length, offset, flags);
            if (!error && flags == RAM_ZERO && !d->checks)
                load_zeros(d);
            if (flags == RAM_PAGE && !d->checks)
                note_run(d, block, offset / PP_PAGE_SIZE);
            else
                d->run = 0;
            if (d->run < RUN)
                d->window = RUN;
        }
        if (error)
            return (int)error;
    }
}

/* DONTNEED, and for a memfd a hole too: in a private one the page cache behind the mapping may have been
 * filled by a read, in a shared one DONTNEED alone discards nothing. */
int pp_destination_discard(struct pp_destination *d, uint32_t block, uint64_t first, uint64_t count)
{
    struct pp_block *b = &d->blocks[block];
    off_t start = (off_t)(first * PP_PAGE_SIZE), length = (off_t)(count * PP_PAGE_SIZE);

    if (madvise(b->host + start, (size_t)length, MADV_DONTNEED))
        return -errno;
    if (b->fd >= 0 && fallocate(b->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, start, length))
        return -errno;
    pp_bitmap_clear_range(b->received, first, count);
    pp_bitmap_clear_range(b->zero, first, count);
    return 0;
}
