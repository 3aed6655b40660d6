/* Running ahead of the parser: pages of a run read from the channel straight to where they belong.
 *
 * While the source sends page after page of one RAMBlock, the next record is a header of 8 bytes that is known
 * beforehand and 4096 bytes for the next page. So one readv takes many records, headers apart from pages, and
 * the headers are compared afterwards:
 *
 *     channel   h p+1 | page p+1 | h p+2 | page p+2 | ...
 *     readv     heads[0]  to[0]    heads[1]  to[1]
 *
 * From the first header that is another one, all bytes go back into the reader's buffer, in their order, and
 * the parser has a look at them. It is then as if they had been read there at once.
 */
#include <errno.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

#include "page_pump.h"

enum { HEAD = 8, RECORD = HEAD + PP_PAGE_SIZE };

/* Bytes [from, from + n) of the records as vectors. */
static int vectors_from(struct pp_ahead *a, struct iovec *iov, uint64_t from, uint64_t n)
{
    int used = 0;

    while (n > 0) {
        uint64_t record = from / RECORD, at = from % RECORD;
        uint64_t part = at < HEAD ? HEAD - at : RECORD - at;
        uint8_t *place = at < HEAD ? a->heads[record] + at : a->to + record * PP_PAGE_SIZE + (at - HEAD);

        part = part < n ? part : n;
        iov[used++] = (struct iovec){place, part};
        from += part;
        n -= part;
    }
    return used;
}

/* Headers that have become whole by now are compared; -1 = one is another. */
static int compare(struct pp_ahead *a)
{
    uint8_t expected[HEAD];

    for (; a->good < a->count && a->filled >= a->good * RECORD + HEAD; a->good++) {
        pp_put64(expected, (a->first + a->good) * PP_PAGE_SIZE | RAM_PAGE | RAM_CONTINUE);
        if (memcmp(a->heads[a->good], expected, HEAD))
            return -1;
    }
    return 0;
}

/* Reads up to a->count records, of the pages from a->first on, into a->to, beginning with what the buffer holds:
 * less than one record. With a->wait it waits for the rest of a page that has begun. Returns how many pages are
 * whole, 0 if the channel has nothing now; these alone are consumed. If the buffer is not empty then, something
 * else came. a->written pages of a->to have been written to, those returned and perhaps more. */
int pp_read_ahead(struct pp_reader *r, struct pp_ahead *a)
{
    struct iovec iov[2 * PP_AHEAD];
    uint64_t size = (uint64_t)a->count * RECORD, pages, left;
    int error = 0;

    a->good = 0;
    a->filled = r->tail - r->head;
    for (int i = 0, n = vectors_from(a, iov, 0, a->filled), at = (int)r->head; i < n;
         at += (int)iov[i++].iov_len)
        memcpy(iov[i].iov_base, r->buffer + at, iov[i].iov_len);
    while (!compare(a) && a->filled < size && !error) {
        int used = vectors_from(a, iov, a->filled, size - a->filled);
        ssize_t n = readv(r->fd, iov, used);

        if (n > 0)
            a->filled += (uint64_t)n;
        else if (n == 0)
            r->eof = 1, error = -ENODATA;
        else if (errno == EAGAIN && (!a->wait || a->filled == a->good * RECORD))
            break;
        else if (errno == EAGAIN)
            error = pp_wait(r->fd, 0, r->cancel_fd, r->timeout_ms);
        else if (errno != EINTR)
            error = -errno;
    }
    pages = a->filled / RECORD < a->good ? a->filled / RECORD : a->good;
    left = a->filled - pages * RECORD;
    a->written = (a->filled + PP_PAGE_SIZE - 1) / RECORD;
    r->head = 0;
    r->tail = (uint32_t)left;
    r->offset += pages * RECORD;
    for (int i = 0, n = vectors_from(a, iov, pages * RECORD, left), at = 0; i < n; at += (int)iov[i++].iov_len)
        memcpy(r->buffer + at, iov[i].iov_base, iov[i].iov_len);
    return error && error != -ENODATA ? error : (int)pages;
}
