/*
 * Guest RAM as the translator sees it: which pages hold translated code, and which were stored to.
 *
 * Unicorn took out QEMU's dirty bitmaps, so it misses code that is changed through a second virtual address,
 * and keeps every writable and executable mapping on the slow store path for ever. The wrapped routines put
 * them back: `has_code` is QEMU's DIRTY_MEMORY_CODE, inverted, `log` is the migration bitmap
 * (store_log.c).
 * A TLB entry loses NOTDIRTY, and so the slow path, only when its page has no code and, while logging, is
 * in the log already. Unicorn would clear NOTDIRTY of a non-executable mapping after its first store; it does
 * not while a memory hook covers the page, and ours for fetches (instructions.c, on_fetch) covers all of them.
 *
 *   tlb_protect_code             first block made from a page: has_code, all TLB entries back to NOTDIRTY
 *   tlb_unprotect_code           last block gone
 *   tb_invalidate_phys_page_fast store through a NOTDIRTY entry: drop code, log, clear NOTDIRTY if allowed
 *   tlb_set_page_with_attrs      new TLB entry (always NOTDIRTY): clear it at once if allowed
 *   address_space_st*            stores by the page walker (A/D bits) and by SVM, not through the TLB: log
 */
#include <errno.h>
#include <stdlib.h>

#include "engine_private.h"

void __real_tlb_protect_code_x86_64(void *uc, uint64_t ram_addr);
void __real_tlb_unprotect_code_x86_64(void *uc, uint64_t ram_addr);
void __real_tb_invalidate_phys_page_fast_x86_64(void *uc, void *pages, uint64_t start, int length, uintptr_t retaddr);
void __real_tlb_set_page_with_attrs_x86_64(void *cpu, uint64_t vaddr, uint64_t paddr, uint32_t attrs, int prot,
                                           int mmu_idx, uint64_t size);

struct pf_ram *pf_find_guest(struct pf_engine *engine, uint64_t guest)
{
    for (uint32_t i = 0; i < engine->ram_count; i++)
        if (guest - engine->ram[i].guest < engine->ram[i].length)
            return &engine->ram[i];
    return NULL;
}

static struct pf_ram *find_ram_addr(struct pf_engine *engine, uint64_t ram_addr)
{
    for (uint32_t i = 0; engine && i < engine->ram_count; i++)
        if (ram_addr - engine->ram[i].ram_addr < engine->ram[i].length)
            return &engine->ram[i];
    return NULL;
}

static bool is_logged(const struct pf_ram *ram, uint64_t page)
{
    return (ram->log[page / 64] >> (page % 64)) & 1;
}

/* Only the vCPU's thread writes here while it runs. */
static void log_page(struct pf_engine *engine, struct pf_ram *ram, uint64_t page)
{
    if (!engine->logging)
        return;
    ram->log[page / 64] |= 1ull << (page % 64);
    __atomic_store_n(&engine->log_used, 1, __ATOMIC_RELEASE);
}

/* Lets stores to a page take the fast path, in the entry it was last mapped by, if that is still so. */
static void allow_fast_stores(struct pf_engine *engine, const struct pf_ram *ram, uint64_t page)
{
    if (ram->has_code[page] || (engine->logging && !is_logged(ram, page)))
        return;
    for (int mode = 0; mode < TLB_MODES; mode++) {
        struct tlb_fast *fast = &AT(struct tlb_fast, engine->cpu, CPU_TLB_FAST) + mode;
        uint64_t index = ram->last_index[page] & (fast->mask >> TLB_ENTRY_SHIFT);
        struct tlb_entry *entry = (struct tlb_entry *)(fast->table + (index << TLB_ENTRY_SHIFT));
        uint64_t vaddr = entry->addr_write & ~(PAGE_BYTES - 1);

        if (entry->addr_write == (vaddr | TLB_NOTDIRTY) && vaddr + entry->addend == ram->host + page * PAGE_BYTES)
            entry->addr_write = vaddr;
    }
}

