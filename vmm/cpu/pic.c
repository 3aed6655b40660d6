/*
 * The 8259A pair. The Python twin is vmm/devices/pic.py.
 *
 *   inputs --edge or level--> irr --(not masked, above what is in service)--> output --acknowledge--> isr --EOI-->
 *
 * Source: Intel 8259A data sheet; the behaviour where it is open is QEMU 7.2's (hw/intc/i8259.c).
 */
#include <stdint.h>

#include "pic.h"

#define CASCADE 2
#define SPURIOUS 7
#define ELCR_MASTER 0xf8u /* timer, keyboard and the cascade are always edge triggered */
#define ELCR_SLAVE 0xdeu  /* RTC and FPU, too */
#define NONE 8

static int highest(const struct pf_pic *pic, uint32_t inputs) /* in order of priority, 0 is first; NONE */
{
    int priority = 0;

    if (!inputs)
        return NONE;
    while (!(inputs & (1u << ((priority + pic->priority_add) & 7))))
        priority++;
    return priority;
}

static int wanted(const struct pf_pic *pic, int is_master) /* the input to be served, or -1 */
{
    uint32_t in_service = pic->isr;
    int priority = highest(pic, pic->irr & (uint32_t)~pic->imr);

    if (priority == NONE)
        return -1;
    if (pic->special_mask)
        in_service &= (uint32_t)~pic->imr;
    if (pic->special_fully_nested_mode && is_master)
        in_service &= ~(1u << CASCADE);
    return priority < highest(pic, in_service) ? (priority + pic->priority_add) & 7 : -1;
}

static void set_input(struct pf_pic *pic, int input, int level)
{
    uint8_t bit = (uint8_t)(1u << input);

    if (!level) {
        if (pic->elcr & bit)
            pic->irr &= (uint8_t)~bit;
        pic->last_irr &= (uint8_t)~bit;
        return;
    }
    if ((pic->elcr & bit) || !(pic->last_irr & bit))
        pic->irr |= bit;
    pic->last_irr |= bit;
}

static void cascade(struct pf_pics *pics)
{
    set_input(&pics->pic[0], CASCADE, wanted(&pics->pic[1], 0) >= 0);
}

static void take(struct pf_pic *pic, int input)
{
    uint8_t bit = (uint8_t)(1u << input);

    if (!pic->auto_eoi)
        pic->isr |= bit;
    else if (pic->rotate_on_auto_eoi)
        pic->priority_add = (uint8_t)((input + 1) & 7);
    if (!(pic->elcr & bit))
        pic->irr &= (uint8_t)~bit;
}

static void restart(struct pf_pic *pic) /* what ICW1 does; elcr and levels stay */
{
    *pic = (struct pf_pic){.irr = pic->irr & pic->elcr, .elcr = pic->elcr};
}

void pf_pics_reset(struct pf_pics *pics)
{
    for (int i = 0; i < 2; i++)
        pics->pic[i] = (struct pf_pic){.elcr = 0};
}

void pf_pics_set_line(struct pf_pics *pics, int irq, int level)
{
    set_input(&pics->pic[irq >> 3 & 1], irq & 7, level);
    cascade(pics);
}

int pf_pics_output(const struct pf_pics *pics)
{
    return wanted(&pics->pic[0], 1) >= 0;
}

int pf_pics_acknowledge(struct pf_pics *pics)
{
    struct pf_pic *master = &pics->pic[0], *slave = &pics->pic[1];
    int input = wanted(master, 1), vector;

    if (input < 0)
        return master->irq_base + SPURIOUS;
    vector = master->irq_base + input;
    if (input == CASCADE) {
        int second = wanted(slave, 0);

        if (second >= 0)
            take(slave, second);
        vector = slave->irq_base + (second >= 0 ? second : SPURIOUS);
    }
    take(master, input);
    cascade(pics);
    return vector;
}

int pf_pics_has_port(uint32_t port)
{
    return (port & ~0x81u) == 0x20 || (port & ~1u) == 0x4d0;
}

uint8_t pf_pics_read(struct pf_pics *pics, uint32_t port)
{
    struct pf_pic *pic = &pics->pic[port >= 0x4d0 ? port & 1 : port >> 7 & 1];
    uint8_t value;

    if (port >= 0x4d0)
        return pic->elcr;
    if (pic->poll) {
        int input = wanted(pic, pic == pics->pic);

        pic->poll = 0;
        value = input < 0 ? 0 : (uint8_t)(0x80 | input);
        if (input >= 0)
            take(pic, input);
        cascade(pics);
        return value;
    }
    if (port & 1)
        return pic->imr;
    return pic->read_reg_select ? pic->isr : pic->irr;
}

static void end_of_interrupt(struct pf_pic *pic, uint8_t value) /* OCW2 */
{
    int command = value >> 5, input = value & 7, is_specific = command & 2;

    if (command == 0 || command == 4) {
        pic->rotate_on_auto_eoi = (uint8_t)(command >> 2);
        return;
    }
    if (!is_specific) {
        int priority = highest(pic, pic->isr);

        if (priority == NONE)
            return;
        input = (priority + pic->priority_add) & 7;
    }
    if (command == 2)
        return;
    if (command != 6)
        pic->isr &= (uint8_t)~(1u << input);
    if (command & 4)
        pic->priority_add = (uint8_t)((input + 1) & 7);
}

static void write_command(struct pf_pic *pic, uint8_t value)
{
    if (value & 0x10) {
        restart(pic);
        pic->init_state = 1;
        pic->init4 = value & 1;
        pic->single_mode = value >> 1 & 1;
    } else if (value & 0x08) {
        if (value & 4)
            pic->poll = 1;
        if (value & 2)
            pic->read_reg_select = value & 1;
        if (value & 0x40)
            pic->special_mask = value >> 5 & 1;
    } else {
        end_of_interrupt(pic, value);
    }
}

static void write_data(struct pf_pic *pic, uint8_t value)
{
    switch (pic->init_state) {
    case 0:
        pic->imr = value;
        break;
    case 1:
        pic->irq_base = value & 0xf8;
        pic->init_state = !pic->single_mode ? 2 : pic->init4 ? 3 : 0;
        break;
    case 2:
        pic->init_state = pic->init4 ? 3 : 0;
        break;
    default:
        pic->special_fully_nested_mode = value >> 4 & 1;
        pic->auto_eoi = value >> 1 & 1;
        pic->init_state = 0;
    }
}

void pf_pics_write(struct pf_pics *pics, uint32_t port, uint8_t value)
{
    struct pf_pic *pic = &pics->pic[port >= 0x4d0 ? port & 1 : port >> 7 & 1];

    if (port >= 0x4d0)
        pic->elcr = value & (port & 1 ? ELCR_SLAVE : ELCR_MASTER);
    else if (port & 1)
        write_data(pic, value);
    else
        write_command(pic, value);
    cascade(pics);
}
