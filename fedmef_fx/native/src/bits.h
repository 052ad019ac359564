/* Words of a tensor by the vector, and bits of a bitmap from and to the lanes of vectors. */
#ifndef FEDMEF_BITS_H
#define FEDMEF_BITS_H

#include "common.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

/* What these kernels do is bound by memory: longer vectors would not be faster. */
#if defined(__AVX2__)
enum { LANE_BYTES = 32 };
#else
enum { LANE_BYTES = 16 };
#endif

typedef uint16_t uint_t16;
typedef uint32_t uint_t32;
typedef uint64_t uint_t64;
typedef uint16_t words16 __attribute__((vector_size(LANE_BYTES)));
typedef uint32_t words32 __attribute__((vector_size(LANE_BYTES)));
typedef uint64_t words64 __attribute__((vector_size(LANE_BYTES)));
typedef int16_t flags16 __attribute__((vector_size(LANE_BYTES)));
typedef int32_t flags32 __attribute__((vector_size(LANE_BYTES)));
typedef int64_t flags64 __attribute__((vector_size(LANE_BYTES)));

/* bits_of<width>: bit i is whether lane i, which is 0 or -1, is set. */
#if defined(__AVX2__)
static inline uint64_t bits_of64(flags64 flags) { return (uint64_t)_mm256_movemask_pd((__m256d)flags); }
static inline uint64_t bits_of32(flags32 flags) { return (uint64_t)_mm256_movemask_ps((__m256)flags); }
static inline uint64_t bits_of16(flags16 flags) {
    __m256i lanes = (__m256i)flags;
    __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(lanes), _mm256_extracti128_si256(lanes, 1));
    return (uint64_t)_mm_movemask_epi8(bytes);
}
#elif defined(__SSE2__)
static inline uint64_t bits_of64(flags64 flags) { return (uint64_t)_mm_movemask_pd((__m128d)flags); }
static inline uint64_t bits_of32(flags32 flags) { return (uint64_t)_mm_movemask_ps((__m128)flags); }
static inline uint64_t bits_of16(flags16 flags) {
    return (uint64_t)_mm_movemask_epi8(_mm_packs_epi16((__m128i)flags, _mm_setzero_si128()));
}
#else
#define BITS_OF(width)                                                                                       \
    static inline uint64_t bits_of##width(flags##width flags) {                                              \
        uint64_t bits = 0;                                                                                   \
        for (int i = 0; i < LANE_BYTES * 8 / width; i++) bits |= (uint64_t)(flags[i] & 1) << i;              \
        return bits;                                                                                         \
    }
BITS_OF(16)
BITS_OF(32)
BITS_OF(64)
#endif

/* lanes_of<width>: lane i is -1 where bit i is set, else 0. */
static inline words16 lanes_of16(uint64_t bits) {
    const words16 own = {1, 2, 4, 8, 16, 32, 64, 128,
#if defined(__AVX2__)
                         256, 512, 1024, 2048, 4096, 8192, 16384, 32768
#endif
    };
    return (words16)(((own * 0 + (uint16_t)bits) & own) == own);
}

static inline words32 lanes_of32(uint64_t bits) {
    const words32 own = {1, 2, 4, 8,
#if defined(__AVX2__)
                         16, 32, 64, 128
#endif
    };
    return (words32)(((own * 0 + (uint32_t)bits) & own) == own);
}

static inline words64 lanes_of64(uint64_t bits) {
    const words64 own = {1, 2,
#if defined(__AVX2__)
                         4, 8
#endif
    };
    return (words64)(((own * 0 + bits) & own) == own);
}

#endif
