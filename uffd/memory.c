/* Mapping memory, giving it back, and touching it by address. Any touch may wait for a page, for as
 * long as it takes: cffi calls all of this with the GIL released. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/falloc.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "bits.h"

#include "api.h"

static void *at(uint64_t address)
{
    return (void *)(uintptr_t)address;
}

/* Map `length` bytes at a multiple of `alignment`: anonymous memory if fd < 0. The reservation around
 * it makes the alignment, and leaves an unmapped page or more on both sides: an access that runs
 * over the end of guest RAM ends in SIGSEGV, not in the next block. */
int memory_map(uint64_t length, uint64_t alignment, int fd, int shared, uint64_t *address)
{
    const uint64_t page = 4096;
    uint64_t room = length + alignment + 2 * page;
    if (room < length)
        return -ENOMEM;
    void *place = mmap(NULL, room, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (place == MAP_FAILED)
        return -errno;
    uint64_t low = (uint64_t)(uintptr_t)place;
    uint64_t start = (low + page + alignment - 1) / alignment * alignment;
    int flags = MAP_FIXED | MAP_NORESERVE | (shared ? MAP_SHARED : MAP_PRIVATE);
    if (fd < 0)
        flags |= MAP_ANONYMOUS;
    if (mmap(at(start), length, PROT_READ | PROT_WRITE, flags, fd, 0) == MAP_FAILED) {
        int error = errno;
        munmap(place, room);
        return -error;
    }
    if (start - page > low)
        munmap(place, start - page - low);
    if (low + room > start + length + page)
        munmap(at(start + length + page), low + room - (start + length + page));
    *address = start;
    return 0;
}

/* With the two pages kept free around it. */
int memory_unmap(uint64_t address, uint64_t length)
{
    return munmap(at(address - 4096), length + 2 * 4096) < 0 ? -errno : 0;
}

int memory_advise(uint64_t address, uint64_t length, int advice)
{
    return madvise(at(address), length, advice) < 0 ? -errno : 0;
}

int memory_punch_hole(int fd, uint64_t offset, uint64_t length)
{
    int mode = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE;
    while (fallocate(fd, mode, (off_t)offset, (off_t)length) < 0) {
        if (errno != EINTR)
            return -errno;
    }
    return 0;
}

/* OR the pages of [offset, offset + length) of a memfd that hold data into the bitmap (bit 0 is the page
 * at `offset`); returns how many bits are new. Data that is swapped out counts. */
int64_t memory_find_data(int fd, uint64_t offset, uint64_t length, uint64_t bitmap)
{
    off_t end = (off_t)(offset + length);
    int64_t fresh = 0;
    for (off_t position = (off_t)offset; position < end;) {
        off_t data = lseek(fd, position, SEEK_DATA);
        if (data < 0)
            return errno == ENXIO ? fresh : -errno; /* ENXIO: nothing but a hole from here on */
        if (data >= end)
            break;
        off_t hole = lseek(fd, data, SEEK_HOLE);
        if (hole < 0 && errno == ENXIO) { /* punched in the meantime */
            position = data + 4096;
            continue;
        }
        if (hole < 0)
            return -errno;
        hole = hole < end ? hole : end;
        uint64_t first = ((uint64_t)data - offset) / 4096;
        uint64_t last = ((uint64_t)hole - offset + 4095) / 4096;
        fresh += bits_set(at(bitmap), first, last - first);
        position = hole > data ? hole : data + 4096;
    }
    return fresh;
}

void memory_read(void *destination, uint64_t source, uint64_t length)
{
    memcpy(destination, at(source), length);
}

void memory_write(uint64_t destination, const void *source, uint64_t length)
{
    memcpy(at(destination), source, length);
}

void memory_fill(uint64_t destination, int value, uint64_t length)
{
    memset(at(destination), value, length);
}

int memory_is_equal(uint64_t address, const void *other, uint64_t length)
{
    return memcmp(at(address), other, length) == 0;
}

int memory_is_zero(uint64_t address, uint64_t length)
{
    const unsigned char *bytes = at(address);
    /* Equal to itself one byte on, and the first byte is zero. */
    return length == 0 || (bytes[0] == 0 && memcmp(bytes, bytes + 1, length - 1) == 0);
}
