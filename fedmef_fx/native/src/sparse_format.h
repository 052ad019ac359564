/* The kernels of sparse.c for one FLOAT. */

#include "vectors_format.h"

/* `vectors` vectors of one row of the result; a constant where this is inlined. */
static inline __attribute__((always_inline)) void NAME(multiply_vectors)(const struct product *work, int64_t row,
                                                                         const FLOAT *source, FLOAT *out,
                                                                         const int vectors) {
    const FLOAT *values = work->values, *bias = work->bias;
    VECTOR sums[VECTORS];
    for (int i = 0; i < vectors; i++) sums[i] = (VECTOR){0} + (bias ? bias[row] : 0);
    for (int64_t k = work->starts[row]; k < work->starts[row + 1]; k++) {
        const FLOAT *from = source + work->offsets[k];
        const FLOAT value = values[k];
        for (int i = 0; i < vectors; i++) sums[i] += value * NAME(load)(from + i * LANES);
    }
    for (int i = 0; i < vectors; i++) memcpy(out + i * LANES, &sums[i], sizeof sums[i]);
}

static void NAME(multiply_elements)(const struct product *work, int64_t row, const FLOAT *source, FLOAT *out,
                                    int64_t count) {
    const FLOAT *values = work->values, *bias = work->bias;
    for (int64_t i = 0; i < count; i++) {
        FLOAT sum = bias ? bias[row] : 0;
        for (int64_t k = work->starts[row]; k < work->starts[row + 1]; k++)
            sum += values[k] * source[work->offsets[k] + i];
        out[i] = sum;
    }
}

static void NAME(multiply)(const void *argument, int64_t first, int64_t last) {
    const struct product *work = argument;
    for (int64_t tile = first; tile < last; tile++) {
        int64_t run = tile / work->tiles, begin = tile % work->tiles * VECTORS * LANES;
        int64_t count = least(work->length - begin, VECTORS * LANES), whole = count / LANES * LANES;
        const FLOAT *source = (const FLOAT *)work->source + run * work->source_run + begin;
        for (int64_t row = 0; row < work->rows; row++) {
            FLOAT *out = (FLOAT *)work->out + run * work->out_run + row * work->out_row + begin;
            if (count == VECTORS * LANES) {
                NAME(multiply_vectors)(work, row, source, out, VECTORS);
                continue;
            }
            int64_t done = 0;
            for (; done + 4 * LANES <= count; done += 4 * LANES)
                NAME(multiply_vectors)(work, row, source + done, out + done, 4);
            for (; done < whole; done += LANES) NAME(multiply_vectors)(work, row, source + done, out + done, 1);
            if (whole < count) NAME(multiply_elements)(work, row, source + whole, out + whole, count - whole);
        }
    }
}

/* Several inner products of `left` at once, a constant number where this is inlined: it is loaded once for all. */
static inline __attribute__((always_inline)) void NAME(inner_several)(const FLOAT *left, const FLOAT *source,
                                                                      const int32_t *offsets, int64_t count, FLOAT *out,
                                                                      const int several) {
    const FLOAT *right[MOST_INNER];
    VECTOR sums[2][MOST_INNER];
    int64_t i = 0;
    for (int j = 0; j < several; j++) {
        right[j] = source + offsets[j];
        sums[0][j] = sums[1][j] = (VECTOR){0};
    }
    for (; i + 2 * LANES <= count; i += 2 * LANES) {
        const VECTOR first = NAME(load)(left + i), second = NAME(load)(left + i + LANES);
        for (int j = 0; j < several; j++) {
            sums[0][j] += first * NAME(load)(right[j] + i);
            sums[1][j] += second * NAME(load)(right[j] + i + LANES);
        }
    }
    for (int j = 0; j < several; j++) {
        FLOAT rest = 0;
        for (int64_t p = i; p < count; p++) rest += left[p] * right[j][p];
        out[j] += NAME(total)(sums[0][j] + sums[1][j]) + rest;
    }
}

/* One inner product, to the same bits. */
static void NAME(inner_one)(const FLOAT *left, const FLOAT *right, int64_t count, FLOAT *out) {
    VECTOR sums[2] = {0};
    FLOAT rest = 0;
    int64_t i = 0;
    for (; i + 2 * LANES <= count; i += 2 * LANES)
        for (int j = 0; j < 2; j++) sums[j] += NAME(load)(left + i + j * LANES) * NAME(load)(right + i + j * LANES);
    for (; i < count; i++) rest += left[i] * right[i];
    *out += NAME(total)(sums[0] + sums[1]) + rest;
}

static void NAME(inner)(const void *argument, int64_t first, int64_t last) {
    const struct product *work = argument;
    FLOAT *out = work->out;
    int64_t first_row = 0;
    while (work->starts[first_row + 1] <= first) first_row++;
    for (int64_t run = 0; run < work->runs; run++) {
        for (int64_t begin = 0; begin < work->length; begin += STRIP) {
            int64_t count = least(work->length - begin, STRIP);
            const FLOAT *source = (const FLOAT *)work->source + run * work->source_run + begin;
            int64_t k = first;
            for (int64_t row = first_row; k < last; row++) {
                const FLOAT *left = (const FLOAT *)work->left + run * work->left_run + row * work->left_row + begin;
                int64_t stop = least(work->starts[row + 1], last);
                for (; k + MOST_INNER <= stop; k += MOST_INNER)
                    NAME(inner_several)(left, source, work->offsets + k, count, out + k, MOST_INNER);
                for (; k + 4 <= stop; k += 4)
                    NAME(inner_several)(left, source, work->offsets + k, count, out + k, 4);
                for (; k < stop; k++) NAME(inner_one)(left, source + work->offsets[k], count, out + k);
            }
        }
    }
}

#undef VECTOR
#undef LANES
