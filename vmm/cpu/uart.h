/*
 * What a guest that prints does all the time to a 16550 whose output goes through: the registers and an output
 * buffer that the vCPU's thread uses by itself. The Python twin, which has all the rest, is serial_uart.py in
 * vmm/devices/; serial.py there gives the registers and takes them back.
 *
 *   open:    no input waits, nothing is sent back by the outside, no loopback, no divisor latch
 *   closed:  Python has the registers
 *
 * Plain data and functions; who calls them sees to the locking. cffi reads this text as it stands.
 */
enum { PF_UART_BYTES = 1024 };

struct pf_uart {
    uint8_t is_open;
    uint8_t takes_output; /* while it is open */
    uint8_t ier;
    uint8_t thr_ipending;
    uint8_t msr;
    uint8_t iir_fifo; /* the upper bits of IIR */
    uint32_t count;
    uint8_t output[PF_UART_BYTES];
};

/* The level of the interrupt line. */
int pf_uart_output(const struct pf_uart *uart);
/* A register's value, or -1: Python knows it. */
int pf_uart_read(struct pf_uart *uart, uint32_t offset);
/* 1: done, 0: Python does it. */
int pf_uart_write(struct pf_uart *uart, uint32_t offset, uint8_t value);
