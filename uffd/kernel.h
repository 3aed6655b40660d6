/* The kernel's userfaultfd and PAGEMAP_SCAN interface, written down here.
 *
 * Debian 12's headers stop at Linux 6.1: no POISON, no WP_ASYNC, no PAGEMAP_SCAN. What the running
 * kernel can do is found out at run time, so what it may be asked for must not depend on a header.
 * Constants carry the kernel's names, each under #ifndef; the argument blocks carry names of ours, so
 * that this file can be read beside the kernel's. tests/uffd/test_kernel_header.py compares the two.
 *
 * Sources: include/uapi/linux/userfaultfd.h and include/uapi/linux/fs.h of Linux 6.18.
 */
#ifndef PAGEFERRY_UFFD_KERNEL_H
#define PAGEFERRY_UFFD_KERNEL_H

#include <stdint.h>
#include <sys/ioctl.h>

struct pf_uffdio_api {
    uint64_t api;
    uint64_t features; /* in: wanted; out: everything the kernel has */
    uint64_t ioctls;
};

struct pf_uffdio_range {
    uint64_t start;
    uint64_t len;
};

struct pf_uffdio_register {
    struct pf_uffdio_range range;
    uint64_t mode;
    uint64_t ioctls;
};

struct pf_uffdio_copy {
    uint64_t dst;
    uint64_t src;
    uint64_t len;
    uint64_t mode;
    int64_t copy; /* bytes done, or -errno */
};

struct pf_uffdio_zeropage {
    struct pf_uffdio_range range;
    uint64_t mode;
    int64_t zeropage; /* bytes done, or -errno */
};

struct pf_uffdio_writeprotect {
    struct pf_uffdio_range range;
    uint64_t mode;
};

struct pf_uffdio_poison {
    struct pf_uffdio_range range;
    uint64_t mode;
    int64_t updated; /* bytes done, or -errno */
};

struct pf_uffd_msg {
    uint8_t event;
    uint8_t reserved1;
    uint16_t reserved2;
    uint32_t reserved3;
    union {
        struct {
            uint64_t flags;
            uint64_t address;
            uint32_t ptid;
        } pagefault;
        uint64_t words[3];
    } arg;
};

struct pf_page_region {
    uint64_t start;
    uint64_t end;
    uint64_t categories;
};

struct pf_pm_scan_arg {
    uint64_t size;
    uint64_t flags;
    uint64_t start;
    uint64_t end;
    uint64_t walk_end; /* out: where to go on */
    uint64_t vec;      /* struct pf_page_region[vec_len] */
    uint64_t vec_len;
    uint64_t max_pages; /* 0 = no limit */
    uint64_t category_inverted;
    uint64_t category_mask;
    uint64_t category_anyof_mask;
    uint64_t return_mask;
};

#ifndef USERFAULTFD_IOC_NEW
#define USERFAULTFD_IOC_NEW _IO(0xAA, 0x00) /* on /dev/userfaultfd, Linux 6.1 */
#endif
#ifndef UFFD_API
#define UFFD_API ((uint64_t)0xAA)
#endif
#ifndef UFFD_USER_MODE_ONLY
#define UFFD_USER_MODE_ONLY 1 /* 5.11 */
#endif

#ifndef UFFDIO_API
#define UFFDIO_API _IOWR(0xAA, 0x3F, struct pf_uffdio_api)
#endif
#ifndef UFFDIO_REGISTER
#define UFFDIO_REGISTER _IOWR(0xAA, 0x00, struct pf_uffdio_register)
#endif
#ifndef UFFDIO_UNREGISTER
#define UFFDIO_UNREGISTER _IOR(0xAA, 0x01, struct pf_uffdio_range)
#endif
#ifndef UFFDIO_WAKE
#define UFFDIO_WAKE _IOR(0xAA, 0x02, struct pf_uffdio_range)
#endif
#ifndef UFFDIO_COPY
#define UFFDIO_COPY _IOWR(0xAA, 0x03, struct pf_uffdio_copy)
#endif
#ifndef UFFDIO_ZEROPAGE
#define UFFDIO_ZEROPAGE _IOWR(0xAA, 0x04, struct pf_uffdio_zeropage)
#endif
#ifndef UFFDIO_WRITEPROTECT
#define UFFDIO_WRITEPROTECT _IOWR(0xAA, 0x06, struct pf_uffdio_writeprotect)
#endif
#ifndef UFFDIO_POISON
#define UFFDIO_POISON _IOWR(0xAA, 0x08, struct pf_uffdio_poison)
#endif

