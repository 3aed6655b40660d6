/*
 * The two 8259A interrupt controllers of a PC, the second one on input 2 of the first.
 *
 * Plain data and functions; who calls them sees to the locking. cffi reads this text as it stands.
 */
struct pf_pic {
    uint8_t last_irr; /* input levels */
    uint8_t irr;
    uint8_t imr;
    uint8_t isr;
    uint8_t priority_add; /* the input of the highest priority */
    uint8_t irq_base;
    uint8_t read_reg_select; /* 1: the command port reads isr, 0: irr */
    uint8_t poll;
    uint8_t special_mask;
    uint8_t init_state; /* which initialisation word comes next, 0: none */
    uint8_t auto_eoi;
    uint8_t rotate_on_auto_eoi;
    uint8_t special_fully_nested_mode;
    uint8_t init4;
    uint8_t single_mode;
    uint8_t elcr; /* level triggered inputs */
};

/* [0]: ports 0x20, 0x21, 0x4d0, inputs 0 to 7; [1]: ports 0xa0, 0xa1, 0x4d1, inputs 8 to 15. */
struct pf_pics {
    struct pf_pic pic[2];
};

/* After power-on, or a hardware reset; the input levels stay. */
void pf_pics_reset(struct pf_pics *pics);
void pf_pics_set_line(struct pf_pics *pics, int irq, int level);
/* 1: an interrupt is wanted. */
int pf_pics_output(const struct pf_pics *pics);
/* The CPU takes the interrupt: its vector. Without one it is the spurious interrupt's, as in hardware. */
int pf_pics_acknowledge(struct pf_pics *pics);
/* 1: the port is one of theirs. */
int pf_pics_has_port(uint32_t port);
uint8_t pf_pics_read(struct pf_pics *pics, uint32_t port);
void pf_pics_write(struct pf_pics *pics, uint32_t port, uint8_t value);
