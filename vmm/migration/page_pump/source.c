/* The source's side: the next page, requested ones first, gathered from guest RAM into the stream. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/uio.h>
#include <unistd.h>

#include "page_pump.h"

enum {
    QUEUE_BLOCK_SHIFT = 40,
    HEADERS = 80 << 10,   /* bytes of page headers in a batch: more than 9000 zero pages */
    PAGES_PER_DATA = 32,  /* pages in a batch for each that may have content: without content they cost little */
    FEW = 64,             /* pages that are not worth the look for a run of zeroes */
    ANSWERED_AT_ONCE = 8, /* pages; what the writer's buffer holds */
    MOST_OF_A_PAGE = 8 + 1 + PP_NAME + PP_PAGE_SIZE + PP_CHECKSUM,
};

int pp_source_init(struct pp_source *s)
{
    pthread_mutex_t *locks = malloc(2 * sizeof(*locks));

    s->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (!locks || s->wake_fd < 0) {
        free(locks);
        return locks ? -errno : -ENOMEM;
    }
    pthread_mutex_init(&locks[0], NULL);
    pthread_mutex_init(&locks[1], NULL);
    s->lock = &locks[0];
    s->send_lock = &locks[1];
    s->last_block = -1;
    return 0;
}

void pp_source_free(struct pp_source *s)
{
    if (!s->lock)
        return;
    pp_helper_free(&s->helper);
    pthread_mutex_destroy(s->lock);
    pthread_mutex_destroy(s->send_lock);
    free(s->lock);
    free(s->queue);
    close(s->wake_fd);
    s->lock = NULL;
    s->queue = NULL;
}

static int queue_grow(struct pp_source *s)
{
    uint64_t size = s->queue_size ? s->queue_size * 2 : 256, *queue = malloc(size * sizeof(*queue));

    if (!queue)
        return -ENOMEM;
    for (uint64_t i = 0; i < s->queue_used; i++)
        queue[i] = s->queue[(s->queue_head + i) % s->queue_size];
    free(s->queue);
    s->queue = queue;
    s->queue_size = size;
    s->queue_head = 0;
    return 0;
}

static int answer_now(struct pp_source *s);

/* A page stands in the queue once at most, so the queue is bounded by guest RAM whatever the peer sends. */
int pp_source_request(struct pp_source *s, uint32_t block, uint64_t page, uint64_t count)
{
    struct pp_preempt *preempt = __atomic_load_n(&s->preempt, __ATOMIC_ACQUIRE);
    uint64_t one = 1;
    int error = 0, was_empty, queued = 0;

    pthread_mutex_lock(s->lock);
    s->requests++;
    was_empty = s->queue_used == 0;
    for (uint64_t i = page; i < page + count && !error; i++) {
        int sent = preempt ? pp_preempt_answer(preempt, &s->blocks[block], (int32_t)block, i) : 0;

        if (sent < 0)
            error = sent;
        if (sent)
            continue;
        if (pp_test(s->blocks[block].queued, i))
            continue;
        if (s->queue_used == s->queue_size)
            error = queue_grow(s);
        if (error)
            break;
        queued = 1;
        pp_set(s->blocks[block].queued, i);
        s->queue[(s->queue_head + s->queue_used++) % s->queue_size] =
            (uint64_t)block << QUEUE_BLOCK_SHIFT | i;
    }
    pthread_mutex_unlock(s->lock);
    if (error || (preempt && !queued))
        return error;
    error = answer_now(s);
    if (error)
        return error < 0 ? error : 0;
    return was_empty && write(s->wake_fd, &one, sizeof(one)) < 0 && errno != EAGAIN ? -errno : 0;
}

