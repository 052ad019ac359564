/* Levels that fit a block, computed in FLOAT: fedmef_fx/packing/centroids.py, operation by operation.
 *
 * Part of block_levels.h, whose names it takes.
 */

static inline VECTOR LEVEL(loaded)(const FLOAT *x) {
    VECTOR lanes;
    memcpy(&lanes, x, sizeof lanes);
    return lanes;
}

static inline void LEVEL(store)(FLOAT *out, VECTOR lanes) { memcpy(out, &lanes, sizeof lanes); }

/* Sum of some numbers, a power of two that is no less than LANES: the second half is added to the first until one is left.
 */
static inline FLOAT LEVEL(folded)(FLOAT *x, int64_t count) {
    for (int64_t half = count / 2; half >= LEVEL(LANES); half /= 2)
        for (int64_t i = 0; i < half; i += LEVEL(LANES))
            LEVEL(store)(x + i, LEVEL(loaded)(x + i) + LEVEL(loaded)(x + half + i));
    VECTOR lanes = LEVEL(loaded)(x);
    for (int half = LEVEL(LANES) / 2; half > 0; half /= 2)
        for (int lane = 0; lane < half; lane++) lanes[lane] += lanes[half + lane];
    return lanes[0];
}

static inline FLOAT LEVEL(within)(FLOAT x, FLOAT low, FLOAT high) {
    x = x < low ? low : x;
    return x > high ? high : x;
}

/* A block and what follows from it; `size` is a power of two, and what lies beyond `count` belongs to no level. */
struct LEVEL(fitted) {
    FLOAT x[MOST_BLOCK], shares[MOST_BLOCK], sums[MOST_BLOCK];
    FLOAT share;
    int64_t count, size;
};

static void LEVEL(prepare)(struct LEVEL(fitted) *block, const FLOAT *x, int64_t count) {
    block->count = count, block->share = 1 / (FLOAT)count;
    for (block->size = 2 * LEVEL(LANES); block->size < count;) block->size *= 2;
    for (int64_t i = 0; i < count; i++) block->x[i] = x[i], block->shares[i] = x[i] * block->share;
    for (int64_t i = count; i < block->size; i++) block->x[i] = (FLOAT)NAN, block->shares[i] = 0;
}

/* Mean of the values above one number and not above another; `otherwise` where there are none. */
static FLOAT LEVEL(mean_between)(struct LEVEL(fitted) *block, FLOAT above, FLOAT up_to, FLOAT otherwise) {
    const VECTOR none = {0}, lower = none + above, upper = none + up_to;
    const int64_t half = block->size / 2;
    FLAGS counts = {0};
    int64_t count = 0;
    for (int64_t i = 0; i < half; i += LEVEL(LANES)) {
        const VECTOR left = LEVEL(loaded)(block->x + i), right = LEVEL(loaded)(block->x + half + i);
        const FLAGS first = (left > lower) & (left <= upper), second = (right > lower) & (right <= upper);
        counts -= first + second;
        LEVEL(store)(block->sums + i, LEVEL(chosen)(first, LEVEL(loaded)(block->shares + i), none) +
                                          LEVEL(chosen)(second, LEVEL(loaded)(block->shares + half + i), none));
    }
    for (int lane = 0; lane < LEVEL(LANES); lane++) count += counts[lane];
    return count > 0 ? LEVEL(folded)(block->sums, half) / ((FLOAT)count * block->share) : otherwise;
}

/* Halfway between the best levels of a normal distribution and even ones. */
static void LEVEL(start)(struct LEVEL(fitted) *block, int bits, FLOAT low, FLOAT high, FLOAT *levels) {
    const int many = 1 << bits;
    const FLOAT half = (FLOAT)0.5;
    memcpy(block->sums, block->shares, (size_t)block->size * sizeof(FLOAT));
    const FLOAT centre = LEVEL(within)(LEVEL(folded)(block->sums, block->size), low, high);
    memset(block->sums, 0, (size_t)block->size * sizeof(FLOAT));
    for (int64_t i = 0; i < block->count; i++) {
        const FLOAT away = block->x[i] - centre;
        block->sums[i] = (away < 0 ? -away : away) * block->share;
    }
    const FLOAT deviation = LEVEL(folded)(block->sums, block->size) * (FLOAT)MEAN_TO_STANDARD_DEVIATION;
    for (int k = 0; k < many; k++) {
        const double upper = NORMAL_LEVELS[bits - 1][k < many / 2 ? many / 2 - 1 - k : k - many / 2];
        const FLOAT normal = LEVEL(within)(centre + deviation * (FLOAT)(k < many / 2 ? -upper : upper), low, high);
        levels[k] = normal * half + low * half + (high - low) * (((FLOAT)k + half) / (FLOAT)(2 * many));
    }
}

