/* One function for each thing userfaultfd can do. No policy: who calls decides what an errno means. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "kernel.h"

#include "api.h"

/* Through the device node, whose file mode is then what decides who may (Linux 6.1). */
int uffd_open_device(int flags)
{
    int device = open("/dev/userfaultfd", O_RDWR | O_CLOEXEC);
    if (device < 0)
        return -errno;
    int fd = ioctl(device, USERFAULTFD_IOC_NEW, O_CLOEXEC | O_NONBLOCK | flags);
    int error = errno;
    close(device);
    return fd < 0 ? -error : fd;
}

int uffd_open_syscall(int flags)
{
    long fd = syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | flags);
    return fd < 0 ? -errno : (int)fd;
}

/* A descriptor shakes hands once. wanted = 0 asks for the mask of all features, on a throw-away one. */
int uffd_handshake(int fd, uint64_t wanted, uint64_t *supported)
{
    struct pf_uffdio_api arg = {.api = UFFD_API, .features = wanted};
    if (ioctl(fd, UFFDIO_API, &arg) < 0)
        return -errno;
    *supported = arg.features;
    return 0;
}

/* Out of the way of small numbers, so that a stray close() of a wrong number does not hit it, and still among the
 * 64 that every process has room for: to make room for more waits for RCU, 15 ms in a process with threads. */
int uffd_duplicate(int fd)
{
    int copy = fcntl(fd, F_DUPFD_CLOEXEC, 48);
    if (copy < 0 && errno == EINVAL) /* RLIMIT_NOFILE is below that */
        copy = fcntl(fd, F_DUPFD_CLOEXEC, 3);
    return copy < 0 ? -errno : copy;
}

int uffd_close(int fd)
{
    return close(fd) < 0 ? -errno : 0;
}

int uffd_register(int fd, uint64_t start, uint64_t length, uint64_t mode)
{
    struct pf_uffdio_register arg = {.range = {start, length}, .mode = mode};
    return ioctl(fd, UFFDIO_REGISTER, &arg) < 0 ? -errno : 0;
}

int uffd_unregister(int fd, uint64_t start, uint64_t length)
{
    struct pf_uffdio_range arg = {start, length};
    return ioctl(fd, UFFDIO_UNREGISTER, &arg) < 0 ? -errno : 0;
}

int uffd_wake(int fd, uint64_t start, uint64_t length)
{
    struct pf_uffdio_range arg = {start, length};
    return ioctl(fd, UFFDIO_WAKE, &arg) < 0 ? -errno : 0;
}

/* The kernel reports progress and failure in one signed field: bytes done, with EAGAIN as the ioctl's
 * errno when it stopped early; or the -errno of the very first page, then also in errno. */
static int progress(int result, int error, int64_t field, uint64_t *done)
{
    *done = field > 0 ? (uint64_t)field : 0;
    return result < 0 ? -error : 0;
}

int uffd_copy(int fd, uint64_t destination, uint64_t source, uint64_t length, uint64_t mode, uint64_t *done)
{
    struct pf_uffdio_copy arg = {.dst = destination, .src = source, .len = length, .mode = mode};
    int result = ioctl(fd, UFFDIO_COPY, &arg);
    return progress(result, errno, arg.copy, done);
}

int uffd_zeropage(int fd, uint64_t start, uint64_t length, uint64_t mode, uint64_t *done)
{
    struct pf_uffdio_zeropage arg = {.range = {start, length}, .mode = mode};
    int result = ioctl(fd, UFFDIO_ZEROPAGE, &arg);
    return progress(result, errno, arg.zeropage, done);
}

int uffd_poison(int fd, uint64_t start, uint64_t length, uint64_t *done)
{
    struct pf_uffdio_poison arg = {.range = {start, length}};
    int result = ioctl(fd, UFFDIO_POISON, &arg);
    return progress(result, errno, arg.updated, done);
}

/* Goes on by itself on EAGAIN, which says that the address space was just being changed. */
int uffd_writeprotect(int fd, uint64_t start, uint64_t length, uint64_t mode)
{
    struct pf_uffdio_writeprotect arg = {.range = {start, length}, .mode = mode};
    while (ioctl(fd, UFFDIO_WRITEPROTECT, &arg) < 0) {
        if (errno != EAGAIN)
            return -errno;
    }
    return 0;
}

/* Up to `capacity` (at most 64) waiting messages; 0 if there is none. */
int uffd_read_faults(int fd, struct uffd_fault *faults, int capacity)
{
    struct pf_uffd_msg messages[64];
    size_t room = capacity < 64 ? (size_t)capacity : 64;
    ssize_t got = read(fd, messages, room * sizeof messages[0]);
    if (got < 0)
        return errno == EAGAIN ? 0 : -errno;
    int count = (int)((size_t)got / sizeof messages[0]);
    for (int i = 0; i < count; i++) {
        faults[i].event = messages[i].event;
        faults[i].address = messages[i].arg.pagefault.address;
        faults[i].flags = messages[i].arg.pagefault.flags;
        faults[i].thread_id = messages[i].arg.pagefault.ptid;
    }
    return count;
}
