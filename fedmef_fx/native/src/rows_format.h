/* The kernels of rows.c for one FLOAT. Columns: mean, scale, normalizer, inverse_square, centring, each [rows]. */

/* The sum, and the sum of squares, of values less a mean. */
static void NAME(moments)(const FLOAT *values, int64_t count, double mean, double *sum, double *square) {
    double sums[SUMS] = {0}, squares[SUMS] = {0};
    int64_t whole = count / SUMS * SUMS;
    for (int64_t i = 0; i < whole; i += SUMS) {
        for (int j = 0; j < SUMS; j++) {
            double value = (double)values[i + j] - mean;
            sums[j] += value;
            squares[j] += value * value;
        }
    }
    for (int64_t i = whole; i < count; i++) {
        double value = (double)values[i] - mean;
        sums[i - whole] += value;
        squares[i - whole] += value * value;
    }
    *sum = total_of(sums);
    *square = total_of(squares);
}

static void NAME(statistics)(const void *argument, int64_t first, int64_t last) {
    const struct rows *work = argument;
    const struct limits *limits = &work->limits;
    const FLOAT *values = (const FLOAT *)work->values + start_of(work->lengths, first), *gain = work->gain;
    FLOAT *columns = work->out;
    for (int64_t row = first; row < last; row++) {
        int64_t number = work->lengths[row];
        double total, energy, unused, square;
        NAME(moments)(values, number, 0.0, &total, &energy);
        double counted = limits->fan_in > 0 ? limits->fan_in : number > 1 ? (double)number : 1.0;
        double mean = total / counted;
        int is_degenerate = number <= 1 || energy - counted * mean * mean <= limits->degenerate_ratio * energy;
        if (is_degenerate) mean = 0.0;
        NAME(moments)(values, number, mean, &unused, &square);
        if (limits->fan_in > 0) square += (limits->fan_in - (double)number) * mean * mean;
        double normalizer = 1.0 / sqrt(square < limits->eps ? limits->eps : square); /* a NaN stays one */
        columns[row] = (FLOAT)mean;
        columns[work->rows + row] = (FLOAT)(limits->g * (double)gain[row] * normalizer);
        columns[2 * work->rows + row] = (FLOAT)normalizer;
        columns[3 * work->rows + row] = (FLOAT)(square > limits->eps ? normalizer * normalizer : 0.0);
        columns[4 * work->rows + row] = (FLOAT)(is_degenerate ? 0.0 : 1.0 / counted);
        values += number;
    }
}

static void NAME(scale)(const void *argument, int64_t first, int64_t last) {
    const struct rows *work = argument;
    const FLOAT *columns = work->columns;
    int64_t start = start_of(work->lengths, first);
    const FLOAT *values = (const FLOAT *)work->values + start;
    FLOAT *out = (FLOAT *)work->out + start;
    for (int64_t row = first; row < last; row++) {
        const FLOAT mean = columns[row], scale = columns[work->rows + row];
        for (int64_t i = 0; i < work->lengths[row]; i++) out[i] = (values[i] - mean) * scale;
        values += work->lengths[row];
        out += work->lengths[row];
    }
}

/* The sum of grad, and of its products with the centred values. */
static void NAME(products)(const FLOAT *values, const FLOAT *grad, int64_t count, FLOAT mean, double *sum,
                           double *inner) {
    double sums[SUMS] = {0}, inners[SUMS] = {0};
    int64_t whole = count / SUMS * SUMS;
    for (int64_t i = 0; i < whole; i += SUMS) {
        for (int j = 0; j < SUMS; j++) {
            sums[j] += (double)grad[i + j];
            inners[j] += (double)grad[i + j] * (double)(values[i + j] - mean);
        }
    }
    for (int64_t i = whole; i < count; i++) {
        sums[i - whole] += (double)grad[i];
        inners[i - whole] += (double)grad[i] * (double)(values[i] - mean);
    }
    *sum = total_of(sums);
    *inner = total_of(inners);
}

static void NAME(gradients)(const void *argument, int64_t first, int64_t last) {
    const struct rows *work = argument;
    const FLOAT *columns = work->columns;
    int64_t start = start_of(work->lengths, first);
    const FLOAT *values = (const FLOAT *)work->values + start, *grad = (const FLOAT *)work->grad + start;
    FLOAT *out = (FLOAT *)work->out + start, *out_gain = work->out_gain;
    for (int64_t row = first; row < last; row++) {
        int64_t number = work->lengths[row];
        const FLOAT mean = columns[row], scale = columns[work->rows + row];
        double sum, inner;
        NAME(products)(values, grad, number, mean, &sum, &inner);
        double shift = sum * (double)columns[4 * work->rows + row];
        double slope = inner * (double)columns[3 * work->rows + row];
        for (int64_t i = 0; i < number; i++)
            out[i] = (FLOAT)(((double)grad[i] - shift - (double)(values[i] - mean) * slope) * (double)scale);
        out_gain[row] = (FLOAT)(inner * (double)columns[2 * work->rows + row] * work->limits.g);
        values += number;
        grad += number;
        out += number;
    }
}
