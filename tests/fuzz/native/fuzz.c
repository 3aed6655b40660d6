/* Fuzzes the page pump, built with sanitizers and without Python: `fuzz TARGET SEED SECONDS CORPUS [KEEP]`.
 *
 * An input is CHOICES bytes, from which follows how the world behaves (how the stream is cut, which faults
 * come, what the kernel refuses), and the stream. Mutation works on records first and on bytes second. What
 * reaches a branch that nothing reached before is mutated further and, with KEEP, written there (with no SECONDS:
 * what of the corpus is needed). The same seed and corpus make the same inputs. `fuzz TARGET FILE` runs one.
 *
 * Branches are seen through gcc's -fsanitize-coverage=trace-pc, so that no clang is needed.
 */
#include <dirent.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "fuzz.h"

enum { EDGES = 1 << 16, CORPUS_MAX = 4096, RECORDS_MAX = 512 };

static uint8_t edges_seen[EDGES];
static uint32_t edge_count, edges_new;
static uintptr_t last_place;

void __sanitizer_cov_trace_pc(void)
{
    uintptr_t place = (uintptr_t)__builtin_return_address(0);
    uint32_t edge = (uint32_t)((place ^ last_place >> 1) * 0x9e3779b97f4a7c15ull >> 48);

    last_place = place;
    if (!edges_seen[edge]) {
        edges_seen[edge] = 1;
        edges_new++;
    }
}

/* ---- choices and inputs ---- */

uint64_t next(struct choices *c)
{
    c->state ^= c->state >> 12;
    c->state ^= c->state << 25;
    c->state ^= c->state >> 27;
    return c->state * 0x2545f4914f6cdd1dull;
}

uint64_t below(struct choices *c, uint64_t limit) { return limit ? (next(c) >> 11) % limit : 0; }

int one_in(struct choices *c, uint64_t n) { return below(c, n) == 0; }

void put(struct input *in, const void *bytes, size_t length)
{
    size_t room = INPUT_MAX - in->length;

    length = length < room ? length : room;
    memcpy(in->bytes + in->length, bytes, length);
    in->length += length;
}

void put_be(struct input *in, uint64_t value, unsigned bytes)
{
    for (; bytes; bytes--) {
        uint8_t byte = (uint8_t)(value >> 8 * (bytes - 1));
        put(in, &byte, 1);
    }
}

/* ---- the corpus ---- */

static struct entry { uint8_t *bytes; size_t length; } corpus[CORPUS_MAX];
static size_t corpus_count;

/* Short ones first, so that of two that reach the same the shorter one matters. */
static int by_length(const void *a, const void *b)
{
    const struct entry *one = a, *other = b;

    if (one->length != other->length)
        return one->length < other->length ? -1 : 1;
    return memcmp(one->bytes, other->bytes, one->length);
}

static void keep(const uint8_t *bytes, size_t length)
{
    if (corpus_count == CORPUS_MAX)
        return;
    corpus[corpus_count].bytes = malloc(length);
    memcpy(corpus[corpus_count].bytes, bytes, length);
    corpus[corpus_count++].length = length;
}

static size_t read_file(const char *path, uint8_t *out)
{
    FILE *file = fopen(path, "rb");
    size_t length;

    if (!file)
        return 0;
    length = fread(out, 1, INPUT_MAX, file);
    fclose(file);
    return length;
}

static void read_corpus(const char *folder)
{
    static uint8_t bytes[INPUT_MAX];
    struct dirent **entries;
    int count = scandir(folder, &entries, NULL, alphasort);

    for (int i = 0; i < count; i++) {
        char path[4096];
        size_t length;

        snprintf(path, sizeof(path), "%s/%s", folder, entries[i]->d_name);
        length = read_file(path, bytes);
        if (length >= CHOICES)
            keep(bytes, length);
        free(entries[i]);
    }
    if (count >= 0)
        free(entries);
    qsort(corpus, corpus_count, sizeof(corpus[0]), by_length);
}

static void write_file(const char *folder, const struct input *in)
{
    uint64_t hash = 0xcbf29ce484222325ull;
    char path[4096];
    FILE *file;

    for (size_t i = 0; i < in->length; i++)
        hash = (hash ^ in->bytes[i]) * 0x100000001b3ull;
    snprintf(path, sizeof(path), "%s/%016lx", folder, (unsigned long)hash);
    file = fopen(path, "wb");
    if (!file || fwrite(in->bytes, 1, in->length, file) != in->length || fclose(file)) {
        perror(path);
        exit(2);
    }
}

/* ---- mutation ---- */

static const struct target *target;
static struct choices choices;
static struct input input;

/* The records of a stream: starts[n] is the end of the last. */
static size_t split(const uint8_t *bytes, size_t length, size_t *starts)
{
    size_t count = 0, at = 0;

    while (at < length && count < RECORDS_MAX) {
        size_t size = target->record(bytes, length, at);

        starts[count++] = at;
        at += size && size < length - at ? size : length - at;
    }
    starts[count] = at;
    return count;
}

