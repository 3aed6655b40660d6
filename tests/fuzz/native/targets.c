/* What is fuzzed: the doors through which a peer's bytes reach the page pump.
 *
 *   load       page records before LISTEN, into plain memory; then discards
 *   listen     from LISTEN on: records and faults, pages placed by userfaultfd
 *   messages   the return path at the source; then the pages that were asked for are sent
 *   multifd    packets of one of several channels (packets.c)
 */
#include <errno.h>
#include <string.h>
#include <unistd.h>

#include "fuzz.h"

enum { RAM_SECTION = 2, BAD_LAST = PP_BAD_CHECKSUM, SENT_MAX = 40 /* pages: each byte of them is looked at */ };


static void generate_page(struct input *in, struct choices *c);
static void generate_run(struct input *in, struct choices *c);

static struct pp_reader reader;  /* its buffer holds any record */

static void open_reader(void)
{
    uint32_t size = 70000 + (uint32_t)below(&world.choices, one_in(&world.choices, 4) ? 500000 : 5000);

    reader = (struct pp_reader){.fd = FD_READER, .cancel_fd = FD_CANCEL, .size = size, .timeout_ms = -1};
    reader.buffer = world_reader_buffer(size);
}

/* Every error has a name: an errno of a system call or a loss, or one of enum pp_bad with its place. */
static void check_result(int64_t result, const struct pp_fault *fault)
{
    if (result >= 0)
        return;
    switch (-result) {
    case EPROTO:
        if (!fault->bad || fault->bad > BAD_LAST || fault->offset > world.length + world.second_length)
            fail("an unnamed error: bad %u at %lu", fault->bad, (unsigned long)fault->offset);
        if (fault->bad == PP_BAD_BLOCK && !memchr(fault->name, 0, sizeof(fault->name)))
            fail("a name without an end");
        return;
    case EEXIST:
    case EFAULT:
        if (!fault->bad)
            fail("an unnamed error of a page");
        return;
    case ENODATA:
    case ECONNRESET:
    case ECANCELED:
    case ETIMEDOUT:
    case EPIPE:
    case ENOENT:
        return;
    }
    fail("an error that nobody foresaw: %ld", (long)result);
}

static uint32_t samples[PP_SAMPLES];
static uint8_t staging[PP_RUN * PP_PAGE_SIZE];

/* Has the page record at `at` of an input a checksum? Then all of them must. */
static uint32_t checks_of(const uint8_t *bytes, size_t length, size_t at)
{
    return length > CHOICES + at + 8 ? pp_be64(bytes + CHOICES + at) & RAM_CHECKSUM : 0;
}

static uint32_t checks; /* RAM_CHECKSUM: page records are generated with it */
static void generate_page(struct input *in, struct choices *c);
static void generate_run(struct input *in, struct choices *c);

enum { AT_FIRST = 0, AFTER_PART = 5 };

static struct pp_destination new_destination(void)
{
    open_reader();
    return (struct pp_destination){
        .blocks = world.blocks, .block_count = BLOCKS, .reader = &reader, .uffd = -1,
        .ram_section = RAM_SECTION, .last_block = -1, .samples = samples, .staging = staging,
        .vcpu_thread = 1,
    };
}

static void discard_some(struct pp_destination *d)
{
    for (uint64_t n = below(&world.choices, 4); n; n--) {
        uint32_t block = (uint32_t)below(&world.choices, BLOCKS);
        uint64_t first = below(&world.choices, world.blocks[block].pages);

        check_result(pp_destination_discard(
            d, block, first, 1 + below(&world.choices, world.blocks[block].pages - first)), &d->fault);
    }
}

static void run_load(const uint8_t *data, size_t length)
{
    struct pp_destination d;
    int result;

    world_reset(data, data + CHOICES, length - CHOICES);
    d = new_destination();
    d.checks = checks_of(data, length, AT_FIRST);
    do {
        result = pp_destination_load(&d, 0);
        check_result(result, &d.fault);
        world_check(1);
        discard_some(&d);
        world_check(1);
    } while (!result);
}

/* What Python does with a command: it is in the buffer as a whole. */
static void skip_command(void)
{
    const uint8_t *p = reader.buffer + reader.head;
    uint32_t length = reader.tail - reader.head < 5 ? UINT32_MAX : 5u + pp_be16(p + 3);

    if (length > reader.tail - reader.head || p[0] != RECORD_COMMAND)
        fail("not a whole command");
    reader.head += length;
    reader.offset += length;
}

