// Runs CUDA kernels on the CPU, for tests: g++ finds this in place of CUDA's own header and compiles the .cu files as
// they are. A block's threads are fibers that run in turn, from one barrier or warp exchange to the next, with the
// order of threads turned round from block to block. Blocks run one after another, in another order in each launch;
// those of a cooperative launch take turns, from one sleep (__nanosleep) to the next. Shared memory is filled with 0xff
// (NaN) before each block. A barrier that not all live threads reach, a warp exchange that not all lanes of its mask
// reach, or sleep without end fails the launch with cudaErrorLaunchFailure and a message; so does a thread of a launch
// beside the one before it (programmatic stream serialization) that does not wait for that one.
#pragma once
#include <setjmp.h>
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
  cudaErrorCooperativeLaunchTooLarge = 720,
};
using cudaStream_t = void*;

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

enum cudaLaunchAttributeID {
  cudaLaunchAttributeCooperative = 2,
  cudaLaunchAttributeProgrammaticStreamSerialization = 6,
};

struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    int cooperative, programmaticStreamSerializationAllowed;
  } val;
};

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  std::size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  cudaLaunchAttribute* attrs = nullptr;
  unsigned numAttrs = 0;
};

enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };

inline thread_local dim3 threadIdx, blockIdx, blockDim, gridDim;

// The library's static storage holds its shared memory and nothing else: the emulator's own state is thread_local.
extern "C" {
__attribute__((visibility("hidden"))) extern char __bss_start[], _end[];
}

namespace emulator {

constexpr unsigned kWarp = 32;
constexpr std::size_t kStack = 64 * 1024;             // bytes of a thread
constexpr std::size_t kShared = 48 * 1024;            // bytes of dynamic shared memory that need no leave
constexpr std::size_t kMostShared = 227 * 1024;       // and with leave
constexpr unsigned kProcessors = 6;                   // each takes one block of a cooperative launch

enum class State { ready, at_barrier, at_exchange, asleep, done };

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
  bool waited = false;      // for the launch before
  unsigned char value[64];  // offered to the other lanes
};

struct Block {
  std::vector<std::unique_ptr<Thread>> threads;  // those of the largest block so far
  unsigned count = 0;                            // of this block
  unsigned current = 0;
  unsigned index = 0;
  bool over = false;
  std::unique_ptr<unsigned char[]> dynamic;  // shared memory
  std::vector<char> fixed;                   // static shared memory while another block has its turn
};

// A launch, and what the launches leave to each other.
struct Launch {
  const std::function<void()>* body = nullptr;
  bool dependent = false;
  Stop scheduler;
  bool backwards = false;
  uint32_t number = 0;
};

inline thread_local std::vector<std::unique_ptr<Block>> blocks;  // one, or all of a cooperative launch
inline thread_local Block* block = nullptr;                      // the one that runs
inline thread_local Launch launch;
inline thread_local std::string message;

inline Thread& me() { return *block->threads[block->current]; }

inline void wait(State state, unsigned mask) {
  me().state = state;
  me().mask = mask;
  go(me().stop, launch.scheduler);
}

inline void enter() {
  for (;;) {
    (*launch.body)();
    wait(State::done, 0);
  }
}

inline void resume(unsigned i) {
  block->current = i;
  threadIdx = dim3(i % blockDim.x, i / blockDim.x % blockDim.y, i / (blockDim.x * blockDim.y));
  go(launch.scheduler, block->threads[i]->stop);
}

// Lets threads go on that have all come; false where none can.
inline bool release() {
  const std::vector<std::unique_ptr<Thread>>& threads = block->threads;
  unsigned live = 0, waiting = 0;
  for (unsigned i = 0; i < block->count; ++i) {
    live += threads[i]->state != State::done;
    waiting += threads[i]->state == State::at_barrier;
  }
  if (live == waiting) {
    for (unsigned i = 0; i < block->count; ++i)
      if (threads[i]->state == State::at_barrier) threads[i]->state = State::ready;
    return live > 0;
  }
  bool any = false;
  for (unsigned i = 0; i < block->count; ++i) {
    const unsigned first = i / kWarp * kWarp, mask = threads[i]->mask;
    if (threads[i]->state != State::at_exchange || !(mask >> (i - first) & 1)) continue;
    bool all = true;
    for (unsigned lane = 0; lane < kWarp && all; ++lane) {
      if (!(mask >> lane & 1)) continue;
      all = first + lane < block->count && threads[first + lane]->state == State::at_exchange &&
            threads[first + lane]->mask == mask;
    }
    for (unsigned lane = 0; lane < kWarp && all; ++lane)
      if (mask >> lane & 1) threads[first + lane]->state = State::ready;
    any = any || all;
  }
  return any;
}

inline std::string stuck() {
  unsigned count[5] = {};
  for (unsigned i = 0; i < block->count; ++i) ++count[static_cast<int>(block->threads[i]->state)];
  char text[256];
  std::snprintf(text, sizeof text,
                "deadlock in block %u of %u: %u threads wait at a barrier, %u at a warp exchange, %u sleep, %u have ended",
                block->index, gridDim.x, count[1], count[2], count[3], count[4]);
  return text;
}

