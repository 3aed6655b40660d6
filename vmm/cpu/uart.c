/*
 * The 16550's registers for output. The Python twin is vmm/devices/serial_uart.py.
 *
 * Source: National Semiconductor PC16550D data sheet; the behaviour where it is open is QEMU 7.2's.
 */
#include <stdint.h>

#include "uart.h"

enum { THR = 0, IER = 1, IIR = 2, MSR = 6 };

#define IER_THRI 0x02u
#define IIR_NO_INT 0x01u
#define IIR_THRI 0x02u

int pf_uart_output(const struct pf_uart *uart)
{
    return (uart->ier & IER_THRI) && uart->thr_ipending;
}

int pf_uart_read(struct pf_uart *uart, uint32_t offset)
{
    if (!uart->is_open)
        return -1;
    if (offset == MSR)
        return uart->msr;
    if (offset != IIR)
        return -1;
    if (!pf_uart_output(uart))
        return uart->iir_fifo | IIR_NO_INT;
    uart->thr_ipending = 0;
    return uart->iir_fifo | IIR_THRI;
}

int pf_uart_write(struct pf_uart *uart, uint32_t offset, uint8_t value)
{
    if (!uart->is_open)
        return 0;
    if (offset == IER) {
        if ((uart->ier ^ value) & IER_THRI)
            uart->thr_ipending = (value & IER_THRI) != 0;
        uart->ier = value & 0x0f;
        return 1;
    }
    if (offset != THR || !uart->takes_output || uart->count == PF_UART_BYTES)
        return 0;
    uart->output[uart->count++] = value;
    uart->thr_ipending = 1;
    return 1;
}
