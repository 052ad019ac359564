/* What the kernels of block codes share: noise, and codes in planes of bits. */
#ifndef FEDMEF_BLOCK_CODE_H
#define FEDMEF_BLOCK_CODE_H

#include <stdatomic.h>

#include "bits.h"

/* Elements of the largest block: some buffers of a block lie on the stack. */
enum { MOST_BLOCK = 4096, MOST_LEVELS = 16 };

struct coded {
    const void *source;   /* elements to code, or to decode codes from */
    void *out;            /* decoded elements */
    const uint8_t *marks; /* a bitmap of the elements that have codes; NULL where all have */
    uint8_t *codes;
    void *parameters;
    uint64_t key;
    int64_t number; /* of the first element, for the noise */
    int64_t count, block, all; /* elements with codes, of a block, and all that have a mark */
    int bits, has_centroids, is_stochastic;
    atomic_int *has_exceptions;
};

/* Rounding noise of a block, 16 bits for each element: see fedmef_fx/packing/noise.py. */
union noise {
    uint32_t words[MOST_BLOCK / 2];
    uint16_t halves[MOST_BLOCK];
};

static inline void draw(union noise *noise, uint64_t key, int64_t number, int64_t count) {
    const uint32_t low = (uint32_t)key, high = (uint32_t)(key >> 32), first = (uint32_t)(number / 2);
    for (int64_t i = 0; i < (count + 1) / 2; i++) {
        uint32_t word = (first + (uint32_t)i) ^ low;
        word = (word ^ word >> 16) * UINT32_C(0x7FEB352D) ^ high;
        word = (word ^ word >> 15) * UINT32_C(0x846CA68B);
        word ^= word >> 16;
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
        word = word << 16 | word >> 16;
#endif
        noise->words[i] = word;
    }
}

static inline int64_t plane_bytes(int64_t count, int plane) { return (count * plane + 7) / 8; }

/* Bytes of the codes of one block: fedmef_fx/packing/bit_planes.py. */
static inline int64_t code_bytes(int64_t count, int bits) {
    return bits == 3 ? plane_bytes(count, 2) + plane_bytes(count, 1) : plane_bytes(count, bits);
}

/* Eight codes of one byte each are handled as a word: no shift moves a bit of one into another's byte. */
static inline uint64_t load_codes(const uint8_t *codes) {
    uint64_t word;
    memcpy(&word, codes, sizeof word);
    return word;
}

static inline void store_codes(uint8_t *codes, uint64_t word) { memcpy(codes, &word, sizeof word); }

#define ALL_BYTES(byte) ((uint64_t)(byte) * UINT64_C(0x0101010101010101))

/* Write `plane` bits of each code, from bit `lowest` on; `count` is a multiple of 64 / plane. */
static inline void pack_whole_plane(const uint8_t *codes, int64_t count, const int plane, int lowest, uint8_t *out) {
    const int64_t width = count * plane / 8;
    const uint64_t own = ALL_BYTES((1 << plane) - 1);
    for (int64_t i = 0; i < width; i += 8) {
        uint64_t word = 0;
        for (int row = 0; row < 8 / plane; row++)
            word |= (load_codes(codes + row * width + i) >> lowest & own) << (plane * row);
        store_codes(out + i, word);
    }
}

static inline void pack_plane(const uint8_t *codes, int64_t count, const int plane, int lowest, uint8_t *out) {
    const int64_t width = plane_bytes(count, plane);
    if (count % (64 / plane) == 0) {
        pack_whole_plane(codes, count, plane, lowest, out);
        return;
    }
    memset(out, 0, (size_t)width);
    for (int64_t first = 0, row = 0; first < count; first += width, row++)
        for (int64_t i = 0; i < least(width, count - first); i++)
            out[i] |= (uint8_t)((codes[first + i] >> lowest & ((1 << plane) - 1)) << (plane * row));
}

static inline void unpack_whole_plane(const uint8_t *packed, int64_t count, const int plane, int lowest,
                                      uint8_t *codes) {
    const int64_t width = count * plane / 8;
    const uint64_t own = ALL_BYTES((1 << plane) - 1);
    for (int row = 0; row < 8 / plane; row++)
        for (int64_t i = 0; i < width; i += 8) {
            uint64_t word = load_codes(packed + i) >> (plane * row) & own;
            uint8_t *out = codes + row * width + i;
            store_codes(out, lowest ? word << lowest | load_codes(out) : word);
        }
}

static inline void unpack_plane(const uint8_t *packed, int64_t count, const int plane, int lowest, uint8_t *codes) {
    const int64_t width = plane_bytes(count, plane);
    if (count % (64 / plane) == 0) {
        unpack_whole_plane(packed, count, plane, lowest, codes);
        return;
    }
    for (int64_t first = 0, row = 0; first < count; first += width, row++)
        for (int64_t i = 0; i < least(width, count - first); i++) {
            int code = packed[i] >> (plane * row) & ((1 << plane) - 1);
            codes[first + i] = (uint8_t)(lowest ? codes[first + i] | code << lowest : code);
        }
}

static inline void pack_codes(const uint8_t *codes, int64_t count, int bits, uint8_t *out) {
    switch (bits) {
        case 1: pack_plane(codes, count, 1, 0, out); break;
        case 2: pack_plane(codes, count, 2, 0, out); break;
        case 3:
            pack_plane(codes, count, 2, 0, out);
            pack_plane(codes, count, 1, 2, out + plane_bytes(count, 2));
            break;
        case 4: pack_plane(codes, count, 4, 0, out); break;
        default: memcpy(out, codes, (size_t)count);
    }
}

static inline void unpack_codes(const uint8_t *packed, int64_t count, int bits, uint8_t *codes) {
    switch (bits) {
        case 1: unpack_plane(packed, count, 1, 0, codes); break;
        case 2: unpack_plane(packed, count, 2, 0, codes); break;
        case 3:
            unpack_plane(packed, count, 2, 0, codes);
            unpack_plane(packed + plane_bytes(count, 2), count, 1, 2, codes);
            break;
        case 4: unpack_plane(packed, count, 4, 0, codes); break;
        default: memcpy(codes, packed, (size_t)count);
    }
}

#endif
