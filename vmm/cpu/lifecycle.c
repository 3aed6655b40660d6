/* Opening, checking, mapping and closing an engine. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>

#include "engine_private.h"

/* A guest that writes code for ever fills it, and it is emptied; the library's own size is 1 GiB. */
#define CODE_BUFFER_BYTES (64 << 20)

static int wrong(struct pf_mismatch *mismatch, const char *what, uint64_t expected, uint64_t got)
{
    strncpy(mismatch->what, what, sizeof mismatch->what - 1);
    mismatch->expected = expected;
    mismatch->got = got;
    return -EPROTO;
}

#define EXPECT(what, want, have)                                                                                   \
    do {                                                                                                           \
        if ((uint64_t)(want) != (uint64_t)(have))                                                                  \
            return wrong(mismatch, what, (uint64_t)(want), (uint64_t)(have));                                      \
    } while (0)

static int check_registers(struct pf_engine *engine, struct pf_mismatch *mismatch)
{
    static const struct {
        int reg;
        int offset;
        const char *what;
    } probes[] = {
        {UC_X86_REG_RAX, ENV_REGS, "RAX in the CPU state"},
        {UC_X86_REG_R15, ENV_REGS + 120, "R15 in the CPU state"},
        {UC_X86_REG_CR2, ENV_CR + 16, "CR2 in the CPU state"},
        {UC_X86_REG_DR0, ENV_DR, "DR0 in the CPU state"},
        {UC_X86_REG_FS_BASE, ENV_SEGS + 24 * 4 + 8, "FS base in the CPU state"},
    };
    uint64_t pattern = 0x1122334455667700, xmm[2] = {0xa1a2a3a4a5a6a7a8, 0xb1b2b3b4b5b6b7b8}, zero[2] = {0, 0};

    for (size_t i = 0; i < sizeof probes / sizeof probes[0]; i++) {
        uint64_t value = pattern + i, before = ENV(uint64_t, engine, probes[i].offset);
        uc_reg_write(engine->uc, probes[i].reg, &value);
        EXPECT(probes[i].what, value, ENV(uint64_t, engine, probes[i].offset));
        uc_reg_write(engine->uc, probes[i].reg, &before);
    }
    uc_reg_write(engine->uc, UC_X86_REG_XMM15, xmm);
    EXPECT("XMM15 in the CPU state", xmm[1], ENV(uint64_t, engine, ENV_XMM + 15 * ENV_XMM_STRIDE + 8));
    uc_reg_write(engine->uc, UC_X86_REG_XMM15, zero);
    return 0;
}

int pf_check(struct pf_engine *engine, struct pf_mismatch *mismatch)
{
    uc_engine *uc = engine->uc;
    char *cpu;

    EXPECT("size of the saved context", CONTEXT_SIZE, uc_context_size(uc)); /* makes the CPU, too */
    cpu = AT(char *, uc, UC_CPU);
    EXPECT("CPUState.uc", (uintptr_t)uc, AT(uintptr_t, cpu, CPU_UC));
    EXPECT("CPUState.env_ptr", (uintptr_t)cpu + CPU_ENV, AT(uintptr_t, cpu, CPU_ENV_PTR));
    EXPECT("CPUState.icount_decr_ptr", (uintptr_t)cpu + CPU_TLB_FAST + 48, AT(uintptr_t, cpu, CPU_ICOUNT_DECR_PTR));
    EXPECT("CPUClass.cpu_exec_interrupt", (uintptr_t)x86_cpu_exec_interrupt_x86_64,
           AT(uintptr_t, AT(char *, cpu, CPU_CLASS), CLASS_EXEC_INTERRUPT));
    engine->cpu = cpu;
    engine->env = cpu + CPU_ENV;
    EXPECT("CPUX86State.uc", (uintptr_t)uc, ENV(uintptr_t, engine, ENV_UC));
    EXPECT("CPUX86State.cpuid_vendor", 0x68747541, ENV(uint32_t, engine, ENV_CPUID_VENDOR));
    for (int mode = 0; mode < TLB_MODES; mode++) {
        struct tlb_fast *fast = &AT(struct tlb_fast, cpu, CPU_TLB_FAST) + mode;
        EXPECT("TLB mask", 0, ((fast->mask >> TLB_ENTRY_SHIFT) + 1) & (fast->mask >> TLB_ENTRY_SHIFT));
        EXPECT("TLB table", -1, ((struct tlb_entry *)fast->table)->addr_write);
    }
    EXPECT("uc_struct.memory_mapping", (uintptr_t)find_memory_mapping_x86_64, AT(uintptr_t, uc, UC_MEMORY_MAPPING));
    EXPECT("uc_struct.no_exit_request", 0, AT(uint8_t, uc, UC_NO_EXIT_REQUEST));
    EXPECT("uc_struct.init_done", 1, AT(uint8_t, uc, UC_NO_EXIT_REQUEST + 1));
    return check_registers(engine, mismatch);
}

