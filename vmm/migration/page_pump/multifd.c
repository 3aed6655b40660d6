/* multifd: what is done once per page. Packets, channels and their order are vmm/migration/multifd_*.py. */
#include <errno.h>
#include <string.h>
#include <sys/uio.h>

#include "page_pump.h"

static int put_zero(struct pp_source *s, uint32_t block, uint64_t page)
{
    const char *name = s->blocks[block].name;
    uint64_t flags = (int32_t)block == s->last_block ? RAM_CONTINUE : 0;
    uint8_t record[8 + 1 + PP_NAME + 1];
    size_t length = 8;

    pp_put64(record, page * PP_PAGE_SIZE | flags | RAM_ZERO);
    if (!flags) {
        record[length++] = (uint8_t)strlen(name);
        memcpy(record + length, name, strlen(name));
        length += strlen(name);
        s->last_block = (int32_t)block;
    }
    record[length++] = 0;
    s->zero_pages++;
    s->page_bytes += length;
    return pp_writer_put(s->writer, record, length);
}

/* Takes up to max_pages dirty pages: those of zeroes go into the main stream as records, as in QEMU 7.2, the others
 * into the packet, until it is full or the next one is of another block. Returns how many; fewer than asked, and
 * the packet neither full nor followed by another block = nothing is dirty now. */
int64_t pp_multifd_collect(struct pp_source *s, struct pp_packet *p, uint64_t max_pages)
{
    uint64_t taken = 0;
    uint32_t block;
    uint64_t page;

    p->count = 0;
    while (taken < max_pages && p->count < PP_PACKET && pp_source_next(s, &block, &page)) {
        struct pp_block *b = &s->blocks[block];
        const uint8_t *data = b->host + page * PP_PAGE_SIZE;
        int zero = !pp_test(b->populated, page) || pp_is_zero_page(data), error;

        if (!zero && p->count && p->block != block) {
            s->block = block;
            s->page = page;
            break;
        }
        /* Before its content is read for good: a store after that is in the dirty log. */
        pp_clear(b->dirty, page);
        s->resent_pages += (uint64_t)pp_test(b->sent, page);
        pp_set(b->sent, page);
        s->pushed_pages++;
        taken++;
        if (zero && (!pp_test(b->populated, page) || pp_is_zero_page(data))) {
            error = put_zero(s, block, page);
            if (error)
                return error;
            continue;
        }
        if (p->count && p->block != block) {  /* it was a page of zeroes a moment ago: another packet's */
            pp_set(b->dirty, page);
            taken--;
            s->block = block;
            s->page = page;
            break;
        }
        p->block = block;
        p->pages[p->count++] = page;
        s->normal_pages++;
        s->page_bytes += PP_PAGE_SIZE;
    }
    return (int64_t)taken;
}

/* The packet's head, and its pages as they are. */
int pp_multifd_write(struct pp_writer *w, const struct pp_block *b, const struct pp_packet *p,
                     const uint8_t *head, uint32_t length)
{
    struct iovec iov[1 + PP_PACKET] = {{(void *)head, length}};

    for (uint32_t i = 0; i < p->count; i++)
        iov[1 + i] = (struct iovec){b->host + p->pages[i] * PP_PAGE_SIZE, PP_PAGE_SIZE};
    return pp_writer_writev(w, iov, (int)(1 + p->count));
}

/* The packet's pages side by side: what is compressed must not change meanwhile. */
void pp_multifd_gather(const struct pp_block *b, const struct pp_packet *p, uint8_t *out)
{
    for (uint32_t i = 0; i < p->count; i++)
        memcpy(out + (size_t)i * PP_PAGE_SIZE, b->host + p->pages[i] * PP_PAGE_SIZE, PP_PAGE_SIZE);
}

/* The offsets of a packet as pages of the block; -EPROTO and *bad = the first offset that is none. */
int pp_multifd_offsets(const uint8_t *offsets, uint32_t count, uint64_t pages, struct pp_packet *p,
                       uint64_t *bad)
{
    p->count = 0;
    for (uint32_t i = 0; i < count; i++) {
        uint64_t offset = pp_be64(offsets + 8 * i);

        if (offset % PP_PAGE_SIZE || offset / PP_PAGE_SIZE >= pages) {
            *bad = offset;
            return -EPROTO;
        }
        p->pages[p->count++] = offset / PP_PAGE_SIZE;
    }
    return 0;
}

/* The packet's pages from the channel to their places; `received` is the channel's own map. */
int pp_multifd_read(struct pp_reader *r, const struct pp_block *b, const struct pp_packet *p, uint64_t *received)
{
    for (uint32_t i = 0; i < p->count; i++) {
        int error = pp_reader_take(r, b->host + p->pages[i] * PP_PAGE_SIZE, PP_PAGE_SIZE);

        if (error)
            return error;
        pp_set(received, p->pages[i]);
    }
    return 0;
}

/* The same from a buffer that holds them side by side. */
void pp_multifd_scatter(const uint8_t *data, const struct pp_block *b, const struct pp_packet *p, uint64_t *received)
{
    for (uint32_t i = 0; i < p->count; i++) {
        memcpy(b->host + p->pages[i] * PP_PAGE_SIZE, data + (size_t)i * PP_PAGE_SIZE, PP_PAGE_SIZE);
        pp_set(received, p->pages[i]);
    }
}
