// Products of a warp on the tensor cores: c [16, 8] += a [16, 8] b [8, 8]. Lane l has of c the rows l / 4 and l / 4 + 8
// at columns 2 (l % 4) and the next; of a [row, k] these rows at k = l % 4, then both at k = l % 4 + 4; of b [k, column]
// column l / 4 at these k.
#pragma once
#include "common.cuh"

namespace lk {
namespace {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
// Such devices have no tensor cores for these types.
template <typename T>
__device__ inline void multiply(T (&c)[4], const T (&a)[4], const T (&b)[2]) {
  const int row = int(threadIdx.x) % kWarp / 4, column = int(threadIdx.x) % 4 * 2;
#pragma unroll
  for (int k = 0; k < 8; ++k) {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      c[i] += __shfl_sync(0xffffffffu, a[k / 4 * 2 + i / 2], row * 4 + k % 4) *
              __shfl_sync(0xffffffffu, b[k / 4], (column + i % 2) * 4 + k % 4);
  }
}
__device__ inline float rounded(float v) { return v; }
#elif defined(__CUDACC__)
__device__ inline void multiply(float (&c)[4], const float (&a)[4], const float (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(__float_as_uint(a[0])), "r"(__float_as_uint(a[1])), "r"(__float_as_uint(a[2])), "r"(__float_as_uint(a[3])),
        "r"(__float_as_uint(b[0])), "r"(__float_as_uint(b[1])));
}
__device__ inline void multiply(double (&c)[4], const double (&a)[4], const double (&b)[2]) {
#pragma unroll
  for (int k = 0; k < 2; ++k)
#pragma unroll
    for (int row = 0; row < 2; ++row)
      asm volatile("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0, %1}, {%2}, {%3}, {%0, %1};"
                   : "+d"(c[2 * row]), "+d"(c[2 * row + 1])
                   : "d"(a[2 * k + row]), "d"(b[k]));
}
// To the nearest number of 10 bits, the form in which the tensor cores take floats.
__device__ inline float rounded(float v) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(v));
  return __uint_as_float(bits);
}
#else
template <typename T>
void multiply(T (&c)[4], const T (&a)[4], const T (&b)[2]) {
  emulator::multiply(c, a, b);
}
inline float rounded(float v) { return emulator::rounded(v); }
#endif
__device__ inline double rounded(double v) { return v; }

// With one term, operands are rounded before; with three, floats are split in two and the products are as exact as
// float32's (the product of the two rests is left out).
template <int Terms, typename T>
__device__ inline void multiply_as(T (&c)[4], const T (&a)[4], const T (&b)[2]) {
  if constexpr (Terms == 3) {
    T a_high[4], a_rest[4], b_high[2], b_rest[2];
#pragma unroll
    for (int i = 0; i < 4; ++i) a_high[i] = rounded(a[i]), a_rest[i] = rounded(a[i] - a_high[i]);
#pragma unroll
    for (int i = 0; i < 2; ++i) b_high[i] = rounded(b[i]), b_rest[i] = rounded(b[i] - b_high[i]);
    multiply(c, a_rest, b_high);
    multiply(c, a_high, b_rest);
    multiply(c, a_high, b_high);
  } else {
    multiply(c, a, b);
  }
}

}  // namespace
}  // namespace lk
