/* The destination's side: page records into guest RAM; from LISTEN on one loop for faults and stream.
 *
 * Page states: missing, requested, received (received bit = 1 and requested bit = 0). A page received as zero
 * that nothing has touched is left absent with its `zero` bit set: a fault on it is answered here, by ZEROPAGE,
 * and when the range is unregistered the kernel's own zero page is the right content. A fault on any other
 * received page that is absent would be a lost page, and is an error (design rule 6).
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#include "page_pump.h"

enum { RUN = 16 /* pages in a row before the next ones are read ahead, and how many at first; arbitrary */ };

static int fault_error(struct pp_destination *d, uint32_t bad, uint64_t value, int error)
{
    pp_bad(&d->fault, bad, value, d->reader->offset);
    return error;
}

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

static void consume(struct pp_reader *r, uint32_t n)
{
    r->head += n;
    r->offset += n;
}

/* ---- before LISTEN: plain memory, nothing can be missing ---- */

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

/* A record that stands in the buffer whole, with its checksum. */
static int verify_whole(struct pp_destination *d, struct pp_reader *r, const struct pp_block *b, uint64_t offset,
                        uint32_t kind, uint32_t header, uint32_t data)
{
    const uint8_t *content = r->buffer + r->head + header;

    return pp_verify(d, b, offset, kind, content, data, content + data, r->offset);
}

