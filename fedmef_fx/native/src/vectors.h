/* How many bytes a vector has. */
#ifndef FEDMEF_VECTORS_H
#define FEDMEF_VECTORS_H

#if defined(__AVX512F__)
enum { VECTOR_BYTES = 64 };
#elif defined(__AVX2__)
enum { VECTOR_BYTES = 32 };
#else
enum { VECTOR_BYTES = 16 };
#endif

#endif