void __wrap_tlb_protect_code_x86_64(void *uc, uint64_t ram_addr);
void __wrap_tlb_protect_code_x86_64(void *uc, uint64_t ram_addr)
{
    struct pf_ram *ram = find_ram_addr(pf_current, ram_addr);
    uint64_t page;

    __real_tlb_protect_code_x86_64(uc, ram_addr);
    if (!ram)
        return;
    page = (ram_addr - ram->ram_addr) >> PAGE_SHIFT;
    ram->has_code[page] = 1;
    tlb_reset_dirty_x86_64(pf_current->cpu, ram->host + page * PAGE_BYTES, PAGE_BYTES);
}

void __wrap_tlb_unprotect_code_x86_64(void *uc, uint64_t ram_addr);
void __wrap_tlb_unprotect_code_x86_64(void *uc, uint64_t ram_addr)
{
    struct pf_ram *ram = find_ram_addr(pf_current, ram_addr);

    __real_tlb_unprotect_code_x86_64(uc, ram_addr);
    if (ram)
        ram->has_code[(ram_addr - ram->ram_addr) >> PAGE_SHIFT] = 0;
}

void __wrap_tb_invalidate_phys_page_fast_x86_64(void *uc, void *pages, uint64_t start, int length,
                                                uintptr_t retaddr);
void __wrap_tb_invalidate_phys_page_fast_x86_64(void *uc, void *pages, uint64_t start, int length,
                                                uintptr_t retaddr)
{
    struct pf_engine *engine = pf_current;
    struct pf_ram *ram = find_ram_addr(engine, start);
    uint64_t page;

    if (!ram) {
        __real_tb_invalidate_phys_page_fast_x86_64(uc, pages, start, length, retaddr);
        return;
    }
    engine->slow_stores++;
    page = (start - ram->ram_addr) >> PAGE_SHIFT;
    if (ram->has_code[page]) {
        /* May longjmp, before the store: the block that runs is the one that changes. Then it comes again. */
        __real_tb_invalidate_phys_page_fast_x86_64(uc, pages, start, length, retaddr);
    }
    log_page(engine, ram, page);
    allow_fast_stores(engine, ram, page);
}

void __wrap_tlb_set_page_with_attrs_x86_64(void *cpu, uint64_t vaddr, uint64_t paddr, uint32_t attrs, int prot,
                                           int mmu_idx, uint64_t size);
void __wrap_tlb_set_page_with_attrs_x86_64(void *cpu, uint64_t vaddr, uint64_t paddr, uint32_t attrs, int prot,
                                           int mmu_idx, uint64_t size)
{
    struct pf_engine *engine = pf_current;
    struct pf_ram *ram = engine ? pf_find_guest(engine, paddr) : NULL;
    uint64_t page;

    __real_tlb_set_page_with_attrs_x86_64(cpu, vaddr, paddr, attrs, prot, mmu_idx, size);
    if (!ram || !(prot & PAGE_PROT_WRITE))
        return;
    page = (paddr - ram->guest) >> PAGE_SHIFT;
    ram->last_index[page] = (uint16_t)(vaddr >> PAGE_SHIFT);
    allow_fast_stores(engine, ram, page);
}

static void log_physical_store(uint64_t guest, uint64_t length)
{
    struct pf_engine *engine = pf_current;

    for (uint64_t at = guest; engine && engine->logging && at < guest + length; at += length > 1 ? length - 1 : 1) {
        struct pf_ram *ram = pf_find_guest(engine, at);
        if (ram)
            log_page(engine, ram, (at - ram->guest) >> PAGE_SHIFT);
    }
}

/* attrs (4 bytes of bit fields) and result travel in registers like these types do. */
#define WRAP_PHYSICAL_STORE(name, type, bytes)                                                                     \
    void __real_##name(void *uc, void *as, uint64_t addr, type value, uint32_t attrs, uint32_t *result);           \
    void __wrap_##name(void *uc, void *as, uint64_t addr, type value, uint32_t attrs, uint32_t *result);           \
    void __wrap_##name(void *uc, void *as, uint64_t addr, type value, uint32_t attrs, uint32_t *result)            \
    {                                                                                                              \
        __real_##name(uc, as, addr, value, attrs, result);                                                         \
        log_physical_store(addr, bytes);                                                                           \
    }

