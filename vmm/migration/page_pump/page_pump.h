/* The native data plane of migration: what runs once per page.
 *
 * Nothing here needs Python: it compiles without Python.h, logs nothing and decides no policy. Every
 * function returns -errno on failure; the caller owns all memory that a pointer names and keeps it alive
 * and in place until the call has returned (guest RAM keeps its host address for life).
 * Wire layout: the `ram` section of QEMU's migration stream, version 4 (vmm/migration/wire.py has every
 * number and its source); the Python twins are vmm/migration/ram_records.py (records) and pages.py (maps).
 */
#ifndef PAGE_PUMP_H
#define PAGE_PUMP_H

#include <pthread.h>
#include <stddef.h>
#include <stdint.h>

/* cdef begin */
enum { PP_PAGE_SIZE = 4096, PP_NAME = 256, PP_IN_FLIGHT = 64, PP_SAMPLES = 8192,
       PP_BATCH = 512 /* pages with content a system call: half of UIO_MAXIOV */,
       PP_AHEAD = 64 /* records of a run read at once; more is no faster, and what is none of them takes memory */,
       PP_RUN = 16 /* pages that UFFDIO_COPY places at once: 64 KiB, more is no faster */,
       PP_WAKES = 16 /* more threads than ever wait for one page at once */,
       PP_CHECKED_BATCH = 256 /* pages with checksums to a system call */, PP_CHECKSUM = 8 /* bytes */ };

/* What was wrong with the peer's bytes, beside -EPROTO. */
enum pp_bad {
    PP_OK = 0,
    PP_BAD_FLAGS,        /* value: the flags */
    PP_BAD_BLOCK,        /* name: the unknown RAMBlock */
    PP_BAD_NO_BLOCK,     /* CONTINUE before any block was named */
    PP_BAD_OFFSET,       /* value: the offset; beyond the block or not page aligned */
    PP_BAD_RECORD,       /* value: the record type */
    PP_BAD_SECTION,      /* value: the section id */
    PP_BAD_FOOTER,       /* value: the section id in the footer */
    PP_BAD_LENGTH,       /* value: the length */
    PP_BAD_FILL,         /* value: the fill byte of a ZERO record, postcopy takes only 0 */
    PP_BAD_MESSAGE,      /* value: the return path message type */
    PP_BAD_PRESENT,      /* value: the offset of a page that is present but was never received */
    PP_BAD_FAULT,        /* value: the fault address, outside every RAMBlock */
    PP_BAD_LOST,         /* value: the offset of a page that is marked received and is absent */
    PP_BAD_ENCODING,     /* value: the offset of the page; the XBZRLE is malformed or leaves the page */
    PP_BAD_NO_PAGE,      /* value: the offset of a page that never came, and so has no difference */
    PP_BAD_CHECKSUM      /* name, value: the RAMBlock and the offset of a page that is not what was sent */
};

/* One RAMBlock. Bitmaps: bit i of word i / 64 is page i. A role uses only its own maps. */
struct pp_block {
    uint8_t *host;
    uint64_t pages;
    uint64_t *dirty;     /* source: to be sent */
    uint64_t *sent;      /* source: sent at least once */
    uint64_t *populated; /* source: may hold something else than zeros; others are never read */
    uint64_t *queued;    /* source: in the request queue */
    uint64_t *urgent;    /* source: sent over the second channel of postcopy-preempt */
    uint64_t *received;  /* destination */
    uint64_t *requested; /* destination */
    uint64_t *zero;      /* destination: received as zero and left absent */
    int fd;              /* memfd, or -1 */
    char name[PP_NAME];
};

struct pp_fault {        /* the place and the kind of the last -EPROTO, -EEXIST or -EFAULT */
    uint32_t bad;
    uint64_t value;
    uint64_t offset;     /* of the offending byte in the stream */
    uint64_t expected, got; /* checksums */
    char name[PP_NAME];
};

