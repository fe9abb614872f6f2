// What the kernels share: storage and wide types, 16-byte accesses, positions of windows, reductions, launches.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "parameters.h"

#define LK_RETURN_IF_FAILED(call)           \
  do {                                      \
    const cudaError_t error = (call);       \
    if (error != cudaSuccess) return error; \
  } while (false)

namespace lk {

constexpr int kThreads = 256;
constexpr int kWarp = 32;

template <typename T>
struct WideOf {
  using type = float;
};
template <>
struct WideOf<double> {
  using type = double;
};
template <typename T>
using Wide = typename WideOf<T>::type;

__device__ inline float wide(float v) { return v; }
__device__ inline double wide(double v) { return v; }
__device__ inline float wide(__half v) { return __half2float(v); }
__device__ inline float wide(__nv_bfloat16 v) { return __bfloat162float(v); }

template <typename T>
__device__ inline T narrow(Wide<T> v) {
  return v;
}
template <>
__device__ inline __half narrow<__half>(float v) {
  return __float2half_rn(v);
}
template <>
__device__ inline __nv_bfloat16 narrow<__nv_bfloat16>(float v) {
  return __float2bfloat16_rn(v);
}

// N neighbours in memory, moved by accesses of up to 16 bytes.
template <typename T, int N>
struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) Pack {
  T at[N];
};

template <int N, typename T>
__device__ inline Pack<T, N> load(const T* from) {
  return *reinterpret_cast<const Pack<T, N>*>(from);
}

template <int N, typename T>
__device__ inline void store(T* to, const Pack<T, N>& values) {
  *reinterpret_cast<Pack<T, N>*>(to) = values;
}

// An element of gamma or beta, and their gradients.
template <typename T>
__device__ inline Wide<T> read_parameter(const void* from, int64_t i, bool is_wide) {
  return is_wide ? static_cast<const Wide<T>*>(from)[i] : wide(static_cast<const T*>(from)[i]);
}
template <typename T>
__device__ inline void write_parameter(void* to, int64_t i, double value, bool is_wide) {
  if (is_wide)
    static_cast<Wide<T>*>(to)[i] = Wide<T>(value);
  else
    static_cast<T*>(to)[i] = narrow<T>(Wide<T>(value));
}

// n / divisor and its rest by a multiplication, for n < 2^31 (Granlund, Montgomery 1994).
struct Divider {
  uint32_t divisor, magic, shift;

  explicit Divider(int64_t by) : divisor(uint32_t(by)), magic(0), shift(0) {
    while (shift < 31 && (uint64_t(1) << shift) < divisor) ++shift;
    magic = uint32_t(((uint64_t(1) << 32) * ((uint64_t(1) << shift) - divisor)) / divisor + 1);
  }
  __device__ uint32_t operator()(uint32_t n, uint32_t& rest) const {
    const uint32_t q = (__umulhi(n, magic) + n) >> shift;
    rest = n - q * divisor;
    return q;
  }
};

constexpr int64_t kMostRelative = int64_t(1) << 30;  // an image's places, and a block's, together below 2^31

// Places [rows, columns] of the images of a task, counted in memory order. A block counts from its first image on.
struct Grid {
  Divider plane, row;
  int64_t places;  // of an image

  Grid(int64_t rows, int64_t columns) : plane(rows * columns), row(columns), places(rows * columns) {}
};

struct Place {
  int64_t image;
  uint32_t row, column;
};

class Places {
 public:
  __device__ Places(const Grid& grid, int64_t begin)
      : grid_(grid), image_(begin / grid.places), first_(image_ * grid.places) {}
  __device__ Place operator[](int64_t i) const {
    uint32_t rest, column;
    const uint32_t image = grid_.plane(uint32_t(i - first_), rest);
    const uint32_t row = grid_.row(rest, column);
    return {image_ + image, row, column};
  }

 private:
  const Grid& grid_;
  int64_t image_, first_;
};

// The part `part` of `parts` of [0, count).
__host__ __device__ inline int64_t part_begin(int64_t count, int64_t part, int64_t parts) {
  return count / parts * part + (count % parts) * part / parts;
}

