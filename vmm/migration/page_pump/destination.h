/* What load.c, place.c and listen.c share: the destination's side. */
#ifndef PAGE_PUMP_DESTINATION_H
#define PAGE_PUMP_DESTINATION_H

#include "page_pump.h"

/* place.c, from LISTEN on. 0, or -errno. Both are about d->last_block; data == NULL: a zero page. */
int pp_place(struct pp_destination *d, uint64_t page, const uint8_t *data);
int pp_place_run(struct pp_destination *d, uint64_t first, uint64_t count);
/* The faults that wait: 1 = there were some, 0, or -errno. */
int pp_serve_faults(struct pp_destination *d);

static inline void consume(struct pp_reader *r, uint32_t n)
{
    r->head += n;
    r->offset += n;
}

/* A record that stands in the buffer whole, with its checksum. */
static inline int verify_whole(struct pp_destination *d, struct pp_reader *r, const struct pp_block *b,
                               uint64_t offset, uint32_t kind, uint32_t header, uint32_t data)
{
    const uint8_t *content = r->buffer + r->head + header;

    return pp_verify(d, b, offset, kind, content, data, content + data, r->offset);
}

static inline void note_run(struct pp_destination *d, int32_t block_before, uint64_t page)
{
    d->run = d->run && d->last_block == block_before && page == d->run_next ? d->run + 1 : 1;
    d->run_next = page + 1;
}

#endif
