/* The fourth door: packets of a multifd channel. Their heads are read in Python (multifd_wire.py), which bounds the
 * number of pages and finds the block; here two bytes stand for that.
 *
 *   packet   block (1), pages (1), an offset for each (8), and the pages
 *
 * Then the pages that came go out again, as packets and records.
 */
#include <errno.h>
#include <string.h>

#include "fuzz.h"

enum { HEAD = 2 };

static uint8_t side_by_side[PP_PACKET * PP_PAGE_SIZE];

static int take_packet(struct pp_reader *r, uint64_t *received[])
{
    uint8_t head[HEAD], offsets[8 * PP_PACKET];
    struct pp_packet packet;
    uint64_t bad = 0;
    uint32_t block;
    int error = pp_reader_take(r, head, HEAD);

    if (error)
        return error;
    block = head[0] % BLOCKS;
    error = pp_reader_take(r, offsets, 8ull * (head[1] % (PP_PACKET + 1)));
    if (!error)
        error = pp_multifd_offsets(offsets, head[1] % (PP_PACKET + 1), world.blocks[block].pages, &packet, &bad);
    if (error == -EPROTO && bad % PP_PAGE_SIZE == 0 && bad / PP_PAGE_SIZE < world.blocks[block].pages)
        fail("a good offset is refused: %#lx", (unsigned long)bad);
    if (error)
        return error;
    if (one_in(&world.choices, 2))
        return pp_multifd_read(r, &world.blocks[block], &packet, received[block]);
    error = pp_reader_take(r, side_by_side, (uint64_t)packet.count * PP_PAGE_SIZE);
    if (!error)
        pp_multifd_scatter(side_by_side, &world.blocks[block], &packet, received[block]);
    return error;
}

static void send_packets(uint64_t *received[])
{
    static uint8_t buffer[4096];
    struct pp_writer writer = {.fd = FD_WRITER, .cancel_fd = FD_CANCEL, .buffer = buffer, .size = sizeof(buffer)};
    struct pp_source s = {.blocks = world.blocks, .block_count = BLOCKS, .writer = &writer, .last_block = -1};
    struct pp_packet packet;
    int64_t taken;

    if (pp_source_init(&s))
        fail("no source");
    for (int i = 0; i < BLOCKS; i++)
        for (uint64_t page = 0; page < world.blocks[i].pages; page++)
            if (pp_test(received[i], page)) {
                pp_set(world.blocks[i].dirty, page);
                pp_set(world.blocks[i].populated, page);
            }
    do {
        taken = pp_multifd_collect(&s, &packet, 1 + below(&world.choices, PP_PACKET));
        if (taken <= 0 || !packet.count)
            continue;
        pp_multifd_gather(&world.blocks[packet.block], &packet, side_by_side);
        if (pp_multifd_write(&writer, &world.blocks[packet.block], &packet, buffer, HEAD))
            break;
    } while (taken > 0);
    world_check(0);
    pp_source_free(&s);
}

void run_multifd(const uint8_t *data, size_t length)
{
    struct pp_reader reader = {.fd = FD_READER, .cancel_fd = FD_CANCEL, .size = 70000, .timeout_ms = -1};
    uint64_t *received[BLOCKS];
    int error;

    world_reset(data, data + CHOICES, length - CHOICES);
    reader.buffer = world_reader_buffer(reader.size);
    for (int i = 0; i < BLOCKS; i++)
        received[i] = world.blocks[i].received;
    do {
        error = take_packet(&reader, received);
        world_check(1);
    } while (!error);
    if (error != -EPROTO && error != -ENODATA && error != -ECANCELED && error != -ECONNRESET)
        fail("an error that nobody foresaw: %d", error);
    send_packets(received);
}

size_t record_of_multifd(const uint8_t *data, size_t length, size_t at)
{
    return length - at < HEAD ? length - at : HEAD + data[at + 1] % (PP_PACKET + 1) * (8ul + PP_PAGE_SIZE);
}

void generate_multifd(struct input *in, struct choices *c)
{
    static uint8_t content[PP_PAGE_SIZE];
    unsigned block = (unsigned)below(c, BLOCKS), count = (unsigned)below(c, one_in(c, 8) ? 20 : 5);

    put_be(in, block, 1);
    put_be(in, count, 1);
    for (unsigned i = 0; i < count; i++) {
        uint64_t page = one_in(c, 40) ? world.blocks[block].pages + below(c, 2) : below(c, world.blocks[block].pages);

        put_be(in, page * PP_PAGE_SIZE + (one_in(c, 60) ? below(c, PP_PAGE_SIZE) : 0), 8);
    }
    for (unsigned i = 0; i < count; i++) {
        memset(content, 0, sizeof(content));
        if (!one_in(c, 4))
            content[below(c, sizeof(content))] = (uint8_t)next(c);
        put(in, content, sizeof(content));
    }
}
