/* The destination's side from LISTEN on: one loop for the stream, the second channel and the faults. */
#include <errno.h>
#include <poll.h>

#include "destination.h"

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
    error = pp_place(d, offset / PP_PAGE_SIZE, flags == RAM_PAGE ? r->buffer + r->head + length : NULL);
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
        error = pp_place(d, offset / PP_PAGE_SIZE, flags == RAM_PAGE ? r->buffer + r->head + length : NULL);
        d->last_block = main_block;
        if (error)
            return error;
        r->head += length + data + sum;
        r->offset += length + data + sum;
    }
    return 0;
}

static int is_loss(int error)
{
    return error == -ENODATA || error == -ECONNRESET || error == -ETIMEDOUT || error == -EPIPE;
}

/* What the second channel has now; its end before EOS is no loss once the first one has said END: whether every
 * page came is looked at then. Bytes, 0 = nothing, or -errno. */
static int listen_preempt_read(struct pp_destination *d)
{
    int bytes, error;

    if (!d->preempt || d->preempt_ended)
        return 0;
    bytes = pp_reader_fill(d->preempt);
    if (d->main_ended && is_loss(bytes)) {
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
            result = pp_serve_faults(d);
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
    error = pp_place_run(d, a.first, (uint64_t)pages);
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
    int result = d->reader->fd < 0 ? 0 : is_over(d, listen_buffered(d));

    d->reader->most = PP_RUN * PP_PAGE_SIZE;
    while (!result) {
        int faults = pp_serve_faults(d), bytes = 0, urgent = 0;

        if (faults >= 0)
            urgent = listen_preempt_read(d);
        if (faults >= 0 && urgent >= 0 && d->reader->fd >= 0 && !d->main_ended)
            bytes = listen_read(d);
        bytes = urgent < 0 ? urgent : bytes;
        if (faults < 0)
            result = faults;
        else if (is_loss(bytes))
            result = PP_LISTEN_LOST;
        else if (bytes < 0)
            result = bytes;
        else if (bytes > 0)
            result = listen_buffered(d);
        result = is_over(d, result);
        if (result)
            break;
        if (!faults && !bytes && !urgent)
            result = sleep_until_work(d);
    }
    /* Bytes that arrived before the end of the channel have all been parsed: a loss is a loss. */
    return result;
}
