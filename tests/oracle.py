"""SPEC.md in NumPy, one row at a time: what the right answer is.

Written from SPEC.md alone. It shares no code with `hisa.reference` and the C++ sources, and not
even torch's casts (see `numeric`). Two ways to add up a score:

    exact_score   fp64; needs inputs on which fp32 sums are exact in any order, and checks it.
                  Every device and kernel family must then give these very bits.
    ieee_score    fp32 in the order that the CPU path documents: one fused multiply-add after
                  another over channels, then over heads. Any input, NaN and infinity included.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from tests.case import Case
from tests.numeric import F32, FP8, decode, fma, round_to

Score = Callable[[F32, F32, F32, F32], F32]


class Expected(NamedTuple):
    """The right answer."""

    indices: NDArray[np.int32]  # [M, k]
    scores: F32  # [M, k]
    kept: list[list[int]]  # per row, the first token of each kept block (flat: empty)


class Window(NamedTuple):
    """Tokens [start, end) of the segment that begins at token `origin`."""

    start: int
    end: int
    origin: int


def exact_score(q: F32, k: F32, weights: F32, scale: F32) -> F32:
    """Score keys [n, D] for one query [H, D] in fp64 and assert that fp32 gives the same."""
    dots = k.astype(np.float64) @ q.astype(np.float64).T
    total = np.where(dots > 0, dots, 0.0) @ weights.astype(np.float64)
    rounded = total.astype(np.float32)
    assert (rounded == total).all(), "the builder made inputs that are not exact in fp32"
    return rounded * scale


def ieee_score(q: F32, k: F32, weights: F32, scale: F32) -> F32:
    """Score keys [n, D] for one query [H, D] in fp32, every rounding where the CPU path has it."""
    total = np.zeros(len(k), dtype=np.float32)
    for head in range(q.shape[0]):
        dot = np.zeros(len(k), dtype=np.float32)
        for channel in range(q.shape[1]):
            dot = fma(q[head, channel], k[:, channel], dot)
        relu = np.where(dot > 0, dot, np.float32(0))
        total = fma(weights[head], relu, total)
    with np.errstate(all="ignore"):
        return total * scale


def best(scores: F32, count: int) -> NDArray[np.int64]:
    """Positions of the `count` best, ascending: NaN as -inf, -0.0 as 0.0, ties to the lower."""
    rank = np.where(np.isnan(scores), -np.inf, scores) + 0.0
    order = np.argsort(-rank, kind="stable")
    return np.sort(order[:count])


def segments(case: Case) -> list[tuple[int, int]]:
    """First and end token of every segment."""
    if case.cu_seqlens_k is None:
        return [(0, case.k.shape[0])]
    edges = case.cu_seqlens_k.tolist()
    return [(edges[i], edges[i + 1]) for i in range(len(edges) - 1)]


def window(case: Case, row: int, packed: bool = True) -> Window | None:
    """Return the row's window, clamped to the keys and to its segment; None if it is empty."""
    n = case.k.shape[0]
    start = 0 if case.ks is None else min(max(int(case.ks[row]), 0), n)
    end = n if case.ke is None else min(max(int(case.ke[row]), 0), n)
    for first, past in segments(case) if packed else [(0, n)]:
        if first <= start < past and start < min(end, past):
            return Window(start, min(end, past), first)
    return None


def candidates(case: Case, seen: Window) -> list[int]:
    """Return the first token of each block that meets the window, ascending."""
    size = case.block_size
    return [
        token
        for token in range(seen.origin, seen.end, size)
        if token + size > seen.start  # tokens [token, token + size) meet [start, end)
    ]


def pool_block(case: Case, first: int, keys: F32, scale: F32) -> tuple[F32, np.float32]:
    """Return the pooled key (as fp32 values) and its scale for the block that starts at `first`."""
    members = [keys[token] * scale[token] for token in range(first, first + case.block_size)]
    with np.errstate(all="ignore"):
        if case.pooling == "max":
            pooled = np.max(members, axis=0)
        else:
            pooled = np.zeros(keys.shape[1], dtype=np.float32)
            for member in members:
                pooled = pooled + member
            pooled = pooled / np.float32(case.block_size)
        pooled_scale = np.float32(1)
        if case.k.dtype == FP8:
            amax = np.max(np.abs(pooled))
            pooled_scale = np.maximum(amax / np.float32(448), np.float32(1e-10))
            pooled = pooled / pooled_scale
        return round_to(case.k.dtype, pooled), pooled_scale


