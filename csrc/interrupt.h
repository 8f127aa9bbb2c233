// Lets a long CPU call end when the user presses Ctrl-C.
#pragma once

#include <atomic>
#include <chrono>
#include <thread>

namespace hisa {

// What the Python module provides; without it nothing is ever pending.
struct InterruptHooks {
  bool (*pending)() = nullptr;  // true once a signal handler has raised, on Python's main thread
  void (*raise)() = nullptr;    // throw what it raised
};

// Hooks in force for the whole process.
InterruptHooks& interrupt_hooks();

// One call's question whether the user wants it to end. Threads share it; only the one that made it
// asks Python, and not too often.
class InterruptPoll {
 public:
  bool stop() {
    if (stopped_.load(std::memory_order_relaxed)) return true;
    if (std::this_thread::get_id() != caller_) return false;
    const auto now = std::chrono::steady_clock::now();
    if (now - last_ < std::chrono::milliseconds(50)) return false;
    last_ = now;
    const InterruptHooks& hooks = interrupt_hooks();
    if (hooks.pending != nullptr && hooks.pending()) stopped_.store(true);
    return stopped_.load();
  }

  void raise_if_stopped() const {
    if (stopped_.load()) interrupt_hooks().raise();
  }

 private:
  const std::thread::id caller_ = std::this_thread::get_id();
  std::chrono::steady_clock::time_point last_ = std::chrono::steady_clock::now();
  std::atomic<bool> stopped_{false};
};

}  // namespace hisa
