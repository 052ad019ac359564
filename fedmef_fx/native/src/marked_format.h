/* Kernels of block_code.c for the elements that a bitmap marks, for one format; see formats.h. */

/* Copy the first `most` marked elements of a word, at most all; returns the marks that are left. */
static inline uint64_t NAME(take)(uint64_t marks, const STORED *source, int64_t most, STORED *out) {
    uint64_t rest = 0;
    if (most < __builtin_popcountll(marks)) {
        for (rest = marks; most > 0; most--) rest &= rest - 1;
        marks ^= rest;
    }
#if defined(__AVX512F__) && WIDTH == 32
    for (int64_t at = 0; marks; at += 16, marks >>= 16) {
        const __mmask16 own = (__mmask16)marks;
        const __m512i found = _mm512_maskz_compress_epi32(own, _mm512_maskz_loadu_epi32(own, source + at));
        const int taken = __builtin_popcount(own);
        _mm512_mask_storeu_epi32(out, (__mmask16)((1u << taken) - 1), found);
        out += taken;
    }
#else
    for (; marks; marks &= marks - 1) *out++ = source[__builtin_ctzll(marks)];
#endif
    return rest;
}

/* Copy values to the marked elements of a word, and 0 to the others. */
static inline void NAME(put)(uint64_t marks, const STORED *values, int64_t count, STORED *out) {
#if defined(__AVX512F__) && WIDTH == 32
    for (int64_t at = 0; at < count; at += 16, marks >>= 16) {
        const __mmask16 marked = (__mmask16)marks, own = (__mmask16)((UINT32_C(1) << least(count - at, 16)) - 1);
        const int taken = __builtin_popcount(marked);
        const __m512i found = _mm512_maskz_loadu_epi32((__mmask16)((1u << taken) - 1), values);
        _mm512_mask_storeu_epi32(out + at, own, _mm512_maskz_expand_epi32(marked, found));
        values += taken;
    }
#else
    memset(out, 0, (size_t)count * sizeof(STORED));
    for (; marks; marks &= marks - 1) out[__builtin_ctzll(marks)] = *values++;
#endif
}

/* The blocks of marked elements that begin in [first, last); their elements may lie behind it. */
static void NAME(pack_marked)(const void *argument, int64_t first, int64_t last) {
    const struct coded *work = argument;
    const STORED *source = work->source;
    STORED gathered[MOST_BLOCK];
    COMPUTED buffer[WIDTH == 16 ? MOST_BLOCK : 1];
    const int64_t before = count_bits(work->marks, first);
    const int64_t after = before + count_range(work->marks, first, last);
    int64_t block = (before + work->block - 1) / work->block, skipped = block * work->block - before, at = first;
    uint64_t marks = load_bits(work->marks, at, work->all);
    for (; block * work->block < after; block++) {
        const int64_t count = least(work->block, work->count - block * work->block);
        int64_t taken = -skipped; /* the elements up to the first block are another part's */
        for (skipped = 0; taken < count; ) {
            const int64_t found = __builtin_popcountll(marks);
            if (taken + found <= 0) {
                taken += found, marks = 0;
            } else if (taken < 0) {
                for (; taken < 0; taken++) marks &= marks - 1;
            } else {
                marks = NAME(take)(marks, source + at, count - taken, gathered + taken);
                taken += least(found, count - taken);
            }
            if (!marks && taken < count) at += WORD_BITS, marks = load_bits(work->marks, at, work->all);
        }
        const COMPUTED *x = NAME(computed)(gathered, count, buffer);
        if (!JOIN(encode_block_, COMPUTED)(work, x, block, count)) {
            atomic_store_explicit(work->has_exceptions, 1, memory_order_relaxed);
            return;
        }
    }
}

/* Elements [first, last), of which the marked ones have codes. */
static void NAME(unpack_marked)(const void *argument, int64_t first, int64_t last) {
    const struct coded *work = argument;
    STORED values[MOST_BLOCK + WORD_BITS];
    const int64_t before = work->number + count_bits(work->marks, first);
    int64_t block = before / work->block, next = 0, ready = 0;
    const int64_t skipped = before - block * work->block;
    for (int64_t at = first; at < last; at += WORD_BITS) {
        const int64_t count = least(last - at, WORD_BITS);
        const uint64_t marks = load_bits(work->marks, at, last);
        const int64_t wanted = __builtin_popcountll(marks);
        while (next + wanted > ready) {
            const int64_t decoded = least(work->block, work->count - block * work->block), left = ready - next;
            memmove(values, values + next, (size_t)left * sizeof(STORED));
            NAME(decode_block)(work, block, decoded, values + left);
            next = block == before / work->block ? skipped : 0, ready = left + decoded, block++;
        }
        NAME(put)(marks, values + next, count, (STORED *)work->out + at);
        next += wanted;
    }
}
