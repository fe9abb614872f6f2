// What the library says of itself.
#include "common.cuh"

#ifndef LK_ARCHITECTURES
#define LK_ARCHITECTURES ""
#endif

// The architectures that the library has code for, as in TORCH_CUDA_ARCH_LIST: "8.0 9.0 10.0+PTX".
LK_EXPORT const char* lk_architectures() { return LK_ARCHITECTURES; }

LK_EXPORT const char* lk_error_string(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

// The library has a CUDA runtime of its own: the device of the launches that follow on this thread.
LK_EXPORT int lk_set_device(int device) { return cudaSetDevice(device); }

// Of a device: multiprocessors, bytes of shared memory that a block may have.
LK_EXPORT int lk_limits(int device, int64_t* limits) {
  int processors = 0, shared = 0;
  LK_RETURN_IF_FAILED(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
  LK_RETURN_IF_FAILED(cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  limits[0] = processors, limits[1] = shared;
  return cudaSuccess;
}

// Whether the launches that follow on this thread may be placed beside the kernel before them.
LK_EXPORT void lk_set_dependent_launches(int allowed) { lk::dependent_launches = allowed != 0; }

LK_EXPORT int64_t lk_sizeof_norm_relu_pool() { return sizeof(lk::NormReluPool); }
LK_EXPORT int64_t lk_sizeof_image_block() { return sizeof(lk::ImageBlock); }
LK_EXPORT int64_t lk_sizeof_cross_entropy() { return sizeof(lk::CrossEntropy); }
LK_EXPORT int64_t lk_sizeof_sgd() { return sizeof(lk::Sgd); }
LK_EXPORT int64_t lk_sizeof_last_steps() { return sizeof(lk::LastSteps); }