// How a block's threads cover channels in packs (threadIdx.x) and pixels (threadIdx.y); the grid: task, part, chunk.
struct Cover {
  int64_t packs;   // of all channels
  int64_t parts;   // of a task's pixels
  int64_t chunks;  // of the packs, blockDim.x each

  Cover(int64_t channels, int pack, int64_t parts) : packs(channels / pack), parts(parts), chunks((packs + 63) / 64) {}
  dim3 block() const {
    const int64_t x = (packs + chunks - 1) / chunks;
    return dim3(unsigned(x), unsigned(kThreads / x));
  }
  int64_t blocks(int64_t tasks) const { return tasks * parts * chunks; }
};

struct Work {
  int64_t task, part, pack;
  bool idle;  // this thread's channels lie beyond the last

  __device__ explicit Work(const Cover& cover) {
    const int64_t item = blockIdx.x;
    const int64_t rest = item / cover.chunks;
    pack = item % cover.chunks * blockDim.x + threadIdx.x;
    part = rest % cover.parts;
    task = rest / cover.parts;
    idle = pack >= cover.packs;
  }
};

// A sum over the lanes of a warp, in every lane.
__device__ inline double warp_sum(double v) {
#pragma unroll
  for (int lane = kWarp / 2; lane > 0; lane /= 2) v += __shfl_xor_sync(0xffffffffu, v, lane);
  return v;
}

// For each threadIdx.x: joins the threads' values over threadIdx.y into those of threadIdx.y == 0. Every thread comes.
template <typename Join>
__device__ inline void join_rows(Join join) {
  int rows = int(blockDim.y);
  while (rows > 1) {
    const int half = (rows + 1) / 2;
    __syncthreads();
    if (int(threadIdx.y) + half < rows) join((threadIdx.y + half) * blockDim.x + threadIdx.x);
    rows = half;
  }
}

inline bool aligned(const void* at, std::size_t bytes) { return reinterpret_cast<uintptr_t>(at) % bytes == 0; }

// Whether a kernel may be placed on the device while the one before it in the stream still runs (programmatic dependent
// launch); for this thread's launches. Every kernel waits for that one's end before it reads or writes memory.
inline thread_local bool dependent_launches = false;

// What each thread of each kernel does first. Whoever reads what this kernel writes waits in the same way, so that it
// may be placed at once.
__device__ inline void wait_for_launch_before() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  cudaGridDependencySynchronize();
  cudaTriggerProgrammaticLaunchCompletion();
#endif
}

template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), int64_t blocks, dim3 block, void* stream, Arguments... arguments) {
  if (blocks == 0) return cudaSuccess;
  if (blocks > 0x7fffffff) return cudaErrorInvalidConfiguration;
  cudaLaunchAttribute beside{};
  beside.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  beside.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(blocks));
  config.blockDim = block;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &beside;
  config.numAttrs = dependent_launches ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

// A launch whose blocks all run at the same time and may wait for each other, with `shared` bytes of dynamic shared
// memory. CUDA refuses it where the device has no room for all of them.
template <typename... Parameters, typename... Arguments>
cudaError_t launch_together(void (*kernel)(Parameters...), int64_t blocks, dim3 block, int64_t shared, void* stream,
                            Arguments... arguments) {
  if (blocks == 0) return cudaSuccess;
  if (blocks > 0x7fffffff || shared > 0x7fffffff) return cudaErrorInvalidConfiguration;
  LK_RETURN_IF_FAILED(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared)));
  cudaLaunchAttribute together{};
  together.id = cudaLaunchAttributeCooperative;
  together.val.cooperative = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(blocks));
  config.blockDim = block;
  config.dynamicSmemBytes = std::size_t(shared);
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &together;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

// The dynamic shared memory of a block.
__device__ inline unsigned char* dynamic_shared() {
#ifdef __CUDACC__
  extern __shared__ __align__(16) unsigned char dynamic[];
  return dynamic;
#else
  return emulator::dynamic_shared();
#endif
}

// call.template operator()<T>() with the storage type of dtype.
template <typename Call>
cudaError_t with_dtype(int dtype, Call call) {
  switch (dtype) {
    case kFloat32:
      return call.template operator()<float>();
    case kFloat64:
      return call.template operator()<double>();
    case kFloat16:
      return call.template operator()<__half>();
    case kBFloat16:
      return call.template operator()<__nv_bfloat16>();
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace lk
