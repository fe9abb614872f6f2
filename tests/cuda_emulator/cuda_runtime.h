// Runs CUDA kernels on the CPU, for tests: g++ finds this in place of CUDA's own header and compiles the .cu files as they
// are. A block's threads are fibers that run in turn, from one barrier or warp exchange to the next; blocks run one after
// another. Shared memory is filled with 0xff (NaN) before each block. A barrier that not all live threads reach, or a warp
// exchange that not all lanes of its mask reach, fails the launch with cudaErrorLaunchFailure and a message.
#pragma once
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __shared__ static

using std::exp;
using std::log;
using std::sqrt;

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorLaunchFailure = 719,
};
using cudaStream_t = void*;

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  std::size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};

inline thread_local dim3 threadIdx, blockIdx, blockDim, gridDim;

// The library's static storage holds its shared memory and nothing else: the emulator's own state is thread_local.
extern "C" {
__attribute__((visibility("hidden"))) extern char __bss_start[], _end[];
}

namespace emulator {

constexpr unsigned kWarp = 32;
constexpr std::size_t kStack = 64 * 1024;  // bytes of a thread

enum class State { ready, at_barrier, at_exchange, done };

struct Thread {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStack]};
  State state = State::ready;
  unsigned mask = 0;     // of the exchange that it waits at
  int phase = 0;         // exchanges and barriers passed
  unsigned char value[16];  // offered to the other lanes
};

struct Block {
  std::vector<Thread> threads;
  std::vector<unsigned char> offered;  // 16 bytes a thread
  ucontext_t scheduler;
  unsigned current = 0;
  const std::function<void()>* body = nullptr;
  std::string error;
};

inline thread_local Block* block = nullptr;
inline thread_local std::string message;

inline void enter() {
  (*block->body)();
  Thread& me = block->threads[block->current];
  me.state = State::done;
  swapcontext(&me.context, &block->scheduler);
}

inline void wait(State state, unsigned mask) {
  Thread& me = block->threads[block->current];
  me.state = state;
  me.mask = mask;
  swapcontext(&me.context, &block->scheduler);
}

inline void select(unsigned i) {
  block->current = i;
  threadIdx = dim3(i % blockDim.x, i / blockDim.x % blockDim.y, i / (blockDim.x * blockDim.y));
}

// Lets threads go on that have all come; false where none can.
inline bool release(Block& b) {
  unsigned live = 0, waiting = 0;
  for (const Thread& t : b.threads) {
    live += t.state != State::done;
    waiting += t.state == State::at_barrier;
  }
  if (live == waiting) {
    for (Thread& t : b.threads)
      if (t.state == State::at_barrier) t.state = State::ready;
    return live > 0;
  }
  bool any = false;
  for (std::size_t first = 0; first < b.threads.size(); first += kWarp) {
    const std::size_t lanes = std::min<std::size_t>(kWarp, b.threads.size() - first);
    for (std::size_t lane = 0; lane < lanes; ++lane) {
      const Thread& asking = b.threads[first + lane];
      if (asking.state != State::at_exchange) continue;
      const unsigned mask = asking.mask;
      bool all = (mask >> lane & 1) != 0;
      for (unsigned other = 0; other < kWarp && all; ++other) {
        if (!(mask >> other & 1)) continue;
        all = other < lanes && b.threads[first + other].state == State::at_exchange &&
              b.threads[first + other].mask == mask;
      }
      if (!all) continue;
      for (unsigned other = 0; other < kWarp; ++other)
        if (mask >> other & 1) b.threads[first + other].state = State::ready;
      any = true;
    }
  }
  return any;
}

inline std::string stuck(const Block& b) {
  unsigned count[4] = {};
  for (const Thread& t : b.threads) ++count[static_cast<int>(t.state)];
  char text[256];
  std::snprintf(text, sizeof text,
                "deadlock in block %u of %u: %u threads wait at a barrier, %u at a warp exchange, %u have ended", blockIdx.x,
                gridDim.x, count[1], count[2], count[3]);
  return text;
}

inline bool run_block(const std::function<void()>& body, std::vector<Thread>& threads) {
  Block b;
  block = &b;
  b.threads.swap(threads);
  b.body = &body;
  for (unsigned i = 0; i < b.threads.size(); ++i) {
    Thread& t = b.threads[i];
    t.state = State::ready;
    getcontext(&t.context);
    t.context.uc_stack.ss_sp = t.stack.get();
    t.context.uc_stack.ss_size = kStack;
    t.context.uc_link = nullptr;
    makecontext(&t.context, enter, 0);
  }
  bool fine = true;
  for (;;) {
    for (unsigned i = 0; i < b.threads.size(); ++i) {
      if (b.threads[i].state != State::ready) continue;
      select(i);
      swapcontext(&b.scheduler, &b.threads[i].context);
    }
    const bool over =
        std::all_of(b.threads.begin(), b.threads.end(), [](const Thread& t) { return t.state == State::done; });
    if (over) break;
    if (!release(b)) {
      message = stuck(b);
      fine = false;
      break;
    }
  }
  threads.swap(b.threads);
  block = nullptr;
  return fine;
}

// Exchanges a value with another lane of the warp.
template <typename T>
T exchange(unsigned mask, T value, unsigned source) {
  Thread& me = block->threads[block->current];
  std::memcpy(me.value, &value, sizeof value);
  wait(State::at_exchange, mask);
  const unsigned first = block->current / kWarp * kWarp;
  T got;
  std::memset(static_cast<void*>(&got), 0xff, sizeof got);  // a lane outside the mask has nothing to give
  if (mask >> source & 1) std::memcpy(static_cast<void*>(&got), block->threads[first + source].value, sizeof got);
  wait(State::at_exchange, mask);
  return got;
}

inline unsigned lane() { return block->current % kWarp; }

}  // namespace emulator

inline void __syncthreads() { emulator::wait(emulator::State::at_barrier, 0); }

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int other) {
  return emulator::exchange(mask, value, (emulator::lane() ^ unsigned(other)) % emulator::kWarp);
}
template <typename T>
T __shfl_sync(unsigned mask, T value, int source) {
  return emulator::exchange(mask, value, unsigned(source) % emulator::kWarp);
}

inline uint32_t __umulhi(uint32_t a, uint32_t b) { return uint32_t(uint64_t(a) * b >> 32); }

inline const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "no error";
    case cudaErrorInvalidValue: return "invalid argument";
    case cudaErrorInvalidConfiguration: return "invalid configuration argument";
    default: return emulator::message.c_str();
  }
}

inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments&&... arguments) {
  gridDim = config->gridDim;
  blockDim = config->blockDim;
  const unsigned count = blockDim.x * blockDim.y * blockDim.z;
  if (count == 0 || count > 1024 || gridDim.x == 0 || gridDim.x > 0x7fffffff || gridDim.y != 1 || gridDim.z != 1)
    return cudaErrorInvalidConfiguration;
  thread_local std::vector<emulator::Thread> threads;
  while (threads.size() < count) threads.emplace_back();
  while (threads.size() > count) threads.pop_back();
  const std::function<void()> body = [&] { kernel(arguments...); };
  for (unsigned i = 0; i < gridDim.x; ++i) {
    blockIdx = dim3(i);
#ifndef __SANITIZE_ADDRESS__
    std::memset(__bss_start, 0xff, std::size_t(_end - __bss_start));
#endif
    if (!emulator::run_block(body, threads)) return cudaErrorLaunchFailure;
  }
  return cudaSuccess;
}
