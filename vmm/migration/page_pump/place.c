/* The destination's side from LISTEN on: pages to where they belong, and the faults of who waits for them.
 *
 * Page states: missing, requested, received (received bit = 1 and requested bit = 0). A page received as zero
 * that nothing has touched is left absent with its `zero` bit set: a fault on it is answered here, by ZEROPAGE,
 * and when the range is unregistered the kernel's own zero page is the right content. A fault on any other
 * received page that is absent would be a lost page, and is an error (design rule 6).
 */
#include <errno.h>
#include <linux/userfaultfd.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include "destination.h"

static int fault_error(struct pp_destination *d, uint32_t bad, uint64_t value, int error)
{
    pp_bad(&d->fault, bad, value, d->reader->offset);
    return error;
}

static int wake(struct pp_destination *d, uint64_t address)
{
    struct uffdio_range range = {address, PP_PAGE_SIZE};

    return ioctl(d->uffd, UFFDIO_WAKE, &range) ? -errno : 0;
}

/* 0, or -errno. EAGAIN = the address space is changing under us (or nothing was done): try again. */
static int copy_page(struct pp_destination *d, uint64_t address, const uint8_t *data)
{
    struct uffdio_copy copy = {.dst = address, .src = (uintptr_t)data, .len = PP_PAGE_SIZE};

    while (ioctl(d->uffd, UFFDIO_COPY, &copy)) {
        if (errno != EAGAIN)
            return -errno;
        copy.copy = 0;
    }
    return 0;
}

static int zero_page(struct pp_destination *d, uint64_t address)
{
    struct uffdio_zeropage zero = {.range = {address, PP_PAGE_SIZE}};

    while (ioctl(d->uffd, UFFDIO_ZEROPAGE, &zero)) {
        if (errno != EAGAIN)
            return -errno;
        zero.zeropage = 0;
    }
    return 0;
}

/* data == NULL: a zero page. The received bit is set only after the kernel has taken the page. */
int pp_place(struct pp_destination *d, uint64_t page, const uint8_t *data)
{
    struct pp_block *b = &d->blocks[d->last_block];
    uint64_t address = (uintptr_t)b->host + page * PP_PAGE_SIZE;
    int requested = pp_test(b->requested, page), error;

    if (pp_test(b->received, page)) {
        d->duplicates++;  /* the guest may have written to it since: the newer content stays */
        return 0;
    }
    if (!data && !requested) {
        pp_set(b->zero, page);
    } else {
        error = data ? copy_page(d, address, data) : zero_page(d, address);
        if (error == -EEXIST)
            return fault_error(d, PP_BAD_PRESENT, page * PP_PAGE_SIZE, -EEXIST);
        if (error)
            return error;
    }
    pp_set(b->received, page);
    if (requested) {
        pp_clear(b->requested, page);
        pp_wait_end(d, address);
    }
    d->normal_pages += data != NULL;
    d->zero_pages += data == NULL;
    return 0;
}

/* The pages of a run, side by side in d->staging, with one call to the kernel; if it refuses, one by one. */
int pp_place_run(struct pp_destination *d, uint64_t first, uint64_t count)
{
    struct pp_block *b = &d->blocks[d->last_block];
    uint64_t address = (uintptr_t)b->host + first * PP_PAGE_SIZE, end = first + count, placed = 0;
    struct uffdio_copy copy = {.dst = address, .src = (uintptr_t)d->staging, .len = count * PP_PAGE_SIZE};

    if (count > 1 && pp_bitmap_find(b->received, end, first, 1) == end) {
        ioctl(d->uffd, UFFDIO_COPY, &copy);
        placed = copy.copy > 0 ? (uint64_t)copy.copy / PP_PAGE_SIZE : 0;
    }
    pp_bitmap_set_range(b->received, first, placed);
    d->normal_pages += placed;
    for (uint64_t page = pp_bitmap_find(b->requested, first + placed, first, 1); page < first + placed;
         page = pp_bitmap_find(b->requested, first + placed, page + 1, 1)) {
        pp_clear(b->requested, page);
        pp_wait_end(d, (uintptr_t)b->host + page * PP_PAGE_SIZE);
    }
    for (uint64_t page = first + placed; page < end; page++) {
        int error = pp_place(d, page, d->staging + (page - first) * PP_PAGE_SIZE);

        if (error)
            return error;
    }
    return 0;
}

/* A received page that faults: absent on purpose (zero), or the kernel's message is older than the answer and
 * a WAKE is all it takes. The same page again and again after a WAKE is absent: lost. It is not filled in. */
static int serve_received(struct pp_destination *d, struct pp_block *b, uint64_t page, uint64_t address)
{
    int error;

    d->served_locally++;
    if (!pp_test(b->zero, page)) {
        d->wakes = d->last_woken == address ? d->wakes + 1 : 1;
        d->last_woken = address;
        if (d->wakes > PP_WAKES)
            return fault_error(d, PP_BAD_LOST, page * PP_PAGE_SIZE, -EFAULT);
        return wake(d, address);
    }
    error = zero_page(d, address);
    if (error == -EEXIST)
        error = wake(d, address);
    if (!error)
        pp_clear(b->zero, page);
    return error;
}

static int serve_fault(struct pp_destination *d, uint64_t address, uint32_t thread)
{
    for (uint32_t i = 0; i < d->block_count; i++) {
        struct pp_block *b = &d->blocks[i];
        uint64_t page = (address - (uintptr_t)b->host) / PP_PAGE_SIZE;

        if (address < (uintptr_t)b->host || page >= b->pages)
            continue;
        address &= ~(uint64_t)(PP_PAGE_SIZE - 1);
        d->faults++;
        if (pp_test(b->received, page)) {
            uint64_t since = pp_now_ns();
            int error = serve_received(d, b, page, address);

            d->vcpu_blocked_ns += thread && thread == d->vcpu_thread ? pp_now_ns() - since : 0;
            return error;
        }
        pp_wait_begin(d, address, thread);
        if (pp_test(b->requested, page))
            return 0;
        pp_set(b->requested, page);
        d->requests++;
        return d->quiet ? 0 : pp_return_path_request(d->rp, d->blocks, (int32_t)i, page, 1);
    }
    return fault_error(d, PP_BAD_FAULT, address, -EFAULT);
}

/* What was read is gone from the descriptor: all of it is noted, also when asking for the first page failed. */
int pp_serve_faults(struct pp_destination *d)
{
    struct uffd_msg messages[16];
    ssize_t n = read(d->uffd, messages, sizeof(messages));
    int first_error = 0;

    if (n < 0)
        return errno == EAGAIN || errno == EINTR ? 0 : -errno;
    for (size_t i = 0; i < (size_t)n / sizeof(messages[0]); i++) {
        int error;

        if (messages[i].event != UFFD_EVENT_PAGEFAULT)
            continue;
        error = serve_fault(d, messages[i].arg.pagefault.address, messages[i].arg.pagefault.feat.ptid);
        if (error && !first_error)
            first_error = error;
    }
    return first_error ? first_error : n > 0;
}
