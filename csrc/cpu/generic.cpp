#include "image_block.h"
#include "norm_relu_pool.h"
#include "norm_tangent.h"
#include "product.h"
#include "winograd.h"

#define LK_ISA generic
#define LK_VECTOR_BYTES 16
#include "vector.inl"
#include "image_block.inl"
#include "norm_relu_pool.inl"
#include "norm_tangent.inl"
#include "product.inl"
#include "winograd.inl"
