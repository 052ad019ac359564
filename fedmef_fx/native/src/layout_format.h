/* The kernels of layout.c for one FLOAT. */

/* Of the places v with v * stride + first in [0, size): the first one, and the one after the last, below `count`. */
static void NAME(inside)(int64_t first, int64_t stride, int64_t size, int64_t count, int64_t *from, int64_t *to) {
    *from = first < 0 ? (-first + stride - 1) / stride : 0;
    *to = size > first ? least((size - first + stride - 1) / stride, count) : 0;
    if (*to < *from) *to = *from = 0;
}

/* Rows of small images are so short that calls of memcpy and memset would take most of the time. */
static inline void NAME(copy)(FLOAT *out, const FLOAT *source, int64_t count) {
    if (count == 4)
        memcpy(out, source, 4 * sizeof(FLOAT));
    else if (count == 8)
        memcpy(out, source, 8 * sizeof(FLOAT));
    else if (count == 16)
        memcpy(out, source, 16 * sizeof(FLOAT));
    else
        memcpy(out, source, (size_t)count * sizeof(FLOAT));
}

static inline void NAME(clear)(FLOAT *out, int64_t count) {
    if (count > 2) {
        memset(out, 0, (size_t)count * sizeof(FLOAT));
        return;
    }
    if (count > 0) out[0] = 0;
    if (count > 1) out[1] = 0;
}

static void NAME(lay_out_plane)(const struct layout *work, const FLOAT *image, int64_t a, int64_t b, FLOAT *out) {
    const int64_t left = b - work->padding[1], top = a - work->padding[0], stride = work->stride[1];
    int64_t from, to;
    NAME(inside)(left, stride, work->width, work->columns, &from, &to);
    for (int64_t u = 0; u < work->rows; u++, out += work->columns) {
        const int64_t y = u * work->stride[0] + top;
        const int is_inside = y >= 0 && y < work->height && from < to;
        const int64_t begin = is_inside ? from : work->columns, end = is_inside ? to : work->columns;
        NAME(clear)(out, begin);
        if (!is_inside) continue;
        const FLOAT *source = image + y * work->width + begin * stride + left;
        if (stride == 1)
            NAME(copy)(out + begin, source, end - begin);
        else
            for (int64_t v = begin; v < end; v++) out[v] = source[(v - begin) * stride];
        NAME(clear)(out + end, work->columns - end);
    }
}

static void NAME(lay_out)(const void *argument, int64_t first, int64_t last) {
    const struct layout *work = argument;
    for (int64_t at = first; at < last; at++) {
        const int64_t channel = at / work->images, image = at % work->images;
        const FLOAT *source =
            (const FLOAT *)work->source + (image * work->channels + channel) * work->height * work->width;
        for (int64_t plane = 0; plane < work->plane_count; plane++) {
            FLOAT *out = (FLOAT *)work->out + (channel * work->plane_count + plane) * work->row_distance +
                         image * work->rows * work->columns;
            NAME(lay_out_plane)(work, source, work->planes[2 * plane], work->planes[2 * plane + 1], out);
            if (image + 1 < work->images) continue;
            const int64_t size = work->rows * work->columns, rest = work->row_length - work->images * size;
            memset(out + size, 0, (size_t)rest * sizeof(FLOAT));
        }
    }
}

static void NAME(take_plane_back)(const struct layout *work, const FLOAT *source, int64_t a, int64_t b, FLOAT *image) {
    const int64_t left = b - work->padding[1], top = a - work->padding[0], stride = work->stride[1];
    int64_t from, to;
    NAME(inside)(left, stride, work->width, work->columns, &from, &to);
    for (int64_t u = 0; u < work->rows; u++, source += work->columns) {
        const int64_t y = u * work->stride[0] + top;
        if (y < 0 || y >= work->height || from == to) continue;
        FLOAT *out = image + y * work->width + from * stride + left;
        if (stride == 1)
            NAME(copy)(out, source + from, to - from);
        else
            for (int64_t v = from; v < to; v++) out[(v - from) * stride] = source[v];
    }
}

static void NAME(take_back)(const void *argument, int64_t first, int64_t last) {
    const struct layout *work = argument;
    const int is_complete = work->stride[0] == 1 && work->stride[1] == 1 && work->padding[0] == 0 &&
                            work->padding[1] == 0 && work->rows >= work->height && work->columns >= work->width;
    for (int64_t at = first; at < last; at++) {
        const int64_t channel = at / work->images, image = at % work->images, size = work->height * work->width;
        FLOAT *out = (FLOAT *)work->out + (image * work->channels + channel) * size;
        if (!is_complete) memset(out, 0, (size_t)size * sizeof(FLOAT));
        for (int64_t plane = 0; plane < work->plane_count; plane++) {
            const FLOAT *source = (const FLOAT *)work->source +
                                  (channel * work->plane_count + plane) * work->row_distance +
                                  image * work->rows * work->columns;
            NAME(take_plane_back)(work, source, work->planes[2 * plane], work->planes[2 * plane + 1], out);
        }
    }
}
