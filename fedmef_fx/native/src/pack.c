/* Flat tensors split into a bitmap and the values that it marks, and put together again.
 *
 * Floats are seen as unsigned words: without the sign bit, the order of magnitudes is that of the words, and a NaN is
 * larger than infinity, so that one comparison serves every format.
 */
#include "bits.h"

struct flat {
    const void *source;
    const uint8_t *bitmap;
    uint8_t *out_bitmap;
    void *out;
    uint64_t limit, magnitude;
    int64_t count;
};

#define PASTE(name, bits) name##bits
#define JOIN(name, bits) PASTE(name, bits)
#define NAME(name) JOIN(name, WIDTH)
#define WORD NAME(uint_t)
#define LANES (LANE_BYTES * 8 / WIDTH)

#define WIDTH 16
#include "pack_words.h"
#undef WIDTH
#define WIDTH 32
#include "pack_words.h"
#undef WIDTH
#define WIDTH 64
#include "pack_words.h"
#undef WIDTH

static void run(int width, part_function *const parts[3], const struct flat *work, int threads) {
    run_parts(parts[width == 2 ? 0 : width == 4 ? 1 : 2], work, work->count, WORD_BITS, threads);
}

/* Mark the elements with a magnitude above a limit; `width` is the bytes of a word, 2, 4 or 8. */
EXPORT void fedmef_mark(int width, const void *source, uint64_t magnitude, uint64_t limit, uint8_t *bitmap,
                        int64_t count, int threads) {
    struct flat work = {.source = source, .out_bitmap = bitmap, .limit = limit, .magnitude = magnitude, .count = count};
    run(width, (part_function *const[]){mark16, mark32, mark64}, &work, threads);
}

/* Mark the elements that are a word. */
EXPORT int64_t fedmef_mark_equal(int width, const void *source, uint64_t word, uint8_t *bitmap, int64_t count,
                                 int threads) {
    struct flat work = {.source = source, .out_bitmap = bitmap, .limit = word, .count = count};
    run(width, (part_function *const[]){mark_equal16, mark_equal32, mark_equal64}, &work, threads);
    return count_bits(bitmap, count);
}

/* Copy the marked elements to `values`, which has room for exactly these. */
EXPORT void fedmef_compress(int width, const uint8_t *bitmap, const void *source, void *values, int64_t count,
                            int threads) {
    struct flat work = {.source = source, .bitmap = bitmap, .out = values, .count = count};
    run(width, (part_function *const[]){compress16, compress32, compress64}, &work, threads);
}

/* Copy `values` to the marked elements of `out`, and 0 to the others. */
EXPORT void fedmef_expand(int width, const uint8_t *bitmap, const void *values, void *out, int64_t count, int threads) {
    struct flat work = {.source = values, .bitmap = bitmap, .out = out, .count = count};
    run(width, (part_function *const[]){expand16, expand32, expand64}, &work, threads);
}

/* out = source where marked, else 0; `out` may be `source`. */
EXPORT void fedmef_select(int width, const uint8_t *bitmap, const void *source, void *out, int64_t count, int threads) {
    struct flat work = {.source = source, .bitmap = bitmap, .out = out, .count = count};
    run(width, (part_function *const[]){select16, select32, select64}, &work, threads);
}

/* Set bits among the first `count`. */
EXPORT int64_t fedmef_count(const uint8_t *bitmap, int64_t count) { return count_bits(bitmap, count); }
