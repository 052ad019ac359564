/* How blocks become codes and values, computed in FLOAT: fedmef_fx/packing/block_code.py, operation by operation. */

typedef FLOAT LEVEL(vector) __attribute__((vector_size(LANE_BYTES)));
typedef SIGNED LEVEL(flags) __attribute__((vector_size(LANE_BYTES)));
#define VECTOR LEVEL(vector)
#define FLAGS LEVEL(flags)
enum { LEVEL(LANES) = LANE_BYTES / sizeof(FLOAT) };

static inline VECTOR LEVEL(chosen)(FLAGS mask, VECTOR yes, VECTOR no) {
    return (VECTOR)((mask & (FLAGS)yes) | (~mask & (FLAGS)no));
}

/* Smallest and largest of some numbers; false where one is not finite or twice their difference is not.
 *
 * In several vectors, as each comparison would wait for the one before.
 */
static bool LEVEL(ends)(const FLOAT *x, int64_t count, FLOAT *lowest, FLOAT *highest) {
    FLOAT low = x[0], high = x[0];
    bool is_nan = false;
    int64_t at = 0;
    if (count >= ENDS * LEVEL(LANES)) {
        VECTOR lows[ENDS], highs[ENDS];
        FLAGS nans[ENDS] = {{0}};
        memcpy(lows, x, sizeof lows);
        memcpy(highs, x, sizeof highs);
        for (; at + ENDS * LEVEL(LANES) <= count; at += ENDS * LEVEL(LANES))
            for (int i = 0; i < ENDS; i++) {
                VECTOR next;
                memcpy(&next, x + at + i * LEVEL(LANES), sizeof next);
                lows[i] = LEVEL(chosen)(next < lows[i], next, lows[i]);
                highs[i] = LEVEL(chosen)(next > highs[i], next, highs[i]);
                nans[i] |= next != next;
            }
        for (int i = 1; i < ENDS; i++) {
            lows[0] = LEVEL(chosen)(lows[i] < lows[0], lows[i], lows[0]);
            highs[0] = LEVEL(chosen)(highs[i] > highs[0], highs[i], highs[0]);
            nans[0] |= nans[i];
        }
        for (int lane = 0; lane < LEVEL(LANES); lane++) {
            low = lows[0][lane] < low ? lows[0][lane] : low;
            high = highs[0][lane] > high ? highs[0][lane] : high;
            is_nan |= nans[0][lane] != 0;
        }
    }
    for (; at < count; at++) {
        low = x[at] < low ? x[at] : low;
        high = x[at] > high ? x[at] : high;
        is_nan |= x[at] != x[at];
    }
    *lowest = low, *highest = high;
    const FLOAT twice = 2 * high - 2 * low;
    return !is_nan && twice - twice == 0;
}

static inline FLOAT LEVEL(bfloat16_below)(FLOAT x) { return from_bfloat16(bfloat16_below(LEVEL(float_below)(x))); }

/* Offset and scale of a block, as they are stored. */
static void LEVEL(range)(FLOAT low, FLOAT high, int bits, FLOAT *offset, FLOAT *scale) {
    const FLOAT top = (FLOAT)((1 << bits) - 1);
    FLOAT smallest = SMALLEST, step;
    if (bits == 8) {
        *offset = low, step = (high - low) / top;
    } else {
        smallest = (FLOAT)FLT_MIN;
        *offset = LEVEL(bfloat16_below)(low);
        step = -LEVEL(bfloat16_below)((*offset - high) / top);
    }
    *scale = step < smallest ? 0 : step;
}

/* code = (x - offset) * inverse + noise, rounded down. */
static void LEVEL(encode)(const FLOAT *x, int64_t count, FLOAT offset, FLOAT scale, int bits, const uint16_t *noise,
                          uint8_t *codes) {
    const FLOAT inverse = scale > 0 ? 1 / scale : 0, half = (FLOAT)0.5;
    const int top = (1 << bits) - 1;
    if (noise) {
        for (int64_t i = 0; i < count; i++)
            codes[i] = LEVEL(code_of)((x[i] - offset) * inverse + ((FLOAT)noise[i] + half) * (FLOAT)0x1p-16, top);
        return;
    }
    for (int64_t i = 0; i < count; i++) codes[i] = LEVEL(code_of)((x[i] - offset) * inverse + half, top);
}

/* Code a block by a range, of which it stores offset and scale. */
static void LEVEL(encode_range)(const struct coded *work, const FLOAT *x, int64_t block, int64_t count, FLOAT low,
                                FLOAT high, const uint16_t *noise, uint8_t *codes) {
    FLOAT offset, scale;
    LEVEL(range)(low, high, work->bits, &offset, &scale);
    if (work->bits == 8) {
        ((FLOAT *)work->parameters)[2 * block] = offset;
        ((FLOAT *)work->parameters)[2 * block + 1] = scale;
    } else {
        ((uint16_t *)work->parameters)[2 * block] = to_bfloat16((float)offset);
        ((uint16_t *)work->parameters)[2 * block + 1] = to_bfloat16((float)scale);
    }
    LEVEL(encode)(x, count, offset, scale, work->bits, noise, codes);
}

#include "centroid_levels.h"

/* Code a block; false where it has exceptions. */
static bool LEVEL(encode_block)(const struct coded *work, const FLOAT *x, int64_t block, int64_t count) {
    FLOAT low, high;
    uint8_t codes[MOST_BLOCK];
    union noise noise;
    if (!LEVEL(ends)(x, count, &low, &high)) return false;
    if (work->is_stochastic) draw(&noise, work->key, work->number + block * work->block, count);
    const uint16_t *halves = work->is_stochastic ? noise.halves : NULL;
    if (work->has_centroids)
        LEVEL(encode_centroids)(work, x, block, count, low + 0, high + 0, halves, codes);
    else
        LEVEL(encode_range)(work, x, block, count, low + 0, high + 0, halves, codes);
    pack_codes(codes, count, work->bits, work->codes + block * code_bytes(work->block, work->bits));
    return true;
}

/* Offset and scale of a block. */
static inline void LEVEL(read_range)(const struct coded *work, int64_t block, FLOAT *offset, FLOAT *scale) {
    if (work->bits == 8) {
        *offset = ((const FLOAT *)work->parameters)[2 * block];
        *scale = ((const FLOAT *)work->parameters)[2 * block + 1];
    } else {
        *offset = from_bfloat16(((const uint16_t *)work->parameters)[2 * block]);
        *scale = from_bfloat16(((const uint16_t *)work->parameters)[2 * block + 1]);
    }
}

#undef VECTOR
#undef FLAGS