/* Bytes out of a non-blocking descriptor. One thread. */
struct pp_writer {
    int fd, cancel_fd;
    uint64_t total;      /* bytes accepted by the kernel */
    uint8_t *buffer;
    uint32_t used, size;
};
int pp_writer_put(struct pp_writer *w, const uint8_t *data, uint64_t length);
int pp_writer_flush(struct pp_writer *w);

/* Bytes in. One thread. */
struct pp_reader {
    int fd, cancel_fd;
    uint8_t *buffer;
    uint32_t size, head, tail;
    uint64_t offset;     /* stream offset of buffer[head] */
    int eof;
    int timeout_ms;      /* for one wait; -1 = none */
    uint32_t most;       /* bytes to read at once, 0 = what there is room for */
};
int pp_reader_need(struct pp_reader *r, uint32_t n);  /* until n bytes are buffered; -ENODATA at the end */
int pp_reader_take(struct pp_reader *r, uint8_t *out, uint64_t n);
int pp_wait(int fd, int for_write, int cancel_fd, int timeout_ms);

/* The return path: two threads write, one lock. */
struct pp_return_path {
    int fd, cancel_fd;
    void *lock;
    int32_t last_block;  /* of the last REQ_PAGES_ID on this channel, -1 = none */
    int error;           /* first -errno; later sends answer with it */
};
int pp_return_path_init(struct pp_return_path *rp, int fd, int cancel_fd);
void pp_return_path_free(struct pp_return_path *rp);
int pp_return_path_send(struct pp_return_path *rp, uint16_t type, const uint8_t *payload, uint32_t length);
int pp_return_path_send_raw(struct pp_return_path *rp, const uint8_t *bytes, uint32_t length);
int pp_return_path_request(struct pp_return_path *rp, const struct pp_block *blocks, int32_t block,
                           uint64_t page, uint64_t count);

/* XBZRLE at the source: a page that was sent before goes as its difference. */
struct pp_xbzrle {
    uint64_t slots, *keys, *ages, age; /* age: the bitmap syncs so far */
    uint8_t *pages, *scratch;
    uint64_t asked, misses, overflows, sent_pages, sent_bytes;
};
int pp_xbzrle_init(struct pp_xbzrle *x, uint64_t cache_bytes);
void pp_xbzrle_free(struct pp_xbzrle *x);
void pp_xbzrle_zero(struct pp_xbzrle *x, uint32_t block, uint64_t page);
uint32_t pp_xbzrle_page(struct pp_xbzrle *x, uint32_t block, uint64_t page, uint32_t place,
                        uint8_t **data);
int pp_xbzrle_encode(const uint8_t *before, const uint8_t *now, uint8_t *out);
int pp_xbzrle_decode(const uint8_t *in, uint32_t length, uint8_t *page);

/* The checksum of a page record: of the RAMBlock's name, offset | kind, and the page (the fill byte of ZERO). */
uint64_t pp_checksum(const char *name, uint64_t word, const uint8_t *content, uint64_t length);
uint64_t pp_checksum_portable(const char *name, uint64_t word, const uint8_t *content, uint64_t length);

/* postcopy-preempt at the source: the second channel. */
struct pp_preempt {
    struct pp_writer *writer;
    void *lock;          /* guards everything here */
    int32_t last_block;
    int ended;
    int checks;          /* pages go with checksums */
    uint64_t zero_pages, normal_pages;
};
int pp_preempt_init(struct pp_preempt *p, struct pp_writer *writer);
void pp_preempt_free(struct pp_preempt *p);
int pp_preempt_answer(struct pp_preempt *p, const struct pp_block *b, int32_t index, uint64_t page);
int pp_preempt_end(struct pp_preempt *p);