#ifndef UFFDIO_REGISTER_MODE_MISSING
#define UFFDIO_REGISTER_MODE_MISSING ((uint64_t)1 << 0)
#endif
#ifndef UFFDIO_REGISTER_MODE_WP
#define UFFDIO_REGISTER_MODE_WP ((uint64_t)1 << 1)
#endif
#ifndef UFFDIO_COPY_MODE_DONTWAKE
#define UFFDIO_COPY_MODE_DONTWAKE ((uint64_t)1 << 0)
#endif
#ifndef UFFDIO_ZEROPAGE_MODE_DONTWAKE
#define UFFDIO_ZEROPAGE_MODE_DONTWAKE ((uint64_t)1 << 0)
#endif
#ifndef UFFDIO_WRITEPROTECT_MODE_WP
#define UFFDIO_WRITEPROTECT_MODE_WP ((uint64_t)1 << 0)
#endif
#ifndef UFFDIO_WRITEPROTECT_MODE_DONTWAKE
#define UFFDIO_WRITEPROTECT_MODE_DONTWAKE ((uint64_t)1 << 1)
#endif

#ifndef UFFD_EVENT_PAGEFAULT
#define UFFD_EVENT_PAGEFAULT 0x12
#endif
#ifndef UFFD_PAGEFAULT_FLAG_WRITE
#define UFFD_PAGEFAULT_FLAG_WRITE (1 << 0)
#endif
#ifndef UFFD_PAGEFAULT_FLAG_WP
#define UFFD_PAGEFAULT_FLAG_WP (1 << 1)
#endif

#ifndef UFFD_FEATURE_PAGEFAULT_FLAG_WP
#define UFFD_FEATURE_PAGEFAULT_FLAG_WP (1 << 0) /* 5.7 */
#endif
#ifndef UFFD_FEATURE_MISSING_SHMEM
#define UFFD_FEATURE_MISSING_SHMEM (1 << 5) /* 4.11 */
#endif
#ifndef UFFD_FEATURE_SIGBUS
#define UFFD_FEATURE_SIGBUS (1 << 7) /* 4.14 */
#endif
#ifndef UFFD_FEATURE_THREAD_ID
#define UFFD_FEATURE_THREAD_ID (1 << 8) /* 4.14 */
#endif
#ifndef UFFD_FEATURE_EXACT_ADDRESS
#define UFFD_FEATURE_EXACT_ADDRESS (1 << 11) /* 5.18 */
#endif
#ifndef UFFD_FEATURE_WP_HUGETLBFS_SHMEM
#define UFFD_FEATURE_WP_HUGETLBFS_SHMEM (1 << 12) /* 5.19 */
#endif
#ifndef UFFD_FEATURE_WP_UNPOPULATED
#define UFFD_FEATURE_WP_UNPOPULATED (1 << 13) /* 6.4 */
#endif
#ifndef UFFD_FEATURE_POISON
#define UFFD_FEATURE_POISON (1 << 14) /* 6.6 */
#endif
#ifndef UFFD_FEATURE_WP_ASYNC
#define UFFD_FEATURE_WP_ASYNC (1 << 15) /* 6.7 */
#endif

#ifndef PAGEMAP_SCAN
#define PAGEMAP_SCAN _IOWR('f', 16, struct pf_pm_scan_arg) /* 6.7 */
#endif
#ifndef PM_SCAN_WP_MATCHING
#define PM_SCAN_WP_MATCHING (1 << 0)
#endif
#ifndef PM_SCAN_CHECK_WPASYNC
#define PM_SCAN_CHECK_WPASYNC (1 << 1)
#endif
#ifndef PAGE_IS_WPALLOWED
#define PAGE_IS_WPALLOWED (1 << 0)
#endif
#ifndef PAGE_IS_WRITTEN
#define PAGE_IS_WRITTEN (1 << 1)
#endif
#ifndef PAGE_IS_FILE
#define PAGE_IS_FILE (1 << 2)
#endif
#ifndef PAGE_IS_PRESENT
#define PAGE_IS_PRESENT (1 << 3)
#endif
#ifndef PAGE_IS_SWAPPED
#define PAGE_IS_SWAPPED (1 << 4)
#endif
#ifndef PAGE_IS_PFNZERO
#define PAGE_IS_PFNZERO (1 << 5)
#endif

#endif
