// Queries or keys on their way from a projection to the indexer: turned, quantised, or both. A team
// of lanes takes kHeads heads of a row, one after the other, so a warp has several at once.
//
//   y[i] = x[i] * cos[i] - x[i + half] * sin[i]                       of the turned channels,
//   y[i + half] = x[i + half] * cos[i + half] + x[i] * sin[i + half]  i < half
//
// Interleaved, x[2i] and x[2i + 1] take the place of x[i] and x[i + half], and angle i that of
// both. Every product and sum is rounded to the type of x, as the separate operators of a model
// would. Channels that turn with each other are in the same lane, and no lane needs another's but
// for the largest magnitude. Cost: x is read once, y written once.
#include "../support.h"
#include "lanes.cuh"
#include "launch.h"

namespace hisa::cuda {
namespace {

constexpr int kThreads = 256;  // of a block
constexpr int kHeads = 8;  // of a team
constexpr int kAtOnce = 2;  // heads whose loads are under way together
constexpr int kPairs = 2;  // of a lane; a pair is twice four channels
constexpr int kPairChannels = 2 * kLane;
constexpr int kFewLanes = 8, kManyLanes = 16;  // of a team
static_assert(kManyLanes * kPairs * kPairChannels >= support::kMaxDim, "no head is larger");

struct Multiply {
  __device__ float operator()(float a, float b) const { return __fmul_rn(a, b); }
  template <class Two>
  __device__ Two operator()(Two a, Two b) const {
    return __hmul2_rn(a, b);
  }
};
struct Add {
  __device__ float operator()(float a, float b) const { return __fadd_rn(a, b); }
  template <class Two>
  __device__ Two operator()(Two a, Two b) const {
    return __hadd2_rn(a, b);
  }
};
struct Subtract {
  __device__ float operator()(float a, float b) const { return __fsub_rn(a, b); }
  template <class Two>
  __device__ Two operator()(Two a, Two b) const {
    return __hsub2_rn(a, b);
  }
};
struct Largest {  // magnitude; NaN if either is
  __device__ float operator()(float a, float b) const {  // as bits: NaN is above infinity
    return __uint_as_float(max(__float_as_uint(a), __float_as_uint(b) & 0x7FFFFFFFU));
  }
  template <class Two>
  __device__ Two operator()(Two a, Two b) const {
    return __hmax2_nan(a, __habs2(b));
  }
};

// What an instruction multiplies or adds: rounded once, whether as two of 16 bits or in fp32 first,
// which has more than twice the digits.
template <class T>
using Unit =
    std::conditional_t<std::is_same_v<T, float>, float,
                       std::conditional_t<std::is_same_v<T, __half>, __half2, __nv_bfloat162>>;
template <class T>
inline constexpr int kUnits = kLane * sizeof(T) / sizeof(Unit<T>);

template <class T>
struct alignas(kLane * sizeof(T)) Units {
  Unit<T> at[kUnits<T>];
};

template <class T, class Operation>
__device__ Units<T> apply(const Operation& operation, const Units<T>& a, const Units<T>& b) {
  Units<T> y;
#pragma unroll
  for (int i = 0; i < kUnits<T>; ++i) y.at[i] = operation(a.at[i], b.at[i]);
  return y;
}

__device__ float2 two_floats(__half2 x) { return __half22float2(x); }
__device__ float2 two_floats(__nv_bfloat162 x) { return __bfloat1622float2(x); }

template <class T>
__device__ Floats widened(const Units<T>& x) {
  Floats wide;
  if constexpr (std::is_same_v<T, float>) {
#pragma unroll
    for (int i = 0; i < kLane; ++i) wide.at[i] = x.at[i];
  } else {
#pragma unroll
    for (int i = 0; i < kUnits<T>; ++i) {
      const float2 two = two_floats(x.at[i]);
      wide.at[2 * i] = two.x;
      wide.at[2 * i + 1] = two.y;
    }
  }
  return wide;
}

// The even elements of eight in a row to x[0], the odd ones to x[1].
__device__ void deinterleave(Units<float> (&x)[2]) {
  const Units<float> even{x[0].at[0], x[0].at[2], x[1].at[0], x[1].at[2]};
  x[1] = {x[0].at[1], x[0].at[3], x[1].at[1], x[1].at[3]};
  x[0] = even;
}
__device__ void deinterleave(Units<__half> (&x)[2]) {
  const Units<__half> even{__lows2half2(x[0].at[0], x[0].at[1]),
                           __lows2half2(x[1].at[0], x[1].at[1])};
  x[1] = {__highs2half2(x[0].at[0], x[0].at[1]), __highs2half2(x[1].at[0], x[1].at[1])};
  x[0] = even;
}
__device__ void deinterleave(Units<__nv_bfloat16> (&x)[2]) {
  const Units<__nv_bfloat16> even{__lows2bfloat162(x[0].at[0], x[0].at[1]),
                                  __lows2bfloat162(x[1].at[0], x[1].at[1])};
  x[1] = {__highs2bfloat162(x[0].at[0], x[0].at[1]), __highs2bfloat162(x[1].at[0], x[1].at[1])};
  x[0] = even;
}

// Of each head, what a lane has of one pair: its lower and its upper channels, and how they turn.
template <class T>
struct Pair {
  bool inside, turns;
  int from[2], to[2];  // first channel of each four
  Units<T> cos[2], sin[2];
};

// `angles` is the row's first, of cos and of sin.
template <class T, bool kInterleaved>
__device__ Pair<T> make_pair(const RopeParams& params, int64_t angles, int number) {
  const auto dim = static_cast<int>(params.dim);
  const auto first = static_cast<int>(params.first);
  const auto turned = static_cast<int>(params.turned);
  const int channel = number * kPairChannels;
  Pair<T> pair{};
  pair.inside = channel < dim;
  if (!pair.inside) return pair;
  // Before, within or behind the turned channels: a pair is of both halves of these.
  pair.turns = channel >= first && channel < first + turned;
  const int begin = channel < first ? 0 : pair.turns ? first : first + turned;
  const int end = channel < first ? first : pair.turns ? first + turned : dim;
  const int lower = (channel - begin) / 2;
  const int half = (end - begin) / 2;
  const bool adjacent = kInterleaved && pair.turns;  // come out de-interleaved
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    pair.to[i] = begin + lower + i * half;
    pair.from[i] = adjacent ? channel + i * kLane : pair.to[i];
    if (!pair.turns) continue;
    const int64_t angle = angles + lower + (kInterleaved ? 0 : i * half);
    pair.cos[i] = *reinterpret_cast<const Units<T>*>(static_cast<const T*>(params.cos) + angle);
    pair.sin[i] = *reinterpret_cast<const Units<T>*>(static_cast<const T*>(params.sin) + angle);
  }
  return pair;
}

template <class T, bool kInterleaved>
__device__ void turn(const Pair<T>& pair, Units<T> (&x)[2]) {
  if constexpr (kInterleaved) deinterleave(x);
  const Units<T> lower =
      apply(Subtract{}, apply(Multiply{}, x[0], pair.cos[0]), apply(Multiply{}, x[1], pair.sin[0]));
  x[1] = apply(Add{}, apply(Multiply{}, x[1], pair.cos[1]), apply(Multiply{}, x[0], pair.sin[1]));
  x[0] = lower;
}

// The largest magnitude in all lanes of a team; NaN if there is one.
template <class T, int kLanes>
__device__ float find_amax(const Units<T> (&x)[kPairs][2]) {
  Units<T> most{};
#pragma unroll
  for (int i = 0; i < kPairs; ++i)
#pragma unroll
    for (int j = 0; j < 2; ++j) most = apply(Largest{}, most, x[i][j]);
  uint32_t bits = 0;
#pragma unroll
  for (float value : widened(most).at) bits = max(bits, __float_as_uint(value));
#pragma unroll
  for (int other = kLanes / 2; other > 0; other /= 2)
    bits = max(bits, __shfl_xor_sync(~0U, bits, other));
  return __uint_as_float(bits);
}

// The least power of two that is no smaller; infinity and NaN as they are.
__device__ float raise_to_power_of_two(float scale) {
  const uint32_t bits = __float_as_uint(scale);
  const uint32_t raised = (bits + 0x7FFFFFU) & 0x7F800000U;
  return bits >= 0x7F800000U ? scale : __uint_as_float(raised);
}

// What divides by a scale, correctly rounded where fp8 tells the quotient from zero.
struct Divider {
  float reciprocal;
  float scale;  // for corrections: 0, so that there are none, if it is infinite
};

__device__ Divider make_divider(float scale) {
  return {__fdiv_rn(1.0F, scale), scale < INFINITY ? scale : 0.0F};
}

// NOTE: two corrections. The first makes the error less than a unit in the last place, for which
// Markstein has proved that the second, with a correctly rounded reciprocal, rounds correctly.
// Signs are such that -0 stays -0.
__device__ Floats divide(Floats x, const Divider& by) {
#pragma unroll
  for (float& value : x.at) {
    float quotient = __fmul_rn(value, by.reciprocal);
#pragma unroll
    for (int i = 0; i < 2; ++i)
      quotient = __fmaf_rn(-__fmaf_rn(quotient, by.scale, -value), by.reciprocal, quotient);
    value = quotient;
  }
  return x;
}

template <class T>
__device__ Four<__nv_fp8_e4m3> quantized(const Units<T>& x, const Divider& by) {
  const Floats quotient = divide(widened(x), by);
  Four<__nv_fp8_e4m3> y;
#pragma unroll
  for (int j = 0; j < kLane; j += 2) {
    // None is beyond the range, and NaN stays NaN.
    const __nv_fp8x2_storage_t two = __nv_cvt_float2_to_fp8x2(
        make_float2(quotient.at[j], quotient.at[j + 1]), __NV_SATFINITE, __NV_E4M3);
    y.at[j].__x = static_cast<__nv_fp8_storage_t>(two & 0xFF);
    y.at[j + 1].__x = static_cast<__nv_fp8_storage_t>(two >> 8);
  }
  return y;
}

template <class T, bool kQuantize, bool kInterleaved, int kLanes>
__global__ __launch_bounds__(kThreads) void rope_kernel(const __grid_constant__ RopeParams params) {
  using Target = std::conditional_t<kQuantize, __nv_fp8_e4m3, T>;
  const int64_t thread = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const auto lane = static_cast<int>(thread % kLanes);
  const int64_t team = thread / kLanes;
  const int64_t per_row = (params.heads + kHeads - 1) / kHeads;
  const int64_t row = min(team / per_row, params.entries * params.rows - 1);
  const int64_t skipped = (team - row * per_row) * kHeads;  // behind the last row, all
  const auto count = static_cast<int>(min(params.heads - skipped, int64_t{kHeads}));
  const int64_t begin = row * params.heads + skipped;  // head
  const T* from = static_cast<const T*>(params.x) + begin * params.dim;
  Target* to = static_cast<Target*>(params.y) + begin * params.dim;
  const int64_t angles =
      row / params.rows * params.angle_stride + row % params.rows * params.turned;
  Pair<T> pairs[kPairs];
#pragma unroll
  for (int i = 0; i < kPairs; ++i)
    pairs[i] = make_pair<T, kInterleaved>(params, angles, lane + i * kLanes);

  const auto most = static_cast<int>(min(params.heads, int64_t{kHeads}));  // of any team
#pragma unroll 1
  for (int first = 0; first < most; first += kAtOnce) {
    Units<T> x[kAtOnce][kPairs][2] = {};
#pragma unroll
    for (int n = 0; n < kAtOnce; ++n, from += params.dim)
#pragma unroll
      for (int i = 0; i < kPairs; ++i)
#pragma unroll
        for (int j = 0; j < 2; ++j)
          if (first + n < count && pairs[i].inside)
            x[n][i][j] = *reinterpret_cast<const Units<T>*>(from + pairs[i].from[j]);
#pragma unroll
    for (int n = 0; n < kAtOnce; ++n, to += params.dim) {
      const bool there = first + n < count;
#pragma unroll
      for (int i = 0; i < kPairs; ++i)
        if (pairs[i].turns) turn<T, kInterleaved>(pairs[i], x[n][i]);
      Divider divider;
      if constexpr (kQuantize) {
        float scale = scale_of(find_amax<T, kLanes>(x[n]));
        if (params.power_of_two) scale = raise_to_power_of_two(scale);
        if (lane == 0 && there) params.scale[begin + first + n] = scale;
        divider = make_divider(scale);
      }
#pragma unroll
      for (int i = 0; i < kPairs; ++i)
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          if (!there || !pairs[i].inside) continue;
          Target* const y = to + pairs[i].to[j];
          if constexpr (kQuantize)
            *reinterpret_cast<Four<Target>*>(y) = quantized(x[n][i][j], divider);
          else
            *reinterpret_cast<Units<T>*>(y) = x[n][i][j];
        }
    }
  }
}

