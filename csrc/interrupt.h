// Ctrl-C in a call of C++: what Python does for a signal is done between two pieces of work, and an exception ends the call.
#pragma once
#include <atomic>
#include <chrono>
#include <exception>
#include <thread>

namespace lk {

class Interrupt {
 public:
  // Between two pieces of work, on any thread. On the thread that made this, and not more often than Python would notice,
  // it runs the handlers of signals that came; what one of them raises is thrown on all threads.
  void look() {
    if (raised_.load(std::memory_order_acquire)) std::rethrow_exception(what_);
    if (std::this_thread::get_id() == caller_ && Clock::now() - asked_ > kPause) ask();
  }

 private:
  using Clock = std::chrono::steady_clock;
  static constexpr std::chrono::milliseconds kPause{20};  // to ask takes Python's lock

  void ask();

  const std::thread::id caller_ = std::this_thread::get_id();
  Clock::time_point asked_ = Clock::now();
  std::exception_ptr what_;
  std::atomic<bool> raised_ = false;
};

}  // namespace lk
