/* Bytes in and out of non-blocking descriptors; every wait ends at once when cancel_fd becomes readable. */
#include <errno.h>
#include <poll.h>
#include <string.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#include "page_pump.h"

uint64_t pp_now_ns(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000ull + (uint64_t)now.tv_nsec;
}

enum { LITTLE = 2 * PP_PAGE_SIZE /* bytes that are moved to save memory */ };

int pp_bad(struct pp_fault *fault, uint32_t bad, uint64_t value, uint64_t offset)
{
    fault->bad = bad;
    fault->value = value;
    fault->offset = offset;
    return -EPROTO;
}

/* 0 when fd is ready (or has an error that the next read or write will tell). */
int pp_wait(int fd, int for_write, int cancel_fd, int timeout_ms)
{
    struct pollfd fds[2] = {
        {.fd = fd, .events = for_write ? POLLOUT : POLLIN},
        {.fd = cancel_fd, .events = POLLIN},
    };

    for (;;) {
        int ready = poll(fds, 2, timeout_ms);

        if (ready < 0 && errno != EINTR)
            return -errno;
        if (ready == 0)
            return -ETIMEDOUT;
        if (ready > 0)
            return fds[1].revents ? -ECANCELED : 0;
    }
}

/* The vectors are used up: what has been sent is taken off them. */
int pp_writer_writev(struct pp_writer *w, void *vectors, int count)
{
    struct iovec *iov = vectors;

    while (count > 0) {
        ssize_t n = writev(w->fd, iov, count);

        if (n < 0) {
            int error = errno == EINTR ? 0 : errno != EAGAIN ? -errno : pp_wait(w->fd, 1, w->cancel_fd, -1);
            if (error)
                return error;
            continue;
        }
        w->total += (uint64_t)n;
        for (; count > 0 && (size_t)n >= iov->iov_len; iov++, count--)
            n -= (ssize_t)iov->iov_len;
        if (count > 0) {
            iov->iov_base = (uint8_t *)iov->iov_base + n;
            iov->iov_len -= (size_t)n;
        }
    }
    return 0;
}

int pp_writer_flush(struct pp_writer *w)
{
    struct iovec iov = {w->buffer, w->used};
    int error = w->used ? pp_writer_writev(w, &iov, 1) : 0;

    if (!error)
        w->used = 0;
    return error;
}

/* What the channel takes at once; the rest waits in the buffer, where the caller has seen to it that there is room. */
int pp_writer_offer(struct pp_writer *w, const void *vectors, int count)
{
    const struct iovec *iov = vectors;
    ssize_t n = w->used ? 0 : writev(w->fd, iov, count);

    if (n < 0 && errno != EAGAIN && errno != EINTR)
        return -errno;
    n = n < 0 ? 0 : n;
    w->total += (uint64_t)n;
    for (; count > 0; iov++, count--) {
        size_t gone = (size_t)n < iov->iov_len ? (size_t)n : iov->iov_len;

        memcpy(w->buffer + w->used, (uint8_t *)iov->iov_base + gone, iov->iov_len - gone);
        w->used += (uint32_t)(iov->iov_len - gone);
        n -= (ssize_t)gone;
    }
    return 0;
}

int pp_writer_put(struct pp_writer *w, const uint8_t *data, uint64_t length)
{
    int error = 0;

    if (length > w->size - w->used)
        error = pp_writer_flush(w);
    if (error)
        return error;
    if (length > w->size) {
        struct iovec iov = {(void *)data, length};
        return pp_writer_writev(w, &iov, 1);
    }
    memcpy(w->buffer + w->used, data, length);
    w->used += (uint32_t)length;
    return 0;
}

int pp_reader_fill(struct pp_reader *r)
{
    uint32_t room;
    ssize_t n;

    /* What is left of a record goes to the front: the buffer's end is for who needs much at once, and mostly is never
     * touched. */
    if (r->tail == r->size || r->tail - r->head <= LITTLE) {
        memmove(r->buffer, r->buffer + r->head, r->tail - r->head);
        r->tail -= r->head;
        r->head = 0;
    }
    room = r->size - r->tail;
    do
        n = read(r->fd, r->buffer + r->tail, r->most && r->most < room ? r->most : room);
    while (n < 0 && errno == EINTR);
    if (n < 0)
        return errno == EAGAIN ? 0 : -errno;
    if (n == 0) {
        r->eof = 1;
        return -ENODATA;
    }
    r->tail += (uint32_t)n;
    return (int)n;
}

int pp_reader_need(struct pp_reader *r, uint32_t n)
{
    if (n > r->size)
        return -EMSGSIZE;
    while (r->tail - r->head < n) {
        int got = pp_reader_fill(r);

        if (got == 0)
            got = pp_wait(r->fd, 0, r->cancel_fd, r->timeout_ms);
        if (got < 0)
            return got;
    }
    return 0;
}

int pp_reader_take(struct pp_reader *r, uint8_t *out, uint64_t n)
{
    while (n > 0) {
        uint32_t part = n < r->size / 2 ? (uint32_t)n : r->size / 2;
        int error = pp_reader_need(r, part);

        if (error)
            return error;
        memcpy(out, r->buffer + r->head, part);
        r->head += part;
        r->offset += part;
        out += part;
        n -= part;
    }
    return 0;
}