/* The second channel of postcopy-preempt: page records, most of them right, and mostly its end. */
static void open_second(struct pp_destination *d)
{
    static struct input second;
    static struct pp_reader channel;
    static uint8_t buffer[70000];

    second.length = 0;
    for (uint64_t n = below(&world.choices, 12); n; n--)
        (one_in(&world.choices, 6) ? generate_run : generate_page)(&second, &world.choices);
    if (!one_in(&world.choices, 4))
        put_be(&second, RAM_EOS, 8);
    world.second = second.bytes;
    world.second_length = second.length;
    channel = (struct pp_reader){.fd = FD_PREEMPT, .cancel_fd = FD_CANCEL, .buffer = buffer,
                                 .size = sizeof(buffer), .timeout_ms = -1};
    d->preempt = &channel;
    d->preempt_block = -1;
}

static void run_listen(const uint8_t *data, size_t length)
{
    struct pp_return_path rp;
    struct pp_destination d;
    int result;

    world_reset(data, data + CHOICES, length - CHOICES);
    world.is_listening = 1;
    d = new_destination();
    d.checks = checks = checks_of(data, length, AFTER_PART);
    d.uffd = FD_UFFD;
    d.rp = &rp;
    d.kick_fd = FD_KICK;
    d.quiet = one_in(&world.choices, 4);
    if (one_in(&world.choices, 3))
        open_second(&d);
    if (pp_return_path_init(&rp, FD_RETURN, FD_CANCEL))
        fail("no return path");
    do {
        result = pp_destination_listen(&d);
        if (result > PP_LISTEN_KICKED)
            fail("an outcome that is none: %d", result);
        if (result == PP_LISTEN_COMMAND)
            skip_command();
        check_result(result, &d.fault);
        world_check(1);
    } while (result == PP_LISTEN_COMMAND || (result == PP_LISTEN_KICKED && world.at < world.length));
    if (result == PP_LISTEN_LOST) {  /* without a source it serves what needs none */
        reader.fd = -1;
        d.preempt = NULL;
        d.quiet = 1;
        check_result(pp_destination_listen(&d), &d.fault);
        world_check(1);
    }
    pp_return_path_free(&rp);
}

/* Pages as they are, and again when the guest has written to some of them. */
static int64_t send_twice(struct pp_source *s)
{
    uint32_t data_pages = 1 + (uint32_t)below(&world.choices, PP_BATCH);
    int64_t result = pp_source_send(s, 1 + below(&world.choices, SENT_MAX), data_pages, 0, 0);

    check_result(result, &s->fault);
    if (result < 0 || !s->xbzrle)
        return result;
    for (uint64_t n = below(&world.choices, 12); n; n--) {
        uint64_t page = below(&world.choices, SENT_MAX), words = below(&world.choices, 200);
        uint8_t *bytes = world.blocks[0].host + page * PP_PAGE_SIZE;

        for (; words; words--)
            bytes[below(&world.choices, PP_PAGE_SIZE)] = (uint8_t)next(&world.choices);
        pp_set(world.blocks[0].dirty, page);
        pp_set(world.blocks[0].populated, page);
        s->block = 0;
        s->page = 0;
        result = pp_source_send(s, 2, data_pages, 0, 0);
        check_result(result, &s->fault);
        s->xbzrle->age += below(&world.choices, 2);
    }
    return result;
}

static void run_messages(const uint8_t *data, size_t length)
{
    uint8_t payload[RP_PAYLOAD_LIMIT], buffer[4096];
    struct pp_writer writer = {.fd = FD_WRITER, .cancel_fd = FD_CANCEL, .buffer = buffer, .size = sizeof(buffer)};
    struct pp_xbzrle xbzrle = {0};
    struct pp_source s = {.blocks = world.blocks, .block_count = BLOCKS, .writer = &writer};
    int32_t last_block = -1;
    uint32_t got;
    int64_t result;

    world_reset(data, data + CHOICES, length - CHOICES);
    for (int i = 0; i < BLOCKS; i++) {
        pp_bitmap_set_range(world.blocks[i].dirty, 0, world.blocks[i].pages);
        pp_bitmap_set_range(world.blocks[i].populated, 0, world.blocks[i].pages / 2);
    }
    open_reader();
    if (pp_source_init(&s) || pp_xbzrle_init(&xbzrle, 16 * PP_PAGE_SIZE))
        fail("no source");
    s.xbzrle = one_in(&world.choices, 2) ? &xbzrle : NULL;
    s.may_answer = one_in(&world.choices, 4);
    do {
        result = pp_source_read_message(&s, &reader, payload, &got, &last_block);
        check_result(result, &s.fault);
        if (result >= 0 && got > RP_PAYLOAD_LIMIT)
            fail("a payload of %u bytes", got);
        if (s.queue_used > 67 + 1 + 130)
            fail("%lu entries in the queue", (unsigned long)s.queue_used);
    } while (result >= 0);
    result = send_twice(&s);
    if (result >= 0) {
        result = pp_source_discard(&s, 0, world.blocks[0].sent);
        check_result(result, &s.fault);
        check_result(pp_writer_flush(&writer), &s.fault);
    }
    world_check(0);
    pp_source_free(&s);
    pp_xbzrle_free(&xbzrle);
}

