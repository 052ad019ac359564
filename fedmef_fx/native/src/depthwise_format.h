/* The kernels of depthwise.c for one FLOAT. */

#include "vectors_format.h"

/* Rows are short: a call of memcpy for each would take longer than the copies. */
static inline __attribute__((always_inline)) void NAME(copy)(FLOAT *to, const FLOAT *from, int64_t count) {
    enum { SHORT = 16 / sizeof(FLOAT) };
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) {
        const VECTOR some = NAME(load)(from + i);
        memcpy(to + i, &some, sizeof some);
    }
    for (; i + SHORT <= count; i += SHORT) {
        NAME(short_vector) some;
        memcpy(&some, from + i, sizeof some);
        memcpy(to + i, &some, sizeof some);
    }
    for (; i < count; i++) to[i] = from[i];
}

/* Copy a plane to where its pixels stand in a scratch [rows, columns], which is 0 elsewhere. */
static void NAME(place)(const FLOAT *plane, int64_t height, int64_t width, const int64_t first[2],
                        const int64_t spacing[2], int64_t rows, int64_t columns, FLOAT *scratch) {
    int64_t count = least(width, (columns - 1 - first[1]) / spacing[1] + 1);
    for (int64_t u = 0; u < height; u++) {
        int64_t row = u * spacing[0] + first[0];
        if (row >= rows) return;
        FLOAT *to = scratch + row * columns + first[1];
        const FLOAT *from = plane + u * width;
        if (spacing[1] == 1) {
            NAME(copy)(to, from, count);
            continue;
        }
        for (int64_t v = 0; v < count; v++) to[v * spacing[1]] = from[v];
    }
}

/* `vectors` vectors of results; constants where this is inlined. */
static inline __attribute__((always_inline)) void NAME(sum_taps)(const FLOAT *image, const FLOAT *weight,
                                                                 const int64_t *offsets, const int64_t taps, FLOAT bias,
                                                                 FLOAT *out, const int vectors) {
    VECTOR sums[TOGETHER];
    for (int i = 0; i < vectors; i++) sums[i] = (VECTOR){0} + bias;
    for (int64_t k = 0; k < taps; k++)
        for (int i = 0; i < vectors; i++) sums[i] += weight[k] * NAME(load)(image + offsets[k] + i * LANES);
    for (int i = 0; i < vectors; i++) memcpy(out + i * LANES, &sums[i], sizeof sums[i]);
}

/* `count` results or a few more, up to a whole vector. */
static inline __attribute__((always_inline)) void NAME(sum_run)(const FLOAT *image, const FLOAT *weight,
                                                                const int64_t *offsets, const int64_t taps, FLOAT bias,
                                                                FLOAT *out, int64_t count) {
    int64_t at = 0;
    for (; at + TOGETHER * LANES <= count; at += TOGETHER * LANES)
        NAME(sum_taps)(image + at, weight, offsets, taps, bias, out + at, TOGETHER);
    for (; at < count; at += LANES) NAME(sum_taps)(image + at, weight, offsets, taps, bias, out + at, 1);
}

/* Which of `count` a part takes first. */
#define SHARE(work, count, part) ((count) * (part) / (work)->parts)

/* Copy so many rows of results to where they belong. */
static inline __attribute__((always_inline)) void NAME(take)(const struct depthwise *work, const FLOAT *results,
                                                             int64_t columns, int64_t count, FLOAT *out) {
    for (int64_t u = 0; u < count; u++, results += columns, out += work->out_width) {
        if (work->step[1] == 1)
            NAME(copy)(out, results, work->out_width);
        else
            for (int64_t v = 0; v < work->out_width; v++) out[v] = results[v * work->step[1]];
    }
}

static void NAME(convolve_planes)(const struct depthwise *work, FLOAT *images, int64_t first, int64_t last) {
    int64_t offsets[MOST_TAPS], taps = find_taps(work, offsets), columns = columns_of(work), rows = rows_of(work);
    int64_t lines = work->step[0] == 1 ? 1 : work->out_height; /* runs of places without rows that are dropped */
    int64_t per_line = work->out_height / lines, line_step = work->step[0] * columns;
    int64_t count = ((per_line - 1) * columns) + (work->out_width - 1) * work->step[1] + 1;
    int64_t size = work->height * work->width, out_size = work->out_height * work->out_width;
    int64_t results = work->scratch_size - (count + LANES);
    for (int64_t begin = first; begin < last; begin += work->together) {
        int64_t end = least(begin + work->together, last);
        for (int64_t at = begin; at < end; at++)
            NAME(place)((const FLOAT *)work->source + at * size, work->height, work->width, work->padding, work->spacing,
                        rows, columns, images + (at - begin) * work->scratch_size);
        for (int64_t line = 0; line < lines; line++) {
            for (int64_t at = begin; at < end; at++) {
                const FLOAT *weight = (const FLOAT *)work->weight + at % work->channels * taps;
                const FLOAT bias = work->bias ? ((const FLOAT *)work->bias)[at % work->channels] : 0;
                FLOAT *image = images + (at - begin) * work->scratch_size;
                if (taps == COMMON_TAPS)
                    NAME(sum_run)(image + line * line_step, weight, offsets, COMMON_TAPS, bias, image + results, count);
                else
                    NAME(sum_run)(image + line * line_step, weight, offsets, taps, bias, image + results, count);
            }
            for (int64_t at = begin; at < end; at++)
                NAME(take)(work, images + (at - begin) * work->scratch_size + results, columns, per_line,
                           (FLOAT *)work->out + at * out_size + line * work->out_width);
        }
    }
}

