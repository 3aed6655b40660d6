/* What the C files of the engine share: the engine itself and who may call what. */
#ifndef PAGEFERRY_ENGINE_PRIVATE_H
#define PAGEFERRY_ENGINE_PRIVATE_H

#include <pthread.h>
#include <stdint.h>
#include <unicorn/unicorn.h>

#include "pic.h"
#include "pit.h"
#include "uart.h"
#include "engine.h"
#include "unicorn_private.h"

#define PF_MAX_RAM 8
#define PF_MAX_MMIO 8
#define PF_MAX_CPUID 64
#define PF_ANY_SUBLEAF 0xffffffffu
#define PF_CPUID_ECX_SUBLEAF 1u /* ECX |= subleaf & 0xff (leaf 0xb) */
#define PF_CPUID_OSXSAVE 2u     /* ECX bit 27 follows CR4.OSXSAVE */
#define PF_PORT_FAST 0x100u /* in fast_ports: bytes read are the low eight bits */
#define PF_PORT_DEAF 0x200u /* bytes written are lost */
#define PHYSICAL_LIMIT (1ull << 40) /* of qemu64; the page walker faults on anything above */

typedef bool (*exec_interrupt_fn)(void *cpu, int request);
typedef void *(*find_region_fn)(void *uc, uint64_t guest);

/* One range of guest RAM. `has_code`, `last_index` and `log` have an entry (bit) per page. */
struct pf_ram {
    uint64_t guest;
    uint64_t length;
    uint64_t host;
    uint64_t ram_addr; /* the library's own name for the first byte */
    void *region; /* the library's, once it was asked for */
    uint8_t *has_code;
    uint16_t *last_index; /* where in the TLB a writable entry for it was last made: the virtual page's low bits */
    uint64_t *log;        /* pages stored to; only while logging */
    uint64_t *taken;      /* all clear between collections; the two change places */
};

/* One range of device registers. */
struct pf_mmio {
    struct pf_engine *engine;
    uint64_t guest;
    uint64_t length;
};

/* Something to be done at a safe point; lives on the stack of the thread that waits for it. */
struct pf_work {
    int64_t (*function)(struct pf_engine *engine, void *argument);
    void *argument;
    int64_t result;
    int done;
    struct pf_work *next;
};

struct pf_engine {
    uc_engine *uc;
    char *cpu;
    char *env;
    void *handle;
    pf_port_read_fn read;
    pf_port_write_fn write;
    pf_mmio_read_fn mmio_read;
    pf_mmio_write_fn mmio_write;

    /* `lock` covers this group. A hook that may longjmp never holds it. */
    pthread_mutex_t lock;
    pthread_cond_t changed; /* running, parked or a work item's done */
    int running;
    pthread_t runner;
    int in_handler; /* Python answers the guest, or the vCPU is halted: it needs `lock` to go on */
    int waiting;    /* the vCPU is halted and waits for `changed` */
    int parked;
    struct pf_work *work;

    int translating; /* a block is being made; stays set if that was left by a fault, until the next */

    int stop;    /* these three are written under `lock`, and read by the vCPU without */
    int kicked;  /* the vCPU shall look; it takes this back, without the lock */
    uint32_t pending; /* INTERRUPT_HARD, INTERRUPT_NMI: what the CPU has yet to take */
    int latched; /* this group belongs to the vCPU's thread */
    int waits;   /* the run goes on when the vCPU is halted */
    int failed;
    int triple_fault;
    int halted;
    int sealed; /* everything that is not RAM has been mapped to nothing */
    uint64_t int_eip;

