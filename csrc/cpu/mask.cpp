// A row is read once, a piece at a time. Most pieces hold one value throughout, which a few vector
// instructions find out; where a range begins or ends, the keys are looked at one by one.
#include "mask.h"

#include <algorithm>
#include <array>
#include <cstring>

#include "../mask.h"

namespace hisa::cpu {
namespace {

constexpr int64_t kPieceBytes = 64;

// Whether a piece holds nothing but its first value.
template <class Bits>
bool uniform(const Bits* keys) {
  std::array<uint64_t, kPieceBytes / sizeof(uint64_t)> words;
  std::memcpy(words.data(), keys, sizeof(words));
  uint64_t different = 0;
  for (const uint64_t word : words) different |= word ^ repeated(*keys);
  return different == 0;
}

template <class Mask>
MaskRow scan_row(const MaskParams& params, int64_t offset) {
  using Bits = typename Mask::Bits;
  constexpr auto kPiece = static_cast<int32_t>(kPieceBytes / sizeof(Bits));
  const Bits* keys = static_cast<const Bits*>(params.data) + offset;
  const auto count = static_cast<int32_t>(params.keys);
  MaskRow row = MaskRow::none();
  int32_t key = 0;
  while (key < count) {
    const int32_t n = std::min(kPiece, count - key);
    if (params.key_stride == 1 && n == kPiece && uniform(keys + key)) {
      row.add<Mask>(key, n, keys[key]);
    } else {
      for (int32_t i = key; i < key + n; ++i) row.add<Mask>(i, 1, keys[i * params.key_stride]);
    }
    key += n;
  }
  return row;
}

MaskRow scan_row(const MaskParams& params, int64_t offset) {
  switch (params.type) {
    case MaskType::kBool: return scan_row<BoolMask>(params, offset);
    case MaskType::kFloat16: return scan_row<Float16Mask>(params, offset);
    case MaskType::kBFloat16: return scan_row<BFloat16Mask>(params, offset);
    case MaskType::kFloat32: return scan_row<Float32Mask>(params, offset);
    case MaskType::kFloat64: return scan_row<Float64Mask>(params, offset);
  }
  return MaskRow::none();
}

}  // namespace

MaskSummary larger(const MaskSummary& a, const MaskSummary& b) {
  return {.unknown = std::max(a.unknown, b.unknown),
          .broken = std::max(a.broken, b.broken),
          .longest = std::max(a.longest, b.longest),
          .latest = std::max(a.latest, b.latest)};
}

MaskSummary scan_mask(const MaskParams& params, int64_t begin, int64_t end, InterruptPoll& poll) {
  MaskSummary summary{};
  for (int64_t i = begin; i < end && !poll.stop(); ++i) {
    const MaskRow row = scan_row(
        params, i / params.rows * params.entry_stride + i % params.rows * params.row_stride);
    params.start[i] = row.start();
    params.end[i] = row.end;
    summary = larger(summary, row.summary());
  }
  return summary;
}

}  // namespace hisa::cpu
