/* Codes of 1, 2, 3, 4 or 8 bits in blocks: the arithmetic of fedmef_fx/packing/block_code.py and centroids.py, bit for
 * bit.
 *
 * A block is worked on in the first-level cache, from its elements to its planes of bits, so that nothing of the size of
 * the tensor is made besides its codes.
 */
#include "block_code.h"

#include <float.h>
#include <math.h>
#include <stdbool.h>

#include "halves.h"

/* The pattern of the largest bfloat16 not above x, which is finite. */
static inline uint16_t bfloat16_below(float x) {
    const uint32_t word = as_word(x), below = (word >> 16) + (word >> 31 & ((word & 0xFFFF) != 0));
    return (uint16_t)(below == 0xFF80 ? 0xFF7F : below); /* not -inf */
}

static const float LARGEST_BFLOAT16 = 0x1.FEp127f;

static inline float float_below_float(float x) { return x; }

static inline float float_below_double(double x) {
    if (x >= LARGEST_BFLOAT16) return LARGEST_BFLOAT16;
    if (x <= -LARGEST_BFLOAT16) return -LARGEST_BFLOAT16;
    const float near = (float)x;
    if (!((double)near > x)) return near;
    /* One step down: of the magnitude, upwards for negative numbers. */
    if (near == 0) return -0x1p-149f;
    return as_float(near > 0 ? as_word(near) - 1 : as_word(near) + 1);
}

/* A range of floats begins at or below its values and ends near them: integers hold what comes out. */
static inline uint8_t code_of_float(float step, int top) {
    const int code = (int)step;
    return (uint8_t)(code < top ? code : top);
}

/* A range of doubles is cut to what bfloat16 holds. */
static inline uint8_t code_of_double(double step, int top) {
    step = step > 0 ? step : 0;
    return (uint8_t)(step < top ? (int)step : top);
}

enum { ENDS = 4, LLOYD_STEPS = 4 };

#define MEAN_TO_STANDARD_DEVIATION 1.2533141373155001

/* Where half of the levels of a normal distribution with deviation 1 lie, by bits. */
static const double NORMAL_LEVELS[4][MOST_LEVELS / 2] = {
    {0.798},
    {0.453, 1.510},
    {0.245, 0.756, 1.344, 2.152},
    {0.128, 0.388, 0.657, 0.942, 1.256, 1.618, 2.069, 2.733},
};

#define LEVEL(name) name##_float
#define FLOAT float
#define SIGNED int32_t
#define SMALLEST FLT_MIN
#include "block_levels.h"
#undef LEVEL
#undef FLOAT
#undef SIGNED
#undef SMALLEST
#define LEVEL(name) name##_double
#define FLOAT double
#define SIGNED int64_t
#define SMALLEST DBL_MIN
#include "block_levels.h"
#undef LEVEL
#undef FLOAT
#undef SIGNED
#undef SMALLEST

#define LIMIT_float16 65504.0f
#define LIMIT_bfloat16 LARGEST_BFLOAT16

static inline int64_t count_range(const uint8_t *marks, int64_t first, int64_t last) {
    return count_bits(marks + first / 8, last - first);
}

#define KERNELS "block_format.h"
#include "formats.h"

static part_function *const PACK[FORMATS] = OF_EACH_FORMAT(pack);
static part_function *const UNPACK[FORMATS] = OF_EACH_FORMAT(unpack);
static part_function *const PACK_MARKED[FORMATS] = OF_EACH_FORMAT(pack_marked);
static part_function *const UNPACK_MARKED[FORMATS] = OF_EACH_FORMAT(unpack_marked);

/* Code a tensor.
 *
 * `parameters` are pairs of offset and scale: of bfloat16, for 8 bits of the type to compute in. With centroids, of up
 * to 4 bits, they are the levels of each block, of bfloat16. `number` is that of the
 * first element, for the noise under `key`. Returns whether there are exceptions; codes and parameters are then worth
 * nothing.
 */
EXPORT int64_t fedmef_pack_blocks(int format, const void *source, int64_t count, int bits, int64_t block,
                                  int has_centroids, int is_stochastic, uint64_t key, int64_t number, uint8_t *codes,
                                  void *parameters, int threads) {
    atomic_int has_exceptions = 0;
    struct coded work = {.source = source,
                         .codes = codes,
                         .parameters = parameters,
                         .key = key,
                         .number = number,
                         .count = count,
                         .block = block,
                         .bits = bits,
                         .has_centroids = has_centroids,
                         .is_stochastic = is_stochastic,
                         .has_exceptions = &has_exceptions};
    run_parts(PACK[format], &work, count, block, threads);
    return atomic_load(&has_exceptions);
}

/* Decode what `fedmef_pack_blocks` coded. */
EXPORT void fedmef_unpack_blocks(int format, uint8_t *codes, void *parameters, int bits, int64_t block, int has_centroids,
                                 void *out, int64_t count, int threads) {
    struct coded work = {.out = out,
                         .codes = codes,
                         .parameters = parameters,
                         .count = count,
                         .block = block,
                         .bits = bits,
                         .has_centroids = has_centroids};
    run_parts(UNPACK[format], &work, count, block, threads);
}

/* Code the elements that a bitmap of `all` elements marks, `count` of them, as if they lay one after another.
 *
 * Returns 1 where there are exceptions, and 2, having written nothing, where another number of elements is marked.
 */
EXPORT int64_t fedmef_pack_marked(int format, const uint8_t *marks, const void *source, int64_t all, int64_t count,
                                  int bits, int64_t block, int has_centroids, int is_stochastic, uint64_t key,
                                  uint8_t *codes, void *parameters, int threads) {
    if (count_bits(marks, all) != count) return 2;
    atomic_int has_exceptions = 0;
    struct coded work = {.source = source,
                         .marks = marks,
                         .codes = codes,
                         .parameters = parameters,
                         .key = key,
                         .count = count,
                         .block = block,
                         .all = all,
                         .bits = bits,
                         .has_centroids = has_centroids,
                         .is_stochastic = is_stochastic,
                         .has_exceptions = &has_exceptions};
    run_parts(PACK_MARKED[format], &work, all, WORD_BITS, threads);
    return atomic_load(&has_exceptions);
}

/* Decode what `fedmef_pack_marked` coded to where the bitmap of `all` elements says, and write 0 elsewhere: `size`
 * elements from `start` on, a multiple of the bits of a word.
 *
 * Returns how many elements are marked; nothing is written where these are not `count`.
 */
EXPORT int64_t fedmef_unpack_marked(int format, const uint8_t *marks, int64_t all, int64_t start, uint8_t *codes,
                                    void *parameters, int bits, int64_t block, int has_centroids, void *out,
                                    int64_t size, int64_t count, int threads) {
    const int64_t before = count_bits(marks, start);
    const uint8_t *own = marks + start / 8;
    const int64_t marked = before + count_bits(own, all - start);
    if (marked != count) return marked;
    struct coded work = {.out = out,
                         .marks = own,
                         .codes = codes,
                         .parameters = parameters,
                         .number = before,
                         .count = count,
                         .block = block,
                         .all = size,
                         .bits = bits,
                         .has_centroids = has_centroids};
    run_parts(UNPACK_MARKED[format], &work, size, WORD_BITS, threads);
    return marked;
}
