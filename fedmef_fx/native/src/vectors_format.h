/* Vectors of one FLOAT. */

typedef FLOAT NAME(vector) __attribute__((vector_size(VECTOR_BYTES)));
typedef FLOAT NAME(short_vector) __attribute__((vector_size(16)));
#define VECTOR NAME(vector)
#define LANES ((int64_t)(VECTOR_BYTES / sizeof(FLOAT)))

static inline __attribute__((always_inline)) VECTOR NAME(load)(const FLOAT *from) {
    VECTOR vector;
    memcpy(&vector, from, sizeof vector); /* at any address */
    return vector;
}

static inline __attribute__((always_inline)) FLOAT NAME(total)(VECTOR vector) {
    NAME(short_vector) parts[VECTOR_BYTES / 16];
    memcpy(parts, &vector, sizeof vector);
    for (int half = VECTOR_BYTES / 32; half > 0; half /= 2)
        for (int i = 0; i < half; i++) parts[i] += parts[i + half];
    FLOAT sum = 0;
    for (int i = 0; i < (int)(16 / sizeof(FLOAT)); i++) sum += parts[0][i];
    return sum;
}