enum class Turn { over, asleep, stuck };

// Runs the block until it is over, or all that it has left sleep or wait. `moved`: whether anything but sleep came of it.
inline Turn take_turn(bool& moved) {
  for (unsigned i = 0; i < block->count; ++i)
    if (block->threads[i]->state == State::asleep) block->threads[i]->state = State::ready;
  for (;;) {
    for (unsigned n = 0; n < block->count; ++n) {
      const unsigned i = launch.backwards ? block->count - 1 - n : n;
      if (block->threads[i]->state != State::ready) continue;
      resume(i);
      moved = moved || block->threads[i]->state != State::asleep;
    }
    bool over = true, asleep = false;
    for (unsigned i = 0; i < block->count; ++i) {
      over = over && block->threads[i]->state == State::done;
      asleep = asleep || block->threads[i]->state == State::asleep;
    }
    if (over) return Turn::over;
    if (release()) continue;
    return asleep ? Turn::asleep : Turn::stuck;
  }
}

inline void prepare(Block& made, unsigned count, std::size_t dynamic) {
  while (made.threads.size() < count) {
    made.threads.push_back(std::make_unique<Thread>());
    Thread& t = *made.threads.back();
    getcontext(&t.stop.context);
    t.stop.context.uc_stack.ss_sp = t.stack.get();
    t.stop.context.uc_stack.ss_size = kStack;
    makecontext(&t.stop.context, enter, 0);
  }
  made.count = count;
  made.dynamic.reset(new unsigned char[dynamic]);
  std::memset(made.dynamic.get(), 0xff, dynamic);
}

inline void begin(Block& made, unsigned index) {
  made.index = index, made.over = false;
  for (unsigned i = 0; i < made.count; ++i) made.threads[i]->state = State::ready, made.threads[i]->waited = false;
}

inline std::size_t fixed_bytes() {
#ifdef __SANITIZE_ADDRESS__
  return 0;
#else
  return std::size_t(_end - __bss_start);
#endif
}

// Runs blocks that have begun, in turns, to their ends. Where they are several, each has its own static shared memory.
inline bool run(std::size_t count) {
  const std::size_t bytes = fixed_bytes();
  for (std::size_t left = count; left > 0;) {
    bool moved = false;
    for (std::size_t i = 0; i < count; ++i) {
      block = blocks[i].get();
      if (block->over) continue;
      blockIdx = dim3(block->index);
      launch.backwards = !launch.backwards;
      if (count > 1 && bytes > 0) std::memcpy(__bss_start, block->fixed.data(), bytes);
      const Turn turn = take_turn(moved);
      if (count > 1 && bytes > 0) std::memcpy(block->fixed.data(), __bss_start, bytes);
      if (turn == Turn::over) {
        block->over = true, --left;
        for (unsigned t = 0; t < block->count; ++t) {
          if (!launch.dependent || block->threads[t]->waited) continue;
          message = "a thread of a dependent launch did not wait for the launch before";
          return false;
        }
      }
      if (turn == Turn::stuck) {
        message = stuck();
        return false;
      }
    }
    if (left > 0 && !moved) {
      message = stuck();
      return false;
    }
  }
  return true;
}

// The numbers below `count` in an order that differs from launch to launch.
inline std::vector<unsigned> shuffled(unsigned count, uint32_t seed) {
  std::vector<unsigned> order(count);
  for (unsigned i = 0; i < count; ++i) order[i] = i;
  for (unsigned i = count; i > 1; --i) {
    seed = seed * 1664525u + 1013904223u;
    std::swap(order[i - 1], order[(seed >> 8) % i]);
  }
  return order;
}

// Exchanges a value with another lane of the warp.
template <typename T>
T exchange(unsigned mask, T value, unsigned source) {
  std::memcpy(me().value, &value, sizeof value);
  wait(State::at_exchange, mask);
  const unsigned first = block->current / kWarp * kWarp;
  T got;
  std::memset(static_cast<void*>(&got), 0xff, sizeof got);  // a lane outside the mask has nothing to give
  if (mask >> source & 1) std::memcpy(static_cast<void*>(&got), block->threads[first + source]->value, sizeof got);
  wait(State::at_exchange, mask);
  return got;
}

inline unsigned lane() { return block->current % kWarp; }

// What a tensor core reads of a number: of a float, sign, exponent and 10 bits.
inline double read(double v) { return v; }
inline float read(float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, sizeof bits);
  bits &= ~0x1fffu;
  std::memcpy(&v, &bits, sizeof bits);
  return v;
}

// cvt.rna.tf32: to the nearest of these, ties away from zero.
inline float rounded(float v) {
  if (!(v - v == 0)) return v;
  uint32_t bits;
  std::memcpy(&bits, &v, sizeof bits);
  bits = (bits + 0x1000u) & ~0x1fffu;
  std::memcpy(&v, &bits, sizeof bits);
  return v;
}