static void note_run(struct pp_destination *d, int32_t block_before, uint64_t page)
{
    d->run = d->run && d->last_block == block_before && page == d->run_next ? d->run + 1 : 1;
    d->run_next = page + 1;
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

/* ---- from LISTEN on ---- */

static int wake(struct pp_destination *d, uint64_t address)
{
    struct uffdio_range range = {address, PP_PAGE_SIZE};

    return ioctl(d->uffd, UFFDIO_WAKE, &range) ? -errno : 0;
}

/* 0, or -errno. EAGAIN = the address space is changing under us (or nothing was done): try again. */
static int copy_page(struct pp_destination *d, uint64_t address, const uint8_t *data)
{
    struct uffdio_copy copy = {.dst = address, .src = (uintptr_t)data, .len = PP_PAGE_SIZE};

    while (ioctl(d->uffd, UFFDIO_COPY, &copy)) {
        if (errno != EAGAIN)
            return -errno;
        copy.copy = 0;
    }
    return 0;
}

static int zero_page(struct pp_destination *d, uint64_t address)
{
    struct uffdio_zeropage zero = {.range = {address, PP_PAGE_SIZE}};

    while (ioctl(d->uffd, UFFDIO_ZEROPAGE, &zero)) {
        if (errno != EAGAIN)
            return -errno;
        zero.zeropage = 0;
    }
    return 0;
}

/* data == NULL: a zero page. The received bit is set only after the kernel has taken the page. */
static int place(struct pp_destination *d, uint64_t page, const uint8_t *data)
{
    struct pp_block *b = &d->blocks[d->last_block];
    uint64_t address = (uintptr_t)b->host + page * PP_PAGE_SIZE;
    int requested = pp_test(b->requested, page), error;

    if (pp_test(b->received, page)) {
        d->duplicates++;  /* the guest may have written to it since: the newer content stays */
        return 0;
    }
    if (!data && !requested) {
        pp_set(b->zero, page);
    } else {
        error = data ? copy_page(d, address, data) : zero_page(d, address);
        if (error == -EEXIST)
            return fault_error(d, PP_BAD_PRESENT, page * PP_PAGE_SIZE, -EEXIST);
        if (error)
            return error;
    }
    pp_set(b->received, page);
    if (requested) {
        pp_clear(b->requested, page);
        pp_wait_end(d, address);
    }
    d->normal_pages += data != NULL;
    d->zero_pages += data == NULL;
    return 0;
}

/* The pages of a run, side by side in d->staging, with one call to the kernel; if it refuses, one by one. */
static int place_run(struct pp_destination *d, uint64_t first, uint64_t count)
{
    struct pp_block *b = &d->blocks[d->last_block];
    uint64_t address = (uintptr_t)b->host + first * PP_PAGE_SIZE, end = first + count, placed = 0;
    struct uffdio_copy copy = {.dst = address, .src = (uintptr_t)d->staging, .len = count * PP_PAGE_SIZE};

    if (count > 1 && pp_bitmap_find(b->received, end, first, 1) == end) {
        ioctl(d->uffd, UFFDIO_COPY, &copy);
        placed = copy.copy > 0 ? (uint64_t)copy.copy / PP_PAGE_SIZE : 0;
    }
    pp_bitmap_set_range(b->received, first, placed);
    d->normal_pages += placed;
    for (uint64_t page = pp_bitmap_find(b->requested, first + placed, first, 1); page < first + placed;
         page = pp_bitmap_find(b->requested, first + placed, page + 1, 1)) {
        pp_clear(b->requested, page);
        pp_wait_end(d, (uintptr_t)b->host + page * PP_PAGE_SIZE);
    }
    for (uint64_t page = first + placed; page < end; page++) {
        int error = place(d, page, d->staging + (page - first) * PP_PAGE_SIZE);

        if (error)
            return error;
    }
    return 0;
}

/* A received page that faults: absent on purpose (zero), or the kernel's message is older than the answer and
 * a WAKE is all it takes. The same page again and again after a WAKE is absent: lost. It is not filled in. */
static int serve_received(struct pp_destination *d, struct pp_block *b, uint64_t page, uint64_t address)
{
    int error;

    d->served_locally++;
    if (!pp_test(b->zero, page)) {
        d->wakes = d->last_woken == address ? d->wakes + 1 : 1;
        d->last_woken = address;
        if (d->wakes > PP_WAKES)
            return fault_error(d, PP_BAD_LOST, page * PP_PAGE_SIZE, -EFAULT);
        return wake(d, address);
    }
    error = zero_page(d, address);
    if (error == -EEXIST)
        error = wake(d, address);
    if (!error)
        pp_clear(b->zero, page);
    return error;
}

static int serve_fault(struct pp_destination *d, uint64_t address, uint32_t thread)
{
    for (uint32_t i = 0; i < d->block_count; i++) {
        struct pp_block *b = &d->blocks[i];
        uint64_t page = (address - (uintptr_t)b->host) / PP_PAGE_SIZE;

        if (address < (uintptr_t)b->host || page >= b->pages)
            continue;
        address &= ~(uint64_t)(PP_PAGE_SIZE - 1);
        d->faults++;
        if (pp_test(b->received, page)) {
            uint64_t since = pp_now_ns();
            int error = serve_received(d, b, page, address);

            d->vcpu_blocked_ns += thread && thread == d->vcpu_thread ? pp_now_ns() - since : 0;
            return error;
        }
        pp_wait_begin(d, address, thread);
        if (pp_test(b->requested, page))
            return 0;
        pp_set(b->requested, page);
        d->requests++;
        return d->quiet ? 0 : pp_return_path_request(d->rp, d->blocks, (int32_t)i, page, 1);
    }
    return fault_error(d, PP_BAD_FAULT, address, -EFAULT);
}

/* What was read is gone from the descriptor: all of it is noted, also when asking for the first page failed. */
static int serve_faults(struct pp_destination *d)
{
    struct uffd_msg messages[16];
    ssize_t n = read(d->uffd, messages, sizeof(messages));
    int first_error = 0;

    if (n < 0)
        return errno == EAGAIN || errno == EINTR ? 0 : -errno;
    for (size_t i = 0; i < (size_t)n / sizeof(messages[0]); i++) {
        int error;

        if (messages[i].event != UFFD_EVENT_PAGEFAULT)
            continue;
        error = serve_fault(d, messages[i].arg.pagefault.address, messages[i].arg.pagefault.feat.ptid);
        if (error && !first_error)
            first_error = error;
    }
    return first_error ? first_error : n > 0;
}

/* One page record, if it is whole: 1 = EOS, 0 = a page, -EAGAIN = more bytes are needed. */
static int listen_page(struct pp_destination *d)
{
    struct pp_reader *r = d->reader;
    uint32_t length, flags, data, sum = d->checks ? PP_CHECKSUM : 0;
    uint64_t offset;
    int32_t before = d->last_block, block = before;
    int error = (int)pp_page_header(r, 0, &length, &block, d->blocks, d->block_count, &offset, &flags,
                                    &d->fault, d->checks);

    if (error)
        return error;
    if (flags == RAM_EOS) {
        consume(r, 8);
        return 1;
    }
    data = flags == RAM_PAGE ? PP_PAGE_SIZE : 1;
    if (r->tail - r->head < length + data + sum)
        return -EAGAIN;
    error = sum ? verify_whole(d, r, &d->blocks[block], offset, flags, length, data) : 0;
    if (error)
        return error;
    if (flags == RAM_ZERO && r->buffer[r->head + length])
        return pp_bad(&d->fault, PP_BAD_FILL, r->buffer[r->head + length], r->offset);
    d->last_block = block;
    error = place(d, offset / PP_PAGE_SIZE, flags == RAM_PAGE ? r->buffer + r->head + length : NULL);
    if (error)
        return error;
    if (flags == RAM_PAGE && !sum)
        note_run(d, before, offset / PP_PAGE_SIZE);
    else
        d->run = 0;
    consume(r, length + data + sum);
    return 0;
}

/* All whole records of the second channel: pages alone, and EOS at its end. 0, or -errno. */
static int listen_preempt(struct pp_destination *d)
{
    struct pp_reader *r = d->preempt;

    while (!d->preempt_ended) {
        int32_t main_block = d->last_block;
        uint32_t length, flags, data, sum = d->checks ? PP_CHECKSUM : 0;
        uint64_t offset;
        int error = (int)pp_page_header(r, 0, &length, &d->preempt_block, d->blocks, d->block_count, &offset,
                                        &flags, &d->fault, d->checks);

        if (error)
            return error == -EAGAIN ? 0 : error;
        if (flags == RAM_EOS) {
            r->head += 8;
            r->offset += 8;
            d->preempt_ended = 1;
            return 0;
        }
        data = flags == RAM_PAGE ? PP_PAGE_SIZE : 1;
        if (r->tail - r->head < length + data + sum)
            return 0;
        error = sum ? verify_whole(d, r, &d->blocks[d->preempt_block], offset, flags, length, data) : 0;
        if (error)
            return error;
        if (flags == RAM_ZERO && r->buffer[r->head + length])
            return pp_bad(&d->fault, PP_BAD_FILL, r->buffer[r->head + length], r->offset);
        d->last_block = d->preempt_block;
        error = place(d, offset / PP_PAGE_SIZE, flags == RAM_PAGE ? r->buffer + r->head + length : NULL);
        d->last_block = main_block;
        if (error)
            return error;
        r->head += length + data + sum;
        r->offset += length + data + sum;
    }
    return 0;
}

/* What the second channel has now; its end before EOS is no loss once the first one has said END: whether every
 * page came is looked at then. Bytes, 0 = nothing, or -errno. */
static int listen_preempt_read(struct pp_destination *d)
{
    int bytes, error;

    if (!d->preempt || d->preempt_ended)
        return 0;
    bytes = pp_reader_fill(d->preempt);
    if (bytes == -ENODATA && d->main_ended) {
        d->preempt_ended = 1;
        return 1;
    }
    if (bytes <= 0)
        return bytes;
    error = listen_preempt(d);
    return error ? error : bytes;
}

/* A PING is answered; what else a command means is for the caller to say. */
static int listen_command(struct pp_destination *d, const uint8_t *p, uint32_t have)
{
    int error;

    if (have < 5)
        return -EAGAIN;
    if (pp_be16(p + 1) != COMMAND_PING)
        return have < 5u + pp_be16(p + 3) ? -EAGAIN : PP_LISTEN_COMMAND;
    if (pp_be16(p + 3) != 4)
        return pp_bad(&d->fault, PP_BAD_LENGTH, pp_be16(p + 3), d->reader->offset);
    if (have < 9)
        return -EAGAIN;
    error = pp_return_path_send(d->rp, RP_PONG, p + 5, 4);
    if (!error)
        consume(d->reader, 9);
    return error;
}

/* A record between sections: PP_LISTEN_END at EOF, PP_LISTEN_COMMAND, 0, or -errno (-EAGAIN = more bytes). */
static int listen_record(struct pp_destination *d)
{
    struct pp_reader *r = d->reader;
    const uint8_t *p = r->buffer + r->head;
    uint32_t have = r->tail - r->head;

    if (have < 1)
        return -EAGAIN;
    switch (p[0]) {
    case RECORD_EOF:
        consume(r, 1);
        return PP_LISTEN_END;
    case RECORD_COMMAND:
        return listen_command(d, p, have);
    case RECORD_PART:
    case RECORD_END:
        if (d->quiet)  /* who has not agreed to recover, or is a stranger, has no pages for us */
            break;
        if (have < 5)
            return -EAGAIN;
        if (pp_be32(p + 1) != d->ram_section)
            return pp_bad(&d->fault, PP_BAD_SECTION, pp_be32(p + 1), r->offset);
        d->ending = p[0] == RECORD_END;
        d->stage = 1;
        d->run = 0;
        consume(r, 5);
        return 0;
    }
    return pp_bad(&d->fault, PP_BAD_RECORD, p[0], r->offset);
}

static int listen_footer(struct pp_destination *d)
{
    struct pp_reader *r = d->reader;
    const uint8_t *p = r->buffer + r->head;

    if (r->tail - r->head < 5)
        return -EAGAIN;
    if (p[0] != RECORD_FOOTER)
        return pp_bad(&d->fault, PP_BAD_RECORD, p[0], r->offset);
    if (pp_be32(p + 1) != d->ram_section)
        return pp_bad(&d->fault, PP_BAD_FOOTER, pp_be32(p + 1), r->offset);
    consume(r, 5);
    d->stage = 0;
    return 0;
}

/* All whole records in the buffer; faults go first, every few pages. */
static int listen_buffered(struct pp_destination *d)
{
    for (int n = 1;; n++) {
        int result = d->stage == 1 ? listen_page(d) : d->stage == 2 ? listen_footer(d) : listen_record(d);

        if (result == -EAGAIN)
            return 0;
        if (result < 0 || (d->stage == 0 && result > 0))
            return result;
        if (d->stage == 1 && result == 1)
            d->stage = 2;
        if (n % 32 == 0) {
            result = serve_faults(d);
            if (result < 0)
                return result;
        }
    }
}

static int sleep_until_work(struct pp_destination *d)
{
    struct pollfd fds[5] = {
        {.fd = d->reader->cancel_fd, .events = POLLIN},
        {.fd = d->uffd, .events = POLLIN},
        {.fd = d->main_ended ? -1 : d->reader->fd, .events = POLLIN},
        {.fd = d->kick_fd, .events = POLLIN},
        {.fd = d->preempt && !d->preempt_ended ? d->preempt->fd : -1, .events = POLLIN},
    };

    if (poll(fds, 5, -1) < 0 && errno != EINTR)
        return -errno;
    if (fds[1].revents & (POLLERR | POLLNVAL))
        return -EBADF;
    return fds[0].revents ? -ECANCELED : fds[3].revents ? PP_LISTEN_KICKED : 0;
}

/* What the channel has now: pages of a run are placed at once, all else goes into the buffer. 1 = something came,
 * 0 = nothing, or -errno. */
static int listen_read(struct pp_destination *d)
{
    struct pp_reader *r = d->reader;
    uint32_t before = r->tail - r->head;
    struct pp_ahead a = {.first = d->run_next, .count = PP_RUN, .to = d->staging};
    int pages, error;

    if (d->stage != 1 || !d->run || before >= 8 + PP_PAGE_SIZE || a.first >= d->blocks[d->last_block].pages)
        return pp_reader_fill(r);
    if (a.count > d->blocks[d->last_block].pages - a.first)
        a.count = (uint32_t)(d->blocks[d->last_block].pages - a.first);
    pages = pp_read_ahead(r, &a);
    if (pages < 0)
        return pages;
    d->run_next += (uint64_t)pages;
    error = place_run(d, a.first, (uint64_t)pages);
    if (error)
        return error;
    if (a.filled > before)
        return 1;
    d->run = 0;  /* what the buffer holds is something else, or its rest is not there yet */
    return pp_reader_fill(r);
}

/* Both channels must have ended. */
static int is_over(struct pp_destination *d, int result)
{
    if (result == PP_LISTEN_END)
        d->main_ended = 1;
    if (!d->main_ended || result < 0)
        return result;
    return !d->preempt || d->preempt_ended ? PP_LISTEN_END : 0;
}

int pp_destination_listen(struct pp_destination *d)
{
    int is_spinning = 0, result = d->reader->fd < 0 ? 0 : is_over(d, listen_buffered(d));

    d->reader->most = PP_RUN * PP_PAGE_SIZE;
    while (!result) {
        int faults = serve_faults(d), bytes = 0, urgent = 0;

        if (faults >= 0)
            urgent = listen_preempt_read(d);
        if (faults >= 0 && urgent >= 0 && d->reader->fd >= 0 && !d->main_ended)
            bytes = listen_read(d);
        bytes = urgent < 0 ? urgent : bytes;
        if (faults < 0)
            result = faults;
        else if (bytes == -ENODATA || bytes == -ECONNRESET || bytes == -ETIMEDOUT || bytes == -EPIPE)
            result = PP_LISTEN_LOST;
        else if (bytes < 0)
            result = bytes;
        else if (bytes > 0)
            result = listen_buffered(d);
        result = is_over(d, result);
        if (result)
            break;
        if (faults || bytes || urgent) {
            is_spinning = 0;
            continue;
        }
        if (!is_spinning && d->in_flight && d->reader->fd >= 0) {
            is_spinning = 1;
            pp_spin_begin(&d->spin);
        }
        if (is_spinning && pp_spin_on(&d->spin))
            continue;
        is_spinning = 0;
        result = sleep_until_work(d);
    }
    /* Bytes that arrived before the end of the channel have all been parsed: a loss is a loss. */
    return result;
}
