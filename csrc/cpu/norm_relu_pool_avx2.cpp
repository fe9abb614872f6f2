#include "norm_relu_pool.h"

#if defined(__x86_64__)
#pragma GCC target("avx2,fma")
#define LK_ISA avx2
#include "norm_relu_pool.inl"
#endif
