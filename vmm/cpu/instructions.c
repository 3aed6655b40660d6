/*
 * Instructions and exceptions that Unicorn leaves to its user, done as a PC does them.
 *
 * The translator's helpers are wrapped at link time instead of hooked: no list walk per instruction, and a
 * wrapper can raise a guest exception. GETPC in the library is the return address into translated code; here
 * that is the return address of the wrapper. A wrapper or hook that raises leaves by longjmp: it holds no lock
 * and has no Python frame below it.
 */
#include <string.h>

#include "engine_private.h"

#define RETADDR ((uintptr_t)__builtin_extract_return_addr(__builtin_return_address(0)))

enum { RAX, RCX, RDX, RBX, R11 = 11 };
enum { CS = 1, SS = 2 };

/* ---- port I/O ---- */

static uint32_t port_read(uint32_t port, uint32_t size)
{
    struct pf_engine *engine = pf_current;
    uint32_t all_ones = size == 4 ? 0xffffffffu : (1u << (size * 8)) - 1;
    uint16_t fast = __atomic_load_n(&engine->fast_ports[port & 0xffff], __ATOMIC_RELAXED);
    uint32_t value;

    if (engine->latched)
        return all_ones;
    if ((fast & PF_PORT_FAST) && size == 1)
        return fast & 0xff;
    if (engine->has_pics && size == 1 && pf_pics_has_port(port))
        return pf_pic_port_read(engine, port);
    if (engine->has_pit && size == 1 && pf_pit_has_port(port))
        return pf_pit_port_read(engine, port);
    if (engine->has_uart && size == 1 && (port & ~7u) == engine->uart_port) {
        int found = pf_uart_port_read(engine, port);

        if (found >= 0)
            return (uint32_t)found;
    }
    pf_enter_handler(engine);
    value = engine->read(engine->handle, port & 0xffff, size) & all_ones;
    pf_leave_handler(engine);
    return value;
}

static void port_write(uint32_t port, uint32_t size, uint32_t value)
{
    struct pf_engine *engine = pf_current;

    if (engine->latched)
        return;
    if (engine->has_pics && size == 1 && pf_pics_has_port(port)) {
        pf_pic_port_write(engine, port, (uint8_t)value);
        return;
    }
    if (engine->has_pit && size == 1 && pf_pit_has_port(port)) {
        pf_pit_port_write(engine, port, (uint8_t)value);
        return;
    }
    if (engine->has_uart && size == 1 && (port & ~7u) == engine->uart_port &&
        pf_uart_port_write(engine, port, (uint8_t)value))
        return;
    if (size == 1 && (__atomic_load_n(&engine->fast_ports[port & 0xffff], __ATOMIC_RELAXED) & PF_PORT_DEAF))
        return;
    pf_enter_handler(engine);
    engine->write(engine->handle, port & 0xffff, size, value);
    pf_leave_handler(engine);
}

#define WRAP_PORT(suffix, size, mask)                                                                              \
    uint64_t __wrap_helper_in##suffix##_x86_64(void *env, uint32_t port);                                          \
    uint64_t __wrap_helper_in##suffix##_x86_64(void *env, uint32_t port)                                           \
    {                                                                                                              \
        (void)env;                                                                                                 \
        return port_read(port, size);                                                                              \
    }                                                                                                              \
    void __wrap_helper_out##suffix##_x86_64(void *env, uint32_t port, uint32_t value);                             \
    void __wrap_helper_out##suffix##_x86_64(void *env, uint32_t port, uint32_t value)                              \
    {                                                                                                              \
        (void)env;                                                                                                 \
        port_write(port, size, value & (mask));                                                                    \
    }

WRAP_PORT(b, 1, 0xffu)
WRAP_PORT(w, 2, 0xffffu)
WRAP_PORT(l, 4, 0xffffffffu)

int pf_set_fast_read(struct pf_engine *engine, uint32_t port, int value)
{
    uint16_t entry = value < 0 ? 0 : (uint16_t)(PF_PORT_FAST | (value & 0xff));

    if (port > 0xffff || value > 0xff)
        return -22; /* EINVAL */
    __atomic_store_n(&engine->fast_ports[port], entry, __ATOMIC_RELAXED);
    return 0;
}

int pf_set_no_device(struct pf_engine *engine, uint32_t port)
{
    if (port > 0xffff)
        return -22; /* EINVAL */
    if (!(engine->has_pics && pf_pics_has_port(port))) /* of theirs only wide accesses come to the caller */
        __atomic_store_n(&engine->fast_ports[port], PF_PORT_FAST | PF_PORT_DEAF | 0xff, __ATOMIC_RELAXED);
    return 0;
}

/* ---- time stamp counter ---- */

static void read_tsc(struct pf_engine *engine, void *env, uint32_t intercept, uintptr_t retaddr)
{
    uint64_t *regs = &AT(uint64_t, env, ENV_REGS);
    uint64_t value;

    if ((AT(uint64_t, env, ENV_CR + 32) & CR4_TSD) && (AT(uint32_t, env, ENV_HFLAGS) & HF_CPL))
        raise_exception_ra_x86_64(env, 13, retaddr);
    cpu_svm_check_intercept_param_x86_64(env, intercept, 0, retaddr);
    value = (uint64_t)pf_read_ticks(engine) + AT(uint64_t, env, ENV_TSC_OFFSET);
    regs[RAX] = (uint32_t)value;
    regs[RDX] = value >> 32;
}

