/* The kernels of pack.c for words of WIDTH bits; included once for each. */

static void NAME(mark)(const void *argument, int64_t first, int64_t last) {
    const struct flat *work = argument;
    const NAME(words) magnitude = (NAME(words)){0} + (WORD)work->magnitude, limit = (NAME(words)){0} + (WORD)work->limit;
    WORD rest[WORD_BITS] = {0};
    for (int64_t start = first; start < last; start += WORD_BITS) {
        int64_t count = least(last - start, WORD_BITS);
        const WORD *source = (const WORD *)work->source + start;
        if (count < WORD_BITS) source = memcpy(rest, source, (size_t)count * sizeof(WORD));
        uint64_t bits = 0;
        for (int i = 0; i < WORD_BITS; i += LANES) {
            NAME(words) words;
            memcpy(&words, source + i, sizeof words);
            bits |= NAME(bits_of)((NAME(flags))((words & magnitude) > limit)) << i;
        }
        store_bits(work->out_bitmap, start, last, bits);
    }
}

static void NAME(mark_equal)(const void *argument, int64_t first, int64_t last) {
    const struct flat *work = argument;
    const NAME(words) wanted = (NAME(words)){0} + (WORD)work->limit;
    WORD rest[WORD_BITS] = {0};
    for (int64_t start = first; start < last; start += WORD_BITS) {
        int64_t count = least(last - start, WORD_BITS);
        const WORD *source = (const WORD *)work->source + start;
        if (count < WORD_BITS) source = memcpy(rest, source, (size_t)count * sizeof(WORD));
        uint64_t bits = 0;
        for (int i = 0; i < WORD_BITS; i += LANES) {
            NAME(words) words;
            memcpy(&words, source + i, sizeof words);
            bits |= NAME(bits_of)((NAME(flags))(words == wanted)) << i;
        }
        store_bits(work->out_bitmap, start, last, first_bits(bits, count));
    }
}

static void NAME(compress)(const void *argument, int64_t first, int64_t last) {
    const struct flat *work = argument;
    const WORD *source = work->source;
    WORD *values = (WORD *)work->out + count_bits(work->bitmap, first);
    for (int64_t start = first; start < last; start += WORD_BITS) {
        uint64_t rest = load_bits(work->bitmap, start, last);
#if defined(__AVX512F__) && WIDTH == 32
        /* Never a store beyond the part's own values: another thread writes there. */
        for (int64_t at = start; rest; at += 16, rest >>= 16) {
            __mmask16 marked = (__mmask16)rest;
            int taken = __builtin_popcount(marked);
            __m512i found = _mm512_maskz_compress_epi32(marked, _mm512_maskz_loadu_epi32(marked, source + at));
            _mm512_mask_storeu_epi32(values, (__mmask16)((1u << taken) - 1), found);
            values += taken;
        }
#else
        for (; rest; rest &= rest - 1) *values++ = source[start + __builtin_ctzll(rest)];
#endif
    }
}

static void NAME(expand)(const void *argument, int64_t first, int64_t last) {
    const struct flat *work = argument;
    const WORD *values = (const WORD *)work->source + count_bits(work->bitmap, first);
    WORD *out = work->out;
    for (int64_t start = first; start < last; start += WORD_BITS) {
        uint64_t rest = load_bits(work->bitmap, start, last);
        int64_t count = least(last - start, WORD_BITS);
#if defined(__AVX512F__) && WIDTH == 32
        for (int64_t at = start; at < start + count; at += 16, rest >>= 16) {
            __mmask16 marked = (__mmask16)rest, own = (__mmask16)((UINT32_C(1) << least(start + count - at, 16)) - 1);
            int taken = __builtin_popcount(marked);
            __m512i found = _mm512_maskz_loadu_epi32((__mmask16)((1u << taken) - 1), values);
            _mm512_mask_storeu_epi32(out + at, own, _mm512_maskz_expand_epi32(marked, found));
            values += taken;
        }
#else
        memset(out + start, 0, (size_t)count * sizeof(WORD));
        for (; rest; rest &= rest - 1) out[start + __builtin_ctzll(rest)] = *values++;
#endif
    }
}

static void NAME(select)(const void *argument, int64_t first, int64_t last) {
    const struct flat *work = argument;
    WORD rest[WORD_BITS] = {0};
    for (int64_t start = first; start < last; start += WORD_BITS) {
        uint64_t bits = load_bits(work->bitmap, start, last);
        int64_t count = least(last - start, WORD_BITS);
        const WORD *source = (const WORD *)work->source + start;
        WORD *out = (WORD *)work->out + start, *target = count < WORD_BITS ? rest : out;
        if (count < WORD_BITS) source = memcpy(rest, source, (size_t)count * sizeof(WORD));
        for (int i = 0; i < WORD_BITS; i += LANES) {
            NAME(words) words;
            memcpy(&words, source + i, sizeof words);
            words &= NAME(lanes_of)(bits >> i);
            memcpy(target + i, &words, sizeof words);
        }
        if (count < WORD_BITS) memcpy(out, rest, (size_t)count * sizeof(WORD));
    }
}