static int set_up(struct pf_engine *engine, struct pf_mismatch *mismatch)
{
    int result;

    EXPECT("version", 0x020104ff, uc_version(NULL, NULL)); /* 2.1.4, final */
    if (uc_open(UC_ARCH_X86, UC_MODE_64, &engine->uc) ||
        uc_ctl_set_tcg_buffer_size(engine->uc, CODE_BUFFER_BYTES) ||
        uc_ctl_set_cpu_model(engine->uc, UC_CPU_X86_QEMU64) || uc_ctl_exits_enable(engine->uc))
        return -ENOMEM;
    result = pf_check(engine, mismatch);
    if (result)
        return result;
    AT(uint8_t, engine->uc, UC_NO_EXIT_REQUEST) = 1; /* leave only between blocks, see run.c */
    pf_hook_interrupts(engine);
    pf_hook_lookups(engine);
    return pf_hook(engine);
}

/* The engine asks for huge pages for its code. The first one would be there before any code is, and most guests never
 * fill it: two megabytes of every process. So what the set-up touches gets small pages; the rest is as it was asked. */
static int set_up_small(struct pf_engine *engine, struct pf_mismatch *mismatch)
{
    int before = prctl(PR_GET_THP_DISABLE, 0, 0, 0, 0), result;

    prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0);
    result = set_up(engine, mismatch);
    if (before == 0)
        prctl(PR_SET_THP_DISABLE, 0, 0, 0, 0);
    return result;
}

int pf_create(struct pf_engine **out, void *handle, const struct pf_callbacks *callbacks,
              struct pf_mismatch *mismatch)
{
    struct pf_engine *engine = calloc(1, sizeof *engine);
    pthread_condattr_t attributes;
    int result;

    if (!engine)
        return -ENOMEM;
    engine->handle = handle;
    engine->read = callbacks->port_read;
    engine->write = callbacks->port_write;
    engine->mmio_read = callbacks->mmio_read;
    engine->mmio_write = callbacks->mmio_write;
    engine->stop = 1; /* a new vCPU is stopped */
    engine->tick_armed = -1;
    engine->tick_fd = timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC);
    pthread_mutex_init(&engine->lock, NULL);
    pthread_condattr_init(&attributes);
    pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
    pthread_cond_init(&engine->changed, &attributes);
    pthread_condattr_destroy(&attributes);
    result = engine->tick_fd < 0 ? -errno : set_up_small(engine, mismatch);
    if (result) {
        pf_destroy(engine);
        return result;
    }
    *out = engine;
    return 0;
}

int pf_destroy(struct pf_engine *engine)
{
    if (engine->running)
        return -EBUSY;
    if (engine->uc)
        uc_close(engine->uc);
    for (uint32_t i = 0; i < engine->ram_count; i++) {
        free(engine->ram[i].has_code);
        free(engine->ram[i].last_index);
        free(engine->ram[i].log);
        free(engine->ram[i].taken);
    }
    if (engine->tick_fd >= 0)
        close(engine->tick_fd);
    pthread_cond_destroy(&engine->changed);
    pthread_mutex_destroy(&engine->lock);
    free(engine);
    return 0;
}

int pf_map_ram(struct pf_engine *engine, uint64_t guest, uint64_t host, uint64_t length)
{
    struct pf_ram *ram = &engine->ram[engine->ram_count];
    uint64_t pages = length / PAGE_BYTES;

    if (engine->sealed || engine->running)
        return -EBUSY;
    if (engine->ram_count == PF_MAX_RAM)
        return -ENOSPC;
    if ((guest | host | length) % PAGE_BYTES || !length || guest + length > PHYSICAL_LIMIT)
        return -EINVAL;
    ram->has_code = calloc(pages, 1);
    ram->last_index = calloc(pages, sizeof *ram->last_index);
    if (!ram->has_code || !ram->last_index ||
        uc_mem_map_ptr(engine->uc, guest, length, UC_PROT_ALL, (void *)(uintptr_t)host)) {
        free(ram->has_code);
        free(ram->last_index);
        return -EINVAL;
    }
    ram->guest = guest;
    ram->length = length;
    ram->host = host;
    ram->ram_addr = qemu_ram_addr_from_host_x86_64(engine->uc, (void *)(uintptr_t)host);
    engine->ram_count++;
    return 0;
}

int pf_set_cpuid(struct pf_engine *engine, const struct pf_cpuid *table, uint32_t count, const uint32_t *features)
{
    static const int word[] = {0, 1, 2, 6, 7}; /* QEMU 5.0's FeatureWord numbers of the five */

    if (count > PF_MAX_CPUID)
        return -ENOSPC;
    memcpy(engine->cpuid, table, count * sizeof *table);
    engine->cpuid_count = count;
    for (int i = 0; i < 5; i++)
        ENV(uint64_t, engine, ENV_FEATURES + 8 * word[i]) = features[i];
    return 0;
}

const char *pf_strerror(int uc_error)
{
    return uc_strerror((uc_err)uc_error);
}
