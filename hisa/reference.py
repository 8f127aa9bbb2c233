"""What hisa computes, in plain PyTorch: the definition that every kernel is checked against.

One function per stage, one row at a time, in the order in which they run:

    pool     one representative key per complete block         [N, D]     -> [ceil(N / B), D]
    score    weighted sum over heads of relu(q . k) * k_scale  [H, D]     -> [number of keys]
    select   the best `count`, ties to the lower index         [n]        -> ascending indices
    coarse   score pooled keys, select blocks                  one row    -> kept blocks
    refine   score the kept blocks' tokens, select tokens      one row    -> token indices

Slow and simple on purpose. Inputs are trusted here; `hisa.check` is the function that looks at
them. The arguments and results of `index`, `flat_index` and `pool_keys` are those of the functions
of the same name in `hisa`. Method: "HISA: Efficient Hierarchical Indexing for Fine-Grained Sparse
Attention", arXiv 2603.28458.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

FP8_MAX = 448.0
MIN_SCALE = 1e-10


class Row(NamedTuple):
    """Where one query may look: tokens [start, end) of the segment that begins at `origin`."""

    start: int
    end: int
    origin: int

    def block(self, token: int, block_size: int) -> int:
        """Return the number of the block that holds `token`, counted from the segment's start."""
        return (token - self.origin) // block_size


def pool(keys: Tensor, pooling: str) -> Tensor:
    """Stage 0 for one block of dequantised keys [B, D] fp32: its representative [D] fp32.

    The mean adds the tokens one after the other, so that its rounding is defined.
    """
    if pooling == "max":
        return keys.amax(0)
    total = torch.zeros_like(keys[0])
    for key in keys:
        total = total + key
    return total / keys.shape[0]


def score(q: Tensor, keys: Tensor, weights: Tensor, scale: Tensor) -> Tensor:
    """Score keys [n, D] for one query [H, D] with weights [H] and key scales [n]: fp32 [n].

    A NaN dot product contributes 0, as every other that is not above 0.
    """
    dots = q.float() @ keys.float().T  # [H, n]
    relu = torch.where(dots > 0, dots, 0.0)
    return scale * (weights[:, None] * relu).sum(0)


def select(scores: Tensor, count: int) -> Tensor:
    """Return the positions of the `count` best scores, in ascending order.

    Highest first; NaN ranks with -inf, -0.0 equals 0.0, and among equals the lower position wins.
    """
    ranked = torch.where(scores.isnan(), -torch.inf, scores) + 0.0
    order = ranked.argsort(descending=True, stable=True)
    return order[:count].sort().values


