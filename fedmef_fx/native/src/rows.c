/* The equations of fedmef_fx/ops/nsconv.py on packed rows: one loop each in place of a dozen small tensors.
 *
 * A row is a run of consecutive values; `lengths` has their numbers. Sums are taken in double, in an order that depends
 * on the length alone.
 */
#include <math.h>

#include "format_numbers.h"

/* Partial sums, so that loops run on vectors. */
enum { SUMS = 8 };

struct limits {
    double g, eps, degenerate_ratio, fan_in;
};

struct rows {
    const void *values, *grad, *gain, *columns;
    void *out, *out_gain;
    const int64_t *lengths;
    int64_t rows;
    struct limits limits;
};

static int64_t start_of(const int64_t *lengths, int64_t row) {
    int64_t start = 0;
    for (int64_t i = 0; i < row; i++) start += lengths[i];
    return start;
}

static double total_of(const double sums[SUMS]) {
    return ((sums[0] + sums[4]) + (sums[2] + sums[6])) + ((sums[1] + sums[5]) + (sums[3] + sums[7]));
}

#define NAME(name) name##_float32
#define FLOAT float
#include "rows_format.h"
#undef NAME
#undef FLOAT
#define NAME(name) name##_float64
#define FLOAT double
#include "rows_format.h"
#undef NAME
#undef FLOAT

/* The five columns of each row, [5, rows]; a `fan_in` of 0 stands for statistics over the active weights. */
EXPORT void fedmef_row_statistics(int format, const void *values, const int64_t *lengths, const void *gain, double g,
                                  double eps, double degenerate_ratio, double fan_in, void *columns, int64_t rows,
                                  int threads) {
    struct rows work = {.values = values,
                        .gain = gain,
                        .out = columns,
                        .lengths = lengths,
                        .rows = rows,
                        .limits = {g, eps, degenerate_ratio, fan_in}};
    run_parts(format == FLOAT64 ? statistics_float64 : statistics_float32, &work, rows, 1, threads);
}

/* out = (values - mean of the row) * scale of the row. */
EXPORT void fedmef_row_scale(int format, const void *values, const int64_t *lengths, const void *columns, void *out,
                             int64_t rows, int threads) {
    struct rows work = {.values = values, .columns = columns, .out = out, .lengths = lengths, .rows = rows};
    run_parts(format == FLOAT64 ? scale_float64 : scale_float32, &work, rows, 1, threads);
}

/* Gradients of values and gain from that of the scaled values. */
EXPORT void fedmef_row_gradients(int format, const void *values, const void *grad, const int64_t *lengths,
                                 const void *columns, double g, void *out, void *out_gain, int64_t rows, int threads) {
    struct rows work = {.values = values,
                        .grad = grad,
                        .columns = columns,
                        .out = out,
                        .out_gain = out_gain,
                        .lengths = lengths,
                        .rows = rows,
                        .limits = {.g = g}};
    run_parts(format == FLOAT64 ? gradients_float64 : gradients_float32, &work, rows, 1, threads);
}
