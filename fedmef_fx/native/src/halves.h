/* Numbers of 16 bits: IEEE half precision and bfloat16, converted as torch converts them, without branches. */
#ifndef FEDMEF_HALVES_H
#define FEDMEF_HALVES_H

#include "common.h"

static inline float as_float(uint32_t word) {
    float value;
    memcpy(&value, &word, sizeof value);
    return value;
}

static inline uint32_t as_word(float value) {
    uint32_t word;
    memcpy(&word, &value, sizeof word);
    return word;
}

static inline float from_bfloat16(uint16_t word) { return as_float((uint32_t)word << 16); }

/* Rounded to nearest, ties to even. */
static inline uint16_t to_bfloat16(float value) {
    uint32_t word = as_word(value), magnitude = word & 0x7FFFFFFF;
    uint32_t rounded = (word + 0x7FFF + (word >> 16 & 1)) >> 16;
    uint32_t quiet = word >> 16 | 0x40;
    return (uint16_t)(magnitude > 0x7F800000 ? quiet : rounded);
}

static inline float from_half(uint16_t word) {
    uint32_t magnitude = word & 0x7FFF, sign = (uint32_t)(word & 0x8000) << 16;
    /* The exponent's bias differs by 112; the product is exact, also for subnormal numbers. */
    float finite = as_float(magnitude << 13) * 0x1p112f;
    uint32_t special = 0x7F800000 | magnitude << 13;
    return as_float(sign | (magnitude >= 0x7C00 ? special : as_word(finite)));
}

/* Rounded to nearest, ties to even. */
static inline uint16_t to_half(float value) {
    uint32_t word = as_word(value), magnitude = word & 0x7FFFFFFF, sign = word >> 16 & 0x8000;
    uint32_t normal = (magnitude - (UINT32_C(112) << 23) + 0xFFF + (magnitude >> 13 & 1)) >> 13;
    /* Where the last bit of the result is worth 2^-24, adding 1/2 rounds to it: the sum's own last bit is worth that. */
    uint32_t subnormal = as_word(as_float(magnitude) + 0.5f) - UINT32_C(0x3F000000);
    uint32_t finite = magnitude < 0x38800000 ? subnormal : normal;
    uint32_t special = magnitude > 0x7F800000 ? 0x7E00 | (magnitude >> 13 & 0x3FF) : 0x7C00;
    return (uint16_t)(sign | (magnitude >= 0x477FF000 ? special : finite));
}

#endif
