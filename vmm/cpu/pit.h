/*
 * The 8254 timer, and port 0x61, which shows the output of its channel 2.
 *
 * A guest measures its clocks by reading these in a loop, and one that sleeps programs the next interrupt each
 * time: both are worth no call into Python. Plain data and functions; who calls them sees to the locking.
 * cffi reads this text as it stands.
 */
struct pf_pit_channel {
    int32_t count;
    uint16_t latched_count;
    uint8_t count_latched;
    uint8_t status_latched;
    uint8_t status;
    uint8_t read_state;
    uint8_t write_state;
    uint8_t write_latch;
    uint8_t rw_mode;
    uint8_t mode;
    uint8_t bcd;
    uint8_t gate;
    int64_t count_load_time;      /* ns of guest time */
    int64_t next_transition_time; /* when the output rises, -1: not; only channel 0 has one */
};

struct pf_pit {
    struct pf_pit_channel channels[3];
    uint8_t speaker; /* port 0x61, bits 1 and 4 */
    uint8_t refresh;
    uint8_t started; /* channel 0 was programmed */
};

/* What channel 0 asks of interrupt line 0. */
struct pf_pit_due {
    uint32_t count; /* edges */
    uint32_t limit; /* of a periodic timer: how many are kept back at most; 0: it comes once */
    int stays_high;
};

/* 1: the port is one of its. */
int pf_pit_has_port(uint32_t port);
uint8_t pf_pit_read(struct pf_pit *pit, uint32_t port, int64_t now_ns);
/* 1: channel 0 has begun anew; its line is low, and nothing of before is owed. */
int pf_pit_write(struct pf_pit *pit, uint32_t port, uint8_t value, int64_t now_ns);
/* 1: the interrupt is due; when the next one is has been noted. */
int pf_pit_take(struct pf_pit *pit, int64_t now_ns, struct pf_pit_due *due);
