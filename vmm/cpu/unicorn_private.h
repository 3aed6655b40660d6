/*
 * The private layout of Unicorn 2.1.4 (x86-64 host, x86-64 guest) and the routines of its library that are
 * used beside the public API. The only file that knows offsets; check.c compares them with the library.
 *
 * Numbers are byte offsets in uc_struct (UC_), CPUState (CPU_), CPUX86State (ENV_). They were read from the
 * debug information of an own build of the tag and found again in the wheel's library.
 */
#ifndef PAGEFERRY_UNICORN_PRIVATE_H
#define PAGEFERRY_UNICORN_PRIVATE_H

#include <stdbool.h>
#include <stdint.h>

#define UC_MEMORY_MAPPING 288
#define UC_CPU 440
#define UC_STOP_REQUEST 1389
#define UC_INVALID_ERROR 1424
#define UC_NO_EXIT_REQUEST 2034

#define CPU_EXIT_REQUEST 21
#define CPU_INTERRUPT_REQUEST 28
#define CPU_ENV_PTR 296
#define CPU_ICOUNT_DECR_PTR 304
#define CPU_HALTED 33176
#define CPU_UC 33192
#define CPU_CLASS 33200
#define CPU_TLB_FAST 35344 /* CPUNegativeOffsetState (33216) + tlb.f (2128) */
#define CPU_ENV 35408
#define CLASS_EXEC_INTERRUPT 144

#define ENV_REGS 0
#define ENV_EIP 128
#define ENV_EFLAGS 136
#define ENV_CC_SRC 152
#define ENV_CC_OP 168
#define ENV_DF 172
#define ENV_HFLAGS 176
#define ENV_HFLAGS2 180
#define ENV_SEGS 184
#define ENV_LDT 328
#define ENV_TR 352
#define ENV_GDT 376
#define ENV_IDT 400
#define ENV_CR 424
#define ENV_A20_MASK 496
#define ENV_EFER 592
#define ENV_FPSTT 604
#define ENV_FPUS 608
#define ENV_FPUC 610
#define ENV_FPTAGS 612
#define ENV_FPREGS 624
#define ENV_MXCSR 816
#define ENV_XMM 824
#define ENV_XMM_STRIDE 64
#define ENV_YMMH 2944
#define ENV_SYSENTER_CS 4800
#define ENV_SYSENTER_ESP 4808
#define ENV_SYSENTER_EIP 4816
#define ENV_STAR 4824
#define ENV_VM_HSAVE 4832
#define ENV_LSTAR 4840
#define ENV_CSTAR 4848
#define ENV_FMASK 4856
#define ENV_KERNELGSBASE 4864
#define ENV_TSC_AUX 4896
#define ENV_XCR0 4904
#define ENV_MCG_STATUS 4912
#define ENV_MSR_IA32_MISC_ENABLE 4920
#define ENV_PAT 5280
#define ENV_SMBASE 5288
#define ENV_SYSTEM_TIME_MSR 5336
#define ENV_WALL_CLOCK_MSR 5344
#define ENV_ERROR_CODE 5384
#define ENV_EXCEPTION_IS_INT 5388
#define ENV_DR 5400
#define ENV_CPU_BREAKPOINT 5464 /* 4 pointers into the CPU's lists */
#define ENV_OLD_EXCEPTION 5496
#define ENV_VM_VMCB 5504
#define ENV_TSC_OFFSET 5512
#define ENV_INTERCEPT 5520
#define ENV_INTERCEPT_CR_READ 5528
#define ENV_INTERCEPT_CR_WRITE 5530
#define ENV_INTERCEPT_DR_READ 5532
#define ENV_INTERCEPT_DR_WRITE 5534
#define ENV_INTERCEPT_EXCEPTIONS 5536
#define ENV_V_TPR 5556
#define ENV_CPUID_VENDOR 5616
#define ENV_FEATURES 5632
#define ENV_MTRR_FIXED 6320
#define ENV_MTRR_DEFTYPE 6408
#define ENV_MTRR_VAR 6416
#define ENV_MCG_CAP 6608
#define ENV_MCG_CTL 6616
#define ENV_MCE_BANKS 6632
#define ENV_UC 7000

#define CONTEXT_SIZE 5608

/* CPUTLBDescFast and CPUTLBEntry */
#define TLB_MODES 3
#define TLB_ENTRY_SHIFT 6
#define TLB_NOTDIRTY 0x400u

#define PAGE_SHIFT 12
#define PAGE_BYTES 4096ull
#define PAGE_PROT_WRITE 2

#define INTERRUPT_HARD 0x2u
#define INTERRUPT_NMI 0x200u
#define INTERRUPT_OURS 0x40000000u /* no QEMU bit; reaches cpu_exec_interrupt like any other */

#define HF_INHIBIT_IRQ (1u << 3)
#define HF_CS32 (1u << 4)
#define HF_SS32 (1u << 5)
#define HF_ADDSEG (1u << 6)
#define HF_LMA (1u << 14)
#define HF_CS64 (1u << 15)
#define HF_CPL 3u
#define HF2_GIF 1u
#define HF2_NMI 4u

#define CC_OP_EFLAGS 1u
#define EFLAGS_CC 0x8d5ull
#define EFLAGS_IF 0x200ull
#define EFLAGS_DF 0x400ull
#define EFLAGS_RF 0x10000ull
#define EFLAGS_VM 0x20000ull
#define CR4_TSD 4ull
#define CR4_OSXSAVE (1ull << 18)
#define EFER_SCE 1ull

#define BP_CPU 0x20
#define EXCP_NMI 2
#define EXCP_UD 6

#define SVM_EXIT_NMI 0x61
#define SVM_EXIT_RDTSC 0x6e
#define SVM_EXIT_CPUID 0x72
#define SVM_EXIT_RDTSCP 0x87

struct tlb_fast {
    uint64_t mask; /* (entries - 1) << TLB_ENTRY_SHIFT */
    char *table;
};

struct tlb_entry {
    uint64_t addr_read, addr_write, addr_code, paddr, addend;
};

/* Routines of the library; the arguments typed void * are uc_engine, CPUState or CPUX86State. */
void *find_memory_mapping_x86_64(void *uc, uint64_t guest);
void x86_cpu_do_interrupt_x86_64(void *cpu);
void do_interrupt_x86_hardirq_x86_64(void *env, int vector, int is_hw);
bool x86_cpu_exec_interrupt_x86_64(void *cpu, int request);
__attribute__((noreturn)) void raise_exception_ra_x86_64(void *env, int vector, uintptr_t retaddr);
__attribute__((noreturn)) void raise_exception_err_ra_x86_64(void *env, int vector, int code, uintptr_t retaddr);
void cpu_svm_check_intercept_param_x86_64(void *env, uint32_t type, uint64_t param, uintptr_t retaddr);
uint64_t helper_read_eflags_x86_64(void *env);
void cpu_breakpoint_remove_all_x86_64(void *cpu, int mask);
void cpu_watchpoint_remove_all_x86_64(void *cpu, int mask);
void cpu_x86_update_dr7_x86_64(void *env, uint32_t dr7);
void update_fp_status_x86_64(void *env);
void update_mxcsr_status_x86_64(void *env);
void tb_flush_x86_64(void *cpu);
void tlb_flush_x86_64(void *cpu);
void tlb_reset_dirty_x86_64(void *cpu, uint64_t host, uint64_t length);
void tb_invalidate_phys_page_range_x86_64(void *uc, uint64_t start, uint64_t end);
uint64_t qemu_ram_addr_from_host_x86_64(void *uc, void *host);

#endif
