/* Which pages of this process are there, and which were written: /proc/self/pagemap into bitmaps. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <unistd.h>

#include "bits.h"
#include "kernel.h"

#include "api.h"

enum { PAGE_SHIFT = 12, REGIONS = 512, ENTRIES = 4096 };

/* The descriptor speaks of the process that opened it, also after a fork: open it late. */
int pagemap_open(void)
{
    int fd = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
    return fd < 0 ? -errno : fd;
}

/* OR the pages of [start, start + length) that have all of `mask` and one of `any_of` (0 = no such
 * condition) into the bitmap, whose bit 0 is the page at `start`; returns how many bits are new.
 * PM_SCAN_WP_MATCHING in `flags` write-protects each of them in the same step. A full vector ends one
 * ioctl early, so it goes on until the kernel's walk has reached the end.
 *
 * `known` (0 = none) is a bitmap of the pages that were reported before. A page outside of it that is
 * mapped to the kernel's page of zeroes was read for the first time, not written: it is left out. A known
 * one is not, since the kernel may turn a page that was written with zeroes into that page (the shrinker
 * of huge pages does, mm/huge_memory.c). What is reported becomes known. */
int64_t pagemap_scan(int fd, uint64_t start, uint64_t length, uint64_t flags, uint64_t mask,
                     uint64_t any_of, uint64_t bitmap, uint64_t known)
{
    uint64_t *found = (uint64_t *)(uintptr_t)bitmap;
    uint64_t *before = (uint64_t *)(uintptr_t)known;
    struct pf_page_region regions[REGIONS];
    struct pf_pm_scan_arg arg = {
        .size = sizeof arg,
        .flags = flags,
        .start = start,
        .end = start + length,
        .vec = (uint64_t)(uintptr_t)regions,
        .vec_len = REGIONS,
        .category_mask = mask,
        .category_anyof_mask = any_of,
        .return_mask = mask | any_of | (known ? PAGE_IS_PFNZERO : 0),
    };
    int64_t fresh = 0;
    while (arg.start < arg.end) {
        arg.walk_end = 0;
        int count = ioctl(fd, PAGEMAP_SCAN, &arg);
        if (count < 0)
            return -errno;
        for (int i = 0; i < count; i++) {
            uint64_t first = (regions[i].start - start) >> PAGE_SHIFT;
            uint64_t pages = (regions[i].end - regions[i].start) >> PAGE_SHIFT;
            if (before != NULL && regions[i].categories & PAGE_IS_PFNZERO) {
                fresh += bits_set_masked(found, before, first, pages);
                continue;
            }
            fresh += bits_set(found, first, pages);
            if (before != NULL)
                bits_set(before, first, pages);
        }
        if (arg.walk_end <= arg.start || arg.walk_end > arg.end)
            return -EIO; /* no progress: asking again would never end */
        arg.start = arg.walk_end;
    }
    return fresh;
}

/* The same for kernels before 6.7, by reading one 64-bit entry a page: those with any bit of
 * `entry_flags` (63: present, 62: swapped; Documentation/admin-guide/mm/pagemap.rst). */
int64_t pagemap_read(int fd, uint64_t start, uint64_t length, uint64_t entry_flags, uint64_t bitmap)
{
    uint64_t entries[ENTRIES];
    uint64_t pages = length >> PAGE_SHIFT;
    int64_t fresh = 0;
    for (uint64_t page = 0; page < pages;) {
        uint64_t want = pages - page < ENTRIES ? pages - page : ENTRIES;
        off_t offset = (off_t)(((start >> PAGE_SHIFT) + page) * sizeof entries[0]);
        ssize_t got = pread(fd, entries, want * sizeof entries[0], offset);
        if (got < 0)
            return -errno;
        if (got == 0)
            return -EIO;
        uint64_t count = (uint64_t)got / sizeof entries[0];
        for (uint64_t i = 0; i < count; i++) {
            if (entries[i] & entry_flags)
                fresh += bits_set((uint64_t *)(uintptr_t)bitmap, page + i, 1);
        }
        page += count;
    }
    return fresh;
}