    struct pf_pics pics; /* under `lock` */
    int has_pics;
    uint32_t owed[16]; /* pulses of an interrupt line that are still to come, under `lock` */
    struct pf_pit pit;     /* under `lock` */
    int has_pit;
    int tick_fd; /* a timerfd */
    int64_t tick_armed; /* what it is set to, -1: nothing; under `lock` */
    int ticks_end;
    struct pf_uart uart; /* under `lock` */
    uint32_t uart_port;
    int uart_irq, has_uart;
    int64_t clock_offset; /* the guest's clock, under `lock` */
    int clock_runs;
    uint32_t clock_turns, seen_turns; /* how often it was started, stopped or set; the latter as `seen_ns` */
    int64_t hidden_ns; /* see clock.c; the vCPU's thread, read by others */
    int64_t seen_ns, seen_tsc;
    int watched;
    int64_t ticks_offset, ticks_last; /* the guest's TSC, under `lock` */
    int ticks_enabled;
    uint64_t starts, slow_stores;

    int logging;
    int log_used; /* some `log` may have a bit set */
    uint32_t ram_count;
    struct pf_ram ram[PF_MAX_RAM];
    uint32_t mmio_count;
    struct pf_mmio mmio[PF_MAX_MMIO];
    uint32_t cpuid_count;
    struct pf_cpuid cpuid[PF_MAX_CPUID];
    uint16_t fast_ports[65536];
};

/* The engine whose library routines run on this thread; the wrapped routines find theirs by it. */
extern __thread struct pf_engine *pf_current;

#define WATCHED_READS 64 /* reads of the TSC after a read of the timer that still belong to it */

#define AT(type, base, offset) (*(type *)((char *)(base) + (offset)))
#define ENV(type, engine, offset) AT(type, (engine)->env, offset)

int pf_check(struct pf_engine *engine, struct pf_mismatch *mismatch);
int pf_seal(struct pf_engine *engine);
int pf_hook(struct pf_engine *engine);
void pf_hook_interrupts(struct pf_engine *engine);
/* vCPU thread, or any while it does not run: INTERRUPT_NMI or INTERRUPT_HARD, which the CPU would take now, or 0. */
uint32_t pf_deliverable(const struct pf_engine *engine);
void pf_hook_lookups(struct pf_engine *engine);
void pf_leave(struct pf_engine *engine);
void pf_kick(struct pf_engine *engine);    /* lock held */
void pf_do_work(struct pf_engine *engine);
bool pf_deliver(struct pf_engine *engine);
int64_t pf_now_ns(void);
int64_t pf_read_ticks(struct pf_engine *engine);
void pf_hide_gap(struct pf_engine *engine);
/* `lock` held: when the vCPU or `tick_fd` is to take the next tick (CLOCK_MONOTONIC, -1: never), and taking it. */
int64_t pf_tick_at(const struct pf_engine *engine);
void pf_arm_tick(struct pf_engine *engine);
void pf_take_tick(struct pf_engine *engine);
/* `lock` held: as pf_set_irq(). */
void pf_put_line(struct pf_engine *engine, int irq, int level);
/*
 * `lock` held. Raises and lowers an interrupt line `count` times, each when the CPU has taken the one before; no
 * more than `limit` are kept back, of a masked line one.
 */
void pf_owe_pulses(struct pf_engine *engine, int irq, uint32_t count, uint32_t limit);
/* vCPU thread: -1 when the vCPU is not halted any more, or an exit. */
int pf_pass_halt(struct pf_engine *engine);
void pf_enter_handler(struct pf_engine *engine);
void pf_leave_handler(struct pf_engine *engine);
uint8_t pf_pic_port_read(struct pf_engine *engine, uint32_t port);
int pf_uart_port_read(struct pf_engine *engine, uint32_t port); /* as pf_uart_read() */
int pf_uart_port_write(struct pf_engine *engine, uint32_t port, uint8_t value);
void pf_pic_port_write(struct pf_engine *engine, uint32_t port, uint8_t value);
int64_t pf_at_safe_point(struct pf_engine *engine, int64_t (*function)(struct pf_engine *, void *), void *argument,
                         int64_t timeout_ns);
struct pf_ram *pf_find_guest(struct pf_engine *engine, uint64_t guest);
void pf_load_flat_segments(struct pf_engine *engine, uint32_t cs, uint32_t ss, int long_mode);

#endif
