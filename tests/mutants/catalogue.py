"""The seeded bugs: what goes wrong, in which file, and the edit that makes it go wrong.

A mutant that no longer applies is an error, so the list follows the sources. Mutants that change
speed only are not bugs and are left out.
"""

from __future__ import annotations

from typing import NamedTuple


class Mutant(NamedTuple):
    """One seeded bug."""

    name: str
    file: str  # below csrc/
    old: str
    new: str
    times: int = 1  # how often `old` occurs; all are replaced
    tests: tuple[str, ...] = ()  # what pytest is given instead of the usual tests


MUTANTS = [
    # windows and segments
    Mutant("ks ignored", "windows.h", "= wanted < 0 ? 0 : wanted;", "= wanted * 0;"),
    Mutant("negative ks not clamped", "windows.h", "wanted < 0 ? 0 : wanted", "wanted"),
    Mutant("ke is one short", "windows.h", ": windows.end[m];", ": windows.end[m] - 1;"),
    Mutant("blocks tile from token 0", "windows.h",
           ": segment.end, segment.begin}", ": segment.end, 0}"),
    Mutant("window runs into the next segment", "windows.h",
           "{start, end < segment.end ? end : segment.end,",
           "{start, end < key_count ? end : key_count,"),
    Mutant("segments not clamped to the keys", "windows.h",
           "edge < key_count ? edge : key_count", "edge"),
    # pool
    Mutant("blocks straddle segments", "cpu/pool.cpp",
           "start + params.block_size > segment.end", "start + params.block_size > keys.count"),
    Mutant("last complete block not pooled", "cpu/pool.cpp",
           "start + params.block_size > segment.end", "start + params.block_size >= segment.end"),
    Mutant("pooling ignores k_scale", "cpu/kernels_body.h", "key[d] *= scale;", "key[d] *= 1.0F;"),
    Mutant("maximum drops NaN", "cpu/kernels_body.h", " || key[d] != key[d] ?", " ?"),
    Mutant("max pooling is mean pooling", "checks.cpp",
           'if (name == "max") return Pooling::kMax', 'if (name == "max") return Pooling::kMean'),
    Mutant("zero block divides by zero", "cpu/pool.cpp",
           "scale < kMinScale ? kMinScale : scale", "scale"),
    Mutant("fp8 scale from another format", "cpu/pool.cpp", "kFp8Max = 448.0F", "kFp8Max = 240.0F"),
    Mutant("pooled offset in 32 bits", "cpu/pool.cpp", "start * keys.stride * element_size",
           "static_cast<int32_t>(start * keys.stride) * element_size"),
    # coarse
    Mutant("slot rounds down", "cpu/coarse.cpp",
           "(row.origin + size - 1) / size", "row.origin / size"),
    Mutant("second block is no candidate", "cpu/coarse.cpp",
           "= {shift + first + 1, shift + last,", "= {shift + first + 2, shift + last,"),
    Mutant("first block not forced", "cpu/coarse.cpp",
           "*block++ = row.origin + first * size;", "*block++ = row.origin + (first + 1) * size;"),
    Mutant("last block not forced", "cpu/coarse.cpp",
           "if (last > first) *block++", "if (all) *block++"),
    Mutant("one block too few", "cpu/coarse.cpp",
           "group.select(i, params.block_topk - 2);", "group.select(i, params.block_topk - 3);"),
    Mutant("pooled keys given are recomputed", "entry.h",
           ".pooled = pooled_k.has_value()};", ".pooled = pooled_k.has_value() && topk == 0};"),
    Mutant("keys are never pooled", "plan.h",
           "slots() > block_topk;", "slots() > 2 * block_topk;"),
    # scores
    Mutant("no ReLU", "cpu/kernels_body.h", "Isa::relu(dots[h][v])", "dots[h][v]"),
    Mutant("NaN passes the ReLU", "cpu/kernels_avx2.cpp",
           "_mm256_max_ps(x, zero())", "_mm256_max_ps(zero(), x)"),
    Mutant("scores ignore k_scale", "cpu/kernels_body.h", "tile.scale[n] * tile.scores[n]",
           "1.0F * tile.scores[n]"),
    Mutant("k_scale of another token", "cpu/group.cpp",
           "keys.scale + start", "keys.scale + all.begin"),
    Mutant("fp8 NaN bytes are 480", "cpu/isa_avx2.h", "_mm_and_si128(nan, _mm_set1_epi16(0x7E00))",
           "_mm_and_si128(nan, _mm_setzero_si128())"),
    Mutant("multiply-add rounds twice", "cpu/kernels_avx2.cpp", "_mm256_fmadd_ps(a, b, c)",
           "_mm256_add_ps(_mm256_mul_ps(a, b), c)"),
    Mutant("last panel of heads dropped", "cpu/kernels_body.h", "cut < cuts; ++cut",
           "cut < (cuts > 1 ? cuts - 1 : 1); ++cut"),
    Mutant("strides of weights ignored", "entry.h", "weights.stride(0)}", "weights.size(1)}"),
    # select
    Mutant("higher token wins a tie", "cpu/select.h",
           "~static_cast<uint32_t>(", "static_cast<uint32_t>(", times=2),
    Mutant("full buffer drops candidates", "cpu/select.cpp",
           "if (size_ == capacity_) compact();", "if (size_ == capacity_) return;"),
    Mutant("a chunk skips one score too many", "cpu/select.cpp", "i += kChunk;\n",
           "i += kChunk + 1;\n"),
    Mutant("NaN wins", "cpu/select.h", "nan ? -std::numeric_limits<float>::infinity()",
           "nan ? std::numeric_limits<float>::infinity()"),
    Mutant("NaN reported as -inf", "cpu/select.h", "| static_cast<uint32_t>(nan) |", "|"),
    Mutant("-0.0 ranks below 0.0", "cpu/select.h", ": score + 0.0F;", ": score;"),
    Mutant("negative scores in reverse", "cpu/select.h",
           "? ~bits : bits | kSign", "? bits ^ kSign : bits | kSign"),
    # refine, flat, output
    Mutant("last tile of a block dropped", "cpu/refine.cpp", "tile < end; tile += kTileKeys",
           "tile < end - 1; tile += kTileKeys"),
    Mutant("last tile of flat dropped", "cpu/group.cpp", "tile < end; tile += kTileKeys",
           "tile + kTileKeys <= end || tile == begin; tile += kTileKeys"),
    Mutant("indices not relative to ks", "cpu/refine.cpp",
           "row.end), row.start}", "row.end), row.origin}"),
    Mutant("tail of zeros", "cpu/group.cpp",
           "indices + output.topk, -1)", "indices + output.topk, 0)"),
    Mutant("tail not written", "cpu/group.cpp",
           "std::fill(indices + n, indices + output.topk, -1);", ""),
    Mutant("first group of rows skipped", "cpu/run.h",
           "i < plan.groups &&", "i + 1 < plan.groups &&"),
    Mutant("Ctrl-C ignored", "interrupt.h", "if (hooks.pending != nullptr && hooks.pending())",
           "if (hooks.pending == nullptr)"),
    # masks
    Mutant("end of a mask's row ignored", "cpu/mask.cpp",
           "while (key < count)", "while (key + kPiece <= count)"),
    Mutant("fp16 minimum is not masked", "mask.h", "bits >= kMinimum", "bits > kMinimum"),
    Mutant("NaN is masked", "mask.h", " && bits <= kInfinity", ""),
    Mutant("-0.0 does not attend", "mask.h", "static_cast<Bits>(bits << 1) == 0", "bits == 0"),
    Mutant("strides of a mask's rows ignored", "cpu/mask.cpp", "* params.row_stride",
           "* params.keys"),
    # the threads that rows run on, and what is done on their behalf
    Mutant("flush-to-zero as the thread has it", "cpu/run.h",
           "const FloatEnvironment environment;", ""),
    Mutant("pooling flushes to zero", "cpu/api.cpp", "const FloatEnvironment environment;", ""),
    Mutant("the caller's settings are lost", "cpu/float_environment.h", "std::fesetenv(&saved_)",
           "std::fegetenv(&saved_)"),
    Mutant("signals asked for on any thread", "python.cpp",
           "if (PyThread_get_thread_ident() != main_thread) return false;", ""),
    # checks
    Mutant("k_scale's length not checked", "checks.cpp", '"[N]", ScalarType::Float, {k.size(0)}',
           '"[N]", ScalarType::Float, {-1}'),
    Mutant("topk above the budget accepted", "checks.cpp", "(topk - 1) / block_size < block_topk",
           "(topk - 1) / block_size <= block_topk"),
]  # fmt: skip


