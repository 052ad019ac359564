/* Which instruction sets the processor and the system offer. */
#include "common.h"

#if defined(__x86_64__) || defined(_M_X64)
#include <cpuid.h>

static uint64_t saved_registers(void) {
    uint32_t low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (uint64_t)high << 32 | low;
}

static int has_all(uint32_t bits, uint32_t wanted) { return (bits & wanted) == wanted; }

/* 0: the baseline; 1: AVX2 with FMA, F16C and BMI; 2: AVX-512 F, BW, DQ and VL, too. */
EXPORT int fedmef_best_isa(void) {
    uint32_t a, b, c, d, features;
    if (!__get_cpuid(1, &a, &b, &features, &d)) return 0;
    if (!has_all(features, bit_OSXSAVE | bit_AVX | bit_FMA | bit_F16C | bit_POPCNT)) return 0;
    uint64_t saved = saved_registers();
    if ((saved & 0x6) != 0x6 || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return 0;
    if (!has_all(b, bit_AVX2 | bit_BMI | bit_BMI2)) return 0;
    if ((saved & 0xE0) != 0xE0) return 1;
    return has_all(b, bit_AVX512F | bit_AVX512BW | bit_AVX512DQ | bit_AVX512VL) ? 2 : 1;
}
#else
EXPORT int fedmef_best_isa(void) { return 0; }
#endif

/* Raised with every change of an argument or a result. */
EXPORT int fedmef_abi(void) { return 5; }
