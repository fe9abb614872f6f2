// All steps of the last layers in half precision: products of TF32, which has no fewer digits.
#include "steps.cuh"

namespace lk {

cudaError_t steps_of_half(const LastSteps& p, int dtype, void* stream) {
  if (dtype == kFloat16) return steps<__half, 1>(p, stream);
  if (dtype == kBFloat16) return steps<__nv_bfloat16, 1>(p, stream);
  return cudaErrorInvalidValue;
}

}  // namespace lk