static void one_record_change(struct input *out, const uint8_t *bytes, const size_t *starts, size_t count)
{
    size_t at = below(&choices, count + 1), other = below(&choices, count + 1);
    uint64_t how = below(&choices, 5);

    for (size_t i = 0; i < count; i++) {
        if (i == at && how == 0)
            continue;  /* left out */
        if (i == at && how == 1)
            target->generate(out, &choices);
        if (i == at && how == 2 && other < count)
            put(out, bytes + starts[other], starts[other + 1] - starts[other]);
        put(out, bytes + starts[i], starts[i + 1] - starts[i]);
        if (i == at && how == 3)
            put(out, bytes + starts[i], starts[i + 1] - starts[i]);  /* twice */
        if (i == at && how == 4)
            break;  /* the end comes early */
    }
    if (at == count)
        target->generate(out, &choices);
}

static void change_records(struct input *in)
{
    static struct input old;
    static size_t starts[RECORDS_MAX + 1];
    size_t count;

    old = *in;
    count = split(old.bytes + CHOICES, old.length - CHOICES, starts);
    in->length = CHOICES;
    one_record_change(in, old.bytes + CHOICES, starts, count);
}

static void change_bytes(struct input *in)
{
    static size_t starts[RECORDS_MAX + 1];
    size_t count = split(in->bytes + CHOICES, in->length - CHOICES, starts), at;

    if (!count)
        return;
    /* The first bytes of a record are its header: most of what can be wrong is there. */
    at = CHOICES + starts[below(&choices, count)] + below(&choices, one_in(&choices, 8) ? 300 : 16);
    if (at < in->length)
        in->bytes[at] = (uint8_t)(one_in(&choices, 2) ? in->bytes[at] ^ 1u << below(&choices, 8) : next(&choices));
}

static void splice(struct input *in)
{
    size_t other = below(&choices, corpus_count);
    size_t from = CHOICES + below(&choices, corpus[other].length - CHOICES + 1);

    put(in, corpus[other].bytes + from, corpus[other].length - from);
}

static void make_input(void)
{
    input.length = 0;
    if (corpus_count && !one_in(&choices, 10)) {
        size_t base = below(&choices, corpus_count);
        put(&input, corpus[base].bytes, corpus[base].length);
    } else {
        uint64_t seed = next(&choices);
        put(&input, &seed, CHOICES);
        for (uint64_t n = 1 + below(&choices, 12); n; n--)
            target->generate(&input, &choices);
    }
    for (uint64_t n = below(&choices, 6); n; n--) {
        if (one_in(&choices, 12))
            input.bytes[below(&choices, CHOICES)] = (uint8_t)next(&choices);
        else if (one_in(&choices, 10) && corpus_count)
            splice(&input);
        else if (one_in(&choices, 2))
            change_records(&input);
        else
            change_bytes(&input);
    }
}

/* ---- running ---- */

static uint64_t executions;
static char crash_path[64];

void fail(const char *format, ...)
{
    va_list arguments;

    va_start(arguments, format);
    vfprintf(stderr, format, arguments);
    va_end(arguments);
    fprintf(stderr, "\n");
    abort();
}

/* An input must end within a second, and when it does not or crashes it is already in a file. */
static void run_input(void)
{
    static int fd_is_open;
    static FILE *last;

    if (crash_path[0]) {
        if (!fd_is_open) {
            last = fopen(crash_path, "wb");
            fd_is_open = 1;
        }
        if (last) {
            rewind(last);
            fwrite(input.bytes, 1, input.length, last);
            fflush(last);
            if (ftruncate(fileno(last), (off_t)input.length))
                perror(crash_path);
        }
    }
    alarm(2);
    last_place = 0;
    edges_new = 0;
    target->run(input.bytes, input.length);
    executions++;
    edge_count += edges_new;
}

static double now_s(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + (double)now.tv_nsec / 1e9;
}

static void fuzz(double seconds, const char *keep_in)
{
    size_t given = corpus_count;
    double end = now_s() + seconds;

    for (size_t i = 0; i < given; i++) {
        input.length = 0;
        put(&input, corpus[i].bytes, corpus[i].length);
        run_input();
        if (edges_new && keep_in)
            write_file(keep_in, &input);
    }
    while (now_s() < end) {
        make_input();
        run_input();
        if (edges_new) {
            keep(input.bytes, input.length);
            if (keep_in)
                write_file(keep_in, &input);
        }
    }
    printf("%s: %lu executions, %u branches, %zu inputs that matter (%zu at the start)\n", target->name,
           (unsigned long)executions, edge_count, corpus_count, given);
}

int main(int count, char **arguments)
{
    setvbuf(stdout, NULL, _IOLBF, 0);
    for (target = targets; count > 2 && target->name && strcmp(target->name, arguments[1]); target++)
        ;
    if ((count != 3 && count != 5 && count != 6) || !target->name) {
        fprintf(stderr, "usage: fuzz TARGET SEED SECONDS CORPUS [KEEP] | fuzz TARGET FILE\n");
        return 2;
    }
    world_make();
    if (count == 3) {
        input.length = read_file(arguments[2], input.bytes);
        if (input.length < CHOICES)
            return 2;
        run_input();
        printf("%s: no invariant is broken\n", arguments[2]);
        return 0;
    }
    choices.state = strtoull(arguments[2], NULL, 10) * 0x9e3779b97f4a7c15ull | 1;
    snprintf(crash_path, sizeof(crash_path), "last-input-%s", target->name);
    read_corpus(arguments[4]);
    fuzz(atof(arguments[3]), count == 6 ? arguments[5] : NULL);
    unlink(crash_path);
    return 0;
}