# Built and tested with `--cuda`, on a GPU.
CUDA_MUTANTS = [
    # pool
    Mutant("pool: scale of the first token", "cuda/pool.cu",
           "keys.scale[start + i]", "keys.scale[start]"),
    Mutant("pool: blocks straddle segments", "cuda/pool.cu",
           "start + params.block_size <= segment.end", "start + params.block_size <= keys.count"),
    Mutant("pool: maximum drops NaN", "cuda/pool.cu", "b > a || b != b ? b : a", "b > a ? b : a"),
    Mutant("pool: zero block divides by zero", "cuda/pool.cu",
           "scale < kMinScale ? kMinScale : scale", "scale"),
    Mutant("pool: no barrier before the maximum", "cuda/pool.cu",
           "= amax;\n  __syncthreads();", "= amax;"),
    # coarse
    Mutant("coarse: slot rounds down", "cuda/coarse.cuh",
           "(row.origin + size - 1) >>", "row.origin >>"),
    Mutant("coarse: second block no candidate", "cuda/coarse.cuh",
           "slot + first + 1, last - first - 1)", "slot + first + 2, last - first - 2)"),
    Mutant("coarse: one block too many", "cuda/coarse.cuh",
           "params.block_topk - 2)", "params.block_topk - 1)"),
    Mutant("coarse: blocks from token 0", "cuda/coarse.cuh",
           "static_cast<int32_t>(row.origin);", "0;"),
    # refine
    Mutant("refine: first block not cut", "cuda/refine.cuh",
           "static_cast<uint32_t>(row.start - blocks[0]);", "0;"),
    Mutant("refine: last block not cut", "cuda/refine.cuh",
           "row.end - blocks[kept - 1]) - source.first",
           "(1 << params.block_shift)) - source.first"),
    Mutant("refine: outputs of 32-bit offsets", "cuda/refine.cuh",
           "output.indices + m * output.topk",
           "output.indices + static_cast<int32_t>(m * output.topk)",
           tests=("-m", "long", "tests/test_t12_large.py", "-k", "output_beyond", "--families",
                  "cuda")),
    # scores
    Mutant("scores ignore k_scale", "cuda/source.cuh", ".scale = keys.scale,", ".scale = nullptr,"),
    Mutant("keys of a block mixed up", "cuda/source.cuh",
           "((1U << block_shift) - 1)", "((1U << block_shift) - 2)"),
    Mutant("heads behind the last not zeroed", "cuda/rows.cuh", "h < queries.heads ?", "true ?"),
    Mutant("a kernel for more channels", "cuda/variants.h",
           "padded ? d <= dim : d == dim", "d <= dim"),
    Mutant("strides of weights are not used", "entry.h",
           "weights.stride(0)}", "weights.size(1)}"),
    Mutant("alignment is not looked at", "entry.h",
           "tensor.const_data_ptr()) % step == 0", "tensor.const_data_ptr()) >= 0"),
    # select
    Mutant("select: all ties of a warp pass", "cuda/select.cuh",
           "tie && rank < bar.ties", "tie && ties < bar.ties"),
    Mutant("select: ties of a slab forgotten", "cuda/select.cuh", "equal += total.y;", ""),
    Mutant("select: the tail counts twice", "cuda/select.cuh",
           "min(n - from, 4U)", "4U"),
    Mutant("select: no barrier before sums", "cuda/select.cuh",
           "memory.sums[parity][warp] = mine;\n  __syncthreads();",
           "memory.sums[parity][warp] = mine;"),
    Mutant("select: no barrier behind the bin", "cuda/select.cuh",
           "counts[0]};\n  }\n  __syncthreads();", "counts[0]};\n  }"),
    Mutant("select: histogram is not cleared", "cuda/select.cuh",
           "    bins[i] = uint4{0, 0, 0, 0};\n", ""),
    Mutant("select: digits of all keys counted", "cuda/select.cuh",
           "kFirst || key >> (low + width) == prefix ? 1 : 0", "1"),
    Mutant("select: NaN wins", "cuda/select.cuh",
           "fmaxf(score, -INFINITY) + 0.0F", "score + 0.0F"),
    Mutant("select: NaN is worse than -inf", "cuda/memory.cuh",
           "candidate == score || (score == -INFINITY && !(candidate > score))",
           "candidate == score"),
    Mutant("select: -0.0 ranks below 0.0", "cuda/select.cuh",
           "fmaxf(score, -INFINITY) + 0.0F", "fmaxf(score, -INFINITY)"),
    Mutant("select: the buffer overflows", "cuda/select.cuh",
           "size + n > region.capacity", "size + n > 2 * region.capacity"),
    Mutant("select: a full buffer drops a chunk", "cuda/select.cuh",
           "if (size + n > region.capacity) {", "if (size + n > region.capacity) return;\n  {"),
    Mutant("select: positions within the chunk", "cuda/select.cuh",
           "source.value(begin + i)", "source.value(i)"),
    # Hopper
    Mutant("hopper: rows of a group share weights", "cuda/sm90/load.cuh",
           "const int64_t of = m + i / C::kHeads;", "const int64_t of = m;"),
    Mutant("hopper: scales of segments that begin anywhere", "cuda/sm90/load.cuh",
           "(first + params.scale_offset) & 3U", "(0 * first + params.scale_offset) & 3U"),
    Mutant("hopper: scale tensors that begin anywhere", "cuda/sm90/load.cuh",
           "(key + params.scale_offset) & ~3U", "key & ~3U"),
    Mutant("hopper: scales of a pair are alike", "cuda/sm90/pair.cuh",
           "group.rows[lane].first) + params.scale_offset",
           "group.rows[0].first) + params.scale_offset"),
    Mutant("hopper: a pair's place in the second row", "cuda/sm90/pair.cuh",
           "add(same[i] >= 0, 0, mine[0][i], slot, same[i]);",
           "add(same[i] >= 0, 0, mine[0][i], slot, slot);"),
    Mutant("hopper: common blocks of a pair are the second row's too", "cuda/sm90/pair.cuh",
           "(common[i] >> lane & 1) == 0 &&", "kept[1] > 0 &&"),
    Mutant("hopper: windows of a group are alike", "cuda/sm90/load.cuh",
           "mine.scored ? mine.stage.source.first - base : 0", "0"),
    Mutant("hopper: scores of later chunks", "cuda/sm90/score.cuh",
           "max(group.rows[row].shift, begin * C::kTile)", "group.rows[row].shift"),
    Mutant("hopper: the key half of a sum", "cuda/sm90/score.cuh",
           "number(i) % 2 * 8", "0 * number(i)"),
    Mutant("hopper: the last block is not forced", "cuda/sm90/select.cuh",
           "blocks[i] = row.last;", "blocks[i] = row.first;"),
    Mutant("hopper: heads of a pair's second row", "cuda/sm90/score.cuh",
           "queries_ + first * C::kHeads * C::kPitch", "queries_"),
    Mutant("hopper: ties of the bar", "cuda/sm90/candidates.cuh",
           "sum<Team>(counts, turn, mine) <= bar.ties", "sum<Team>(counts, turn, mine) < bar.ties"),
    Mutant("hopper: NaN among the best", "cuda/sm90/candidates.cuh",
           "bracket.low = kLowestKey;", "bracket.low = least;"),
    Mutant("hopper: what lies behind the scores", "cuda/sm90/candidates.cuh",
           "scores[at] = NAN;", "scores[at] = INFINITY;"),
    Mutant("hopper: slabs of other warps", "cuda/sm90/candidates.cuh",
           "if (w < warp) before[i] += two;", "if (w <= warp) before[i] += two;"),
    Mutant("hopper: blocks that begin anywhere", "cuda/sm90/select_row.cuh",
           "positions != nullptr || source.first % 4 != 0", "positions != nullptr"),
    Mutant("hopper: the buffer overflows", "cuda/sm90/select_row.cuh",
           "size + passing <= buffer.capacity", "size + passing <= 2 * buffer.capacity"),
    Mutant("hopper: positions within the chunk", "cuda/sm90/select_row.cuh",
           "static_cast<int32_t>(begin + at + j)", "static_cast<int32_t>(at + j)"),
    Mutant("hopper: one more than is kept", "cuda/select_bracket.cuh",
           "reach_low <= count + slack", "reach_low <= count + slack + 1"),
    Mutant("hopper: ties among few blocks", "cuda/select_warp.cuh",
           "static_cast<uint32_t>(__popc(equal & before)) < ties", "true"),
    Mutant("hopper: calls of other families", "cuda/sm90/launch.cpp",
           "variant.heads == shape.heads", "variant.heads >= shape.heads"),
    # launch
    Mutant("launch: room for topk alone", "cuda/launch.cpp",
           "std::max(std::min(shape.topk, tokens), geometry.kept)", "std::min(shape.topk, tokens)"),
    Mutant("launch: the workspace of one block", "cuda/launch.cpp",
           "geometry.grid * row;", "row;"),
    Mutant("launch: on the default stream", "cuda/api.cpp",
           "getCurrentCUDAStream()", "getDefaultCUDAStream()"),
]  # fmt: skip


def mutated(mutant: Mutant, text: str) -> str:
    """Return a source file's text with the bug in it; ValueError if the text has moved on."""
    found = text.count(mutant.old)
    if found != mutant.times:
        raise ValueError(f"{mutant.name}: {mutant.old!r} occurs {found} times in {mutant.file}")
    return text.replace(mutant.old, mutant.new)