/* ---- records: where they end, and new ones ---- */

static size_t page_record(const uint8_t *p, size_t left)
{
    uint64_t word;
    size_t length = 8;

    if (left < 9)
        return left;
    word = pp_be64(p);
    if (!(word & RAM_CONTINUE) && !(word & RAM_EOS))
        length += 1u + p[8];
    if (word & RAM_XBZRLE)
        length += left < length + XBZRLE_HEAD ? 1u : (uint32_t)XBZRLE_HEAD + pp_be16(p + length + 1);
    else if (word & RAM_PAGE)
        length += PP_PAGE_SIZE;
    else if (word & RAM_ZERO)
        length++;
    if (word & RAM_CHECKSUM)
        length += PP_CHECKSUM;
    return length;
}

static size_t record_of_load(const uint8_t *data, size_t length, size_t at)
{
    return page_record(data + at, length - at);
}

static size_t record_of_listen(const uint8_t *data, size_t length, size_t at)
{
    switch (data[at]) {
    case RECORD_EOF:
        if (length - at > 8 && !data[at + 1])  /* more likely the offset of a page record */
            return page_record(data + at, length - at);
        return 1;
    case RECORD_PART:
    case RECORD_END:
    case RECORD_FOOTER:
        return 5;
    case RECORD_COMMAND:
        return length - at < 5 ? length - at : 5u + pp_be16(data + at + 3);
    }
    return page_record(data + at, length - at);
}

static size_t record_of_messages(const uint8_t *data, size_t length, size_t at)
{
    return length - at < 4 ? length - at : 4u + pp_be16(data + at + 2);
}

static uint64_t strange(struct choices *c, uint64_t limit)
{
    static const uint64_t EDGES[] = {0, 1, 0x7fffffff, 0x80000000, 0xffffffff, 1ull << 40, 1ull << 52, ~0ull >> 12};

    if (!one_in(c, 12))
        return below(c, limit);
    return one_in(c, 2) ? limit + below(c, 2) : EDGES[below(c, sizeof(EDGES) / sizeof(EDGES[0]))];
}

static void put_name(struct input *in, struct choices *c, unsigned block)
{
    const char *name = one_in(c, 20) ? "rom" : world.blocks[block].name;
    size_t length = strlen(name);

    put_be(in, one_in(c, 30) ? next(c) & 0xff : length, 1);
    put(in, name, length);
}

static void put_checksum(struct input *in, unsigned block, uint64_t word, const uint8_t *content, uint64_t length)
{
    if (checks)
        put_be(in, pp_checksum(world.blocks[block].name, word, content, length), PP_CHECKSUM);
}

/* One input in four has checksums, from its first page on. */
static void choose_checks(struct input *in, struct choices *c, size_t first)
{
    checks = in->length > CHOICES + first + 8 ? checks_of(in->bytes, in->length, first)
                                              : one_in(c, 4) ? RAM_CHECKSUM : 0;
}

static void generate_page(struct input *in, struct choices *c)
{
    static uint8_t content[PP_PAGE_SIZE];
    unsigned block = (unsigned)below(c, BLOCKS), goes_on = !one_in(c, 3);
    uint64_t flags = one_in(c, 3) ? RAM_PAGE : one_in(c, 5) ? RAM_EOS : RAM_ZERO;
    uint64_t offset = strange(c, world.blocks[block].pages) * PP_PAGE_SIZE;

    if (one_in(c, 40))
        flags = next(c) & (PP_PAGE_SIZE - 1);
    if (flags == RAM_EOS) {
        put_be(in, one_in(c, 20) ? RAM_EOS | PP_PAGE_SIZE : RAM_EOS, 8);
        return;
    }
    put_be(in, offset | flags | (goes_on ? RAM_CONTINUE : 0) | checks, 8);
    if (!goes_on)
        put_name(in, c, block);
    if (flags == RAM_PAGE) {
        memset(content, (int)below(c, 256), sizeof(content));
        put(in, content, one_in(c, 50) ? below(c, sizeof(content)) : sizeof(content));
    } else {
        content[0] = one_in(c, 10) ? next(c) & 0xff : 0;
        put(in, content, 1);
    }
    put_checksum(in, block, offset | flags, content, flags == RAM_PAGE ? PP_PAGE_SIZE : 1);
}

