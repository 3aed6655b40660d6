/* The keeper: a process that holds the source's RAM, and saves what is owed when the source is killed.
 *
 * It is a fork of the source after the hand-over, when no page of the guest changes any more: all pages are
 * shared, nothing is copied but page tables. It sleeps on a pipe whose other end only the source has open:
 *
 *     a byte      the destination has everything: end
 *     end of file the source is gone without that byte: write the spool, give it its name, end
 *
 * Between fork and _exit it makes system calls only: other threads of the source may have held any lock.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "page_pump.h"

#define CHUNK_PAGES 2048u /* 8 MiB: at most 128 mappings more for a GiB, until the fork is done */

static int write_all(int fd, const uint8_t *data, uint64_t length, uint64_t at)
{
    while (length > 0) {
        ssize_t n = pwrite(fd, data, length, (off_t)at);

        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0)
            return n < 0 ? -errno : -EIO;
        data += n;
        length -= (uint64_t)n;
        at += (uint64_t)n;
    }
    return 0;
}

/* Owed pages at the offset of their RAMBlock; between them the file is a hole. */
static int write_block(int fd, const struct pp_spool_block *b)
{
    int error = write_all(fd, (const uint8_t *)b->owed, (b->pages + 63) / 64 * 8, b->owed_at);
    uint64_t page = pp_bitmap_find(b->owed, b->pages, 0, 1);

    while (!error && page < b->pages) {
        uint64_t end = pp_bitmap_find(b->owed, b->pages, page, 0);

        error = write_all(fd, b->host + page * PP_PAGE_SIZE, (end - page) * PP_PAGE_SIZE,
                          b->pages_at + page * PP_PAGE_SIZE);
        page = pp_bitmap_find(b->owed, b->pages, end, 1);
    }
    return error;
}

static int write_spool(const struct pp_spool *s)
{
    int fd = open(s->unfinished, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600), error;

    if (fd < 0)
        return -errno;
    error = ftruncate(fd, (off_t)s->length) ? -errno : 0;
    for (uint32_t i = 0; i < s->block_count && !error; i++)
        error = write_block(fd, &s->blocks[i]);
    if (!error)
        error = write_all(fd, s->header, s->header_length, 0);
    if (!error && fsync(fd))
        error = -errno;
    close(fd);
    if (!error && rename(s->unfinished, s->path))
        error = -errno;
    if (error)
        unlink(s->unfinished);
    return error;
}

static void keep(const struct pp_spool *s, int fd)
{
    uint8_t word;
    ssize_t n;

    prctl(PR_SET_NAME, "pageferry-keep");
    setsid();
    for (int signal_number = 1; signal_number < 32; signal_number++)
        signal(signal_number, signal_number == SIGCHLD ? SIG_DFL : SIG_IGN);
    if (fd > 0)
        syscall(SYS_close_range, 0u, (unsigned)fd - 1, 0u);
    syscall(SYS_close_range, (unsigned)fd + 1, ~0u, 0u);
    do
        n = read(fd, &word, 1);
    while (n < 0 && errno == EINTR);
    _exit(n == 1 ? 0 : write_spool(s) ? 1 : 0);
}

/* What is owed, in whole chunks: what fork costs is page tables. */
static int let_fork(const struct pp_spool_block *b)
{
    uint64_t page = pp_bitmap_find(b->owed, b->pages, 0, 1);

    while (page < b->pages) {
        uint64_t first = page / CHUNK_PAGES * CHUNK_PAGES, end = page;

        do {
            end = (end / CHUNK_PAGES + 1) * CHUNK_PAGES;
            page = end < b->pages ? pp_bitmap_find(b->owed, b->pages, end, 1) : b->pages;
        } while (page < b->pages && page - end < CHUNK_PAGES);
        if (end > b->pages)
            end = b->pages;
        if (madvise(b->host + first * PP_PAGE_SIZE, (end - first) * PP_PAGE_SIZE, MADV_DOFORK))
            return -errno;
    }
    return 0;
}

/* Starts the keeper; its process id. The caller keeps `keeper_fd`'s other end open, and waits for the process. */
int pp_keeper_start(const struct pp_spool *s, int keeper_fd)
{
    int error = 0;
    pid_t child;

    for (uint32_t i = 0; i < s->block_count && !error; i++)
        error = let_fork(&s->blocks[i]);
    child = error ? -1 : fork();
    if (child == 0)
        keep(s, keeper_fd);
    if (child < 0 && !error)
        error = -errno;
    for (uint32_t i = 0; i < s->block_count; i++)
        madvise(s->blocks[i].host, s->blocks[i].pages * PP_PAGE_SIZE, MADV_DONTFORK);
    return error ? error : child;
}
