// Threads that ThreadSanitizer sees being started and waited for, in place of torch's, whose libgomp is built without it.
#pragma once
#include <algorithm>
#include <cstdint>
#include <exception>
#include <thread>
#include <vector>

namespace at {

namespace internal {

inline thread_local bool inside = false;  // a parallel region
inline thread_local int thread = 0;

struct Part {
  Part(int number, bool is_inside) { thread = number, inside = is_inside; }
  ~Part() { thread = thread_, inside = inside_; }

 private:
  const int thread_ = thread;
  const bool inside_ = inside;
};

inline void lazy_init_num_threads() {}

}  // namespace internal

inline int64_t divup(int64_t x, int64_t y) { return (x + y - 1) / y; }
inline bool in_parallel_region() { return internal::inside; }
inline int get_num_threads() { return in_parallel_region() ? 1 : 3; }
inline int get_thread_num() { return internal::thread; }

// As torch's: no more parts than there are threads, each of `grain` items at least; one part is of thread 0, also inside
// of a region; the first failure is thrown.
template <typename F>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const F& f) {
  if (begin >= end) return;
  const int64_t parts = std::min<int64_t>(get_num_threads(), divup(end - begin, std::max<int64_t>(grain, 1)));
  if (parts < 2) {
    const internal::Part one(0, in_parallel_region());
    return f(begin, end);
  }
  const int64_t part = divup(end - begin, parts);
  std::vector<std::exception_ptr> failures(parts);
  const auto run = [&](int64_t i) {
    const internal::Part own(static_cast<int>(i), true);
    try {
      if (begin + i * part < end) f(begin + i * part, std::min(end, begin + (i + 1) * part));
    } catch (...) {
      failures[i] = std::current_exception();
    }
  };
  std::vector<std::thread> others;
  for (int64_t i = 1; i < parts; ++i) others.emplace_back(run, i);
  run(0);
  for (std::thread& thread : others) thread.join();
  for (const std::exception_ptr& failure : failures)
    if (failure) std::rethrow_exception(failure);
}

}  // namespace at