/* The levels of a block, ascending. */
static void LEVEL(fit)(const FLOAT *x, int64_t count, int bits, FLOAT low, FLOAT high, FLOAT *levels) {
    const int many = 1 << bits;
    const FLOAT half = (FLOAT)0.5, endless = (FLOAT)INFINITY;
    struct LEVEL(fitted) block;
    LEVEL(prepare)(&block, x, count);
    LEVEL(start)(&block, bits, low, high, levels);
    for (int step = 0; step < LLOYD_STEPS; step++) {
        FLOAT below = low;
        for (int k = 0; k < many; k++) {
            /* The next level is not yet replaced. */
            const FLOAT beyond = k + 1 < many ? levels[k] * half + levels[k + 1] * half : high;
            const FLOAT mean = LEVEL(mean_between)(&block, k ? below : -endless, k + 1 < many ? beyond : endless, endless);
            if (mean < endless) levels[k] = LEVEL(within)(mean, below, beyond);
            below = beyond;
        }
    }
    for (int k = 0; k < many; k++) levels[k] += 0; /* of zeros the positive one */
}

/* How many of some ascending thresholds each element exceeds. */
static void LEVEL(count_below)(const FLOAT *x, int64_t count, const FLOAT *thresholds, int many, uint8_t *codes) {
    memset(codes, 0, (size_t)count);
    for (int k = 0; k < many; k++)
        for (int64_t i = 0; i < count; i++) codes[i] = (uint8_t)(codes[i] + (x[i] > thresholds[k]));
}

/* The level nearest to each element, or with noise one of the two around it. */
static void LEVEL(encode_by_levels)(const FLOAT *x, int64_t count, const FLOAT *levels, int bits, const uint16_t *noise,
                                    uint8_t *codes) {
    const int many = 1 << bits;
    const FLOAT half = (FLOAT)0.5;
    if (!noise) {
        FLOAT thresholds[MOST_LEVELS];
        for (int k = 0; k + 1 < many; k++) thresholds[k] = levels[k] * half + levels[k + 1] * half;
        LEVEL(count_below)(x, count, thresholds, many - 1, codes);
        return;
    }
    LEVEL(count_below)(x, count, levels + 1, many - 2, codes);
    for (int64_t i = 0; i < count; i++) {
        const FLOAT floor = levels[codes[i]], ceiling = levels[codes[i] + 1];
        const FLOAT share = ceiling > floor ? (x[i] - floor) / (ceiling - floor) : 0;
        codes[i] = (uint8_t)(codes[i] + (share + ((FLOAT)noise[i] + half) * (FLOAT)0x1p-16 >= 1));
    }
}

/* Code a block by levels of its own, of which it stores bfloat16. */
static void LEVEL(encode_centroids)(const struct coded *work, const FLOAT *x, int64_t block, int64_t count, FLOAT low,
                                    FLOAT high, const uint16_t *noise, uint8_t *codes) {
    const FLOAT limit = (FLOAT)LARGEST_BFLOAT16;
    uint16_t *stored = (uint16_t *)work->parameters + (block << work->bits);
    FLOAT levels[MOST_LEVELS];
    LEVEL(fit)(x, count, work->bits, low, high, levels);
    for (int k = 0; k < 1 << work->bits; k++) {
        stored[k] = to_bfloat16((float)LEVEL(within)(levels[k], -limit, limit));
        levels[k] = from_bfloat16(stored[k]);
    }
    LEVEL(encode_by_levels)(x, count, levels, work->bits, noise, codes);
}
