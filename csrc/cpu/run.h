// Runs a call's groups of rows, or parts of these, on torch's threads.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <vector>

#include "float_environment.h"
#include "plan.h"
#include "stages.h"

namespace hisa::cpu {

// Call `stages(group)` for every group of the call's rows and store what it selected. Threads take
// the next group when they are done with one, the last rows first: their windows are the longest.
template <class Params, class Stages>
void run_groups(const Plan& plan, const Params& params, const Stages& stages) {
  const at::Tensor memory = at::empty({plan.places() * plan.place_bytes}, at::kByte);
  auto* const base = static_cast<std::byte*>(memory.mutable_data_ptr());
  std::atomic<int64_t> taken{0};
  InterruptPoll poll;
  at::parallel_for(0, plan.threads, 1, [&](int64_t first_thread, int64_t end_thread) {
    const FloatEnvironment environment;
    for (int64_t thread = first_thread; thread < end_thread; ++thread) {
      Group group(plan.sizes, base + thread * plan.place_bytes, poll);
      for (int64_t i = taken++; i < plan.groups && !poll.stop(); i = taken++) {
        const int64_t first = (plan.groups - 1 - i) * plan.sizes.rows;
        const int64_t count = std::min(plan.sizes.rows, params.queries.rows - first);
        group.begin(params, first, count);
        stages(group);
        group.store(params.output);
      }
    }
  });
  poll.raise_if_stopped();
}

// A call with two threads or more for each group of rows: a group's keys are shared out among them,
// and the best of them all are the best of what each part keeps.
class Parts {
 public:
  template <class Params>
  Parts(const Plan& plan, const Params& params)
      : plan_(plan), memory_(at::empty({plan.places() * plan.place_bytes}, at::kByte)) {
    groups_.reserve(static_cast<size_t>(plan.places()));
    auto* memory = static_cast<std::byte*>(memory_.mutable_data_ptr());
    for (int64_t i = 0; i < plan.places(); ++i, memory += plan.place_bytes) {
      Group& group = groups_.emplace_back(plan.sizes, memory, poll_);
      const int64_t first = i / plan.parts * plan.sizes.rows;
      group.begin(params, first, std::min(plan.sizes.rows, params.queries.rows - first));
      for (int64_t row = 0; row < group.count(); ++row)
        longest_ = std::max(longest_, group.row(row).end - group.row(row).start);
    }
  }

  // Tokens of the longest window.
  int64_t longest() const { return longest_; }

  // Call `stage(group)` for so many parts of each group, then `joined(group)` for the first one,
  // which has what all of them selected.
  template <class Stage, class Joined>
  void run(int64_t parts, const Stage& stage, const Joined& joined) {
    at::parallel_for(0, plan_.groups * parts, 1, [&](int64_t begin, int64_t end) {
      const FloatEnvironment environment;
      for (int64_t i = begin; i < end && !poll_.stop(); ++i) {
        Group& group = at(i / parts, i % parts);
        group.take_part({i % parts, parts});
        stage(group);
        group.finish();
      }
    });
    at::parallel_for(0, plan_.groups, 1, [&](int64_t begin, int64_t end) {
      for (int64_t g = begin; g < end && !poll_.stop(); ++g) {
        for (int64_t part = 1; part < parts; ++part) at(g, 0).join(at(g, part));
        joined(at(g, 0));
        for (int64_t part = 1; part < plan_.parts; ++part) at(g, part).share_blocks(at(g, 0));
      }
    });
    poll_.raise_if_stopped();
  }

 private:
  Group& at(int64_t group, int64_t part) {
    return groups_[static_cast<size_t>(group * plan_.parts + part)];
  }

  const Plan& plan_;
  int64_t longest_ = 0;
  at::Tensor memory_;
  InterruptPoll poll_;
  std::vector<Group> groups_;  // all parts of each
};

// Into how many parts to cut the selection from so many tokens; where all fit, none is scored.
inline int64_t parts_to_select(const Plan& plan, const Output& output, int64_t tokens) {
  return plan.parts_for(output.scores == nullptr && tokens <= output.topk ? 0 : tokens);
}

// The stages of a call that keeps some blocks of each row.
template <class Params>
void run_index(const Plan& plan, const Params& params) {
  const auto choose = [&](Group& group) { coarse(params, group); };
  const auto list = [&](Group& group) { list_blocks(params, group); };
  const auto select = [&](Group& group) { refine(params, group); };
  const auto store = [&](Group& group) { group.store(params.output); };
  if (plan.parts == 1)
    return run_groups(plan, params, [&](Group& group) {
      choose(group);
      list(group);
      select(group);
    });
  Parts parts(plan, params);
  const int64_t longest = parts.longest();
  const int64_t tokens =
      std::min(longest, std::min(params.block_topk, longest) * params.block_size);
  const int64_t blocks = tokens < longest ? longest / params.block_size : 0;
  parts.run(plan.parts_for(blocks), choose, list);
  parts.run(parts_to_select(plan, params.output, tokens), select, store);
}

inline void run_flat(const Plan& plan, const FlatParams& params) {
  const auto select = [&](Group& group) { flat(params, group); };
  if (plan.parts == 1) return run_groups(plan, params, select);
  Parts parts(plan, params);
  parts.run(parts_to_select(plan, params.output, parts.longest()), select,
            [&](Group& group) { group.store(params.output); });
}

}  // namespace hisa::cpu