// c [16, 8] += a [16, 8] b [8, 8], spread over a warp as mma.m16n8k8 has it (and two times two of m8n8k4).
template <typename T>
void multiply(T (&c)[4], const T (&a)[4], const T (&b)[2]) {
  T mine[6];
  for (int i = 0; i < 6; ++i) mine[i] = read(i < 4 ? a[i] : b[i - 4]);
  std::memcpy(me().value, mine, sizeof mine);
  wait(State::at_exchange, 0xffffffffu);
  const unsigned first = block->current / kWarp * kWarp, row = lane() / 4, column = lane() % 4 * 2;
  const auto of = [&](unsigned from, unsigned which) {
    T value;
    std::memcpy(&value, block->threads[first + from]->value + which * sizeof(T), sizeof value);
    return value;
  };
  for (unsigned k = 0; k < 8; ++k)
    for (unsigned i = 0; i < 4; ++i)
      c[i] += of(row * 4 + k % 4, k / 4 * 2 + i / 2) * of((column + i % 2) * 4 + k % 4, 4 + k / 4);
  wait(State::at_exchange, 0xffffffffu);
}

inline unsigned char* dynamic_shared() { return block->dynamic.get(); }
inline thread_local std::vector<const void*> granted;  // kernels that may have more than kShared

}  // namespace emulator

inline void __syncthreads() { emulator::wait(emulator::State::at_barrier, 0); }
inline void __syncwarp() { emulator::wait(emulator::State::at_exchange, 0xffffffffu); }
inline void __nanosleep(unsigned) { emulator::wait(emulator::State::asleep, 0); }
inline void __threadfence() {}
inline void cudaGridDependencySynchronize() { emulator::me().waited = true; }
inline void cudaTriggerProgrammaticLaunchCompletion() {}
inline unsigned atomicAdd(unsigned* at, unsigned more) { return std::exchange(*at, *at + more); }

template <typename T>
T __ldcg(const T* from) {
  return *from;
}

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

enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16, cudaDevAttrMaxSharedMemoryPerBlockOptin = 97 };
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int) {
  *value = int(which == cudaDevAttrMultiProcessorCount ? emulator::kProcessors : emulator::kMostShared);
  return cudaSuccess;
}

inline cudaError_t cudaMemsetAsync(void* to, int value, std::size_t bytes, cudaStream_t) {
  std::memset(to, value, bytes);
  return cudaSuccess;
}

template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute, int bytes) {
  if (bytes < 0 || std::size_t(bytes) > emulator::kMostShared) return cudaErrorInvalidValue;
  emulator::granted.push_back(reinterpret_cast<const void*>(kernel));
  return cudaSuccess;
}

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  using namespace emulator;
  gridDim = config->gridDim;
  blockDim = config->blockDim;
  const unsigned count = blockDim.x * blockDim.y * blockDim.z, grid = gridDim.x;
  const std::size_t dynamic = config->dynamicSmemBytes;
  if (count == 0 || count > 1024 || grid == 0 || grid > 0x7fffffff || gridDim.y != 1 || gridDim.z != 1)
    return cudaErrorInvalidConfiguration;
  const bool leave = std::count(granted.begin(), granted.end(), reinterpret_cast<const void*>(kernel)) > 0;
  if (dynamic > (leave ? kMostShared : kShared)) return cudaErrorInvalidValue;
  bool cooperative = false;
  launch.dependent = false;
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    const cudaLaunchAttribute& at = config->attrs[i];
    if (at.id == cudaLaunchAttributeCooperative) cooperative = at.val.cooperative;
    if (at.id == cudaLaunchAttributeProgrammaticStreamSerialization)
      launch.dependent = at.val.programmaticStreamSerializationAllowed;
  }
  if (cooperative && grid > kProcessors) return cudaErrorCooperativeLaunchTooLarge;
  const std::function<void()> body = [&] { kernel(arguments...); };
  launch.body = &body;
  launch.scheduler.begun = true;
  const std::size_t together = cooperative ? grid : 1;
  while (blocks.size() < together) blocks.push_back(std::make_unique<Block>());
  for (std::size_t i = 0; i < together; ++i) {
    prepare(*blocks[i], count, dynamic);
    blocks[i]->fixed.assign(together > 1 ? fixed_bytes() : 0, char(0xff));
  }
  const std::vector<unsigned> order = shuffled(grid, launch.number++);
  bool good = true;
  for (unsigned i = 0; i < grid && good; i += unsigned(together)) {
    for (unsigned j = 0; j < together; ++j) begin(*blocks[j], order[i + j]);
    if (fixed_bytes()) std::memset(__bss_start, 0xff, fixed_bytes());
    if (together == 1) std::memset(blocks[0]->dynamic.get(), 0xff, dynamic);
    good = run(together);
  }
  if (!good) blocks.clear();  // fibers that can never end
  return good ? cudaSuccess : cudaErrorLaunchFailure;
}
