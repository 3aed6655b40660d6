/*
 * What the CPU engine offers to Python. cffi reads this text as it stands (no preprocessor below).
 *
 * Every function returns 0 or a count, or -errno. Addresses are numbers; who owns the memory behind
 * one stands at the function. "Safe point" is an instant at which no guest instruction is half done:
 * the vCPU is between two translated blocks, or not running at all.
 */
struct pf_engine;

typedef uint32_t (*pf_port_read_fn)(void *handle, uint32_t port, uint32_t size);
typedef void (*pf_port_write_fn)(void *handle, uint32_t port, uint32_t size, uint32_t value);
typedef uint64_t (*pf_mmio_read_fn)(void *handle, uint64_t address, uint32_t size);
typedef void (*pf_mmio_write_fn)(void *handle, uint64_t address, uint32_t size, uint64_t value);

/* Who answers the guest; called on the vCPU's thread, inside the run. */
struct pf_callbacks {
    pf_port_read_fn port_read;
    pf_port_write_fn port_write;
    pf_mmio_read_fn mmio_read;
    pf_mmio_write_fn mmio_write;
};

/* A check of the engine's private layout that failed. */
struct pf_mismatch {
    char what[64];
    uint64_t expected;
    uint64_t got;
};

/* Why pf_run() returned. */
enum pf_exit {
    PF_STOPPED = 0,      /* pf_request_stop(), nothing else happened */
    PF_HALTED = 1,       /* HLT with no interrupt that could end it, in a run that does not wait for one */
    PF_LATCHED = 2,      /* a port handler called pf_latch() */
    PF_TRIPLE_FAULT = 3, /* the guest's CPU went into shutdown */
    PF_FAILED = 4        /* a handler raised (detail 0) or the library refused (detail: uc_err) */
};

struct pf_segment {
    uint32_t selector;
    uint64_t base;
    uint32_t limit;
    uint32_t flags; /* the attributes as in the high word of a descriptor */
};

struct pf_pair {
    uint64_t low;
    uint64_t high;
};

/* The CPU state as QEMU's "cpu" version 12 names and means it, minus what only KVM uses. */
struct pf_cpu_state {
    uint64_t regs[16];
    uint64_t eip;
    uint64_t eflags;
    uint32_t hflags;
    uint32_t hflags2;
    uint16_t fpuc;
    uint16_t fpus_vmstate;
    uint16_t fptag_vmstate;
    struct pf_pair fpregs[8]; /* low: mantissa, high: sign and exponent */
    struct pf_segment segs[6];
    struct pf_segment ldt;
    struct pf_segment tr;
    struct pf_segment gdt;
    struct pf_segment idt;
    uint32_t sysenter_cs;
    uint64_t sysenter_esp;
    uint64_t sysenter_eip;
    uint64_t cr[5];
    uint64_t dr[8];
    int32_t a20_mask;
    uint32_t mxcsr;
    struct pf_pair xmm[16];
    struct pf_pair ymmh[16];
    uint64_t efer;
    uint64_t star;
    uint64_t lstar;
    uint64_t cstar;
    uint64_t fmask;
    uint64_t kernelgsbase;
    uint32_t smbase;
    uint64_t pat;
    uint64_t vm_hsave;
    uint64_t vm_vmcb;
    uint64_t tsc_offset;
    uint64_t intercept;
    uint16_t intercept_cr_read;
    uint16_t intercept_cr_write;
    uint16_t intercept_dr_read;
    uint16_t intercept_dr_write;
    uint32_t intercept_exceptions;
    uint8_t v_tpr;
    uint64_t mtrr_fixed[11];
    uint64_t mtrr_deftype;
    struct pf_pair mtrr_var[8];
    uint64_t mcg_cap;
    uint64_t mcg_status;
    uint64_t mcg_ctl;
    uint64_t mce_banks[40];
    uint64_t tsc_aux;
    uint64_t system_time_msr;
    uint64_t wall_clock_msr;
    uint64_t xcr0;
    uint64_t msr_ia32_misc_enable;
};

/* One CPUID answer; an entry for PF_ANY_SUBLEAF is used after the exact ones. */
struct pf_cpuid {
    uint32_t leaf;
    uint32_t subleaf;
    uint32_t eax, ebx, ecx, edx;
    uint32_t flags; /* PF_CPUID_* */
};

/* Where the log of a range of RAM goes: the page at `guest` is bit `first_bit` of the uint64 array at `bitmap`. */
struct pf_log_target {
    uint64_t guest;
    uint64_t pages;
    uint64_t bitmap;
    uint64_t first_bit;
};

/* Opens an engine and checks its layout. `handle` goes to the callbacks. -EPROTO: see mismatch. */
int pf_create(struct pf_engine **engine, void *handle, const struct pf_callbacks *callbacks,
              struct pf_mismatch *mismatch);
/* The vCPU must not run. */
int pf_destroy(struct pf_engine *engine);
/* The caller keeps [host, host + length) mapped until pf_destroy(). -EBUSY once the vCPU has run. */
int pf_map_ram(struct pf_engine *engine, uint64_t guest, uint64_t host, uint64_t length);
/* Accesses to this range call mmio_read and mmio_write. Whole pages; -EBUSY once the vCPU has run. */
int pf_map_mmio(struct pf_engine *engine, uint64_t guest, uint64_t length);
/* `features`: the words 1.EDX, 1.ECX, 7.EBX, 80000001.EDX, 80000001.ECX for the translator. */
int pf_set_cpuid(struct pf_engine *engine, const struct pf_cpuid *table, uint32_t count,
                 const uint32_t *features);
const char *pf_strerror(int uc_error);

