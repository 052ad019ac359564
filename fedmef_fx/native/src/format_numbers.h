#ifndef FEDMEF_FORMAT_NUMBERS_H
#define FEDMEF_FORMAT_NUMBERS_H

#include "common.h"

/* How the elements of a tensor are stored; the numbers are part of the ABI. */
enum format { FLOAT16 = 0, BFLOAT16 = 1, FLOAT32 = 2, FLOAT64 = 3, FORMATS = 4 };

#endif