template <class T, bool kQuantize, bool kInterleaved>
void launch(const RopeParams& params, cudaStream_t stream) {
  const bool few = params.dim <= kFewLanes * kPairs * kPairChannels;
  const int64_t teams = params.entries * params.rows * ((params.heads + kHeads - 1) / kHeads);
  const int64_t threads = teams * (few ? kFewLanes : kManyLanes);
  const auto blocks = static_cast<unsigned>((threads + kThreads - 1) / kThreads);
  if (few)
    rope_kernel<T, kQuantize, kInterleaved, kFewLanes><<<blocks, kThreads, 0, stream>>>(params);
  else
    rope_kernel<T, kQuantize, kInterleaved, kManyLanes><<<blocks, kThreads, 0, stream>>>(params);
}

template <class T, bool kQuantize>
void launch(const RopeParams& params, cudaStream_t stream) {
  if (params.interleaved)
    launch<T, kQuantize, true>(params, stream);
  else
    launch<T, kQuantize, false>(params, stream);
}

template <class T>
void launch(const RopeParams& params, cudaStream_t stream) {
  if (params.quantize)
    launch<T, true>(params, stream);
  else
    launch<T, false>(params, stream);
}

}  // namespace

cudaError_t launch_rope(const RopeParams& params, cudaStream_t stream) {
  return launch_for_floats(params.type, [&]<class T> { launch<T>(params, stream); });
}

}  // namespace hisa::cuda
