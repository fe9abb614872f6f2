#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "image_block.h"
#include "isa.h"
#include "norm_relu_pool.h"
#include "norm_tangent.h"
#include "product.h"
#include "winograd.h"

namespace lk {

#define LK_DECLARE(ISA)                                        \
  namespace ISA {                                              \
  extern const NormReluPoolKernels<float> norm_relu_pool_f32;  \
  extern const NormReluPoolKernels<double> norm_relu_pool_f64; \
  extern const NormTangentKernels<float> norm_tangent_f32;     \
  extern const NormTangentKernels<double> norm_tangent_f64;    \
  extern const ImageBlockKernels<float> image_block_f32;       \
  extern const ImageBlockKernels<double> image_block_f64;      \
  extern const ProductKernels<float> product_f32;              \
  extern const ProductKernels<double> product_f64;             \
  extern const WinogradKernels<float> winograd_f32;            \
  extern const WinogradKernels<double> winograd_f64;           \
  }
LK_DECLARE(generic)
#if defined(__x86_64__)
LK_DECLARE(avx2)
LK_DECLARE(avx512)
#endif
#undef LK_DECLARE

namespace {

enum Isa { kGeneric, kAvx2, kAvx512 };
constexpr const char* kNames[] = {"generic", "avx2", "avx512"};

Isa best() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    return kAvx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return kAvx2;
#endif
  return kGeneric;
}

Isa choose() {
  const char* wish = std::getenv("LAMBDA_KERNELS_ISA");
  if (wish == nullptr || *wish == '\0') return best();
  for (int i = 0; i <= best(); ++i)
    if (std::strcmp(wish, kNames[i]) == 0) return Isa(i);
  std::string can;
  for (int i = 0; i <= best(); ++i) can += std::string(i ? ", " : "") + kNames[i];
  throw std::runtime_error(std::string("LAMBDA_KERNELS_ISA=") + wish + ": this machine runs " + can);
}

Isa chosen() {
  static const Isa isa = choose();
  return isa;
}

}  // namespace

const char* isa() { return kNames[chosen()]; }

#if defined(__x86_64__)
#define LK_TABLE(name) chosen() == kAvx512 ? avx512::name : chosen() == kAvx2 ? avx2::name : generic::name
#else
#define LK_TABLE(name) generic::name
#endif

template <>
const NormReluPoolKernels<float>& norm_relu_pool_kernels<float>() {
  return LK_TABLE(norm_relu_pool_f32);
}

template <>
const NormReluPoolKernels<double>& norm_relu_pool_kernels<double>() {
  return LK_TABLE(norm_relu_pool_f64);
}

template <>
const NormTangentKernels<float>& norm_tangent_kernels<float>() {
  return LK_TABLE(norm_tangent_f32);
}

template <>
const NormTangentKernels<double>& norm_tangent_kernels<double>() {
  return LK_TABLE(norm_tangent_f64);
}

template <>
const ImageBlockKernels<float>& image_block_kernels<float>() {
  return LK_TABLE(image_block_f32);
}

template <>
const ImageBlockKernels<double>& image_block_kernels<double>() {
  return LK_TABLE(image_block_f64);
}

template <>
const ProductKernels<float>& product_kernels<float>() {
  return LK_TABLE(product_f32);
}

template <>
const ProductKernels<double>& product_kernels<double>() {
  return LK_TABLE(product_f64);
}

template <>
const WinogradKernels<float>& winograd_kernels<float>() {
  return LK_TABLE(winograd_f32);
}

template <>
const WinogradKernels<double>& winograd_kernels<double>() {
  return LK_TABLE(winograd_f64);
}

}  // namespace lk
