// Runs CUDA kernels on the CPU, for tests: g++ finds this in place of CUDA's own header and compiles the .cu files as
// they are. A block's threads are fibers that run in turn, from one barrier or warp exchange to the next; blocks run
// one after another, with the order of their threads turned round each time. Shared memory is filled with 0xff (NaN)
// before each block. A barrier that not all live threads reach, or a warp exchange that not all lanes of its mask
// reach, fails the launch with cudaErrorLaunchFailure and a message.
#pragma once
#include <setjmp.h>
#include <ucontext.h>

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

// A place where execution stops and goes on. The first way in is ucontext's; between fibers that have begun, _longjmp
// spares its two system calls (a sanitizer, which follows stacks, gets ucontext alone).
struct Stop {
  ucontext_t context;
  jmp_buf jump;
  bool begun = false;
};

inline void go(Stop& from, Stop& to) {
#ifdef __SANITIZE_ADDRESS__
  swapcontext(&from.context, &to.context);
#else
  if (_setjmp(from.jump) != 0) return;
  if (to.begun) _longjmp(to.jump, 1);
  to.begun = true;
  setcontext(&to.context);
#endif
}

// A fiber, which runs one CUDA thread after another.
struct Thread {
  Stop stop;
  std::unique_ptr<char[]> stack{new char[kStack]};
  State state = State::done;
  unsigned mask = 0;        // of the exchange that it waits at
  unsigned char value[16];  // offered to the other lanes
};

struct Block {
  std::vector<std::unique_ptr<Thread>> threads;  // those of the largest block so far
  unsigned count = 0;                            // of this block
  unsigned current = 0;
  bool backwards = false;
  Stop scheduler;
  const std::function<void()>* body = nullptr;
};

inline thread_local Block block;
inline thread_local std::string message;

inline Thread& me() { return *block.threads[block.current]; }

inline void wait(State state, unsigned mask) {
  me().state = state;
  me().mask = mask;
  go(me().stop, block.scheduler);
}

inline void enter() {
  for (;;) {
    (*block.body)();
    wait(State::done, 0);
  }
}

inline void resume(unsigned i) {
  block.current = i;
  threadIdx = dim3(i % blockDim.x, i / blockDim.x % blockDim.y, i / (blockDim.x * blockDim.y));
  go(block.scheduler, block.threads[i]->stop);
}

// Lets threads go on that have all come; false where none can.
inline bool release() {
  unsigned live = 0, waiting = 0;
  for (unsigned i = 0; i < block.count; ++i) {
    live += block.threads[i]->state != State::done;
    waiting += block.threads[i]->state == State::at_barrier;
  }
  if (live == waiting) {
    for (unsigned i = 0; i < block.count; ++i)
      if (block.threads[i]->state == State::at_barrier) block.threads[i]->state = State::ready;
    return live > 0;
  }
  bool any = false;
  for (unsigned i = 0; i < block.count; ++i) {
    const unsigned first = i / kWarp * kWarp, mask = block.threads[i]->mask;
    if (block.threads[i]->state != State::at_exchange || !(mask >> (i - first) & 1)) continue;
    bool all = true;
    for (unsigned lane = 0; lane < kWarp && all; ++lane) {
      if (!(mask >> lane & 1)) continue;
      all = first + lane < block.count && block.threads[first + lane]->state == State::at_exchange &&
            block.threads[first + lane]->mask == mask;
    }
    for (unsigned lane = 0; lane < kWarp && all; ++lane)
      if (mask >> lane & 1) block.threads[first + lane]->state = State::ready;
    any = any || all;
  }
  return any;
}

inline std::string stuck() {
  unsigned count[4] = {};
  for (unsigned i = 0; i < block.count; ++i) ++count[static_cast<int>(block.threads[i]->state)];
  char text[256];
  std::snprintf(text, sizeof text,
                "deadlock in block %u of %u: %u threads wait at a barrier, %u at a warp exchange, %u have ended",
                blockIdx.x, gridDim.x, count[1], count[2], count[3]);
  return text;
}

inline bool run_block() {
  for (unsigned i = 0; i < block.count; ++i) block.threads[i]->state = State::ready;
  block.backwards = !block.backwards;
  for (;;) {
    for (unsigned n = 0; n < block.count; ++n) {
      const unsigned i = block.backwards ? block.count - 1 - n : n;
      if (block.threads[i]->state == State::ready) resume(i);
    }
    bool over = true;
    for (unsigned i = 0; i < block.count && over; ++i) over = block.threads[i]->state == State::done;
    if (over) return true;
    if (release()) continue;
    message = stuck();
    block.threads.clear();  // fibers that can never end
    return false;
  }
}

inline void prepare(unsigned count) {
  while (block.threads.size() < count) {
    block.threads.push_back(std::make_unique<Thread>());
    Thread& t = *block.threads.back();
    getcontext(&t.stop.context);
    t.stop.context.uc_stack.ss_sp = t.stack.get();
    t.stop.context.uc_stack.ss_size = kStack;
    makecontext(&t.stop.context, enter, 0);
  }
  block.count = count;
}

// Exchanges a value with another lane of the warp.
template <typename T>
T exchange(unsigned mask, T value, unsigned source) {
  std::memcpy(me().value, &value, sizeof value);
  wait(State::at_exchange, mask);
  const unsigned first = block.current / kWarp * kWarp;
  T got;
  std::memset(static_cast<void*>(&got), 0xff, sizeof got);  // a lane outside the mask has nothing to give
  if (mask >> source & 1) std::memcpy(static_cast<void*>(&got), block.threads[first + source]->value, sizeof got);
  wait(State::at_exchange, mask);
  return got;
}

inline unsigned lane() { return block.current % kWarp; }

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
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  gridDim = config->gridDim;
  blockDim = config->blockDim;
  const unsigned count = blockDim.x * blockDim.y * blockDim.z;
  if (count == 0 || count > 1024 || gridDim.x == 0 || gridDim.x > 0x7fffffff || gridDim.y != 1 || gridDim.z != 1)
    return cudaErrorInvalidConfiguration;
  emulator::prepare(count);
  const std::function<void()> body = [&] { kernel(arguments...); };
  emulator::block.body = &body;
  emulator::block.scheduler.begun = true;
  for (unsigned i = 0; i < gridDim.x; ++i) {
    blockIdx = dim3(i);
#ifndef __SANITIZE_ADDRESS__
    std::memset(__bss_start, 0xff, std::size_t(_end - __bss_start));
#endif
    if (!emulator::run_block()) return cudaErrorLaunchFailure;
  }
  return cudaSuccess;
}
