// Ctrl-C in a long call: what a program does for a signal is done between two pieces of work, and an exception ends the call.
#pragma once
#include <atomic>
#include <chrono>
#include <exception>
#include <thread>

namespace lk {

// What looks for signals and handles them: null, or what a handler threw. None without Python, whose module sets it.
using Signals = std::exception_ptr (*)();
[[gnu::visibility("default")]] void handle_signals_by(Signals signals);

class Interrupt {
 public:
  // Between two pieces of work, on any thread. On the thread that made this, now and then, signals that came are handled;
  // what a handler throws is thrown on all threads.
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
