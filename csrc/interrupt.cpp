#include "interrupt.h"

namespace lk {
namespace {

std::atomic<Signals> handled = nullptr;

}  // namespace

void handle_signals_by(Signals signals) { handled = signals; }

void Interrupt::ask() {
  const Signals signals = handled;
  what_ = signals == nullptr ? nullptr : signals();
  asked_ = Clock::now();
  if (what_ == nullptr) return;
  raised_.store(true, std::memory_order_release);
  std::rethrow_exception(what_);
}

}  // namespace lk