/* The next requested page that has not been sent since; pages already on their way are passed over. */
static int next_request(struct pp_source *s, uint32_t *block, uint64_t *page)
{
    int found = 0;

    if (!__atomic_load_n(&s->queue_used, __ATOMIC_ACQUIRE))
        return 0;
    pthread_mutex_lock(s->lock);
    while (s->queue_used && !found) {
        uint64_t entry = s->queue[s->queue_head];

        s->queue_head = (s->queue_head + 1) % s->queue_size;
        s->queue_used--;
        *block = (uint32_t)(entry >> QUEUE_BLOCK_SHIFT);
        *page = entry & ((1ull << QUEUE_BLOCK_SHIFT) - 1);
        pp_clear(s->blocks[*block].queued, *page);
        found = pp_test(s->blocks[*block].dirty, *page);
        if (found && s->drop_request && --s->drop_request == 0) {
            pp_clear(s->blocks[*block].dirty, *page);
            found = 0;
        }
    }
    pthread_mutex_unlock(s->lock);
    return found;
}

/* The next dirty page from the cursor on, once round all blocks. */
int pp_source_next(struct pp_source *s, uint32_t *block, uint64_t *page)
{
    for (uint32_t i = 0; i <= s->block_count; i++) {
        struct pp_block *b = &s->blocks[s->block];
        uint64_t found = pp_bitmap_find(b->dirty, b->pages, s->page, 1);

        if (found < b->pages) {
            *block = s->block;
            *page = found;
            s->page = found + 1;
            return 1;
        }
        s->page = 0;
        s->block = (s->block + 1) % s->block_count;
    }
    return 0;
}

/* What one system call sends. Records of pages without content lie side by side, so that a run of them is one
 * vector; only a page with content takes vectors of its own. */
struct batch {
    struct iovec iov[2 * PP_BATCH];
    uint8_t headers[HEADERS];
    uint32_t used;         /* of headers */
    uint64_t pages;
    uint32_t data_pages;
    int vectors;
    uint32_t zero_block;   /* pages of this one that were found to be zero in the same call */
    uint64_t zero_first, zero_end;
};

static void batch_add(struct batch *batch, uint8_t *data, size_t length)
{
    struct iovec *last = batch->vectors ? &batch->iov[batch->vectors - 1] : NULL;

    if (last && (uint8_t *)last->iov_base + last->iov_len == data)
        last->iov_len += length;
    else
        batch->iov[batch->vectors++] = (struct iovec){data, length};
}

/* How many bytes of `*data` go out for a page that is not zero; 0 = none, the destination has them all. */
static uint32_t difference(struct pp_source *s, uint32_t block, uint64_t page, int zero, uint32_t place,
                           uint8_t **data)
{
    if (!s->xbzrle)
        return PP_PAGE_SIZE;
    if (!zero)
        return pp_xbzrle_page(s->xbzrle, block, page, place, data);
    pp_xbzrle_zero(s->xbzrle, block, page);
    return PP_PAGE_SIZE;
}

static uint32_t add_checksum(struct batch *batch, const struct pp_block *b, uint64_t word, const uint8_t *content,
                             uint64_t length)
{
    uint8_t *sum = batch->headers + batch->used;

    pp_put64(sum, pp_checksum(b->name, word, content, length));
    batch->used += PP_CHECKSUM;
    batch_add(batch, sum, PP_CHECKSUM);
    return PP_CHECKSUM;
}

