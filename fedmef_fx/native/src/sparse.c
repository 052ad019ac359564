/* Products of a sparse matrix with many columns at once, its transposed form, and the gradient of its elements.
 *
 * A matrix is stored by rows: `starts` [rows + 1] says where each row begins among `values`, and `offsets` where the
 * dense row that a value multiplies begins, in elements. A 1x1 convolution, a linear layer and, over a padded image, any
 * other convolution are this one product with different offsets (fedmef_fx/ops/sparse_layout.py).
 */
#include "format_numbers.h"
#include "vectors.h"

/* Vectors of a result that are summed up at once: they hide the latency of the additions. */
enum { VECTORS = 8 };
/* Inner products that are summed up at once, in two vectors each: as many as there are registers for. */
#if defined(__AVX512F__)
enum { MOST_INNER = 8 };
#else
enum { MOST_INNER = 4 };
#endif
/* Elements of a dense row that inner products take at a time, so that rows stay in the second-level cache. */
enum { STRIP = 4096 };

struct product {
    const int64_t *starts;
    const int32_t *offsets;
    const void *values, *bias, *source, *left;
    void *out;
    int64_t rows, count, runs, length, tiles, source_run, left_run, left_row, out_run, out_row;
};

#define NAME(name) name##_float32
#define FLOAT float
#include "sparse_format.h"
#undef NAME
#undef FLOAT
#define NAME(name) name##_float64
#define FLOAT double
#include "sparse_format.h"
#undef NAME
#undef FLOAT

/* out[run, row] = bias[row] + sum over k of values[k] * source[run, offsets[k]:] for runs of `length` elements.
 *
 * `source_run`, `out_run` and `out_row` are distances in elements; `bias` may be NULL.
 */
EXPORT void fedmef_sparse_product(int format, const int64_t *starts, const int32_t *offsets, const void *values,
                                  const void *bias, const void *source, int64_t source_run, void *out, int64_t out_run,
                                  int64_t out_row, int64_t rows, int64_t runs, int64_t length, int threads) {
    int64_t tile = VECTORS * VECTOR_BYTES / (format == FLOAT64 ? 8 : 4), tiles = (length + tile - 1) / tile;
    struct product work = {.starts = starts,
                           .offsets = offsets,
                           .values = values,
                           .bias = bias,
                           .source = source,
                           .source_run = source_run,
                           .out = out,
                           .out_run = out_run,
                           .out_row = out_row,
                           .rows = rows,
                           .runs = runs,
                           .length = length,
                           .tiles = tiles};
    run_parts(format == FLOAT64 ? multiply_float64 : multiply_float32, &work, runs * tiles, 1, threads);
}

/* out[k] += sum over runs and elements of left[run, row of k] * source[run, offsets[k]:]. */
EXPORT void fedmef_sparse_inner(int format, const int64_t *starts, const int32_t *offsets, const void *left,
                                int64_t left_run, int64_t left_row, const void *source, int64_t source_run, void *out,
                                int64_t rows, int64_t runs, int64_t length, int threads) {
    struct product work = {.starts = starts,
                           .offsets = offsets,
                           .left = left,
                           .left_run = left_run,
                           .left_row = left_row,
                           .source = source,
                           .source_run = source_run,
                           .out = out,
                           .rows = rows,
                           .runs = runs,
                           .length = length};
    run_parts(format == FLOAT64 ? inner_float64 : inner_float32, &work, starts[rows], 1, threads);
}

/* Where the marked elements of a matrix [rows, width] stand: `starts` [rows + 1], and the column of each. */
EXPORT void fedmef_sparse_matrix(const uint8_t *bitmap, int64_t rows, int64_t width, int64_t *starts,
                                 int32_t *columns) {
    int64_t row = 0, begin = 0, found = 0;
    starts[0] = 0;
    for (int64_t at = 0; at < rows * width; at += WORD_BITS) {
        for (uint64_t rest = load_bits(bitmap, at, rows * width); rest; rest &= rest - 1) {
            int64_t position = at + __builtin_ctzll(rest);
            while (position >= begin + width) {
                begin += width;
                starts[++row] = found;
            }
            columns[found++] = (int32_t)(position - begin);
        }
    }
    while (row < rows) starts[++row] = found;
}

/* The same matrix by its columns, several of which may make one row of the result.
 *
 * A value in column c goes to row target[c] (c where `target` is NULL), with the offset row * row_distance - shift[c]
 * (shift 0 where `shift` is NULL). `out_starts` has out_rows + 1 elements.
 */
EXPORT void fedmef_sparse_transpose(int width, const int64_t *starts, const int32_t *columns, const void *values,
                                    const int32_t *target, const int32_t *shift, int64_t row_distance, int64_t rows,
                                    int64_t out_rows, int64_t *out_starts, int32_t *out_offsets, void *out_values) {
    const uint32_t *values4 = values;
    const uint64_t *values8 = values;
    for (int64_t i = 0; i <= out_rows; i++) out_starts[i] = 0;
    for (int64_t k = 0; k < starts[rows]; k++) out_starts[(target ? target[columns[k]] : columns[k]) + 1]++;
    for (int64_t i = 0; i < out_rows; i++) out_starts[i + 1] += out_starts[i];
    /* out_starts[i] moves from the start of row i to its end, which is the start of row i + 1. */
    for (int64_t row = 0; row < rows; row++) {
        for (int64_t k = starts[row]; k < starts[row + 1]; k++) {
            int32_t column = columns[k];
            int64_t place = out_starts[target ? target[column] : column]++;
            out_offsets[place] = (int32_t)(row * row_distance - (shift ? shift[column] : 0));
            if (width == 4)
                ((uint32_t *)out_values)[place] = values4[k];
            else
                ((uint64_t *)out_values)[place] = values8[k];
        }
    }
    for (int64_t i = out_rows; i > 0; i--) out_starts[i] = out_starts[i - 1];
    out_starts[0] = 0;
}
