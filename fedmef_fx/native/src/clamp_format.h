/* The kernels of clamp.c for one format; see formats.h. */

#define WORDS JOIN(words, WIDTH)
#define FLAGS JOIN(flags, WIDTH)
#define LANES (LANE_BYTES * 8 / WIDTH)

/* A number of the format in all lanes. */
static inline WORDS NAME(all)(double value) {
    STORED stored = WRITE((COMPUTED)value);
    JOIN(uint_t, WIDTH) word;
    memcpy(&word, &stored, sizeof word);
    return (WORDS){0} + word;
}

static void NAME(clamp)(const void *argument, int64_t first, int64_t last) {
    const struct clamped *work = argument;
    const WORDS low = NAME(all)(work->low), high = NAME(all)(work->high);
    const FLAGS none = {0};
    const FLAGS has_low = work->low == work->low ? ~none : none, has_high = work->high == work->high ? ~none : none;
    STORED rest[WORD_BITS] = {0};
    for (int64_t start = first; start < last; start += WORD_BITS) {
        int64_t count = least(last - start, WORD_BITS);
        const STORED *source = (const STORED *)work->source + start;
        STORED *out = (STORED *)work->out + start, *target = count < WORD_BITS ? rest : out;
        if (count < WORD_BITS) source = memcpy(rest, source, (size_t)count * sizeof(STORED));
        uint64_t bits = 0;
        for (int i = 0; i < WORD_BITS; i += LANES) {
            WORDS words;
            memcpy(&words, source + i, sizeof words);
            const FLAGS numbers = NAME(NUMBERS)(words);
            const FLAGS below = (FLAGS)(NAME(KEYS)(words) <= NAME(KEYS)(low)) & numbers & has_low;
            const FLAGS above = (FLAGS)(NAME(KEYS)(words) >= NAME(KEYS)(high)) & numbers & has_high;
            bits |= JOIN(bits_of, WIDTH)(~(below | above)) << i;
            words = ((WORDS)above & high) | (~(WORDS)above & words);
            words = ((WORDS)below & low) | (~(WORDS)below & words);
            memcpy(target + i, &words, sizeof words);
        }
        store_bits(work->out_bitmap, start, last, first_bits(bits, count));
        if (count < WORD_BITS) memcpy(out, rest, (size_t)count * sizeof(STORED));
    }
}

static void NAME(scale_unmarked)(const void *argument, int64_t first, int64_t last) {
    const struct clamped *work = argument;
    const COMPUTED scale = (COMPUTED)work->scale_off;
    STORED rest[WORD_BITS] = {0};
    for (int64_t start = first; start < last; start += WORD_BITS) {
        uint64_t bits = load_bits(work->bitmap, start, last);
        int64_t count = least(last - start, WORD_BITS);
        const STORED *source = (const STORED *)work->source + start;
        STORED *out = (STORED *)work->out + start, *target = count < WORD_BITS ? rest : out;
        if (count < WORD_BITS) source = memcpy(rest, source, (size_t)count * sizeof(STORED));
        for (int i = 0; i < WORD_BITS; i += LANES) {
            STORED scaled[LANES];
            WORDS words, others, marked = JOIN(lanes_of, WIDTH)(bits >> i);
            memcpy(&words, source + i, sizeof words);
            for (int j = 0; j < LANES; j++) scaled[j] = WRITE(READ(source[i + j]) * scale);
            memcpy(&others, scaled, sizeof others);
            words = (marked & words) | (~marked & others);
            memcpy(target + i, &words, sizeof words);
        }
        if (count < WORD_BITS) memcpy(out, rest, (size_t)count * sizeof(STORED));
    }
}

#undef WORDS
#undef FLAGS
#undef LANES