/* The scratch of a part, without pixels. */
static FLOAT *NAME(empty_scratch)(const struct depthwise *work, int64_t part) {
    FLOAT *scratch = (FLOAT *)work->scratch + part * work->together * work->scratch_size;
    memset(scratch, 0, (size_t)(work->together * work->scratch_size) * sizeof *scratch);
    return scratch;
}

static void NAME(convolve)(const void *argument, int64_t first, int64_t last) {
    const struct depthwise *work = argument;
    for (int64_t part = first; part < last; part++) {
        int64_t planes = work->images * work->channels;
        FLOAT *images = NAME(empty_scratch)(work, part);
        NAME(convolve_planes)(work, images, SHARE(work, planes, part), SHARE(work, planes, part + 1));
    }
}

/* Add products of a plane of gradients with shifted ones of an image, element by element. */
static inline __attribute__((always_inline)) void NAME(add_products)(const FLOAT *grad, const FLOAT *image,
                                                                     const int64_t *offsets, const int64_t taps,
                                                                     int64_t count, VECTOR *sums) {
    VECTOR own[COMMON_TAPS];
    for (int64_t k = 0; k < taps; k++) own[k] = sums[k];
    for (int64_t at = 0; at < count; at += LANES) {
        const VECTOR left = NAME(load)(grad + at);
        for (int64_t k = 0; k < taps; k++) own[k] += left * NAME(load)(image + offsets[k] + at);
    }
    for (int64_t k = 0; k < taps; k++) sums[k] = own[k];
}

static void NAME(correlate_channel)(const struct depthwise *work, FLOAT *images, int64_t channel) {
    static const int64_t START[2] = {0, 0};
    int64_t offsets[MOST_TAPS], taps = find_taps(work, offsets), columns = columns_of(work), rows = rows_of(work);
    int64_t count = length_of(work), size = work->height * work->width, out_size = work->out_height * work->out_width;
    int64_t gradients = work->scratch_size - (count + LANES);
    FLOAT *out = (FLOAT *)work->out + channel * taps;
    VECTOR sums[MOST_TAPS];
    for (int64_t k = 0; k < taps; k++) sums[k] = (VECTOR){0};
    for (int64_t begin = 0; begin < work->images; begin += work->together) {
        int64_t end = least(begin + work->together, work->images);
        for (int64_t n = begin; n < end; n++) {
            int64_t at = n * work->channels + channel;
            FLOAT *image = images + (n - begin) * work->scratch_size;
            NAME(place)((const FLOAT *)work->source + at * size, work->height, work->width, work->padding, work->spacing,
                        rows, columns, image);
            NAME(place)((const FLOAT *)work->grad + at * out_size, work->out_height, work->out_width, START, work->step,
                        rows, columns, image + gradients);
        }
        for (int64_t n = begin; n < end; n++) {
            const FLOAT *image = images + (n - begin) * work->scratch_size, *grad = image + gradients;
            int64_t done = 0;
            for (; done + COMMON_TAPS <= taps; done += COMMON_TAPS)
                NAME(add_products)(grad, image, offsets + done, COMMON_TAPS, count, sums + done);
            for (; done < taps; done++) NAME(add_products)(grad, image, offsets + done, 1, count, sums + done);
        }
    }
    for (int64_t k = 0; k < taps; k++) out[k] += NAME(total)(sums[k]);
}

static void NAME(correlate)(const void *argument, int64_t first, int64_t last) {
    const struct depthwise *work = argument;
    for (int64_t part = first; part < last; part++) {
        FLOAT *images = NAME(empty_scratch)(work, part);
        for (int64_t channel = SHARE(work, work->channels, part); channel < SHARE(work, work->channels, part + 1); channel++)
            NAME(correlate_channel)(work, images, channel);
    }
}

#undef SHARE
#undef VECTOR
#undef LANES
