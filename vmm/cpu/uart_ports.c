/* The UART's output registers where the vCPU's thread answers for them, and their way to Python and back. */
#include <errno.h>
#include <stddef.h>
#include <string.h>

#include "engine_private.h"

int pf_enable_uart(struct pf_engine *engine, uint32_t port, int irq)
{
    if (engine->sealed)
        return -EBUSY;
    if ((port & 7) || irq < 0 || irq > 15)
        return -EINVAL;
    engine->uart_port = port;
    engine->uart_irq = irq;
    engine->has_uart = 1;
    return 0;
}

int pf_take_uart(struct pf_engine *engine, struct pf_uart *uart)
{
    pthread_mutex_lock(&engine->lock);
    memcpy(uart, &engine->uart, offsetof(struct pf_uart, output) + engine->uart.count);
    engine->uart.is_open = 0;
    engine->uart.count = 0;
    pthread_mutex_unlock(&engine->lock);
    return 0;
}

int pf_give_uart(struct pf_engine *engine, const struct pf_uart *uart)
{
    pthread_mutex_lock(&engine->lock);
    memcpy(&engine->uart, uart, offsetof(struct pf_uart, output));
    engine->uart.count = 0;
    pthread_mutex_unlock(&engine->lock);
    return 0;
}

/* Lock held, on the vCPU's thread. */
static void uart_line(struct pf_engine *engine, int before)
{
    int level = pf_uart_output(&engine->uart);

    if (level != before)
        pf_put_line(engine, engine->uart_irq, level);
}

int pf_uart_port_read(struct pf_engine *engine, uint32_t port)
{
    int before, value;

    pthread_mutex_lock(&engine->lock);
    before = pf_uart_output(&engine->uart);
    value = pf_uart_read(&engine->uart, port & 7);
    if (value >= 0)
        uart_line(engine, before);
    pthread_mutex_unlock(&engine->lock);
    return value;
}

int pf_uart_port_write(struct pf_engine *engine, uint32_t port, uint8_t value)
{
    int before, done;

    pthread_mutex_lock(&engine->lock);
    before = pf_uart_output(&engine->uart);
    done = pf_uart_write(&engine->uart, port & 7, value);
    if (done)
        uart_line(engine, before);
    pthread_mutex_unlock(&engine->lock);
    return done;
}
