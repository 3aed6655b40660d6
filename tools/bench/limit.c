/* What the machine can do: moves memory from one process to another by the technique that Pageferry uses, and does
 * nothing else. Huge pages on both sides, writev of header/page pairs from where they are, readv that scatters them
 * to where they belong, headers compared afterwards.
 *
 * The destination is the longer half: 1 GiB took it 270 ms of CPU time, the kernel's clearing of new pages first of all,
 * the source 230. So these were no faster (medians of 5 or 6, two cores): vmsplice instead of writev, which saves the
 * source 80 to 90 ms over a unix socket and costs it three times as much over tcp; a second thread that touches the
 * destination's memory ahead of readv, which takes its core from the source; 64 records a call or 256; 0.5 to 4 MiB
 * in the socket, of which 4 is the best for tcp.
 *
 *     limit unix|tcp MIB     prints the seconds that it took
 *     limit warm MIB         touches as much memory and gives it back: the next to touch it finds it quickly
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <endian.h>
#include <netinet/in.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { PAGE = 4096, BATCH = 256, BACKLOG = 4 << 20, HUGE = 2 << 20, PAGE_FLAG = 8 };

static void check(int ok, const char *what)
{
    if (!ok) {
        perror(what);
        exit(1);
    }
}

static double now(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

static uint8_t *map(size_t length)
{
    uint8_t *p = mmap(NULL, length + HUGE, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

    check(p != MAP_FAILED, "mmap");
    p = (uint8_t *)(((uintptr_t)p + HUGE - 1) & ~(uintptr_t)(HUGE - 1));
    madvise(p, length, MADV_HUGEPAGE);
    return p;
}

static void warm(size_t length)
{
    uint8_t *p = map(length);

    memset(p, 1, length);
    munmap(p, length);
}

static void connect_pair(int tcp, int fd[2])
{
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t length = sizeof(address);
    int listener, size = BACKLOG;

    if (tcp) {
        listener = socket(AF_INET, SOCK_STREAM, 0);
        check(!bind(listener, (struct sockaddr *)&address, length) && !listen(listener, 1), "listen");
        getsockname(listener, (struct sockaddr *)&address, &length);
        fd[0] = socket(AF_INET, SOCK_STREAM, 0);
        check(!connect(fd[0], (struct sockaddr *)&address, length), "connect");
        fd[1] = accept(listener, NULL, NULL);
    } else {
        check(!socketpair(AF_UNIX, SOCK_STREAM, 0, fd), "socketpair");
    }
    setsockopt(fd[0], SOL_SOCKET, SO_SNDBUF, &size, sizeof(size));
}

/* All of the vectors, by `call` = writev or readv. */
static void move(ssize_t (*call)(int, const struct iovec *, int), int fd, struct iovec *iov, int count)
{
    while (count > 0) {
        ssize_t n = call(fd, iov, count);

        check(n > 0, "the channel");
        for (; count > 0 && (size_t)n >= iov->iov_len; iov++, count--)
            n -= (ssize_t)iov->iov_len;
        if (count > 0) {
            iov->iov_base = (uint8_t *)iov->iov_base + n;
            iov->iov_len -= (size_t)n;
        }
    }
}

static int vectors(struct iovec *iov, uint64_t *headers, uint8_t *memory, size_t first, size_t pages)
{
    int count = 0;

    for (size_t i = 0; i < BATCH && first + i < pages; i++) {
        iov[count++] = (struct iovec){&headers[i], sizeof(headers[i])};
        iov[count++] = (struct iovec){memory + (first + i) * PAGE, PAGE};
    }
    return count;
}

static void send_all(int fd, uint8_t *memory, size_t pages)
{
    struct iovec iov[2 * BATCH];
    uint64_t headers[BATCH];

    for (size_t first = 0; first < pages; first += BATCH) {
        int count = vectors(iov, headers, memory, first, pages);

        for (int i = 0; i < count / 2; i++) {
            headers[i] = htobe64((first + (size_t)i) * PAGE | PAGE_FLAG);
            check(*(volatile uint64_t *)iov[2 * i + 1].iov_base != 0, "a page that is not zero");
        }
        move(writev, fd, iov, count);
    }
}

static void receive_all(int fd, uint8_t *memory, size_t pages)
{
    struct iovec iov[2 * BATCH];
    uint64_t headers[BATCH];

    for (size_t first = 0; first < pages; first += BATCH) {
        int count = vectors(iov, headers, memory, first, pages);

        move(readv, fd, iov, count);
        for (int i = 0; i < count / 2; i++)
            check(headers[i] == htobe64((first + (size_t)i) * PAGE | PAGE_FLAG), "the headers");
    }
}

int main(int count, char **words)
{
    size_t length = count > 2 ? strtoul(words[2], NULL, 10) << 20 : 0;
    uint8_t *memory, *copy;
    double started;
    pid_t child;
    int fd[2];

    check(length > 0, "usage: limit unix|tcp|warm MIB");
    if (!strcmp(words[1], "warm")) {
        warm(length);
        return 0;
    }
    memory = map(length);
    for (size_t at = 0; at < length; at += 256)
        *(uint64_t *)(memory + at) = at + 1;
    warm(length + length / 2);
    connect_pair(!strcmp(words[1], "tcp"), fd);
    started = now();
    child = fork();
    check(child >= 0, "fork");
    if (child == 0) {
        send_all(fd[0], memory, length / PAGE);
        _exit(0);
    }
    copy = map(length);
    receive_all(fd[1], copy, length / PAGE);
    printf("%.6f\n", now() - started);
    waitpid(child, NULL, 0);
    return memcmp(memory, copy, length) ? 1 : 0;
}