/* The bit is cleared before the page is looked at: a store after that is in the dirty log. */
static void add_page(struct pp_source *s, struct batch *batch, uint32_t block, uint64_t page)
{
    struct pp_block *b = &s->blocks[block];
    uint8_t *header = batch->headers + batch->used, *data = b->host + page * PP_PAGE_SIZE, *whole;
    uint64_t flags = (int32_t)block == s->last_block ? RAM_CONTINUE : 0;
    static const uint8_t no_fill;
    uint32_t bytes, kind;
    size_t length = 8;
    int zero;

    __builtin_prefetch(data + PP_PAGE_SIZE);
    batch->pages++;
    if (!pp_claim(b->dirty, page))
        return; /* who heard of the request was faster, over the second channel */
    s->resent_pages += (uint64_t)pp_test(b->sent, page);
    pp_set(b->sent, page);
    zero = !pp_test(b->populated, page) || pp_is_zero_page(data);
    if (s->bounce && !zero)
        data = memcpy(s->bounce + (size_t)batch->data_pages * PP_PAGE_SIZE, data, PP_PAGE_SIZE);
    whole = data;
    bytes = difference(s, block, page, zero, batch->data_pages, &data);
    if (!bytes)
        return;
    kind = zero ? RAM_ZERO : bytes == PP_PAGE_SIZE ? RAM_PAGE : RAM_XBZRLE;
    pp_put64(header, page * PP_PAGE_SIZE | flags | kind | (s->bounce ? RAM_CHECKSUM : 0));
    if (!flags) {
        size_t name = strlen(b->name);
        header[length++] = (uint8_t)name;
        memcpy(header + length, b->name, name);
        length += name;
        s->last_block = (int32_t)block;
    }
    if (zero) {
        header[length++] = 0;
    } else if (bytes < PP_PAGE_SIZE) {
        header[length++] = XBZRLE_ENCODING;
        pp_put16(header + length, (uint16_t)bytes);
        length += 2;
    }
    batch->used += (uint32_t)length;
    batch_add(batch, header, length);
    if (zero) {
        s->zero_pages++;
    } else {
        batch_add(batch, data, bytes);
        batch->data_pages++;
        s->normal_pages += bytes == PP_PAGE_SIZE;
        length += bytes;
    }
    if (s->bounce)
        length += add_checksum(batch, b, page * PP_PAGE_SIZE | kind, zero ? &no_fill : whole, zero ? 1 : PP_PAGE_SIZE);
    s->page_bytes += length;
}

static void linear_goes_on_after(struct pp_source *s, uint32_t block, uint64_t page)
{
    s->block = block;
    s->page = page + 1;
}

/* Is the page at the cursor known to be zero? */
static int in_zero_run(const struct pp_source *s, const struct batch *batch)
{
    return s->block == batch->zero_block && s->page >= batch->zero_first && s->page < batch->zero_end;
}

/* Records of a run of zero pages from the cursor on, as many as fit. `look`: the page before it was one, so see how far
 * they go. Each takes part in no cache and has no checksum. */
static void add_zeros(struct pp_source *s, struct batch *batch, uint64_t max_pages, int look)
{
    struct pp_block *b = &s->blocks[s->block];
    uint64_t room = (HEADERS - batch->used) / 9, left = max_pages - batch->pages, count;
    uint8_t *records = batch->headers + batch->used;

    if (s->xbzrle || s->bounce || (int32_t)s->block != s->last_block || left < FEW || room < FEW ||
        __atomic_load_n(&s->queue_used, __ATOMIC_ACQUIRE))
        return;
    if (!in_zero_run(s, batch)) {
        if (!look || s->page >= b->pages)
            return;
        batch->zero_block = s->block;
        batch->zero_first = s->page;
        batch->zero_end = pp_zero_run(s, b, s->page, max_pages);
    }
    s->page = pp_zero_records(s, b, s->page, batch->zero_end, left < room ? left : room, records, &count);
    if (!count)
        return;
    batch->used += (uint32_t)count * 9;
    batch->pages += count;
    batch_add(batch, records, count * 9);
    s->zero_pages += count;
    s->pushed_pages += count;
    s->page_bytes += count * 9;
}

static void fill(struct pp_source *s, struct batch *batch, uint64_t max_pages, uint32_t data_pages,
                 int requests_only)
{
    uint64_t zero_pages;

    max_pages = max_pages < PAGES_PER_DATA * data_pages ? max_pages : PAGES_PER_DATA * data_pages;
    batch->vectors = 0;
    batch->pages = batch->data_pages = batch->used = 0;
    if (!requests_only)
        add_zeros(s, batch, max_pages, 0);
    while (batch->pages < max_pages && batch->data_pages < data_pages &&
           HEADERS - batch->used >= 8 + 1 + PP_NAME + XBZRLE_HEAD + PP_CHECKSUM) {
        uint32_t block;
        uint64_t page;

        if (next_request(s, &block, &page)) {
            s->requested_pages++;
            linear_goes_on_after(s, block, page);
        } else if (!requests_only && pp_source_next(s, &block, &page)) {
            s->pushed_pages++;
        } else {
            return;
        }
        zero_pages = s->zero_pages;
        add_page(s, batch, block, page);
        if (!requests_only && s->zero_pages > zero_pages)
            add_zeros(s, batch, max_pages, 1);
    }
}

