/*
 * What the library looks up again and again, answered at once where it is guest RAM.
 *
 * Unicorn asks for each load and store outside of the TLB's fast path which memory region the address is of,
 * and reads each entry of a page table by the way of a device access. RAM stays where it was mapped.
 */
#include <string.h>

#include "engine_private.h"

static void *find_region(void *uc, uint64_t guest)
{
    struct pf_engine *engine = pf_current;
    struct pf_ram *ram = engine && engine->uc == uc ? pf_find_guest(engine, guest) : NULL;

    if (!ram)
        return find_memory_mapping_x86_64(uc, guest);
    if (!ram->region)
        ram->region = find_memory_mapping_x86_64(uc, guest);
    return ram->region;
}

void pf_hook_lookups(struct pf_engine *engine)
{
    AT(find_region_fn, engine->uc, UC_MEMORY_MAPPING) = find_region;
}

/* Where the page walker finds so many bytes, NULL: not in RAM. */
static const void *find_bytes(uint64_t guest, uint64_t length)
{
    struct pf_ram *ram = pf_current ? pf_find_guest(pf_current, guest) : NULL;

    if (!ram || ram->length - (guest - ram->guest) < length)
        return NULL;
    return (const void *)(uintptr_t)(ram->host + (guest - ram->guest));
}

/* attrs (4 bytes of bit fields) and result travel in registers like these types do; 0 is MEMTX_OK. */
#define WRAP_PHYSICAL_LOAD(name, type)                                                                             \
    type __real_##name(void *uc, void *as, uint64_t addr, uint32_t attrs, uint32_t *result);                       \
    type __wrap_##name(void *uc, void *as, uint64_t addr, uint32_t attrs, uint32_t *result);                       \
    type __wrap_##name(void *uc, void *as, uint64_t addr, uint32_t attrs, uint32_t *result)                        \
    {                                                                                                              \
        const void *bytes = find_bytes(addr, sizeof(type));                                                        \
        type value;                                                                                                \
                                                                                                                   \
        if (!bytes)                                                                                                \
            return __real_##name(uc, as, addr, attrs, result);                                                     \
        memcpy(&value, bytes, sizeof value);                                                                       \
        if (result)                                                                                                \
            *result = 0;                                                                                           \
        return value;                                                                                              \
    }

WRAP_PHYSICAL_LOAD(address_space_ldl_x86_64, uint32_t)
WRAP_PHYSICAL_LOAD(address_space_ldq_x86_64, uint64_t)