/* Source. */
struct pp_source {
    struct pp_block *blocks;
    uint32_t block_count;
    struct pp_writer *writer;
    struct pp_xbzrle *xbzrle; /* NULL = pages go whole */
    struct pp_preempt *preempt; /* NULL = requested pages go over the one channel */
    uint8_t *bounce;     /* PP_CHECKED_BATCH pages: each goes as a copy, with its checksum; NULL = neither */
    uint32_t block;      /* cursor of the linear scan */
    uint64_t page;
    int32_t last_block;  /* for CONTINUE, -1 = none yet on this channel */
    uint64_t zero_pages, normal_pages, page_bytes;
    uint64_t pushed_pages, requested_pages, resent_pages;
    uint64_t requests;   /* REQ_PAGES messages taken */
    uint64_t drop_request; /* test hook: the n-th request (1 = first) is forgotten, and its page too */
    void *send_lock;     /* guards may_answer, and what mig/return does while it is set */
    int may_answer;      /* mig/source sleeps in the body of a section: mig/return sends what it hears of */
    uint64_t zero_look;  /* how many pages the next look along a run of zero pages is for; */
    void *helper;        /* and who shares it */
    void *lock;          /* guards the queue below */
    uint64_t *queue;     /* block << 40 | page */
    uint64_t queue_size, queue_head, queue_used;
    int wake_fd;         /* eventfd, signalled when the queue gets its first entry */
    struct pp_fault fault;
};
int pp_source_init(struct pp_source *s);
void pp_source_free(struct pp_source *s);
int64_t pp_source_send(struct pp_source *s, uint64_t max_pages, uint32_t data_pages, int requests_only,
                       uint64_t until_ns);
int64_t pp_source_discard(struct pp_source *s, uint32_t block, const uint64_t *stale);
int pp_source_request(struct pp_source *s, uint32_t block, uint64_t page, uint64_t count);
/* Until pages have been requested that are not sent yet (1), or the time is over (0). In the body of a section. */
int pp_source_wait(struct pp_source *s, int cancel_fd, int timeout_ms);
/* Reads one message; page requests go to the queue and the next one is read. Returns the type. */
int pp_source_read_message(struct pp_source *s, struct pp_reader *r, uint8_t *payload, uint32_t *length,
                           int32_t *last_block);

/* multifd: the pages of one packet, all of one block. */
enum { PP_PACKET = 128 };
struct pp_packet {
    uint32_t block, count;
    uint64_t pages[PP_PACKET];
};
int64_t pp_multifd_collect(struct pp_source *s, struct pp_packet *p, uint64_t max_pages);
int pp_multifd_write(struct pp_writer *w, const struct pp_block *b, const struct pp_packet *p,
                     const uint8_t *head, uint32_t length);
void pp_multifd_gather(const struct pp_block *b, const struct pp_packet *p, uint8_t *out);
int pp_multifd_offsets(const uint8_t *offsets, uint32_t count, uint64_t pages, struct pp_packet *p,
                       uint64_t *bad);
int pp_multifd_read(struct pp_reader *r, const struct pp_block *b, const struct pp_packet *p, uint64_t *received);
void pp_multifd_scatter(const uint8_t *data, const struct pp_block *b, const struct pp_packet *p, uint64_t *received);

