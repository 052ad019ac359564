/* Images as long rows of planes, over which a convolution is a sparse product, and back; fedmef_fx/ops/sparse_layout.py
 * says why. Plane (a, b) of a channel has at (u, v) the pixel (u * stride - padding + a, v * stride - padding + b), and 0
 * outside of the image.
 */
#include "format_numbers.h"

struct layout {
    const void *source;
    void *out;
    const int32_t *planes;  /* [count, 2]: a and b */
    int64_t plane_count, images, channels, height, width, rows, columns, row_distance, row_length;
    int64_t stride[2], padding[2];
};

#define NAME(name) name##_float32
#define FLOAT float
#include "layout_format.h"
#undef NAME
#undef FLOAT
#define NAME(name) name##_float64
#define FLOAT double
#include "layout_format.h"
#undef NAME
#undef FLOAT

/* Images x [images, channels, height, width] as rows [channels, planes], each [images, rows, columns] and zeros up to
 * `row_length` elements.
 */
EXPORT void fedmef_lay_out(int format, const void *x, const int32_t *planes, int64_t plane_count, int64_t images,
                           int64_t channels, int64_t height, int64_t width, int64_t stride_y, int64_t stride_x,
                           int64_t padding_y, int64_t padding_x, int64_t rows, int64_t columns, int64_t row_distance,
                           int64_t row_length, void *out, int threads) {
    struct layout work = {x,    out,     planes,       plane_count, images,
                          channels, height, width, rows, columns,
                          row_distance, row_length, {stride_y, stride_x}, {padding_y, padding_x}};
    run_parts(format == FLOAT64 ? lay_out_float64 : lay_out_float32, &work, channels * images, 1, threads);
}

/* The inverse; pixels that are in no plane become 0. */
EXPORT void fedmef_take_back(int format, const void *source, const int32_t *planes, int64_t plane_count, int64_t images,
                             int64_t channels, int64_t height, int64_t width, int64_t stride_y, int64_t stride_x,
                             int64_t padding_y, int64_t padding_x, int64_t rows, int64_t columns, int64_t row_distance,
                             int64_t row_length, void *x, int threads) {
    struct layout work = {source,  x,     planes, plane_count, images,
                          channels, height, width, rows, columns,
                          row_distance, row_length, {stride_y, stride_x}, {padding_y, padding_x}};
    run_parts(format == FLOAT64 ? take_back_float64 : take_back_float32, &work, channels * images, 1, threads);
}
