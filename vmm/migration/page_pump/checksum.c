/* Page checksums between two Pageferries: 64 bits behind each page record, over where it belongs and what it is.
 *
 *     seed   CRC32C over name | be64 (offset | kind) | the content's last length % 32 bytes
 *     lanes  CRC32C over every fourth 8-byte word of the rest: A from seed, B from ~seed, C and D from all ones
 *     sum    (A << 32 | B) * K1 ^ rotate((C << 32 | D) * K2, 32)        the multiplications lose nothing
 *
 * Any damage inside one lane that its CRC sees changes the sum: every single flipped bit, every two or three in a
 * lane, every burst of up to 32 bits in a lane. What is spread over both halves passes once in 2^64 times.
 * Four lanes, since the instruction takes three cycles and one can begin in each.
 * The Python twin is vmm/migration/checksum.py.
 */
#include <errno.h>
#include <string.h>

#include "page_pump.h"

enum { LANES = 4, STRIDE = 8 * LANES };
static const uint64_t K1 = 0x9e3779b97f4a7c15ull, K2 = 0xc2b2ae3d27d4eb4full; /* odd */
static const uint32_t POLYNOMIAL = 0x82f63b78; /* Castagnoli, reflected */

static uint32_t tables[8][256];
static pthread_once_t tables_once = PTHREAD_ONCE_INIT;

static void make_tables(void)
{
    for (uint32_t i = 0; i < 256; i++) {
        uint32_t crc = i;

        for (int bit = 0; bit < 8; bit++)
            crc = crc >> 1 ^ (crc & 1 ? POLYNOMIAL : 0);
        tables[0][i] = crc;
    }
    for (int t = 1; t < 8; t++)
        for (uint32_t i = 0; i < 256; i++)
            tables[t][i] = tables[t - 1][i] >> 8 ^ tables[0][tables[t - 1][i] & 0xff];
}

static uint32_t bytes_portable(uint32_t crc, const uint8_t *p, uint64_t n)
{
    while (n--)
        crc = crc >> 8 ^ tables[0][(crc ^ *p++) & 0xff];
    return crc;
}

static uint32_t word_portable(uint32_t crc, const uint8_t *p)
{
    crc ^= (uint32_t)p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24;
    return tables[7][crc & 0xff] ^ tables[6][crc >> 8 & 0xff] ^ tables[5][crc >> 16 & 0xff] ^
           tables[4][crc >> 24] ^ tables[3][p[4]] ^ tables[2][p[5]] ^ tables[1][p[6]] ^ tables[0][p[7]];
}

static void lanes_portable(uint32_t *lanes, const uint8_t *p, const uint8_t *end)
{
    for (; p < end; p += STRIDE)
        for (int i = 0; i < LANES; i++)
            lanes[i] = word_portable(lanes[i], p + 8 * i);
}

#if defined(__x86_64__)
#include <nmmintrin.h>

__attribute__((target("sse4.2"))) static uint32_t bytes_sse42(uint32_t crc, const uint8_t *p, uint64_t n)
{
    while (n--)
        crc = _mm_crc32_u8(crc, *p++);
    return crc;
}

__attribute__((target("sse4.2"))) static void lanes_sse42(uint32_t *lanes, const uint8_t *p, const uint8_t *end)
{
    uint64_t a = lanes[0], b = lanes[1], c = lanes[2], d = lanes[3], words[LANES];

    for (; p < end; p += STRIDE) {
        memcpy(words, p, STRIDE);
        a = _mm_crc32_u64(a, words[0]);
        b = _mm_crc32_u64(b, words[1]);
        c = _mm_crc32_u64(c, words[2]);
        d = _mm_crc32_u64(d, words[3]);
    }
    lanes[0] = (uint32_t)a, lanes[1] = (uint32_t)b, lanes[2] = (uint32_t)c, lanes[3] = (uint32_t)d;
}
#endif

typedef uint32_t crc_bytes(uint32_t crc, const uint8_t *p, uint64_t n);
typedef void crc_lanes(uint32_t *lanes, const uint8_t *p, const uint8_t *end);

static uint64_t checksum(crc_bytes *bytes, crc_lanes *by_lane, const char *name, uint64_t word,
                         const uint8_t *content, uint64_t length)
{
    uint64_t whole = length / STRIDE * STRIDE, x, y;
    uint8_t head[8];
    uint32_t seed, lanes[LANES];

    pp_put64(head, word);
    seed = bytes(~0u, (const uint8_t *)name, strlen(name));
    seed = bytes(seed, head, sizeof(head));
    seed = bytes(seed, content + whole, length - whole);
    lanes[0] = seed, lanes[1] = ~seed, lanes[2] = lanes[3] = ~0u;
    by_lane(lanes, content, content + whole);
    x = ((uint64_t)lanes[0] << 32 | lanes[1]) * K1;
    y = ((uint64_t)lanes[2] << 32 | lanes[3]) * K2;
    return x ^ (y << 32 | y >> 32);
}

uint64_t pp_checksum_portable(const char *name, uint64_t word, const uint8_t *content, uint64_t length)
{
    pthread_once(&tables_once, make_tables);
    return checksum(bytes_portable, lanes_portable, name, word, content, length);
}

uint64_t pp_checksum(const char *name, uint64_t word, const uint8_t *content, uint64_t length)
{
#if defined(__x86_64__)
    if (__builtin_cpu_supports("sse4.2"))
        return checksum(bytes_sse42, lanes_sse42, name, word, content, length);
#endif
    return pp_checksum_portable(name, word, content, length);
}

/* 0, or -EPROTO: `stated` is not the sum of what came. `at`: of the record in the stream. */
int pp_verify(struct pp_destination *d, const struct pp_block *b, uint64_t offset, uint32_t kind,
              const uint8_t *content, uint64_t length, const uint8_t *stated, uint64_t at)
{
    uint64_t sum = pp_checksum(b->name, offset | kind, content, length);

    if (sum == pp_be64(stated)) {
        d->checked_pages++;
        return 0;
    }
    memcpy(d->fault.name, b->name, PP_NAME);
    d->fault.expected = pp_be64(stated);
    d->fault.got = sum;
    return pp_bad(&d->fault, PP_BAD_CHECKSUM, offset, at);
}
