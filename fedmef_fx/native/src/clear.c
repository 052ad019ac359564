/* Elements of a dense tensor set to 0 where a mask of one byte each is 0, whatever stood there. */
#include "common.h"

struct masked {
    const uint8_t *mask;
    void *values;
};

#define CLEAR(bits)                                                                  \
    static void clear##bits(const void *argument, int64_t first, int64_t last) {     \
        const struct masked *work = argument;                                        \
        const uint8_t *restrict mask = work->mask;                                   \
        uint##bits##_t *restrict values = work->values;                              \
        for (int64_t i = first; i < last; i++) values[i] = mask[i] ? values[i] : 0;  \
    }
CLEAR(16)
CLEAR(32)
CLEAR(64)

/* `width` is the bytes of an element, 2, 4 or 8. */
EXPORT void fedmef_clear(int width, const uint8_t *mask, void *values, int64_t count, int threads) {
    const struct masked work = {.mask = mask, .values = values};
    run_parts(width == 2 ? clear16 : width == 4 ? clear32 : clear64, &work, count, WORD_BITS, threads);
}
