/*
 * The CPU state between Unicorn's CPUX86State and the fields of QEMU's "cpu" version 12.
 *
 * Where the two differ: the x87 stack top is kept apart from the status word, the tags are one byte each and
 * inverted, an XMM register has 64 bytes of room. After a run env->eflags is complete (cpu_exec_exit folds the
 * lazy flags in), and the next run takes it apart again. Setting a state does what QEMU's cpu_post_load does.
 */
#include <errno.h>
#include <string.h>

#include "engine_private.h"

enum direction { GET, SET };

static void copy(void *env, int offset, void *field, size_t size, enum direction direction)
{
    if (direction == GET)
        memcpy(field, (char *)env + offset, size);
    else
        memcpy((char *)env + offset, field, size);
}

#define FIELD(name, offset) copy(env, offset, &s->name, sizeof s->name, direction)

static void copy_segment(void *env, int offset, struct pf_segment *segment, enum direction direction)
{
    copy(env, offset, &segment->selector, 4, direction);
    copy(env, offset + 8, &segment->base, 8, direction);
    copy(env, offset + 16, &segment->limit, 4, direction);
    copy(env, offset + 20, &segment->flags, 4, direction);
}

static void copy_system(void *env, struct pf_cpu_state *s, enum direction direction)
{
    for (int i = 0; i < 6; i++)
        copy_segment(env, ENV_SEGS + 24 * i, &s->segs[i], direction);
    copy_segment(env, ENV_LDT, &s->ldt, direction);
    copy_segment(env, ENV_TR, &s->tr, direction);
    copy_segment(env, ENV_GDT, &s->gdt, direction);
    copy_segment(env, ENV_IDT, &s->idt, direction);
    FIELD(cr, ENV_CR);
    FIELD(dr, ENV_DR);
    FIELD(a20_mask, ENV_A20_MASK);
    FIELD(smbase, ENV_SMBASE);
    FIELD(vm_hsave, ENV_VM_HSAVE);
    FIELD(vm_vmcb, ENV_VM_VMCB);
    FIELD(tsc_offset, ENV_TSC_OFFSET);
    FIELD(intercept, ENV_INTERCEPT);
    FIELD(intercept_cr_read, ENV_INTERCEPT_CR_READ);
    FIELD(intercept_cr_write, ENV_INTERCEPT_CR_WRITE);
    FIELD(intercept_dr_read, ENV_INTERCEPT_DR_READ);
    FIELD(intercept_dr_write, ENV_INTERCEPT_DR_WRITE);
    FIELD(intercept_exceptions, ENV_INTERCEPT_EXCEPTIONS);
    FIELD(v_tpr, ENV_V_TPR);
}

static void copy_msrs(void *env, struct pf_cpu_state *s, enum direction direction)
{
    FIELD(sysenter_cs, ENV_SYSENTER_CS);
    FIELD(sysenter_esp, ENV_SYSENTER_ESP);
    FIELD(sysenter_eip, ENV_SYSENTER_EIP);
    FIELD(efer, ENV_EFER);
    FIELD(star, ENV_STAR);
    FIELD(lstar, ENV_LSTAR);
    FIELD(cstar, ENV_CSTAR);
    FIELD(fmask, ENV_FMASK);
    FIELD(kernelgsbase, ENV_KERNELGSBASE);
    FIELD(pat, ENV_PAT);
    FIELD(mtrr_fixed, ENV_MTRR_FIXED);
    FIELD(mtrr_deftype, ENV_MTRR_DEFTYPE);
    FIELD(mtrr_var, ENV_MTRR_VAR);
    FIELD(mcg_cap, ENV_MCG_CAP);
    FIELD(mcg_status, ENV_MCG_STATUS);
    FIELD(mcg_ctl, ENV_MCG_CTL);
    FIELD(mce_banks, ENV_MCE_BANKS);
    FIELD(tsc_aux, ENV_TSC_AUX);
    FIELD(system_time_msr, ENV_SYSTEM_TIME_MSR);
    FIELD(wall_clock_msr, ENV_WALL_CLOCK_MSR);
    FIELD(xcr0, ENV_XCR0);
    FIELD(msr_ia32_misc_enable, ENV_MSR_IA32_MISC_ENABLE);
}