def coarse(
    q: Tensor,
    weights: Tensor,
    pooled: tuple[Tensor, Tensor],
    row: Row,
    block_size: int,
    block_topk: int,
) -> list[int]:
    """Stage 1 for one row: the numbers of the kept blocks, ascending.

    The first and the last block that meet the window are always kept. The others are complete, and
    the pooled key of the one that holds token `i * block_size` lies in slot i.
    """
    first, last = row.block(row.start, block_size), row.block(row.end - 1, block_size)
    if last - first + 1 <= block_topk:
        return list(range(first, last + 1))
    shift = -(-row.origin // block_size)  # slot of the segment's block 0
    inner = slice(shift + first + 1, shift + last)
    pooled_k, pooled_scale = pooled
    best = select(score(q, pooled_k[inner], weights, pooled_scale[inner]), block_topk - 2)
    return [first, *(first + 1 + best).tolist(), last]


def refine(
    q: Tensor,
    k: Tensor,
    weights: Tensor,
    k_scale: Tensor,
    row: Row,
    blocks: list[int],
    block_size: int,
    topk: int,
) -> tuple[Tensor, Tensor]:
    """Stage 2 for one row: the chosen tokens of the kept blocks, ascending, and their scores."""
    edges = [row.origin + block * block_size for block in blocks]
    tokens = torch.cat(
        [
            torch.arange(max(edge, row.start), min(edge + block_size, row.end), device=k.device)
            for edge in edges
        ]
    )
    scores = score(q, k[tokens], weights, k_scale[tokens])
    best = select(scores, topk)
    return tokens[best], scores[best]


def pool_keys(
    k: Tensor,
    *,
    k_scale: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    block_size: int = 128,
    pooling: str = "mean",
) -> tuple[Tensor, Tensor]:
    """Pool every complete block; see `hisa.pool_keys`."""
    slots = -(-k.shape[0] // block_size)
    pooled_k = torch.zeros(slots, k.shape[1], dtype=k.dtype, device=k.device)
    pooled_scale = torch.ones(slots, dtype=torch.float32, device=k.device)
    dequantised = k.float() if k_scale is None else k.float() * k_scale[:, None]
    for slot in range(slots):
        segment = find_segment(slot * block_size, k.shape[0], cu_seqlens_k)
        if segment is None:
            continue
        origin, end = segment
        start = origin + (slot * block_size - origin) // block_size * block_size
        if start + block_size > end:
            continue  # an incomplete block has no representative
        key = pool(dequantised[start : start + block_size], pooling)
        if k.dtype == torch.float8_e4m3fn:
            pooled_scale[slot] = (key.abs().amax() / FP8_MAX).clamp(min=MIN_SCALE)
            key = key / pooled_scale[slot]
        pooled_k[slot] = key.to(k.dtype)
    return pooled_k, pooled_scale


def index(
    q: Tensor,
    k: Tensor,
    weights: Tensor,
    *,
    k_scale: Tensor | None = None,
    ks: Tensor | None = None,
    ke: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    pooled: tuple[Tensor, Tensor] | None = None,
    block_size: int = 128,
    block_topk: int = 64,
    topk: int = 2048,
    pooling: str = "mean",
    return_scores: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Hierarchical selection, one row after the other; see `hisa.index`."""
    if pooled is None:
        pooled = pool_keys(
            k, k_scale=k_scale, cu_seqlens_k=cu_seqlens_k, block_size=block_size, pooling=pooling
        )
    scale = unit_scale(k) if k_scale is None else k_scale
    indices, scores = empty_output(q, topk)
    for m in range(q.shape[0]):
        row = find_row(m, k.shape[0], ks, ke, cu_seqlens_k)
        if row is None:
            continue
        blocks = coarse(q[m], weights[m], pooled, row, block_size, block_topk)
        tokens, best = refine(q[m], k, weights[m], scale, row, blocks, block_size, topk)
        indices[m, : len(tokens)] = tokens - row.start
        scores[m, : len(tokens)] = best
    return (indices, scores) if return_scores else indices


def flat_index(
    q: Tensor,
    k: Tensor,
    weights: Tensor,
    *,
    k_scale: Tensor | None = None,
    ks: Tensor | None = None,
    ke: Tensor | None = None,
    topk: int = 2048,
    return_scores: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Flat selection, one row after the other; see `hisa.flat_index`."""
    scale = unit_scale(k) if k_scale is None else k_scale
    indices, scores = empty_output(q, topk)
    for m in range(q.shape[0]):
        row = find_row(m, k.shape[0], ks, ke, None)
        if row is None:
            continue
        window = slice(row.start, row.end)
        row_scores = score(q[m], k[window], weights[m], scale[window])
        best = select(row_scores, topk)
        indices[m, : len(best)] = best
        scores[m, : len(best)] = row_scores[best]
    return (indices, scores) if return_scores else indices


def find_row(
    m: int, n: int, ks: Tensor | None, ke: Tensor | None, cu_seqlens_k: Tensor | None
) -> Row | None:
    """Clamp row m's window to [0, n) and to its segment; None if nothing is left."""
    start = 0 if ks is None else max(0, int(ks[m]))
    end = n if ke is None else min(n, int(ke[m]))
    segment = find_segment(start, n, cu_seqlens_k)
    if segment is None or min(end, segment[1]) <= start:
        return None
    return Row(start, min(end, segment[1]), segment[0])


def find_segment(token: int, n: int, cu_seqlens_k: Tensor | None) -> tuple[int, int] | None:
    """Return the first and the end token of the segment that holds `token`, None outside of all."""
    edges = [0, n] if cu_seqlens_k is None else [int(edge) for edge in cu_seqlens_k]
    for start, end in pairwise(edges):
        if start <= token < end:
            return start, end
    return None


def unit_scale(k: Tensor) -> Tensor:
    """Key scales of 1, [N] fp32."""
    return torch.ones(k.shape[0], dtype=torch.float32, device=k.device)


def empty_output(q: Tensor, topk: int) -> tuple[Tensor, Tensor]:
    """Indices of -1 and scores of -inf, both [M, topk]."""
    shape = (q.shape[0], topk)
    indices = torch.full(shape, -1, dtype=torch.int32, device=q.device)
    return indices, torch.full(shape, -torch.inf, dtype=torch.float32, device=q.device)
