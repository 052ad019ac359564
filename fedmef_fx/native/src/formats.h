/* How the elements of a tensor are stored. A file of kernels is included once for each format, with
 *
 *     NAME(x)                 x with the format's name
 *     STORED, COMPUTED        the type in memory, and the one to compute in
 *     READ(x), WRITE(x)       from one to the other
 *     WIDTH                   bits in memory
 */
#include "format_numbers.h"
#include "halves.h"

#define PASTE(left, right) left##right
#define JOIN(left, right) PASTE(left, right)

#define NAME(name) name##_float16
#define STORED uint16_t
#define WIDTH 16
#define COMPUTED float
#define READ from_half
#define WRITE to_half
#include KERNELS
#undef NAME
#undef READ
#undef WRITE

#define NAME(name) name##_bfloat16
#define READ from_bfloat16
#define WRITE to_bfloat16
#include KERNELS
#undef NAME
#undef STORED
#undef WIDTH
#undef READ
#undef WRITE

#define READ(x) (x)
#define WRITE(x) (x)
#define NAME(name) name##_float32
#define STORED float
#define WIDTH 32
#include KERNELS
#undef NAME
#undef STORED
#undef WIDTH
#undef COMPUTED

#define NAME(name) name##_float64
#define STORED double
#define COMPUTED double
#define WIDTH 64
#include KERNELS
#undef NAME
#undef STORED
#undef WIDTH
#undef COMPUTED
#undef READ
#undef WRITE

#define OF_EACH_FORMAT(name) {name##_float16, name##_bfloat16, name##_float32, name##_float64}