/* Runs the guest on the calling thread until something of enum pf_exit happens. `waits`: halts do not end it. */
int pf_run(struct pf_engine *engine, int waits, int *detail);
/* Any thread. From now on pf_run() returns PF_STOPPED, until pf_clear_stop(). */
int pf_request_stop(struct pf_engine *engine);
int pf_clear_stop(struct pf_engine *engine);
/* The vCPU's thread says whether it is parked, that is: will not run before the stop is cleared. */
int pf_set_parked(struct pf_engine *engine, int parked);
/* Waits for parked, kicking the vCPU each ms; 1: parked, 0: not within the time (negative: for ever). */
int pf_wait_parked(struct pf_engine *engine, int64_t timeout_ns);
/* From a port handler: the rest of this run's port I/O is dropped and the run ends. */
int pf_latch(struct pf_engine *engine);
/* As pf_latch(), and pf_run() returns PF_FAILED. */
int pf_fail(struct pf_engine *engine);
/* Before the first run: the interrupt controllers answer their ports from now on. */
int pf_enable_pics(struct pf_engine *engine);
/* Any thread. The level of an interrupt line, 0 to 15. */
int pf_set_irq(struct pf_engine *engine, int irq, int level);
/* Before the first run: the timer answers its ports and raises its interrupt from now on. */
int pf_enable_pit(struct pf_engine *engine);
/* Any thread. Its registers; setting them forgets the pulses that are kept back. */
int pf_get_pit(struct pf_engine *engine, struct pf_pit *pit);
int pf_set_pit(struct pf_engine *engine, const struct pf_pit *pit);
/* vCPU thread: IN and OUT of its ports. */
uint8_t pf_pit_port_read(struct pf_engine *engine, uint32_t port);
void pf_pit_port_write(struct pf_engine *engine, uint32_t port, uint8_t value);
/* Raises its interrupt while the vCPU is not halted; returns after pf_end_ticks(), which any thread may call. */
int pf_serve_ticks(struct pf_engine *engine);
int pf_end_ticks(struct pf_engine *engine);
/* Before the first run: registers of a UART at eight ports, closed. */
int pf_enable_uart(struct pf_engine *engine, uint32_t port, int irq);
/* Any thread. The UART's registers and what was sent, which is forgotten; closes it. */
int pf_take_uart(struct pf_engine *engine, struct pf_uart *uart);
/* Any thread. Sets the registers; the line has the level that they give. */
int pf_give_uart(struct pf_engine *engine, const struct pf_uart *uart);
/* Any thread. The guest's clock is `offset`, and CLOCK_MONOTONIC less what is hidden while it `runs`; ns. */
int pf_set_clock(struct pf_engine *engine, int64_t offset, int runs);
/* Any thread. How many pulses are kept back. */
int64_t pf_owed_irqs(struct pf_engine *engine, int irq);
/* Any thread. How much of the host's time did not pass for the guest, since the engine was made; ns. */
int64_t pf_get_hidden_ns(struct pf_engine *engine);
int pf_reset_pics(struct pf_engine *engine);
int pf_get_pics(struct pf_engine *engine, struct pf_pics *pics);
int pf_set_pics(struct pf_engine *engine, const struct pf_pics *pics);
/* Any thread. A non-maskable interrupt. */
int pf_inject_nmi(struct pf_engine *engine);
/* INTERRUPT_HARD and INTERRUPT_NMI, as far as they are pending. */
uint32_t pf_get_interrupt_request(struct pf_engine *engine);
int pf_get_halted(struct pf_engine *engine);
int pf_set_halted(struct pf_engine *engine, int halted);
/* value 0..255: byte reads of `port` give it without a call; -1: they call the handler again. */
int pf_set_fast_read(struct pf_engine *engine, uint32_t port, int value);
/* No device has the port: bytes read from it are ones, bytes written are lost, both without a call. */
int pf_set_no_device(struct pf_engine *engine, uint32_t port);

/* Both: -EBUSY while the vCPU runs. Setting flushes translated code and the TLB. */
int pf_get_state(struct pf_engine *engine, struct pf_cpu_state *state);
int pf_set_state(struct pf_engine *engine, const struct pf_cpu_state *state);

/* The guest's time stamp counter: stock's cpu_ticks_offset and cpu_ticks_enabled. */
int pf_enable_ticks(struct pf_engine *engine);
int pf_disable_ticks(struct pf_engine *engine);
int64_t pf_get_ticks(struct pf_engine *engine);
int64_t pf_get_ticks_offset(struct pf_engine *engine);
int pf_set_ticks_offset(struct pf_engine *engine, int64_t offset);

/* Any thread, done at a safe point; -ETIMEDOUT if none came within the time (negative: for ever). */
int pf_flush(struct pf_engine *engine, int64_t timeout_ns);
int pf_invalidate(struct pf_engine *engine, uint64_t guest, uint64_t length, int64_t timeout_ns);
int pf_start_log(struct pf_engine *engine, int64_t timeout_ns);
int pf_stop_log(struct pf_engine *engine, int64_t timeout_ns);
/*
 * ORs the pages stored to since the last call into the callers' bitmaps, one for each range of RAM in the order
 * they were mapped, and watches them again. Returns the newly set bits. One thread at a time, also with
 * pf_start_log() and pf_stop_log().
 */
int64_t pf_collect_log(struct pf_engine *engine, const struct pf_log_target *targets, uint32_t count,
                       int64_t timeout_ns);
/* For measurements: uc_emu_start() calls, stores that took the slow path. */
int pf_counters(struct pf_engine *engine, uint64_t *starts, uint64_t *slow_stores);