static void copy_plain(void *env, struct pf_cpu_state *s, enum direction direction)
{
    FIELD(regs, ENV_REGS);
    FIELD(eip, ENV_EIP);
    FIELD(eflags, ENV_EFLAGS);
    FIELD(hflags, ENV_HFLAGS);
    FIELD(hflags2, ENV_HFLAGS2);
    FIELD(fpuc, ENV_FPUC);
    FIELD(mxcsr, ENV_MXCSR);
    for (int i = 0; i < 16; i++) {
        copy(env, ENV_XMM + ENV_XMM_STRIDE * i, &s->xmm[i], 16, direction);
        copy(env, ENV_YMMH + 16 * i, &s->ymmh[i], 16, direction);
    }
    copy_system(env, s, direction);
    copy_msrs(env, s, direction);
}

static void get_x87(char *env, struct pf_cpu_state *s)
{
    s->fpus_vmstate =
        (uint16_t)((AT(uint16_t, env, ENV_FPUS) & ~0x3800) | (AT(uint32_t, env, ENV_FPSTT) & 7) << 11);
    s->fptag_vmstate = 0;
    for (int i = 0; i < 8; i++) {
        s->fptag_vmstate |= (uint16_t)(!AT(uint8_t, env, ENV_FPTAGS + i) << i);
        s->fpregs[i].low = AT(uint64_t, env, ENV_FPREGS + 16 * i);
        s->fpregs[i].high = AT(uint16_t, env, ENV_FPREGS + 16 * i + 8);
    }
}

static void set_x87(char *env, const struct pf_cpu_state *s)
{
    AT(uint32_t, env, ENV_FPSTT) = (s->fpus_vmstate >> 11) & 7;
    AT(uint16_t, env, ENV_FPUS) = (uint16_t)(s->fpus_vmstate & ~0x3800);
    for (int i = 0; i < 8; i++) {
        AT(uint8_t, env, ENV_FPTAGS + i) = !((s->fptag_vmstate >> i) & 1);
        AT(uint64_t, env, ENV_FPREGS + 16 * i) = s->fpregs[i].low;
        AT(uint16_t, env, ENV_FPREGS + 16 * i + 8) = (uint16_t)s->fpregs[i].high;
    }
}

int pf_get_state(struct pf_engine *engine, struct pf_cpu_state *state)
{
    int result = -EBUSY;

    pthread_mutex_lock(&engine->lock);
    if (!engine->running) {
        memset(state, 0, sizeof *state);
        copy_plain(engine->env, state, GET);
        get_x87(engine->env, state);
        result = 0;
    }
    pthread_mutex_unlock(&engine->lock);
    return result;
}

static void set_state(struct pf_engine *engine, struct pf_cpu_state *state)
{
    char *env = engine->env;
    uint64_t dr7 = (uint32_t)state->dr[7];

    cpu_breakpoint_remove_all_x86_64(engine->cpu, BP_CPU);
    cpu_watchpoint_remove_all_x86_64(engine->cpu, BP_CPU);
    memset(env + ENV_CPU_BREAKPOINT, 0, 4 * sizeof(void *)); /* what they pointed to is freed */
    state->hflags = (state->hflags & ~HF_CPL) | ((state->segs[2].flags >> 13) & HF_CPL);
    state->dr[7] = dr7 & ~0xffull; /* all off, for the routine below to turn on and insert */
    copy_plain(env, state, SET);
    set_x87(env, state);
    AT(uint64_t, env, ENV_CC_SRC) = state->eflags & EFLAGS_CC;
    AT(uint32_t, env, ENV_CC_OP) = CC_OP_EFLAGS;
    AT(int32_t, env, ENV_DF) = state->eflags & EFLAGS_DF ? -1 : 1;
    AT(int32_t, env, ENV_ERROR_CODE) = 0;
    AT(int32_t, env, ENV_EXCEPTION_IS_INT) = 0;
    AT(int32_t, env, ENV_OLD_EXCEPTION) = -1;
    cpu_x86_update_dr7_x86_64(env, (uint32_t)dr7);
    update_fp_status_x86_64(env);
    update_mxcsr_status_x86_64(env);
    tlb_flush_x86_64(engine->cpu);
    tb_flush_x86_64(engine->cpu);
}

int pf_set_state(struct pf_engine *engine, const struct pf_cpu_state *state)
{
    struct pf_cpu_state own = *state;
    struct pf_engine *before = pf_current;
    int result = -EBUSY;

    pthread_mutex_lock(&engine->lock);
    if (!engine->running) {
        pf_current = engine;
        set_state(engine, &own);
        pf_current = before;
        result = 0;
    }
    pthread_mutex_unlock(&engine->lock);
    return result;
}