/* Page after page of one block, so that the pump runs ahead of its parser. */
static void generate_run(struct input *in, struct choices *c)
{
    static uint8_t content[PP_PAGE_SIZE];
    unsigned block = (unsigned)below(c, BLOCKS);
    uint64_t first = below(c, world.blocks[block].pages), count = 3 + below(c, 28);

    for (uint64_t i = 0; i < count; i++) {
        put_be(in, (first + i) * PP_PAGE_SIZE | RAM_PAGE | (i ? RAM_CONTINUE : 0) | checks, 8);
        if (!i) {
            put_be(in, strlen(world.blocks[block].name), 1);
            put(in, world.blocks[block].name, strlen(world.blocks[block].name));
        }
        memset(content, (int)(1 + below(c, 255)), sizeof(content));
        put(in, content, sizeof(content));
        put_checksum(in, block, (first + i) * PP_PAGE_SIZE | RAM_PAGE, content, sizeof(content));
        if (one_in(c, 40))
            generate_page(in, c);
    }
}

/* A difference: runs of what stays and of what is new, each with its length. */
static void generate_xbzrle(struct input *in, struct choices *c)
{
    uint64_t length = below(c, 40), block = below(c, BLOCKS);

    put_be(in, strange(c, world.blocks[block].pages) * PP_PAGE_SIZE | RAM_XBZRLE | RAM_CONTINUE | checks, 8);
    put_be(in, one_in(c, 20) ? next(c) : XBZRLE_ENCODING, 1);
    put_be(in, one_in(c, 20) ? next(c) & 0xffff : length, 2);
    for (; length; length--)
        put_be(in, one_in(c, 2) ? below(c, 12) : next(c), 1);
    if (checks)
        put_be(in, next(c), PP_CHECKSUM);
}

static void generate_load(struct input *in, struct choices *c)
{
    choose_checks(in, c, AT_FIRST);
    if (one_in(c, 4))
        generate_run(in, c);
    else if (one_in(c, 4))
        generate_xbzrle(in, c);
    else
        generate_page(in, c);
}

static void generate_listen(struct input *in, struct choices *c)
{
    choose_checks(in, c, AFTER_PART);
    switch (below(c, 4)) {
    case 0:
        put_be(in, RECORD_COMMAND, 1);
        put_be(in, one_in(c, 4) ? below(c, 14) : COMMAND_PING, 2);
        put_be(in, one_in(c, 4) ? next(c) & 0xffff : 4, 2);
        put_be(in, next(c), 4);
        return;
    case 1:
        put_be(in, one_in(c, 8) ? below(c, 256) : one_in(c, 4) ? RECORD_END : RECORD_PART, 1);
        put_be(in, one_in(c, 10) ? next(c) : RAM_SECTION, 4);
        for (uint64_t n = below(c, 6); n; n--)
            (one_in(c, 5) ? generate_run : generate_page)(in, c);
        put_be(in, RAM_EOS, 8);
        put_be(in, one_in(c, 20) ? below(c, 256) : RECORD_FOOTER, 1);
        put_be(in, one_in(c, 20) ? next(c) : RAM_SECTION, 4);
        return;
    case 2:
        put_be(in, one_in(c, 3) ? RECORD_EOF : RECORD_PART, 1);
        return;
    default:
        generate_page(in, c);
    }
}

static void generate_message(struct input *in, struct choices *c)
{
    unsigned block = (unsigned)below(c, BLOCKS), type = one_in(c, 6) ? (unsigned)below(c, 9) : RP_REQ_PAGES_ID;
    uint64_t pages = world.blocks[block].pages, first = strange(c, pages);

    if (type == RP_REQ_PAGES_ID && one_in(c, 2))
        type = RP_REQ_PAGES;
    put_be(in, type, 2);
    if (type != RP_REQ_PAGES && type != RP_REQ_PAGES_ID) {
        uint64_t length = one_in(c, 4) ? strange(c, 600) : 4;

        put_be(in, length, 2);
        for (uint64_t i = 0; i < length && i < 600; i++)
            put_be(in, next(c), 1);
        return;
    }
    put_be(in, one_in(c, 20) ? next(c) & 0x3ff : type == RP_REQ_PAGES ? 12 : 13 + strlen(world.blocks[block].name), 2);
    put_be(in, first * PP_PAGE_SIZE + (one_in(c, 20) ? below(c, PP_PAGE_SIZE) : 0), 8);
    put_be(in, (1 + strange(c, first < pages ? pages - first : 2)) * PP_PAGE_SIZE + (one_in(c, 20) ? 1 : 0), 4);
    if (type == RP_REQ_PAGES_ID)
        put_name(in, c, block);
}

const struct target targets[] = {
    {"load", run_load, record_of_load, generate_load},
    {"listen", run_listen, record_of_listen, generate_listen},
    {"messages", run_messages, record_of_messages, generate_message},
    {"multifd", run_multifd, record_of_multifd, generate_multifd},
    {0},
};
