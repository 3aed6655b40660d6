/*
 * The 8254's counters as they are read. The Python twin is vmm/devices/pit.py.
 *
 * Source: Intel 8254 data sheet; the behaviour where it is open is QEMU 7.2's (hw/timer/i8254.c).
 */
#include <stdint.h>

#include "pit.h"

#define PIT_HZ 1193182
#define NS_PER_S 1000000000
#define FIRST_PORT 0x40u
#define SPEAKER_PORT 0x61u

enum { LOW = 1, HIGH = 2, WORD_LOW = 3, WORD_HIGH = 4 };

static int64_t ticks(const struct pf_pit_channel *channel, int64_t now_ns) /* since the count was loaded */
{
    int64_t passed = now_ns - channel->count_load_time;

    return passed > 0 ? (int64_t)((__int128)passed * PIT_HZ / NS_PER_S) : 0;
}

static uint16_t counter(const struct pf_pit_channel *channel, int64_t now_ns)
{
    int64_t passed = ticks(channel, now_ns);

    if (channel->mode == 2)
        passed %= channel->count;
    else if (channel->mode == 3)
        passed = 2 * passed % channel->count;
    return (uint16_t)(channel->count - passed);
}

static int output(const struct pf_pit_channel *channel, int64_t now_ns)
{
    int64_t passed = ticks(channel, now_ns);

    switch (channel->mode) {
    case 0:
        return passed >= channel->count;
    case 1:
        return passed < channel->count;
    case 2:
        return passed % channel->count == 0 && passed;
    case 3:
        return passed % channel->count < (channel->count + 1) / 2;
    default:
        return passed == channel->count;
    }
}

int pf_pit_has_port(uint32_t port)
{
    return port - FIRST_PORT < 3 || port == SPEAKER_PORT;
}

static uint8_t read_latched(struct pf_pit_channel *channel)
{
    uint8_t part = channel->count_latched;

    channel->count_latched = part == WORD_LOW ? HIGH : 0;
    return (uint8_t)(part == HIGH || part == WORD_HIGH ? channel->latched_count >> 8 : channel->latched_count);
}

static uint8_t read_channel(struct pf_pit_channel *channel, int64_t now_ns)
{
    uint16_t count;

    if (channel->status_latched) {
        channel->status_latched = 0;
        return channel->status;
    }
    if (channel->count_latched)
        return read_latched(channel);
    count = counter(channel, now_ns);
    switch (channel->read_state) {
    case WORD_LOW:
        channel->read_state = WORD_HIGH;
        return (uint8_t)count;
    case WORD_HIGH:
        channel->read_state = WORD_LOW;
        return (uint8_t)(count >> 8);
    default:
        return (uint8_t)(channel->read_state == HIGH ? count >> 8 : count);
    }
}

uint8_t pf_pit_read(struct pf_pit *pit, uint32_t port, int64_t now_ns)
{
    const struct pf_pit_channel *second = &pit->channels[2];

    if (port != SPEAKER_PORT)
        return read_channel(&pit->channels[port - FIRST_PORT], now_ns);
    pit->refresh ^= 0x10;
    return (uint8_t)(second->gate | pit->speaker | pit->refresh | (output(second, now_ns) ? 0x20 : 0));
}
