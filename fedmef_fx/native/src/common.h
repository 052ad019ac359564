/* What every kernel shares: the C ABI, bits, and parts of work.
 *
 * Each library holds all kernels, compiled for one instruction set; fedmef_fx/native/library.py loads the best one that
 * the processor runs. Callers check sizes and indices: kernels trust their arguments. Nothing here allocates memory,
 * and the results are the same bits for every number of threads, because work is cut by its size alone and no sum is
 * taken over parts.
 */
#ifndef FEDMEF_COMMON_H
#define FEDMEF_COMMON_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(_WIN32)
#define EXPORT __declspec(dllexport)
#else
#define EXPORT __attribute__((visibility("default")))
#endif

/* Elements that kernels of flat tensors take at a time: a word of a bitmap. */
enum { WORD_BITS = 64 };

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

/* Bytes of the bitmap of so many elements. */
static inline int64_t bitmap_bytes(int64_t count) { return (count + 7) / 8; }

/* The first `count` bits of a word. */
static inline uint64_t first_bits(uint64_t bits, int64_t count) {
    return count < WORD_BITS ? bits & (((uint64_t)1 << count) - 1) : bits;
}

/* Up to 64 bits of a bitmap from an element that is a multiple of 8 on; those beyond `count` elements are 0. */
static inline uint64_t load_bits(const uint8_t *bitmap, int64_t start, int64_t count) {
    int64_t bytes = bitmap_bytes(least(count - start, WORD_BITS));
    uint64_t bits = 0;
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
    if (count - start >= WORD_BITS) {
        memcpy(&bits, bitmap + start / 8, sizeof bits);
        return bits;
    }
#endif
    for (int64_t byte = 0; byte < bytes; byte++) bits |= (uint64_t)bitmap[start / 8 + byte] << (8 * byte);
    return first_bits(bits, count - start);
}

/* Write up to 64 bits; those beyond `count` elements have to be 0. */
static inline void store_bits(uint8_t *bitmap, int64_t start, int64_t count, uint64_t bits) {
    int64_t bytes = bitmap_bytes(least(count - start, WORD_BITS));
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
    if (bytes == WORD_BITS / 8) {
        memcpy(bitmap + start / 8, &bits, sizeof bits);
        return;
    }
#endif
    for (int64_t byte = 0; byte < bytes; byte++) bitmap[start / 8 + byte] = (uint8_t)(bits >> (8 * byte));
}

/* Set bits among the first `count` elements. */
static inline int64_t count_bits(const uint8_t *bitmap, int64_t count) {
    int64_t total = 0;
    for (int64_t start = 0; start < count; start += WORD_BITS)
        total += __builtin_popcountll(load_bits(bitmap, start, count));
    return total;
}

/* A part [first, last) of some work. */
typedef void part_function(const void *work, int64_t first, int64_t last);

/* Run all parts of [0, count), cut at multiples of `align` into as many parts as there are threads. */
void run_parts(part_function *part, const void *work, int64_t count, int64_t align, int threads);

#endif
