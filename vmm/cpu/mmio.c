/*
 * Guest physical addresses that are not RAM: devices' registers, and the open bus around them.
 *
 * The library calls on_read and on_write from inside of a load or store, on the vCPU's thread, also for the
 * page walker of a guest whose page tables lie in a device. What Python does then may change RAM and drop
 * translated code, as in a port handler: the access itself touches no guest memory any more.
 */
#include <errno.h>

#include "engine_private.h"

static uint64_t all_ones(unsigned size)
{
    return size >= 8 ? ~0ull : (1ull << (size * 8)) - 1;
}

static uint64_t on_read(uc_engine *uc, uint64_t offset, unsigned size, void *user_data)
{
    struct pf_mmio *region = user_data;
    struct pf_engine *engine = region->engine;
    uint64_t value;

    (void)uc;
    if (engine->latched)
        return all_ones(size);
    pf_enter_handler(engine);
    value = engine->mmio_read(engine->handle, region->guest + offset, size) & all_ones(size);
    pf_leave_handler(engine);
    return value;
}

static void on_write(uc_engine *uc, uint64_t offset, unsigned size, uint64_t value, void *user_data)
{
    struct pf_mmio *region = user_data;
    struct pf_engine *engine = region->engine;

    (void)uc;
    if (engine->latched)
        return;
    pf_enter_handler(engine);
    engine->mmio_write(engine->handle, region->guest + offset, size, value & all_ones(size));
    pf_leave_handler(engine);
}

static uint64_t nothing_read(uc_engine *uc, uint64_t offset, unsigned size, void *user_data)
{
    (void)uc, (void)offset, (void)size, (void)user_data;
    return ~0ull;
}

static void nothing_write(uc_engine *uc, uint64_t offset, unsigned size, uint64_t value, void *user_data)
{
    (void)uc, (void)offset, (void)size, (void)value, (void)user_data;
}

static int overlaps(uint64_t first, uint64_t first_length, uint64_t second, uint64_t second_length)
{
    return first < second + second_length && second < first + first_length;
}

int pf_map_mmio(struct pf_engine *engine, uint64_t guest, uint64_t length)
{
    struct pf_mmio *region = &engine->mmio[engine->mmio_count];

    if (engine->sealed || engine->running)
        return -EBUSY;
    if (engine->mmio_count == PF_MAX_MMIO)
        return -ENOSPC;
    if ((guest | length) % PAGE_BYTES || !length || guest > PHYSICAL_LIMIT || length > PHYSICAL_LIMIT - guest)
        return -EINVAL;
    for (uint32_t i = 0; i < engine->ram_count; i++)
        if (overlaps(guest, length, engine->ram[i].guest, engine->ram[i].length))
            return -EINVAL;
    for (uint32_t i = 0; i < engine->mmio_count; i++)
        if (overlaps(guest, length, engine->mmio[i].guest, engine->mmio[i].length))
            return -EINVAL;
    region->engine = engine;
    region->guest = guest;
    region->length = length;
    if (uc_mmio_map(engine->uc, guest, length, on_read, region, on_write, region))
        return -EINVAL;
    engine->mmio_count++;
    return 0;
}

/* The mapped range that begins first at or after `from`; its end, or `limit` with *start = limit. */
static uint64_t next_mapped(const struct pf_engine *engine, uint64_t from, uint64_t *start)
{
    uint64_t end = *start = PHYSICAL_LIMIT;

    for (uint32_t i = 0; i < engine->ram_count; i++)
        if (engine->ram[i].guest >= from && engine->ram[i].guest < *start) {
            *start = engine->ram[i].guest;
            end = *start + engine->ram[i].length;
        }
    for (uint32_t i = 0; i < engine->mmio_count; i++)
        if (engine->mmio[i].guest >= from && engine->mmio[i].guest < *start) {
            *start = engine->mmio[i].guest;
            end = *start + engine->mmio[i].length;
        }
    return end;
}

/* Maps what is left to the open bus of a PC: reads give ones, writes are lost. */
int pf_seal(struct pf_engine *engine)
{
    uint64_t from = 0;

    if (engine->sealed)
        return 0;
    while (from < PHYSICAL_LIMIT) {
        uint64_t start, end = next_mapped(engine, from, &start);

        if (start > from && uc_mmio_map(engine->uc, from, start - from, nothing_read, NULL, nothing_write, NULL))
            return -EIO;
        from = end;
    }
    engine->sealed = 1;
    return 0;
}
