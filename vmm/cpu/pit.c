/*
 * The 8254's counters. The Python twin is vmm/devices/pit.py.
 *
 * Source: Intel 8254 data sheet; the behaviour where it is open is QEMU 7.2's (hw/timer/i8254.c).
 */
#include <stdint.h>

#include "pit.h"

#define PIT_HZ 1193182
#define NS_PER_S 1000000000
#define FIRST_PORT 0x40u
#define COMMAND_PORT 0x43u
#define SPEAKER_PORT 0x61u
#define GATE2 0x01
#define SPEAKER_DATA 0x02
#define NEVER (-1)
#define BACKLOG_NS NS_PER_S /* of a periodic timer that is made up for after a delay; arbitrary */

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

/* When the output rises next. In mode 1 it rises with the gate only. */
static int64_t next_rise(const struct pf_pit_channel *channel, int64_t now_ns)
{
    int64_t target = channel->count, passed = ticks(channel, now_ns);

    if (channel->mode == 2 || channel->mode == 3)
        target *= passed / channel->count + 1;
    else if (channel->mode == 1 || passed >= channel->count)
        return NEVER;
    return channel->count_load_time + (int64_t)(((__int128)target * NS_PER_S + PIT_HZ - 1) / PIT_HZ);
}

int pf_pit_has_port(uint32_t port)
{
    return port - FIRST_PORT < 4 || port == SPEAKER_PORT;
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

    if (port == COMMAND_PORT)
        return 0;
    if (port != SPEAKER_PORT)
        return read_channel(&pit->channels[port - FIRST_PORT], now_ns);
    pit->refresh ^= 0x10;
    return (uint8_t)(second->gate | pit->speaker | pit->refresh | (output(second, now_ns) ? 0x20 : 0));
}

static void latch(struct pf_pit_channel *channel, int64_t now_ns)
{
    if (channel->count_latched)
        return;
    channel->latched_count = counter(channel, now_ns);
    channel->count_latched = channel->rw_mode;
}

static void read_back(struct pf_pit *pit, uint8_t value, int64_t now_ns)
{
    for (int number = 0; number < 3; number++) {
        struct pf_pit_channel *channel = &pit->channels[number];

        if (!(value & (2 << number)))
            continue;
        if (!(value & 0x20))
            latch(channel, now_ns);
        if (!(value & 0x10) && !channel->status_latched) {
            channel->status = (uint8_t)(output(channel, now_ns) << 7 | channel->rw_mode << 4 | channel->mode << 1 |
                                        channel->bcd);
            channel->status_latched = 1;
        }
    }
}

static void command(struct pf_pit *pit, uint8_t value, int64_t now_ns)
{
    struct pf_pit_channel *channel = &pit->channels[value >> 6 & 3];
    uint8_t access = value >> 4 & 3;

    if (value >> 6 == 3) {
        read_back(pit, value, now_ns);
        return;
    }
    if (!access) {
        latch(channel, now_ns);
        return;
    }
    channel->rw_mode = channel->read_state = channel->write_state = access;
    channel->mode = value >> 1 & 7;
    if (channel->mode > 5)
        channel->mode -= 4; /* bit 2 is a don't-care for modes 2 and 3 */
    channel->bcd = value & 1;
}

static int start(struct pf_pit *pit, int number, int32_t count, int64_t now_ns)
{
    struct pf_pit_channel *channel = &pit->channels[number];

    channel->count_load_time = now_ns;
    channel->count = count ? count : 0x10000;
    if (number)
        return 0;
    pit->started = 1;
    channel->next_transition_time = next_rise(channel, now_ns);
    return 1;
}

static int write_count(struct pf_pit *pit, int number, uint8_t value, int64_t now_ns)
{
    struct pf_pit_channel *channel = &pit->channels[number];

    switch (channel->write_state ? channel->write_state : channel->rw_mode) {
    case HIGH:
        return start(pit, number, value << 8, now_ns);
    case WORD_LOW:
        channel->write_latch = value;
        channel->write_state = WORD_HIGH;
        return 0;
    case WORD_HIGH:
        channel->write_state = WORD_LOW;
        return start(pit, number, channel->write_latch | value << 8, now_ns);
    default:
        return start(pit, number, value, now_ns);
    }
}

static void write_speaker(struct pf_pit *pit, uint8_t value, int64_t now_ns)
{
    struct pf_pit_channel *second = &pit->channels[2];
    uint8_t gate = value & GATE2;

    pit->speaker = value & SPEAKER_DATA;
    if (gate && !second->gate && second->mode != 0 && second->mode != 4)
        second->count_load_time = now_ns;
    second->gate = gate;
}

int pf_pit_write(struct pf_pit *pit, uint32_t port, uint8_t value, int64_t now_ns)
{
    if (port == SPEAKER_PORT)
        write_speaker(pit, value, now_ns);
    else if (port == COMMAND_PORT)
        command(pit, value, now_ns);
    else
        return write_count(pit, (int)(port - FIRST_PORT), value, now_ns);
    return 0;
}

int pf_pit_take(struct pf_pit *pit, int64_t now_ns, struct pf_pit_due *due)
{
    struct pf_pit_channel *channel = &pit->channels[0];
    int64_t at_ns = channel->next_transition_time, period_ns = (int64_t)channel->count * NS_PER_S / PIT_HZ;

    if (at_ns == NEVER || at_ns > now_ns)
        return 0;
    channel->next_transition_time = next_rise(channel, now_ns);
    *due = (struct pf_pit_due){.count = 1, .stays_high = channel->mode == 0};
    if (channel->mode == 2 || channel->mode == 3) {
        int64_t missed = (now_ns - at_ns) / period_ns;

        due->limit = period_ns < BACKLOG_NS ? (uint32_t)(BACKLOG_NS / period_ns) : 1;
        due->count += (uint32_t)(missed < due->limit ? missed : due->limit - 1);
    }
    return 1;
}
