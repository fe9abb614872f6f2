#include "norm_relu_pool.h"

#define LK_ISA generic
#include "norm_relu_pool.inl"