/* Destination. */
struct pp_destination {
    struct pp_block *blocks;
    uint32_t block_count;
    struct pp_reader *reader;
    struct pp_return_path *rp;
    struct pp_reader *preempt; /* the second channel of postcopy-preempt, or NULL */
    int32_t preempt_block;
    int preempt_ended, main_ended;
    int uffd;
    uint32_t ram_section;
    uint32_t checks;     /* RAM_CHECKSUM: every page has one, 0: none has */
    uint64_t checked_pages;
    int32_t last_block;
    uint64_t run_next;   /* the page after the last PAGE record; how many of them in a row; */
    uint32_t run, window; /* and how many pages the next look ahead is for */
    int stage;           /* of the listen loop's parser: 0 between records, 1 in ram, 2 at a footer */
    int ending;          /* the section under way is the SECTION_END one */
    uint8_t *staging;    /* PP_RUN pages: a run on its way from the channel to UFFDIO_COPY */
    int quiet;           /* no source, or recovery is not agreed yet: faults are noted and not asked for */
    int kick_fd;         /* ends a sleep of the listen loop with KICKED; -1 = none */
    uint64_t zero_pages, normal_pages, duplicates, faults, requests, served_locally;
    uint64_t latency_count, latency_sum_ns, latency_max_ns;
    uint64_t latency_buckets[24];
    uint32_t *samples;   /* the last PP_SAMPLES latencies in ns */
    uint64_t in_flight_page[PP_IN_FLIGHT], in_flight_since[PP_IN_FLIGHT];
    uint32_t in_flight_thread[PP_IN_FLIGHT];
    uint32_t in_flight;
    uint32_t vcpu_thread; /* as the kernel names it in a fault, 0 = unknown */
    uint64_t vcpu_latency_count, vcpu_latency_sum_ns; /* those of the above that the vCPU waited for */
    uint64_t vcpu_blocked_ns; /* and with its faults that needed no request */
    uint64_t last_woken; /* address of the last page answered by WAKE alone, and how often in a row */
    uint32_t wakes;
    struct pp_fault fault;
};
/* Page records up to EOS, into memory without userfaultfd. With `ahead`, and while nobody else places pages, those
 * of a run are read to their places. */
int pp_destination_load(struct pp_destination *d, int ahead);
int pp_destination_discard(struct pp_destination *d, uint32_t block, uint64_t first, uint64_t count);
/* COMMAND: a whole one, no PING, stands unread in the reader's buffer. */
enum { PP_LISTEN_END = 1, PP_LISTEN_LOST = 2, PP_LISTEN_COMMAND = 3, PP_LISTEN_KICKED = 4 };
int pp_destination_listen(struct pp_destination *d);   /* serves faults and the stream until then, or cancel */

/* The keeper's orders, made before it is: where each thing goes in the spool. Offsets in bytes. */
struct pp_spool_block {
    uint8_t *host;
    uint64_t pages;
    uint64_t *owed;
    uint64_t owed_at, pages_at;
};
struct pp_spool {
    struct pp_spool_block *blocks;
    uint32_t block_count, header_length;
    const uint8_t *header; /* written last: a spool without one is none */
    uint64_t length;
    const char *path, *unfinished;
};
int pp_keeper_start(const struct pp_spool *spool, int keeper_fd);

/* Bitmaps; first + count <= pages of the map (the caller checks). */
void pp_bitmap_set_range(uint64_t *map, uint64_t first, uint64_t count);
void pp_bitmap_clear_range(uint64_t *map, uint64_t first, uint64_t count);
uint64_t pp_bitmap_count(const uint64_t *map, uint64_t pages);
/* of each `step` pages, the last ones may be fewer: pages / step counts, rounded up */
void pp_bitmap_count_stretches(const uint64_t *map, uint64_t pages, uint64_t step, uint64_t *counts);
uint64_t pp_bitmap_find(const uint64_t *map, uint64_t pages, uint64_t from, int value); /* pages = none */
void pp_bitmap_combine(uint64_t *into, const uint64_t *other, uint64_t pages, int operation);
/* Sets the bits of `from` in both others and clears them there. */
void pp_bitmap_pour(uint64_t *from, uint64_t *into, uint64_t *also, uint64_t pages);
enum { PP_OR = 0, PP_AND = 1, PP_ANDNOT = 2, PP_ORNOT = 3 };
int pp_is_zero_page(const uint8_t *page);
/* cdef end */

static inline int pp_test(const uint64_t *map, uint64_t page) { return map[page / 64] >> (page % 64) & 1; }
static inline void pp_set(uint64_t *map, uint64_t page) { map[page / 64] |= 1ull << (page % 64); }
/* For maps that two threads change. */
static inline void pp_set_shared(uint64_t *map, uint64_t page)
{
    __atomic_fetch_or(&map[page / 64], 1ull << (page % 64), __ATOMIC_SEQ_CST);
}
static inline int pp_claim(uint64_t *map, uint64_t page) /* was it set, and is now clear by this call? */
{
    uint64_t bit = 1ull << (page % 64);

    return (__atomic_fetch_and(&map[page / 64], ~bit, __ATOMIC_SEQ_CST) & bit) != 0;
}
static inline void pp_clear(uint64_t *map, uint64_t page) { map[page / 64] &= ~(1ull << (page % 64)); }

