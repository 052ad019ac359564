/* Single elements of a flat tensor, by a bitmap or by their positions. */
#include "common.h"

static inline void write_word(int width, void *out, int64_t at, uint64_t word) {
    if (width == 2)
        ((uint16_t *)out)[at] = (uint16_t)word;
    else if (width == 4)
        ((uint32_t *)out)[at] = (uint32_t)word;
    else
        ((uint64_t *)out)[at] = word;
}

/* Write a word to the marked elements of `out`. */
EXPORT void fedmef_fill_marked(int width, const uint8_t *marks, uint64_t word, void *out, int64_t count) {
    for (int64_t at = 0; at < count; at += WORD_BITS)
        for (uint64_t rest = load_bits(marks, at, count); rest; rest &= rest - 1)
            write_word(width, out, at + __builtin_ctzll(rest), word);
}

/* Write a word to the elements of `out` at some positions. */
EXPORT void fedmef_fill_at(int width, const int32_t *positions, int64_t count, uint64_t word, void *out) {
    for (int64_t i = 0; i < count; i++) write_word(width, out, positions[i], word);
}

/* The positions of the marked elements. */
EXPORT void fedmef_positions(const uint8_t *marks, int64_t count, int32_t *positions) {
    for (int64_t at = 0; at < count; at += WORD_BITS)
        for (uint64_t rest = load_bits(marks, at, count); rest; rest &= rest - 1)
            *positions++ = (int32_t)(at + __builtin_ctzll(rest));
}
