/* The second channel of postcopy-preempt at the source: requested pages overtake what waits in the first one.
 *
 * The thread that hears of a request sends the page. It and mig/source may want the same page: who clears the
 * dirty bit sends it. A page is marked urgent before its bit is cleared, so that nobody takes it for one that the
 * main channel has carried.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>

#include "page_pump.h"

int pp_preempt_init(struct pp_preempt *p, struct pp_writer *writer)
{
    pthread_mutex_t *lock = malloc(sizeof(*lock));

    if (!lock)
        return -ENOMEM;
    pthread_mutex_init(lock, NULL);
    p->lock = lock;
    p->writer = writer;
    p->last_block = -1;
    return 0;
}

void pp_preempt_free(struct pp_preempt *p)
{
    if (!p->lock)
        return;
    pthread_mutex_destroy(p->lock);
    free(p->lock);
    p->lock = NULL;
}

static int send_page(struct pp_preempt *p, const struct pp_block *b, int32_t index, uint64_t page)
{
    uint8_t *data = b->host + page * PP_PAGE_SIZE, header[8 + 1 + PP_NAME + 1], copy[PP_PAGE_SIZE], sum[PP_CHECKSUM];
    int zero = !pp_test(b->populated, page) || pp_is_zero_page(data);
    uint64_t word = page * PP_PAGE_SIZE | (zero ? RAM_ZERO : RAM_PAGE);
    struct iovec iov[3] = {{header, 8}};
    int vectors = 1;

    pp_put64(header, word | (index == p->last_block ? RAM_CONTINUE : 0) | (p->checks ? RAM_CHECKSUM : 0));
    if (index != p->last_block) {
        size_t name = strlen(b->name);

        header[8] = (uint8_t)name;
        memcpy(header + 9, b->name, name);
        iov[0].iov_len += 1 + name;
        p->last_block = index;
    }
    if (zero)
        header[iov[0].iov_len++] = 0;
    if (p->checks && !zero)
        data = memcpy(copy, data, PP_PAGE_SIZE);
    if (!zero)
        iov[vectors++] = (struct iovec){data, PP_PAGE_SIZE};
    if (p->checks) {
        const uint8_t *content = zero ? header + iov[0].iov_len - 1 : data;

        pp_put64(sum, pp_checksum(b->name, word, content, zero ? 1 : PP_PAGE_SIZE));
        iov[vectors++] = (struct iovec){sum, PP_CHECKSUM};
    }
    p->zero_pages += (uint64_t)zero;
    p->normal_pages += (uint64_t)!zero;
    return pp_writer_writev(p->writer, iov, vectors);
}

/* 1 = sent, or it need not be; 0 = the channel has no room now: let mig/source send it; or -errno. */
int pp_preempt_answer(struct pp_preempt *p, const struct pp_block *b, int32_t index, uint64_t page)
{
    int result = 1;

    pthread_mutex_lock(p->lock);
    if (p->ended || !pp_test(b->dirty, page)) {
        /* on its way, or there */
    } else if (pp_wait(p->writer->fd, 1, p->writer->cancel_fd, 0)) {
        result = 0;
    } else {
        pp_set_shared(b->urgent, page);
        if (pp_claim(b->dirty, page)) {
            result = send_page(p, b, index, page);
            result = result < 0 ? result : 1;
        }
    }
    pthread_mutex_unlock(p->lock);
    return result;
}

/* No page goes this way any more; says so to the peer. */
int pp_preempt_end(struct pp_preempt *p)
{
    uint8_t end[8];
    int error;

    pp_put64(end, RAM_EOS);
    pthread_mutex_lock(p->lock);
    p->ended = 1;
    error = pp_writer_put(p->writer, end, sizeof(end));
    if (!error)
        error = pp_writer_flush(p->writer);
    pthread_mutex_unlock(p->lock);
    return error;
}
