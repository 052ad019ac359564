/* The kernels of block_code.c for one format; see formats.h. */

/* Elements in the type to compute in: where they lie, or in a buffer. */
static inline const COMPUTED *NAME(computed)(const STORED *x, int64_t count, COMPUTED *buffer) {
#if WIDTH == 16
    for (int64_t i = 0; i < count; i++) buffer[i] = READ(x[i]);
    return buffer;
#else
    (void)count, (void)buffer;
    return x;
#endif
}

static void NAME(pack)(const void *argument, int64_t first, int64_t last) {
    const struct coded *work = argument;
    COMPUTED buffer[WIDTH == 16 ? MOST_BLOCK : 1];
    for (int64_t start = first; start < last; start += work->block) {
        const int64_t count = least(last - start, work->block);
        const COMPUTED *x = NAME(computed)((const STORED *)work->source + start, count, buffer);
        if (!JOIN(encode_block_, COMPUTED)(work, x, start / work->block, count)) {
            atomic_store_explicit(work->has_exceptions, 1, memory_order_relaxed);
            return;
        }
    }
}

static inline STORED NAME(limited)(COMPUTED value) {
#if WIDTH == 16
    /* The range covers its values by a little more, which may be beyond the format. */
    value = value < NAME(LIMIT) ? value : NAME(LIMIT);
    value = value > -NAME(LIMIT) ? value : -NAME(LIMIT);
#endif
    return WRITE(value);
}

/* Replace codes by the levels of their block. */
static void NAME(look_up)(const struct coded *work, int64_t block, int64_t count, const uint8_t *codes, STORED *out) {
    const uint16_t *stored = (const uint16_t *)work->parameters + (block << work->bits);
    STORED levels[MOST_LEVELS];
    for (int k = 0; k < 1 << work->bits; k++) levels[k] = NAME(limited)(from_bfloat16(stored[k]));
    if (work->bits == 1) { /* a choice is one instruction for many elements */
        const STORED low = levels[0], high = levels[1];
        for (int64_t i = 0; i < count; i++) out[i] = codes[i] ? high : low;
        return;
    }
    for (int64_t i = 0; i < count; i++) out[i] = levels[codes[i]];
}

/* Decode a block. */
static void NAME(decode_block)(const struct coded *work, int64_t block, int64_t count, STORED *out) {
    COMPUTED offset, scale;
    uint8_t codes[MOST_BLOCK];
    unpack_codes(work->codes + block * code_bytes(work->block, work->bits), count, work->bits, codes);
    if (work->has_centroids) {
        NAME(look_up)(work, block, count, codes, out);
        return;
    }
    JOIN(read_range_, COMPUTED)(work, block, &offset, &scale);
    for (int64_t i = 0; i < count; i++) out[i] = NAME(limited)((COMPUTED)codes[i] * scale + offset);
}

static void NAME(unpack)(const void *argument, int64_t first, int64_t last) {
    const struct coded *work = argument;
    for (int64_t start = first; start < last; start += work->block)
        NAME(decode_block)(work, start / work->block, least(last - start, work->block), (STORED *)work->out + start);
}

#include "marked_format.h"
