/* The calls of uffd/'s C part. cffi reads this file too, so it holds declarations and nothing else.
 *
 * Each returns 0 or a count, or -errno. Addresses are plain numbers in this process; "bitmap" is the
 * address of uint64_t words, bit i of word w standing for page 64 * w + i.
 */

/* userfaultfd.c */
struct uffd_fault {
    uint64_t address;
    uint64_t flags;
    uint32_t thread_id;
    uint32_t event;
};

int uffd_open_device(int flags);
int uffd_open_syscall(int flags);
int uffd_handshake(int fd, uint64_t wanted, uint64_t *supported);
int uffd_duplicate(int fd);
int uffd_close(int fd);
int uffd_register(int fd, uint64_t start, uint64_t length, uint64_t mode);
int uffd_unregister(int fd, uint64_t start, uint64_t length);
int uffd_wake(int fd, uint64_t start, uint64_t length);
int uffd_copy(int fd, uint64_t destination, uint64_t source, uint64_t length, uint64_t mode, uint64_t *done);
int uffd_zeropage(int fd, uint64_t start, uint64_t length, uint64_t mode, uint64_t *done);
int uffd_poison(int fd, uint64_t start, uint64_t length, uint64_t *done);
int uffd_writeprotect(int fd, uint64_t start, uint64_t length, uint64_t mode);
int uffd_read_faults(int fd, struct uffd_fault *faults, int capacity);

/* pagemap.c */
int pagemap_open(void);
int64_t pagemap_scan(int fd, uint64_t start, uint64_t length, uint64_t flags, uint64_t mask,
                     uint64_t any_of, uint64_t bitmap, uint64_t known);
int64_t pagemap_read(int fd, uint64_t start, uint64_t length, uint64_t entry_flags, uint64_t bitmap);

/* memory.c */
int memory_map(uint64_t length, uint64_t alignment, int fd, int shared, uint64_t *address);
int memory_unmap(uint64_t address, uint64_t length);
int memory_advise(uint64_t address, uint64_t length, int advice);
int memory_punch_hole(int fd, uint64_t offset, uint64_t length);
int64_t memory_find_data(int fd, uint64_t offset, uint64_t length, uint64_t bitmap);
void memory_read(void *destination, uint64_t source, uint64_t length);
void memory_write(uint64_t destination, const void *source, uint64_t length);
void memory_fill(uint64_t destination, int value, uint64_t length);
int memory_is_equal(uint64_t address, const void *other, uint64_t length);
int memory_is_zero(uint64_t address, uint64_t length);

/* bits.c */
void bits_set_atomic(uint64_t bitmap, uint64_t first, uint64_t count);
int64_t bits_take(uint64_t from, uint64_t into, uint64_t words);

/* protect_log.c */
struct protect_log;
struct protect_log *protect_log_new(int userfaultfd, int cancel_eventfd, uint64_t ranges);
int protect_log_add(struct protect_log *log, uint64_t start, uint64_t pages);
int protect_log_run(struct protect_log *log);
int64_t protect_log_collect(struct protect_log *log, uint64_t range, uint64_t bitmap);
uint64_t protect_log_faults(struct protect_log *log);
void protect_log_free(struct protect_log *log);
