// Threads of a block on one CPU thread, in random order: what a GPU leaves open, a seed decides.
//
// Every GPU thread is a context of its own. It runs until it has to wait: for its warp, for a named
// barrier, for a phase of a barrier in shared memory. Copies by the copy engine are done some time
// later, in any order. So a kernel that relies on luck fails for some seed, and one that waits for
// what never comes is reported.
#pragma once

#include <ucontext.h>

#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

namespace simt {

struct Thread {
  ucontext_t context{};
  std::unique_ptr<char[]> stack;
  uint32_t index = 0;
  bool done = false;
  std::function<bool()> blocked;  // runs again once this is true; empty: it can run
  uint64_t arrivals = 0;  // at its cluster's barrier
};

// A phase of a barrier in shared memory ends when all arrived and all bytes came.
struct Phases {
  uint32_t count = 0;
  uint32_t missing = 0;
  int64_t bytes = 0;
  uint64_t phase = 0;
};

struct Meeting {  // of a warp, or at a named barrier
  uint32_t arrived = 0;
  uint64_t round = 0;
  uint64_t values[32] = {};  // of the round that is filling
  uint64_t results[32] = {};  // of the last one
};

class Block {
 public:
  static constexpr size_t kStack = 96 * 1024;

  // Or `peers` blocks that run together, a cluster; `index` is the first one's.
  Block(uint32_t threads, uint32_t index, uint32_t blocks, uint64_t seed, uint32_t peers = 1)
      : block(index),
        grid(blocks),
        size_(threads),
        random_(seed),
        threads_(threads * peers),
        warps_(threads * peers / 32),
        slowness_(threads * peers / 32) {}

  static Block& current() { return *instance(); }
  Thread& thread() { return *running_; }
  uint32_t size() const { return size_; }  // threads of one block
  uint32_t rank() const { return running_->index / size_; }

  void run(const std::function<void()>& kernel) {
    instance() = this;
    kernel_ = kernel;
    for (uint64_t& slowness : slowness_) slowness = uint64_t{1} << random_() % 3;
    slowness_[random_() % slowness_.size()] <<= random_() % 12;
    for (uint32_t i = 0; i < threads_.size(); ++i) {
      Thread& t = threads_[i];
      t.index = i;
      t.stack = std::make_unique_for_overwrite<char[]>(kStack);
      getcontext(&t.context);
      t.context.uc_stack.ss_sp = t.stack.get();
      t.context.uc_stack.ss_size = kStack;
      t.context.uc_link = &main_;
      makecontext(&t.context, reinterpret_cast<void (*)()>(&Block::enter), 0);
    }
    while (failure.empty() && step()) {
    }
    if (failure.empty() && !copies_.empty()) failure = "copies under way at the end";
    instance() = nullptr;
    if (!failure.empty())
      throw std::runtime_error("block " + std::to_string(block) + ": " + failure);
  }

  // Wait until `ready`, at least for a moment.
  void wait(std::function<bool()> ready) {
    running_->blocked = std::move(ready);
    swapcontext(&running_->context, &main_);
  }

  [[noreturn]] void fail(const std::string& text) {
    failure =
        "thread " + std::to_string(running_ == nullptr ? -1 : int(running_->index)) + ": " + text;
    for (;;) swapcontext(&running_->context, &main_);
  }

  // All lanes of the warp bring a value; the last one computes what each of them gets.
  uint64_t meet(uint64_t value, const std::function<void(const uint64_t*, uint64_t*)>& compute) {
    Meeting& warp = warps_[running_->index / 32];
    const uint32_t lane = running_->index % 32;
    warp.values[lane] = value;
    const uint64_t round = warp.round;
    if (++warp.arrived == 32) {
      compute(warp.values, warp.results);
      warp.arrived = 0;
      ++warp.round;
    }
    wait([&warp, round] { return warp.round != round; });
    return warp.results[lane];
  }

  void sync(uint32_t barrier, uint32_t count) {
    Meeting& meeting = named_[rank() << 8 | barrier];
    const uint64_t round = meeting.round;
    if (++meeting.arrived == count) {
      meeting.arrived = 0;
      ++meeting.round;
    }
    wait([&meeting, round] { return meeting.round != round; });
  }

  // All threads of a cluster arrive before any of them is through, each time.
  void arrive() {
    ++running_->arrivals;
    ++arrivals_;
  }
  void wait_for_all() {
    wait([this, wanted = running_->arrivals * threads_.size()] { return arrivals_ >= wanted; });
  }

  Phases& phases(const void* barrier) { return phases_[barrier]; }
  void complete_if(Phases& p) {
    if (p.missing != 0 || p.bytes != 0) return;
    ++p.phase;
    p.missing = p.count;
  }
  void later(std::function<void()> copy) { copies_.push_back(std::move(copy)); }

  uint32_t block, grid;
  std::string failure;

 private:
  static Block*& instance() {
    static Block* it = nullptr;
    return it;
  }
  static void enter() {
    Block& self = current();
    self.kernel_();
    self.running_->done = true;
  }

  // Let one thread run, or one copy be done; whether there was something to do.
  bool step() {
    std::vector<uint32_t> ready;
    bool all_done = true;
    for (Thread& t : threads_) {
      all_done = all_done && t.done;
      if (!t.done && (!t.blocked || t.blocked())) ready.push_back(t.index);
    }
    if (all_done) return false;
    if (ready.empty() && copies_.empty()) {
      failure = "no thread can go on";
      return false;
    }
    if (!copies_.empty() && (ready.empty() || random_() % 4 == 0)) {
      const size_t i = random_() % copies_.size();
      const auto copy = std::move(copies_[i]);
      copies_.erase(copies_.begin() + static_cast<ptrdiff_t>(i));
      copy();
      return true;
    }
    // A random share of those that can run. Some warps are slow, and fall far behind.
    const uint64_t share = 1 + random_() % 4;
    bool any = false;
    for (const uint32_t i : ready)
      if (random_() % 4 < share && random_() % slowness_[i / 32] == 0) {
        resume(threads_[i]);
        any = true;
      }
    if (!any) resume(threads_[ready[random_() % ready.size()]]);
    return true;
  }

  void resume(Thread& t) {
    if (t.done || !failure.empty() || (t.blocked && !t.blocked())) return;
    t.blocked = nullptr;
    running_ = &t;
    swapcontext(&main_, &t.context);
    running_ = nullptr;
  }

  uint32_t size_;
  uint64_t arrivals_ = 0;
  std::mt19937_64 random_;
  std::vector<Thread> threads_;
  std::vector<Meeting> warps_;
  std::vector<uint64_t> slowness_;  // of a warp: it runs every so many times
  std::map<uint32_t, Meeting> named_;
  std::map<const void*, Phases> phases_;
  std::vector<std::function<void()>> copies_;
  std::function<void()> kernel_;
  Thread* running_ = nullptr;
  ucontext_t main_{};
};

}  // namespace simt
