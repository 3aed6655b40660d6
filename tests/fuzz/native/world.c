/* What the page pump sees instead of the kernel: descriptors that deliver the input in pieces, a userfaultfd
 * that keeps to the kernel's rules and now and then refuses, and RAMBlocks between pages nobody may touch.
 *
 * Linked with -Wl,--wrap for each call below; the pump is compiled as it is.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <unistd.h>

#include "fuzz.h"

enum { CALLS_MAX = 200000, MAPS = 7 };

struct world world;

static const uint64_t PAGES[BLOCKS] = {67, 1, 130};
static uint8_t *present[BLOCKS];  /* of the simulated userfaultfd: one byte a page */

static size_t words(uint64_t pages) { return (pages + 63) / 64; }

void world_make(void)
{
    for (int i = 0; i < BLOCKS; i++) {
        struct pp_block *b = &world.blocks[i];
        size_t length = PAGES[i] * PP_PAGE_SIZE;
        uint8_t *all = mmap(NULL, length + 2 * PP_PAGE_SIZE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        uint64_t **maps[MAPS] = {&b->dirty, &b->sent, &b->populated, &b->queued, &b->received, &b->requested,
                                 &b->zero};

        if (all == MAP_FAILED || mprotect(all + PP_PAGE_SIZE, length, PROT_READ | PROT_WRITE))
            fail("no memory for a RAMBlock");
        b->host = all + PP_PAGE_SIZE;
        b->pages = PAGES[i];
        b->fd = -1;
        for (int m = 0; m < MAPS; m++)
            *maps[m] = malloc(8 * words(b->pages));
        present[i] = malloc(b->pages);
    }
    strcpy(world.blocks[0].name, "ram");
    strcpy(world.blocks[1].name, "b");
    memset(world.blocks[2].name, 'n', 255);
}

void world_reset(const uint8_t *choices, const uint8_t *stream, size_t length)
{
    uint64_t seed;

    memcpy(&seed, choices, sizeof(seed));
    for (int i = 0; i < BLOCKS; i++) {
        struct pp_block *b = &world.blocks[i];
        size_t size = 8 * words(b->pages);

        madvise(b->host, b->pages * PP_PAGE_SIZE, MADV_DONTNEED);
        memset(b->dirty, 0, size), memset(b->sent, 0, size), memset(b->populated, 0, size);
        memset(b->queued, 0, size), memset(b->received, 0, size), memset(b->requested, 0, size);
        memset(b->zero, 0, size), memset(present[i], 0, b->pages);
    }
    world.choices.state = seed | 1;
    world.stream = stream;
    world.length = length;
    world.at = world.calls = world.written = world.second_at = world.second_length = 0;
    world.is_listening = 0;
    world.is_hostile = one_in(&world.choices, 4);
    world.end_error = one_in(&world.choices, 4) ? ECONNRESET : 0;
}

/* An exact heap block, so that one byte beyond it is found. */
uint8_t *world_reader_buffer(uint32_t size)
{
    static uint8_t *buffer;

    free(buffer);
    return buffer = malloc(size);
}

void world_check(int is_destination)
{
    for (int i = 0; i < BLOCKS; i++) {
        struct pp_block *b = &world.blocks[i];
        uint64_t *maps[MAPS] = {b->dirty, b->sent, b->populated, b->queued, b->received, b->requested, b->zero};

        for (int m = 0; m < MAPS; m++) {
            if (b->pages % 64 && maps[m][b->pages / 64] >> b->pages % 64)
                fail("map %d of block %d has a bit beyond its last page", m, i);
        }
        for (uint64_t page = 0; is_destination && page < b->pages; page++) {
            int received = pp_test(b->received, page), zero = pp_test(b->zero, page);

            if (received && pp_test(b->requested, page))
                fail("page %d/%lu is both received and requested", i, (unsigned long)page);
            if (zero && !received)
                fail("page %d/%lu is a zero page that was not received", i, (unsigned long)page);
            if (world.is_listening && received != (present[i][page] || zero))
                fail("page %d/%lu: received %d, present %d, zero %d", i, (unsigned long)page, received,
                     present[i][page], zero);
        }
    }
}

static int find_page(uint64_t address, uint64_t length, uint64_t *page)
{
    for (int i = 0; i < BLOCKS; i++) {
        uint64_t start = (uintptr_t)world.blocks[i].host, size = world.blocks[i].pages * PP_PAGE_SIZE;

        if (address >= start && address - start < size && length <= size - (address - start)) {
            *page = (address - start) / PP_PAGE_SIZE;
            return i;
        }
    }
    fail("a page outside every RAMBlock: %#lx and %#lx bytes", (unsigned long)address, (unsigned long)length);
}

static void count_call(void)
{
    if (++world.calls > CALLS_MAX)
        fail("it does not end: %u system calls", world.calls);
}

static int refuses(int error)
{
    if (!world.is_hostile || !one_in(&world.choices, 40))
        return 0;
    errno = error;
    return 1;
}

/* ---- the calls ---- */

int __real_ioctl(int fd, unsigned long request, void *argument);
ssize_t __real_read(int fd, void *out, size_t size);
ssize_t __real_readv(int fd, const struct iovec *iov, int count);
ssize_t __real_write(int fd, const void *bytes, size_t size);
ssize_t __real_writev(int fd, const struct iovec *iov, int count);
int __real_poll(struct pollfd *fds, nfds_t count, int timeout);
int __real_madvise(void *address, size_t length, int advice);

/* As the kernel does it: it stops at the first page that is present, and says how far it came. */
static int place(uint64_t address, uint64_t length, const uint8_t *data, int64_t *done)
{
    uint64_t page, count = length / PP_PAGE_SIZE, at = 0;
    int block, error = 0;

    if (!count || length % PP_PAGE_SIZE || address % PP_PAGE_SIZE)
        fail("not whole pages: %#lx bytes at %#lx", (unsigned long)length, (unsigned long)address);
    block = find_page(address, length, &page);
    for (; at < count && !error; at += !error) {
        if (refuses(one_in(&world.choices, 2) ? EAGAIN : ENOENT))
            error = errno;
        else if (present[block][page + at])
            error = EEXIST;
        else if (data)
            memcpy((void *)(uintptr_t)(address + at * PP_PAGE_SIZE), data + at * PP_PAGE_SIZE, PP_PAGE_SIZE);
        if (!error)
            present[block][page + at] = 1;
    }
    *done = at ? (int64_t)(at * PP_PAGE_SIZE) : -error;
    errno = at ? EAGAIN : error;
    return error ? -1 : 0;
}

int __wrap_ioctl(int fd, unsigned long request, void *argument)
{
    uint64_t page;

    if (fd != FD_UFFD)
        return __real_ioctl(fd, request, argument);
    count_call();
    switch (request) {
    case UFFDIO_COPY: {
        struct uffdio_copy *copy = argument;

        return place(copy->dst, copy->len, (const uint8_t *)(uintptr_t)copy->src, (int64_t *)&copy->copy);
    }
    case UFFDIO_ZEROPAGE: {
        struct uffdio_zeropage *zero = argument;

        return place(zero->range.start, zero->range.len, NULL, (int64_t *)&zero->zeropage);
    }
    case UFFDIO_WAKE: {
        struct uffdio_range *range = argument;

        find_page(range->start, range->len, &page);
        return 0;
    }
    }
    fail("an ioctl that is not simulated: %#lx", request);
}

static ssize_t read_faults(struct uffd_msg *messages, size_t size)
{
    size_t count = below(&world.choices, 3) ? 0 : 1 + below(&world.choices, size / sizeof(*messages));

    if (world.at == world.length || !count) {  /* the stream's end ends the input: no fault after it */
        errno = EAGAIN;
        return -1;
    }
    memset(messages, 0, count * sizeof(*messages));
    for (size_t i = 0; i < count; i++) {
        struct pp_block *b = &world.blocks[below(&world.choices, BLOCKS)];
        uint64_t offset = below(&world.choices, b->pages * PP_PAGE_SIZE);

        messages[i].event = one_in(&world.choices, 50) ? UFFD_EVENT_REMOVE : UFFD_EVENT_PAGEFAULT;
        messages[i].arg.pagefault.address = (uintptr_t)b->host + offset;
        messages[i].arg.pagefault.feat.ptid = (uint32_t)below(&world.choices, 3);
        if (world.is_hostile && one_in(&world.choices, 100))
            messages[i].arg.pagefault.address = next(&world.choices);
    }
    return (ssize_t)(count * sizeof(*messages));
}

static ssize_t read_stream(const uint8_t *stream, size_t length, size_t *at, const struct iovec *iov, int count)
{
    size_t left = length - *at, part, taken = 0;

    count_call();
    if (!left) {
        errno = world.end_error;  /* a socket tells its error once, then it is at its end */
        world.end_error = 0;
        return errno ? -1 : 0;
    }
    if (one_in(&world.choices, 8)) {
        errno = one_in(&world.choices, 4) ? EINTR : EAGAIN;
        return -1;
    }
    part = one_in(&world.choices, 2) ? 1 + below(&world.choices, 40) : 1 + below(&world.choices, 20000);
    part = part < left ? part : left;
    for (int i = 0; i < count && taken < part; i++) {
        size_t n = iov[i].iov_len < part - taken ? iov[i].iov_len : part - taken;

        memcpy(iov[i].iov_base, stream + *at, n);
        *at += n;
        taken += n;
    }
    return (ssize_t)taken;
}

ssize_t __wrap_read(int fd, void *out, size_t size)
{
    struct iovec iov = {out, size};

    if (fd == FD_READER)
        return read_stream(world.stream, world.length, &world.at, &iov, 1);
    if (fd == FD_PREEMPT)
        return read_stream(world.second, world.second_length, &world.second_at, &iov, 1);
    if (fd != FD_UFFD)
        return __real_read(fd, out, size);
    count_call();
    return read_faults(out, size);
}

ssize_t __wrap_readv(int fd, const struct iovec *iov, int count)
{
    if (fd == FD_READER)
        return read_stream(world.stream, world.length, &world.at, iov, count);
    return __real_readv(fd, iov, count);
}

ssize_t __wrap_write(int fd, const void *bytes, size_t size)
{
    struct iovec iov = {(void *)bytes, size};

    return fd == FD_RETURN || fd == FD_WRITER ? writev(fd, &iov, 1) : __real_write(fd, bytes, size);
}

ssize_t __wrap_writev(int fd, const struct iovec *iov, int count)
{
    volatile uint8_t sum = 0;
    size_t taken = 0, room = 1 + below(&world.choices, 100000);

    if (fd != FD_RETURN && fd != FD_WRITER)
        return __real_writev(fd, iov, count);
    count_call();
    if (one_in(&world.choices, 16)) {
        errno = EAGAIN;
        return -1;
    }
    if (refuses(EPIPE))
        return -1;
    for (int i = 0; i < count; i++) {
        for (size_t j = 0; j < iov[i].iov_len && taken < room; j++, taken++)
            sum = (uint8_t)(sum + ((const uint8_t *)iov[i].iov_base)[j]);  /* the kernel reads each byte */
    }
    world.written += taken;
    return (ssize_t)taken;
}

int __wrap_poll(struct pollfd *fds, nfds_t count, int timeout)
{
    count_call();
    for (nfds_t i = 0; i < count; i++) {
        fds[i].revents = fds[i].fd < 0 || fds[i].fd == FD_CANCEL || fds[i].fd == FD_KICK ? 0 : fds[i].events;
        if (fds[i].fd == FD_KICK && (world.at == world.length || one_in(&world.choices, 60)))
            fds[i].revents = POLLIN;
        if (fds[i].fd == FD_CANCEL && world.is_hostile && one_in(&world.choices, 60))
            fds[i].revents = POLLIN;
    }
    return timeout < 0 || !world.is_hostile || !one_in(&world.choices, 60) ? 1 : 0;
}

int __wrap_madvise(void *address, size_t length, int advice)
{
    uint64_t page;
    int block = find_page((uintptr_t)address, length, &page);

    if (advice != MADV_DONTNEED)
        fail("an madvise that is not simulated: %d", advice);
    memset(&present[block][page], 0, length / PP_PAGE_SIZE);
    return __real_madvise(address, length, advice);
}
