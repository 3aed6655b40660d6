/*
 * The reading side of the 8254 timer, and of port 0x61, which shows the output of its channel 2.
 *
 * A guest measures its clocks by reading these in a loop; it believes what it finds only if each read takes
 * about as long as the other. Python programs the registers and raises the interrupt (vmm/devices/pit.py).
 * The owner of the memory is Python, too; it changes while the vCPU's thread is in a port handler, or parked.
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
    int64_t next_transition_time; /* of the output, -1: none; only channel 0 has one */
};

struct pf_pit {
    struct pf_pit_channel channels[3];
    uint8_t speaker; /* port 0x61, bits 1 and 4 */
    uint8_t refresh;
};

/* 1: reads of the port are answered by pf_pit_read(). */
int pf_pit_has_port(uint32_t port);
uint8_t pf_pit_read(struct pf_pit *pit, uint32_t port, int64_t now_ns);