void __wrap_helper_rdtsc_x86_64(void *env);
void __wrap_helper_rdtsc_x86_64(void *env)
{
    read_tsc(pf_current, env, SVM_EXIT_RDTSC, RETADDR);
}

void __wrap_helper_rdtscp_x86_64(void *env);
void __wrap_helper_rdtscp_x86_64(void *env)
{
    read_tsc(pf_current, env, SVM_EXIT_RDTSCP, RETADDR);
    AT(uint64_t, env, ENV_REGS + 8 * RCX) = AT(uint32_t, env, ENV_TSC_AUX);
}

#define MSR_TSC 0x10u

void __real_helper_rdmsr_x86_64(void *env);
void __wrap_helper_rdmsr_x86_64(void *env);
void __wrap_helper_rdmsr_x86_64(void *env)
{
    uint64_t *regs = &AT(uint64_t, env, ENV_REGS), value;

    if ((uint32_t)regs[RCX] != MSR_TSC) {
        __real_helper_rdmsr_x86_64(env);
        return;
    }
    value = (uint64_t)pf_get_ticks(pf_current) + AT(uint64_t, env, ENV_TSC_OFFSET);
    regs[RAX] = (uint32_t)value;
    regs[RDX] = value >> 32;
}

void __real_helper_wrmsr_x86_64(void *env);
void __wrap_helper_wrmsr_x86_64(void *env);
void __wrap_helper_wrmsr_x86_64(void *env)
{
    uint64_t *regs = &AT(uint64_t, env, ENV_REGS), value;

    if ((uint32_t)regs[RCX] != MSR_TSC) {
        __real_helper_wrmsr_x86_64(env);
        return;
    }
    value = (uint32_t)regs[RAX] | regs[RDX] << 32;
    AT(uint64_t, env, ENV_TSC_OFFSET) = value - (uint64_t)pf_get_ticks(pf_current);
}

/* ---- CPUID ---- */

void __wrap_helper_cpuid_x86_64(void *env);
void __wrap_helper_cpuid_x86_64(void *env)
{
    static const struct pf_cpuid nothing;
    struct pf_engine *engine = pf_current;
    uint64_t *regs = &AT(uint64_t, env, ENV_REGS);
    uint32_t leaf = (uint32_t)regs[RAX], subleaf = (uint32_t)regs[RCX];
    const struct pf_cpuid *found = &nothing;

    cpu_svm_check_intercept_param_x86_64(env, SVM_EXIT_CPUID, 0, RETADDR);
    for (uint32_t i = 0; i < engine->cpuid_count && found == &nothing; i++) {
        const struct pf_cpuid *entry = &engine->cpuid[i];
        if (entry->leaf == leaf && (entry->subleaf == subleaf || entry->subleaf == PF_ANY_SUBLEAF))
            found = entry;
    }
    regs[RAX] = found->eax;
    regs[RBX] = found->ebx;
    regs[RCX] = found->ecx;
    regs[RDX] = found->edx;
    if (found->flags & PF_CPUID_ECX_SUBLEAF)
        regs[RCX] |= subleaf & 0xff;
    if ((found->flags & PF_CPUID_OSXSAVE) && (AT(uint64_t, env, ENV_CR + 32) & CR4_OSXSAVE))
        regs[RCX] |= 1u << 27;
}

/* ---- SYSCALL: Intel SDM and AMD APM vol. 3; flags in the order both give ---- */

void __wrap_helper_syscall_x86_64(void *env, int length);
void __wrap_helper_syscall_x86_64(void *env, int length)
{
    struct pf_engine *engine = pf_current;
    uint64_t *regs = &AT(uint64_t, env, ENV_REGS);
    uint32_t hflags = AT(uint32_t, env, ENV_HFLAGS), selector;
    uint64_t star = AT(uint64_t, env, ENV_STAR), next = AT(uint64_t, env, ENV_EIP) + (uint64_t)length, flags, target;

    if (!(AT(uint64_t, env, ENV_EFER) & EFER_SCE))
        raise_exception_err_ra_x86_64(env, EXCP_UD, 0, RETADDR);
    flags = helper_read_eflags_x86_64(env) & ~EFLAGS_RF;
    selector = (uint32_t)(star >> 32) & 0xfffc;
    if (hflags & HF_LMA) {
        regs[RCX] = next;
        regs[R11] = flags;
        flags &= ~AT(uint64_t, env, ENV_FMASK);
        target = AT(uint64_t, env, hflags & HF_CS64 ? ENV_LSTAR : ENV_CSTAR);
    } else {
        regs[RCX] = (uint32_t)next;
        flags &= ~(EFLAGS_IF | EFLAGS_VM);
        target = (uint32_t)star;
    }
    AT(uint64_t, env, ENV_CC_SRC) = flags & EFLAGS_CC;
    AT(uint32_t, env, ENV_CC_OP) = CC_OP_EFLAGS;
    AT(int32_t, env, ENV_DF) = flags & EFLAGS_DF ? -1 : 1;
    AT(uint64_t, env, ENV_EFLAGS) = (flags & ~(EFLAGS_CC | EFLAGS_DF)) | 2;
    pf_load_flat_segments(engine, selector, selector + 8, (hflags & HF_LMA) != 0);
    AT(uint64_t, env, ENV_EIP) = target;
}

