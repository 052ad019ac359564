/* Two-dimensional convolutions in which each channel has one kernel of its own, and their gradients.
 *
 * A plane, one channel of one image, is copied among zeros into a scratch that stays in the first-level cache. There a
 * tap of the kernel is one shift for all results, as fedmef_fx/ops/sparse_convolution.py says; what lies between rows of
 * results is worked out, too, and dropped. A result may be written over the plane that it was made of. Of small planes
 * several are copied before the first one is read: what was just written in pieces cannot be loaded whole at once.
 */
#include "format_numbers.h"
#include "vectors.h"

/* Taps of a kernel, at most. */
enum { MOST_TAPS = 128, COMMON_TAPS = 9, TOGETHER = 4 };

struct depthwise {
    const void *source, *weight, *bias, *grad;
    void *out, *scratch;
    int64_t images, channels, height, width, out_height, out_width;
    int64_t kernel[2], dilation[2], padding[2];
    int64_t spacing[2]; /* between the pixels of the source, with zeros in between */
    int64_t step[2];    /* between the results that are asked for */
    int64_t is_flipped, scratch_size, together, parts;
};

/* Places of a row of the scratch. */
static inline int64_t columns_of(const struct depthwise *work) {
    return (work->out_width - 1) * work->step[1] + (work->kernel[1] - 1) * work->dilation[1] + 1;
}

static inline int64_t rows_of(const struct depthwise *work) {
    return (work->out_height - 1) * work->step[0] + (work->kernel[0] - 1) * work->dilation[0] + 1;
}

/* From the first result to the last one. */
static inline int64_t length_of(const struct depthwise *work) {
    return (work->out_height - 1) * work->step[0] * columns_of(work) + (work->out_width - 1) * work->step[1] + 1;
}

/* Where the pixel of each tap stands, seen from the result; returns how many taps there are. */
static inline int64_t find_taps(const struct depthwise *work, int64_t offsets[MOST_TAPS]) {
    int64_t taps = 0, columns = columns_of(work);
    for (int64_t i = 0; i < work->kernel[0]; i++) {
        for (int64_t j = 0; j < work->kernel[1]; j++) {
            int64_t y = work->is_flipped ? work->kernel[0] - 1 - i : i, x = work->is_flipped ? work->kernel[1] - 1 - j : j;
            offsets[taps++] = y * work->dilation[0] * columns + x * work->dilation[1];
        }
    }
    return taps;
}

#define NAME(name) name##_float32
#define FLOAT float
#include "depthwise_format.h"
#undef NAME
#undef FLOAT
#define NAME(name) name##_float64
#define FLOAT double
#include "depthwise_format.h"
#undef NAME
#undef FLOAT

/* out[image, channel] = bias[channel] + source[image, channel] convolved with weight[channel].
 *
 * source [images, channels, height, width], of which pixel (u, v) stands at (u * spacing_y + padding_y, v * spacing_x +
 * padding_x), the rest being 0; weight [channels, kernel_y, kernel_x], whose taps are looked up from the end where
 * `is_flipped`; out [images, channels, out_height, out_width]. `scratch` has `scratch_size` elements for each
 * of the planes that each of `parts` parts takes `together`; `bias` may be NULL, and `out` may be `source` where spacing and step are 1 and the sizes the same.
 */
EXPORT void fedmef_depthwise(int format, const void *source, const void *weight, const void *bias, void *out,
                             int64_t images, int64_t channels, int64_t height, int64_t width, int64_t out_height,
                             int64_t out_width, int64_t kernel_y, int64_t kernel_x, int64_t dilation_y,
                             int64_t dilation_x, int64_t padding_y, int64_t padding_x, int64_t spacing_y,
                             int64_t spacing_x, int64_t step_y, int64_t step_x, int64_t is_flipped, void *scratch,
                             int64_t scratch_size, int64_t together, int parts) {
    struct depthwise work = {.source = source,
                             .weight = weight,
                             .bias = bias,
                             .out = out,
                             .scratch = scratch,
                             .images = images,
                             .channels = channels,
                             .height = height,
                             .width = width,
                             .out_height = out_height,
                             .out_width = out_width,
                             .kernel = {kernel_y, kernel_x},
                             .dilation = {dilation_y, dilation_x},
                             .padding = {padding_y, padding_x},
                             .spacing = {spacing_y, spacing_x},
                             .step = {step_y, step_x},
                             .is_flipped = is_flipped,
                             .scratch_size = scratch_size,
                             .together = together,
                             .parts = parts};
    run_parts(format == FLOAT64 ? convolve_float64 : convolve_float32, &work, parts, 1, parts);
}

/* out[channel] += the gradient of weight[channel], of a convolution without spacing, from that of its result, `grad`. */
EXPORT void fedmef_depthwise_weight(int format, const void *source, const void *grad, void *out, int64_t images,
                                    int64_t channels, int64_t height, int64_t width, int64_t out_height,
                                    int64_t out_width, int64_t kernel_y, int64_t kernel_x, int64_t dilation_y,
                                    int64_t dilation_x, int64_t padding_y, int64_t padding_x, int64_t step_y,
                                    int64_t step_x, void *scratch, int64_t scratch_size, int64_t together,
                                    int parts) {
    struct depthwise work = {.source = source,
                             .grad = grad,
                             .out = out,
                             .scratch = scratch,
                             .images = images,
                             .channels = channels,
                             .height = height,
                             .width = width,
                             .out_height = out_height,
                             .out_width = out_width,
                             .kernel = {kernel_y, kernel_x},
                             .dilation = {dilation_y, dilation_x},
                             .padding = {padding_y, padding_x},
                             .spacing = {1, 1},
                             .step = {step_y, step_x},
                             .scratch_size = scratch_size,
                             .together = together,
                             .parts = parts};
    run_parts(format == FLOAT64 ? correlate_float64 : correlate_float32, &work, parts, 1, parts);
}
