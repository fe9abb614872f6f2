#include "image_block.h"
#include "norm_relu_pool.h"

#define LK_ISA generic
#define LK_VECTOR_BYTES 16
#include "image_block.inl"
#include "norm_relu_pool.inl"