WRAP_PHYSICAL_STORE(address_space_stb_x86_64, uint32_t, 1)
WRAP_PHYSICAL_STORE(address_space_stw_x86_64, uint32_t, 2)
WRAP_PHYSICAL_STORE(address_space_stl_x86_64, uint32_t, 4)
WRAP_PHYSICAL_STORE(address_space_stl_notdirty_x86_64, uint32_t, 4)
WRAP_PHYSICAL_STORE(address_space_stq_x86_64, uint64_t, 8)

static int64_t flush_work(struct pf_engine *engine, void *unused)
{
    (void)unused;
    tb_flush_x86_64(engine->cpu);
    tlb_flush_x86_64(engine->cpu);
    return 0;
}

int pf_flush(struct pf_engine *engine, int64_t timeout_ns)
{
    return (int)pf_at_safe_point(engine, flush_work, NULL, timeout_ns);
}

/*
 * While a block is being made, its bytes have been read but its page is not yet known to have code. So who has
 * changed bytes must not believe has_code then.
 */
void *__real_tb_gen_code_x86_64(void *cpu, uint64_t pc, uint64_t cs_base, uint32_t flags, int cflags);
void *__wrap_tb_gen_code_x86_64(void *cpu, uint64_t pc, uint64_t cs_base, uint32_t flags, int cflags);
void *__wrap_tb_gen_code_x86_64(void *cpu, uint64_t pc, uint64_t cs_base, uint32_t flags, int cflags)
{
    struct pf_engine *engine = pf_current;
    void *block;

    __atomic_store_n(&engine->translating, 1, __ATOMIC_SEQ_CST);
    block = __real_tb_gen_code_x86_64(cpu, pc, cs_base, flags, cflags);
    __atomic_store_n(&engine->translating, 0, __ATOMIC_SEQ_CST);
    return block;
}

/* Any thread, after it has changed the bytes: is it certain that no code was made from them? */
static int has_no_code(struct pf_engine *engine, uint64_t guest, uint64_t length)
{
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    if (__atomic_load_n(&engine->translating, __ATOMIC_SEQ_CST))
        return 0;
    for (uint32_t i = 0; i < engine->ram_count; i++) {
        struct pf_ram *ram = &engine->ram[i];
        uint64_t from = guest > ram->guest ? guest : ram->guest, end = guest + length;
        uint64_t to = end < ram->guest + ram->length ? end : ram->guest + ram->length;

        for (uint64_t at = from & ~(PAGE_BYTES - 1); at < to; at += PAGE_BYTES)
            if (__atomic_load_n(&ram->has_code[(at - ram->guest) >> PAGE_SHIFT], __ATOMIC_SEQ_CST))
                return 0;
    }
    return 1;
}

struct range {
    uint64_t guest, length;
};

static int64_t invalidate_work(struct pf_engine *engine, void *argument)
{
    const struct range *range = argument;

    for (uint32_t i = 0; i < engine->ram_count; i++) {
        struct pf_ram *ram = &engine->ram[i];
        uint64_t from = range->guest > ram->guest ? range->guest : ram->guest;
        uint64_t ram_end = ram->guest + ram->length, end = range->guest + range->length;
        uint64_t to = end < ram_end ? end : ram_end;

        for (uint64_t at = from & ~(PAGE_BYTES - 1); at < to; at += PAGE_BYTES) {
            uint64_t offset = at - ram->guest;
            if (ram->has_code[offset >> PAGE_SHIFT])
                tb_invalidate_phys_page_range_x86_64(engine->uc, ram->ram_addr + offset,
                                                     ram->ram_addr + offset + PAGE_BYTES);
        }
    }
    return 0;
}

int pf_invalidate(struct pf_engine *engine, uint64_t guest, uint64_t length, int64_t timeout_ns)
{
    struct range range = {.guest = guest, .length = length};

    if (length > (1ull << 40) || guest + length < guest)
        return -EINVAL;
    if (has_no_code(engine, guest, length))
        return 0;
    return (int)pf_at_safe_point(engine, invalidate_work, &range, timeout_ns);
}