uint64_t pp_now_ns(void);
void pp_wait_begin(struct pp_destination *d, uint64_t address, uint32_t thread);
void pp_wait_end(struct pp_destination *d, uint64_t address);
int pp_bad(struct pp_fault *fault, uint32_t bad, uint64_t value, uint64_t offset);
int pp_verify(struct pp_destination *d, const struct pp_block *b, uint64_t offset, uint32_t kind,
              const uint8_t *content, uint64_t length, const uint8_t *stated, uint64_t at);
int pp_writer_writev(struct pp_writer *w, void *iov, int count);
int pp_writer_offer(struct pp_writer *w, const void *iov, int count);
int pp_reader_fill(struct pp_reader *r);  /* one read without waiting: bytes, 0 = would block, -ENODATA = end */

/* ahead.c: one look at the channel for the next pages of a run. */
struct pp_ahead {
    uint64_t first;      /* page */
    uint32_t count;
    int wait;
    uint8_t *to;         /* of `first` */
    uint64_t good, filled, written;
    uint8_t heads[PP_AHEAD][8];
};
int pp_read_ahead(struct pp_reader *r, struct pp_ahead *a);
int pp_source_next(struct pp_source *s, uint32_t *block, uint64_t *page);

/* zeros.c */
uint64_t pp_zero_run(struct pp_source *s, const struct pp_block *b, uint64_t page, uint64_t most);
uint64_t pp_zero_records(struct pp_source *s, struct pp_block *b, uint64_t page, uint64_t end, uint64_t most,
                         uint8_t *out, uint64_t *count);

/* helper.c */
int pp_helper_begin(void **helper, const char *name, void (*work)(void *), void *argument);
void pp_helper_wait(void *helper);
void pp_helper_free(void **helper);

int64_t pp_page_header(struct pp_reader *r, uint32_t at, uint32_t *length, int32_t *block,
                       struct pp_block *blocks, uint32_t block_count, uint64_t *offset, uint32_t *flags,
                       struct pp_fault *fault, uint32_t also);

static inline uint16_t pp_be16(const uint8_t *p) { return (uint16_t)(p[0] << 8 | p[1]); }
static inline uint32_t pp_be32(const uint8_t *p) { return (uint32_t)pp_be16(p) << 16 | pp_be16(p + 2); }
static inline uint64_t pp_be64(const uint8_t *p) { return (uint64_t)pp_be32(p) << 32 | pp_be32(p + 4); }
static inline void pp_put16(uint8_t *p, uint16_t v) { p[0] = v >> 8, p[1] = v & 0xff; }
static inline void pp_put32(uint8_t *p, uint32_t v) { pp_put16(p, v >> 16), pp_put16(p + 2, v & 0xffff); }
static inline void pp_put64(uint8_t *p, uint64_t v) { pp_put32(p, v >> 32), pp_put32(p + 4, (uint32_t)v); }

/* The `ram` section and the return path: wire.py says where each number comes from. */
enum {
    RAM_ZERO = 0x02, RAM_PAGE = 0x08, RAM_EOS = 0x10, RAM_CONTINUE = 0x20, RAM_XBZRLE = 0x40, RAM_CHECKSUM = 0x800,
    XBZRLE_ENCODING = 1, XBZRLE_HEAD = 3,
    RECORD_EOF = 0x00, RECORD_PART = 0x02, RECORD_END = 0x03, RECORD_COMMAND = 0x08, RECORD_FOOTER = 0x7e,
    COMMAND_PING = 2, COMMAND_DISCARD = 6, DISCARD_RANGES = 12,
    RP_PONG = 2, RP_REQ_PAGES_ID = 3, RP_REQ_PAGES = 4, RP_PAYLOAD_LIMIT = 512,
};
#endif