def pool_keys(case: Case) -> tuple[F32, F32, NDArray[np.bool_]]:
    """Pooled keys as fp32 values, their scales, and which slots hold a complete block.

    A block's slot is the one whose number times B is a token of the block.
    """
    n, size = case.k.shape[0], case.block_size
    slots = (n + size - 1) // size
    keys, scale = decode(case.k), key_scales(case)
    pooled = np.zeros((slots, case.k.shape[1]), dtype=np.float32)
    pooled_scale = np.ones(slots, dtype=np.float32)
    used = np.zeros(slots, dtype=np.bool_)
    for first, past in segments(case):
        for token in range(first, past - size + 1, size):
            slot = slot_of(case, token)
            assert not used[slot]
            used[slot] = True
            with np.errstate(all="ignore"):
                pooled[slot], pooled_scale[slot] = pool_block(case, token, keys, scale)
    return pooled, pooled_scale, used


def slot_of(case: Case, first: int) -> int:
    """Return the slot of the block that starts at token `first`."""
    owned = [t for t in range(first, first + case.block_size) if t % case.block_size == 0]
    return owned[0] // case.block_size


def key_scales(case: Case) -> F32:
    """Key scales, 1 where there are none."""
    n = case.k.shape[0]
    return np.ones(n, dtype=np.float32) if case.k_scale is None else decode(case.k_scale)


def index(case: Case, score: Score = exact_score) -> Expected:
    """Hierarchical selection."""
    pooled, pooled_scale, used = pool_keys(case)
    if case.pooled is not None:
        pooled, pooled_scale = decode(case.pooled[0]), decode(case.pooled[1])
    q, keys, weights, scale = decode(case.q), decode(case.k), decode(case.weights), key_scales(case)
    out = nothing(case)
    for row in range(case.q.shape[0]):
        seen = window(case, row)
        if seen is None:
            continue
        blocks = candidates(case, seen)
        if len(blocks) > case.block_topk:
            inner = blocks[1:-1]
            slots = [slot_of(case, token) for token in inner]
            assert used[slots].all()
            ranked = score(q[row], pooled[slots], weights[row], pooled_scale[slots])
            chosen = [inner[i] for i in best(ranked, case.block_topk - 2)]
            blocks = [blocks[0], *chosen, blocks[-1]]
        tokens = [
            token
            for first in blocks
            for token in range(first, first + case.block_size)
            if seen.start <= token < seen.end
        ]
        scores = score(q[row], keys[tokens], weights[row], scale[tokens])
        fill(out, row, np.array(tokens), scores, seen.start, case.topk)
        out.kept[row].extend(blocks)
    return out


def flat_index(case: Case, score: Score = exact_score) -> Expected:
    """Flat selection."""
    q, keys, weights, scale = decode(case.q), decode(case.k), decode(case.weights), key_scales(case)
    out = nothing(case)
    for row in range(case.q.shape[0]):
        seen = window(case, row, packed=False)
        if seen is None:
            continue
        tokens = np.arange(seen.start, seen.end)
        scores = score(q[row], keys[tokens], weights[row], scale[tokens])
        fill(out, row, tokens, scores, seen.start, case.topk)
    return out


def nothing(case: Case) -> Expected:
    """Return the answer for rows without tokens: -1 and -inf everywhere."""
    shape = (case.q.shape[0], case.topk)
    indices = np.full(shape, -1, dtype=np.int32)
    return Expected(indices, np.full(shape, -np.inf, np.float32), [[] for _ in range(shape[0])])


def fill(out: Expected, row: int, tokens: NDArray[np.int64], scores: F32, start: int,
         topk: int) -> None:  # fmt: skip
    """Write the best tokens of one row, relative to the window's start."""
    chosen = best(scores, topk)
    out.indices[row, : len(chosen)] = tokens[chosen] - start
    out.scores[row, : len(chosen)] = scores[chosen]


def as_pooled(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """Pooled keys as the tensors that `index(pooled=...)` takes."""
    pooled, scale, _ = pool_keys(case)
    return torch.from_numpy(pooled).to(case.k.dtype), torch.from_numpy(scale)
