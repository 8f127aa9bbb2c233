// Queries or keys on their way from a projection to the indexer: turned, quantised, or both. A warp
// for each kHeads heads of a row, four channels and their angles in each lane.
//
// Every product and sum is rounded to the type of x, as the separate operators of a model would.
// Cost: x is read once, y written once.
#include "../rope.h"

#include "lanes.cuh"
#include "launch.h"

namespace hisa::cuda {
namespace {

constexpr int kWarps = 8;  // of a block
constexpr int kHeads = 8;  // of a warp
constexpr int kAtOnce = 4;  // heads whose loads are under way together
// Values as elements of T, in fp32. Two at a time, since that is one conversion.
template <class T>
__device__ void round_to(Floats& x) {
#pragma unroll
  for (int j = 0; j < kLane; j += 2) {
    if constexpr (std::is_same_v<T, __nv_bfloat16>) {
      const float2 two = __bfloat1622float2(__floats2bfloat162_rn(x.at[j], x.at[j + 1]));
      x.at[j] = two.x;
      x.at[j + 1] = two.y;
    } else if constexpr (std::is_same_v<T, __half>) {
      const float2 two = __half22float2(__floats2half2_rn(x.at[j], x.at[j + 1]));
      x.at[j] = two.x;
      x.at[j + 1] = two.y;
    }
  }
}

// A lane's channels of a piece, and how they turn.
template <class T>
struct Channels {
  int first;  // channel
  bool inside, turns;
  int partner;  // interleaved: the first of all eight channels; else the first that they turn with
  bool minus;
  Four<T> cos, sin;
};

template <class T, bool kInterleaved>
__device__ Channels<T> make_channels(const RopeParams& params, int64_t row, int piece) {
  Channels<T> channels{};
  channels.first = first_channel(piece);
  channels.inside = channels.first < params.dim;
  const int64_t c = channels.first - params.first;
  channels.turns = channels.inside && c >= 0 && c < params.turned;
  if (!channels.turns) return channels;
  // The other three are next to the first one, since half of the turned channels is a multiple
  // of 4.
  const Turn turn = Turn::of(c, params.turned, kInterleaved);
  channels.partner = static_cast<int>(params.first + (kInterleaved ? 2 * turn.angle : turn.other));
  channels.minus = turn.minus;
  const int64_t angles =
      row / params.rows * params.angle_stride + row % params.rows * params.turned + turn.angle;
  channels.cos = *reinterpret_cast<const Four<T>*>(static_cast<const T*>(params.cos) + angles);
  channels.sin = *reinterpret_cast<const Four<T>*>(static_cast<const T*>(params.sin) + angles);
  return channels;
}

// Turn the four channels x; `head` holds all values of the head.
template <class T, bool kInterleaved>
__device__ void turn(const Channels<T>& channels, const float* head, Floats& x) {
  Floats other = *reinterpret_cast<const Floats*>(head + channels.partner);
  if constexpr (kInterleaved) {
    const Floats next = *reinterpret_cast<const Floats*>(head + channels.partner + kLane);
    const Floats even{other.at[0], other.at[2], next.at[0], next.at[2]};
    const Floats odd{other.at[1], other.at[3], next.at[1], next.at[3]};
    x = channels.minus ? even : odd;
    other = channels.minus ? odd : even;
  }
#pragma unroll
  for (int j = 0; j < kLane; ++j) {
    x.at[j] = __fmul_rn(x.at[j], widen(channels.cos.at[j]));
    other.at[j] = __fmul_rn(other.at[j], widen(channels.sin.at[j]));
  }
  round_to<T>(x);
  round_to<T>(other);
#pragma unroll
  for (int j = 0; j < kLane; ++j)
    x.at[j] = __fadd_rn(x.at[j], channels.minus ? -other.at[j] : other.at[j]);
  round_to<T>(x);
}

// The least power of two that is no smaller; infinity and NaN as they are.
__device__ float raise_to_power_of_two(float scale) {
  const uint32_t bits = __float_as_uint(scale);
  const uint32_t raised = (bits + 0x7FFFFFU) & 0x7F800000U;
  return bits >= 0x7F800000U ? scale : __uint_as_float(raised);
}

// What divides by a scale, correctly rounded where fp8 tells the quotient from zero.
struct Divider {
  float scale, reciprocal;
  bool finite;
};

__device__ Divider make_divider(float scale) {
  return {scale, __fdiv_rn(1.0F, scale), scale < INFINITY};
}

// NOTE: two corrections. The first makes the error less than a unit in the last place, for which
// Markstein has proved that the second, with a correctly rounded reciprocal, rounds correctly.
// Signs are such that -0 stays -0.
__device__ Floats divide(Floats x, const Divider& by) {
  if (!by.finite) {
#pragma unroll
    for (float& value : x.at) value = __fdiv_rn(value, by.scale);
    return x;
  }
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

__device__ Four<__nv_fp8_e4m3> quantized(const Floats& x, const Divider& by) {
  const Floats quotient = divide(x, by);
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

template <class T, bool kQuantize, bool kInterleaved, int kPieces>
__global__ __launch_bounds__(kWarps *
                             32) void rope_kernel(const __grid_constant__ RopeParams params) {
  using Target = std::conditional_t<kQuantize, __nv_fp8_e4m3, T>;
  __shared__ __align__(16) float heads[kWarps][kPieces * kPiece];
  float* const head = heads[threadIdx.x / 32];
  const int64_t per_row = (params.heads + kHeads - 1) / kHeads;
  const int64_t warp = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;
  const int64_t row = warp / per_row;
  if (row >= params.entries * params.rows) return;
  Channels<T> channels[kPieces];
#pragma unroll
  for (int i = 0; i < kPieces; ++i) channels[i] = make_channels<T, kInterleaved>(params, row, i);

  const int64_t skipped = warp % per_row * kHeads;
  const auto count = static_cast<int>(min(params.heads - skipped, int64_t{kHeads}));
  const int64_t begin = row * params.heads + skipped;  // head
  const T* from = static_cast<const T*>(params.x) + begin * params.dim;
  Target* to = static_cast<Target*>(params.y) + begin * params.dim;
  for (int first = 0; first < count; first += kAtOnce) {
    Bits<T> given[kAtOnce][kPieces];
#pragma unroll
    for (int n = 0; n < kAtOnce; ++n, from += params.dim)
#pragma unroll
      for (int i = 0; i < kPieces; ++i)
        if (first + n < count && channels[i].inside)
          given[n][i] = load_bits(from + channels[i].first);
#pragma unroll
    for (int n = 0; n < kAtOnce; ++n, to += params.dim) {
      if (first + n >= count) break;
      Floats x[kPieces] = {};
#pragma unroll
      for (int i = 0; i < kPieces; ++i) {
        if (!channels[i].inside) continue;
        x[i] = widened<T>(given[n][i]);
        *reinterpret_cast<Floats*>(head + channels[i].first) = x[i];
      }
      __syncwarp();
#pragma unroll
      for (int i = 0; i < kPieces; ++i)
        if (channels[i].turns) turn<T, kInterleaved>(channels[i], head, x[i]);
      __syncwarp();  // before the next head's values are written
      if constexpr (kQuantize) {
        float scale = scale_of(find_amax(x));
        if (params.power_of_two) scale = raise_to_power_of_two(scale);
        if (threadIdx.x % 32 == 0) params.scale[begin + first + n] = scale;
        const Divider divider = make_divider(scale);
#pragma unroll
        for (int i = 0; i < kPieces; ++i)
          if (channels[i].inside)
            *reinterpret_cast<Four<Target>*>(to + channels[i].first) = quantized(x[i], divider);
      } else {
#pragma unroll
        for (int i = 0; i < kPieces; ++i)
          if (channels[i].inside)
            *reinterpret_cast<Four<Target>*>(to + channels[i].first) = narrowed<T>(x[i]);
      }
    }
  }
}

template <class T, bool kQuantize, bool kInterleaved>
void launch(const RopeParams& params, cudaStream_t stream) {
  const int64_t warps = params.entries * params.rows * ((params.heads + kHeads - 1) / kHeads);
  const auto blocks = static_cast<unsigned>((warps + kWarps - 1) / kWarps);
  if (params.dim <= kPiece)
    rope_kernel<T, kQuantize, kInterleaved, 1><<<blocks, kWarps * 32, 0, stream>>>(params);
  else
    rope_kernel<T, kQuantize, kInterleaved, 2><<<blocks, kWarps * 32, 0, stream>>>(params);
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