#define SEG_G (1u << 23)
#define SEG_B (1u << 22)
#define SEG_L (1u << 21)
#define SEG_CODE_FLAGS 0x9b00u /* present, code, readable, accessed; DPL 0 */
#define SEG_DATA_FLAGS 0x9300u

static void set_segment(struct pf_engine *engine, int index, uint32_t selector, uint32_t flags)
{
    char *segment = engine->env + ENV_SEGS + 24 * index;

    AT(uint32_t, segment, 0) = selector;
    AT(uint64_t, segment, 8) = 0;
    AT(uint32_t, segment, 16) = 0xffffffff;
    AT(uint32_t, segment, 20) = flags;
}

/* Flat ring 0 CS and SS, as SYSCALL loads them without a look at the GDT, and the hflags that follow. */
void pf_load_flat_segments(struct pf_engine *engine, uint32_t cs, uint32_t ss, int long_mode)
{
    uint32_t *hflags = &ENV(uint32_t, engine, ENV_HFLAGS);

    set_segment(engine, CS, cs, SEG_G | SEG_CODE_FLAGS | (long_mode ? SEG_L : SEG_B));
    set_segment(engine, SS, ss, SEG_G | SEG_B | SEG_DATA_FLAGS);
    *hflags &= ~(HF_CPL | HF_ADDSEG | HF_CS64);
    *hflags |= HF_CS32 | HF_SS32;
    if (long_mode)
        *hflags |= HF_CS64;
    else if (ENV(uint64_t, engine, ENV_SEGS + 24 * 3 + 8) | ENV(uint64_t, engine, ENV_SEGS + 8))
        *hflags |= HF_ADDSEG; /* DS or ES has a base */
}

/* ---- exceptions ---- */

void __real_helper_raise_interrupt_x86_64(void *env, int vector, int length);
void __wrap_helper_raise_interrupt_x86_64(void *env, int vector, int length);
void __wrap_helper_raise_interrupt_x86_64(void *env, int vector, int length)
{
    pf_current->int_eip = AT(uint64_t, env, ENV_EIP); /* a fault while delivering it points at the INT */
    __real_helper_raise_interrupt_x86_64(env, vector, length);
}

void __real_helper_into_x86_64(void *env, int length);
void __wrap_helper_into_x86_64(void *env, int length);
void __wrap_helper_into_x86_64(void *env, int length)
{
    pf_current->int_eip = AT(uint64_t, env, ENV_EIP);
    __real_helper_into_x86_64(env, length);
}

static void deliver_exception(void)
{
    struct pf_engine *engine = pf_current;

    if (AT(int, engine->uc, UC_INVALID_ERROR) != UC_ERR_OK)
        return; /* the last delivery failed inside the library: let the run end, do not try for ever */
    if (ENV(int32_t, engine, ENV_EXCEPTION_IS_INT))
        ENV(uint64_t, engine, ENV_EIP) = engine->int_eip;
    x86_cpu_do_interrupt_x86_64(engine->cpu);
}

static void on_interrupt(uc_engine *uc, uint32_t vector, void *user_data)
{
    (void)uc, (void)vector, (void)user_data;
    deliver_exception();
}

static bool on_invalid_instruction(uc_engine *uc, void *user_data)
{
    (void)uc, (void)user_data;
    deliver_exception();
    return true;
}

static bool on_fetch(uc_engine *uc, uc_mem_type type, uint64_t address, int size, int64_t value, void *user_data)
{
    (void)uc, (void)type, (void)address, (void)size, (void)value, (void)user_data;
    return true; /* code outside RAM: read the 0xff that are there, which make #UD. See also memory.c. */
}

void __real_qemu_system_reset_request(void *uc);
void __wrap_qemu_system_reset_request(void *uc);
void __wrap_qemu_system_reset_request(void *uc)
{
    if (pf_current)
        pf_current->triple_fault = 1; /* the one caller: a fault while delivering a double fault */
    __real_qemu_system_reset_request(uc);
}

int pf_hook(struct pf_engine *engine)
{
    uc_hook hook;

    if (uc_hook_add(engine->uc, &hook, UC_HOOK_INTR, (void *)on_interrupt, NULL, 1, 0) ||
        uc_hook_add(engine->uc, &hook, UC_HOOK_INSN_INVALID, (void *)on_invalid_instruction, NULL, 1, 0) ||
        uc_hook_add(engine->uc, &hook, UC_HOOK_MEM_FETCH_PROT, (void *)on_fetch, NULL, 1, 0))
        return -5; /* EIO */
    return 0;
}
