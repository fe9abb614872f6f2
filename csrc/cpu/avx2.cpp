#include "image_block.h"
#include "norm_relu_pool.h"
#include "norm_tangent.h"
#include "product.h"
#include "winograd.h"

#if defined(__x86_64__)
#pragma GCC target("avx2,fma")
#define LK_ISA avx2
#define LK_VECTOR_BYTES 32
#include "vector.inl"
#include "image_block.inl"
#include "norm_relu_pool.inl"
#include "norm_tangent.inl"
#include "product.inl"
#include "winograd.inl"
#endif
