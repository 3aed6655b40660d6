/* Fuzzing of the page pump without Python and without a kernel in the way; see fuzz.c. */
#ifndef FUZZ_H
#define FUZZ_H

#include <stddef.h>
#include <stdint.h>

#include "page_pump.h"

enum { INPUT_MAX = 1 << 17, CHOICES = 8 /* first bytes of an input: how its world behaves */ };

/* ---- choices (fuzz.c): xorshift64*, the same everywhere for the same seed ---- */
struct choices { uint64_t state; };
uint64_t next(struct choices *c);
uint64_t below(struct choices *c, uint64_t limit);
int one_in(struct choices *c, uint64_t n);

/* ---- an input under construction (fuzz.c) ---- */
struct input { uint8_t bytes[INPUT_MAX]; size_t length; };
void put(struct input *in, const void *bytes, size_t length);
void put_be(struct input *in, uint64_t value, unsigned bytes);

/* ---- the world (world.c): what the pump sees instead of the kernel ---- */
enum { FD_READER = 1 << 20, FD_PREEMPT, FD_UFFD, FD_CANCEL, FD_KICK, FD_RETURN, FD_WRITER, BLOCKS = 3 };
struct world {
    struct pp_block blocks[BLOCKS];
    struct choices choices;
    const uint8_t *stream;
    size_t length, at;
    const uint8_t *second;  /* what FD_PREEMPT delivers */
    size_t second_length, second_at;
    int end_error;       /* what a read after the last byte answers: 0 = the end, else an errno */
    uint32_t calls;      /* system calls: a loop that does not end is found by their number */
    uint64_t written;    /* bytes into FD_WRITER and FD_RETURN */
    int is_listening;
    int is_hostile;      /* now and then the kernel refuses */
};
extern struct world world;
void world_make(void);
void world_reset(const uint8_t *choices, const uint8_t *stream, size_t length);
void world_check(int is_destination);
uint8_t *world_reader_buffer(uint32_t size);
void fail(const char *format, ...) __attribute__((format(printf, 1, 2), noreturn));

/* ---- targets (targets.c, packets.c) ---- */
struct target {
    const char *name;
    void (*run)(const uint8_t *data, size_t length);
    size_t (*record)(const uint8_t *data, size_t length, size_t at);  /* length of the record at `at` */
    void (*generate)(struct input *in, struct choices *c);            /* one record, mostly a right one */
};
extern const struct target targets[];
void run_multifd(const uint8_t *data, size_t length);
size_t record_of_multifd(const uint8_t *data, size_t length, size_t at);
void generate_multifd(struct input *in, struct choices *c);
#endif
