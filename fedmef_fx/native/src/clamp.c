/* Clamps that note where a gradient passes, and gradients that pass there. */
#include "bits.h"

struct clamped {
    const void *source;
    void *out;
    const uint8_t *bitmap;
    uint8_t *out_bitmap;
    double low, high, scale_off;
    int64_t count;
};

typedef float vector_float32 __attribute__((vector_size(LANE_BYTES)));
typedef double vector_float64 __attribute__((vector_size(LANE_BYTES)));

/* The order of numbers of 16 bits is that of these integers: their magnitudes, with their sign. */
static inline flags16 keys_of(words16 words) {
    const flags16 negative = (flags16)words >> 15;
    return ((flags16)(words & 0x7FFF) ^ negative) - negative;
}

/* What compares like the vector of numbers that is stored in words. */
#define KEYS_float16 keys_of
#define KEYS_bfloat16 keys_of
#define KEYS_float32 (vector_float32)
#define KEYS_float64 (vector_float64)
/* Which words are numbers, where keys do not say it; comparisons of floats are false for a NaN by themselves. */
#define NUMBERS_float16(words) ((flags16)((words & 0x7FFF) <= 0x7C00))
#define NUMBERS_bfloat16(words) ((flags16)((words & 0x7FFF) <= 0x7F80))
#define NUMBERS_float32(words) (~(flags32){0})
#define NUMBERS_float64(words) (~(flags64){0})

#define KERNELS "clamp_format.h"
#include "formats.h"

static part_function *const CLAMP[FORMATS] = OF_EACH_FORMAT(clamp);
static part_function *const SCALE_UNMARKED[FORMATS] = OF_EACH_FORMAT(scale_unmarked);

/* out = clamp(source, low, high), marking what lies inside; `out` may be `source`.
 *
 * The bounds are numbers of the format; one of NaN never stops anything. NaN passes.
 */
EXPORT void fedmef_clamp(int format, const void *source, double low, double high, void *out, uint8_t *bitmap,
                         int64_t count, int threads) {
    struct clamped work = {
        .source = source, .out = out, .out_bitmap = bitmap, .low = low, .high = high, .count = count};
    run_parts(CLAMP[format], &work, count, WORD_BITS, threads);
}

/* out = source where marked, else source * scale; `out` may be `source`. */
EXPORT void fedmef_scale_unmarked(int format, const uint8_t *bitmap, const void *source, double scale, void *out,
                                  int64_t count, int threads) {
    struct clamped work = {.source = source, .out = out, .bitmap = bitmap, .scale_off = scale, .count = count};
    run_parts(SCALE_UNMARKED[format], &work, count, WORD_BITS, threads);
}