/* Sends what is requested, if mig/source sleeps: 1 = done. Who hears of a request answers it; to wake mig/source
 * first would cost more than all the rest. Never waits for the channel: the destination may not read from it before
 * its next request has been read here. What there is no room for now goes before all that mig/source sends. */
static int answer_now(struct pp_source *s)
{
    struct batch batch;
    int error = 0, done = 0;

    if (pthread_mutex_trylock(s->send_lock))
        return 0;
    if (s->may_answer && s->writer->size - s->writer->used >= ANSWERED_AT_ONCE * MOST_OF_A_PAGE) {
        fill(s, &batch, ANSWERED_AT_ONCE, ANSWERED_AT_ONCE, 1);
        error = batch.vectors ? pp_writer_offer(s->writer, batch.iov, batch.vectors) : 0;
        done = !s->writer->used && !__atomic_load_n(&s->queue_used, __ATOMIC_ACQUIRE);
    }
    pthread_mutex_unlock(s->send_lock);
    return error ? error : done;
}

/* mig/source sleeps in the body of a section, and leaves the channel to who hears of a request. */
static int sleep_answering(struct pp_source *s, int fd, int for_write, int cancel_fd, int timeout_ms)
{
    int error;

    pthread_mutex_lock(s->send_lock);
    s->may_answer = 1;
    pthread_mutex_unlock(s->send_lock);
    error = pp_wait(fd, for_write, cancel_fd, timeout_ms);
    pthread_mutex_lock(s->send_lock);
    s->may_answer = 0;
    pthread_mutex_unlock(s->send_lock);
    return error;
}

int pp_source_wait(struct pp_source *s, int cancel_fd, int timeout_ms)
{
    int error = sleep_answering(s, s->wake_fd, 0, cancel_fd, timeout_ms);
    uint64_t ignored;

    if (error)
        return error == -ETIMEDOUT ? 0 : error;
    return read(s->wake_fd, &ignored, sizeof(ignored)) < 0 && errno != EAGAIN ? -errno : 1;
}

/* All before the next batch has gone out. Once pages are requested, the wait for room comes before the batch and not
 * inside it, between two records, so that an answer can come first. */
static int begin_batch(struct pp_source *s)
{
    struct pp_writer *w = s->writer;
    int error = pp_writer_flush(w);

    if (!error && __atomic_load_n(&s->requests, __ATOMIC_RELAXED))
        error = sleep_answering(s, w->fd, 1, w->cancel_fd, -1);
    return error ? error : pp_writer_flush(w);
}

/* Sends up to max_pages dirty pages, at most `data_pages` (<= PP_BATCH) with content per system call, until
 * until_ns (CLOCK_MONOTONIC, 0 = no end) has passed, and a run of zero pages that was read is out. Returns how many;
 * fewer than asked, and the time not over, = nothing (of the kind asked for) is dirty now. */
int64_t pp_source_send(struct pp_source *s, uint64_t max_pages, uint32_t data_pages, int requests_only,
                       uint64_t until_ns)
{
    struct batch batch;
    uint64_t sent = 0;
    int error = 0;

    if (s->bounce && data_pages > PP_CHECKED_BATCH)
        data_pages = PP_CHECKED_BATCH;
    batch.zero_block = 0;
    batch.zero_first = batch.zero_end = 0;
    while (!error && sent < max_pages &&
           !(until_ns && sent && !in_zero_run(s, &batch) && pp_now_ns() >= until_ns)) {
        error = begin_batch(s);
        if (error)
            break;
        fill(s, &batch, max_pages - sent, data_pages, requests_only);
        if (!batch.pages)
            break;
        error = pp_writer_writev(s->writer, batch.iov, batch.vectors);
        sent += batch.pages;
    }
    return error ? error : (int64_t)sent;
}
