/* Bits that one thread sets while another takes them. */
#include "bits.h"

#include <stdint.h>

#include "api.h"

/* Set bits [first, first + count), each word with one atomic OR. */
void bits_set_atomic(uint64_t bitmap, uint64_t first, uint64_t count)
{
    uint64_t *words = (uint64_t *)(uintptr_t)bitmap;
    while (count > 0) {
        uint64_t shift = first % 64;
        uint64_t take = 64 - shift < count ? 64 - shift : count;
        uint64_t mask = (take == 64 ? ~UINT64_C(0) : (UINT64_C(1) << take) - 1) << shift;
        __atomic_fetch_or(words + first / 64, mask, __ATOMIC_SEQ_CST);
        first += take;
        count -= take;
    }
}

/* Move all bits of `from` into `into`, leaving `from` empty; returns how many were new there.
 * `from` may be set by other threads meanwhile: such a bit is moved now or stays for the next time. */
int64_t bits_take(uint64_t from, uint64_t into, uint64_t words)
{
    uint64_t *source = (uint64_t *)(uintptr_t)from;
    uint64_t *target = (uint64_t *)(uintptr_t)into;
    int64_t fresh = 0;
    for (uint64_t i = 0; i < words; i++) {
        if (__atomic_load_n(source + i, __ATOMIC_RELAXED) == 0)
            continue;
        uint64_t bits = __atomic_exchange_n(source + i, 0, __ATOMIC_SEQ_CST);
        fresh += __builtin_popcountll(bits & ~target[i]);
        target[i] |= bits;
    }
    return fresh;
}
