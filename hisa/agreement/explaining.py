"""Runs both indexers for one row and keeps what they decide by."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hisa.checking import NUMBER, check_inputs, check_types
from hisa.ops import flat_index, index, pool_keys
from hisa.reference import Row, find_row

from .explanation import Block, Explanation, Fate, Lost


def explain(
    q: Tensor,
    k: Tensor,
    weights: Tensor,
    *,
    row: int,
    k_scale: Tensor | None = None,
    ks: Tensor | None = None,
    ke: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    block_size: int = 128,
    block_topk: int = 64,
    topk: int = 2048,
    pooling: str = "mean",
) -> Explanation:
    """Explain what `hisa.index` keeps for one row, and what it loses of `hisa.flat_index`'s choice.

    The answer to "why is this token missing?": each block that meets the row's window with its
    coarse score and rank, whether it is kept, and how many of flat's tokens lie in it.

        explanation = hisa.explain(q, k, weights, row=511, ke=ke)
        print(explanation)  # or show it in Jupyter, .plot(), .blocks, .lost

    Args:
        q, k, weights, k_scale, ks, ke, cu_seqlens_k, block_size, block_topk, topk, pooling: as for
            `hisa.index`.
        row: which row of q, 0 to M - 1.

    Returns:
        An `Explanation`. Its tokens are numbered as the keys in `k`, not from `ks[row]` on.

    Raises:
        TypeError, ValueError: what `hisa.index` would raise, or there is no such row.

    Cost: pooling all keys, then flat and hisa for one row. Memory: the pooled keys, and about 100
    bytes for each token of the window. Reads from the device.
    """
    sizes = (block_size, block_topk, topk, pooling)
    check_inputs(q, k, weights, k_scale, ks, ke, cu_seqlens_k, None, *sizes)
    check_types(NUMBER, row=row)
    if not 0 <= row < q.shape[0]:
        raise ValueError(f"row: expected 0 to M - 1 = {q.shape[0] - 1}, got {row}")

    edges = None if cu_seqlens_k is None else cu_seqlens_k.cpu()
    seen = find_row(row, k.shape[0], ks, ke, edges) or Row(0, 0, 0)
    q, weights = q[row : row + 1], weights[row : row + 1]
    scores = _scores(q, k, weights, k_scale, seen.start, seen.end)
    best = _order(scores)[:topk]

    pooled = pool_keys(
        k, k_scale=k_scale, cu_seqlens_k=cu_seqlens_k, block_size=block_size, pooling=pooling
    )
    chosen = index(
        q,
        k,
        weights,
        k_scale=k_scale,
        ks=_int32(seen.start, k),
        ke=_int32(seen.end, k),
        cu_seqlens_k=cu_seqlens_k,
        pooled=pooled,
        block_size=block_size,
        block_topk=block_topk,
        topk=topk,
    )[0].cpu()
    chosen = chosen[chosen >= 0]

    first, last = seen.block(seen.start, block_size), seen.block(seen.end - 1, block_size)
    shift = -(-seen.origin // block_size)  # slot of the segment's block 0
    coarse = _scores(q, pooled[0], weights, pooled[1], shift + first + 1, shift + last)
    tokens = torch.arange(seen.start, seen.end, device="cpu")
    block_of = (tokens - seen.origin) // block_size - first  # [tokens], candidates from 0 on
    starts = range(seen.origin + first * block_size, seen.end, block_size)
    blocks, bar = _blocks(starts, coarse, block_topk, block_of, scores, best, chosen)
    flat = best.sort().values
    return Explanation(
        row=row,
        window=(seen.start, seen.end),
        block_size=block_size,
        block_topk=block_topk,
        topk=topk,
        pooling=pooling,
        bar=bar,
        blocks=blocks,
        lost=_lost(blocks, bar, seen.start, block_of, scores, best, chosen),
        flat=tokens[flat].int(),
        flat_scores=scores[flat],
        selected=tokens[chosen].int(),
    )


def _int32(value: int, like: Tensor) -> Tensor:
    return torch.tensor([value], dtype=torch.int32, device=like.device)


def _scores(
    q: Tensor, keys: Tensor, weights: Tensor, scale: Tensor | None, start: int, end: int
) -> Tensor:
    """Score keys [start, end) for one row, to the bit as the operators do: on the CPU."""
    if end <= start:
        return torch.empty(0, dtype=torch.float32, device="cpu")
    window = {"ks": _int32(start, keys), "ke": _int32(end, keys)}
    count = end - start  # all are selected, so their scores come in order
    scores = flat_index(q, keys, weights, k_scale=scale, **window, topk=count, return_scores=True)
    return scores[1][0].cpu()


def _ranked(scores: Tensor) -> Tensor:
    """Return what scores are compared by: NaN as -inf, -0.0 as 0.0."""
    return torch.where(scores.isnan(), -torch.inf, scores) + 0.0


def _order(scores: Tensor) -> Tensor:
    """Return positions in the order of preference."""
    return _ranked(scores).argsort(descending=True, stable=True)


def _blocks(
    starts: range,
    coarse: Tensor,
    block_topk: int,
    block_of: Tensor,
    scores: Tensor,
    best: Tensor,
    chosen: Tensor,
) -> tuple[tuple[Block, ...], float | None]:
    """Return all candidates, and the lowest coarse score that a block was chosen by."""
    count = len(starts)
    pruned = count > block_topk
    places = block_topk - 2 if pruned else len(coarse)
    order = _order(coarse)
    rank = torch.empty_like(order)
    rank[order] = torch.arange(1, len(order) + 1, device="cpu")
    bar = float(coarse[order[places - 1]]) if pruned and places else None
    inner: list[Fate] = ["kept" if place <= places else "dropped" for place in rank.tolist()]

    top = scores.new_full((count,), -torch.inf)
    top = top.scatter_reduce(0, block_of, _ranked(scores), "amax")
    columns = (
        starts,
        block_of.bincount(minlength=count).tolist(),
        # NOTE: a single candidate is the first one.
        [None, *coarse.tolist(), None][:count],
        [None, *rank.tolist(), None][:count],
        ["sink", *inner, "local"][:count],
        block_of[best].bincount(minlength=count).tolist(),
        block_of[chosen].bincount(minlength=count).tolist(),
        top.tolist(),
    )
    return tuple(Block(*values) for values in zip(*columns, strict=True)), bar


def _lost(
    blocks: tuple[Block, ...],
    bar: float | None,
    start: int,
    block_of: Tensor,
    scores: Tensor,
    best: Tensor,
    chosen: Tensor,
) -> tuple[Lost, ...]:
    """Return flat's tokens that hisa lacks, in flat's order of preference."""
    found = set(chosen.tolist())
    columns = (best.tolist(), scores[best].tolist(), block_of[best].tolist())
    return tuple(
        Lost(start + i, rank, score, at, blocks[at].rank, _below(bar, blocks[at].coarse))
        for rank, (i, score, at) in enumerate(zip(*columns, strict=True), 1)
        if i not in found
    )


def _below(bar: float | None, coarse: float | None) -> float | None:
    """Return by how much a coarse score misses the bar, NaN as -inf."""
    if bar is None or coarse is None:
        return None
    bar, coarse = (-math.inf if math.isnan(value) else value for value in (bar, coarse))
    return 0.0 if bar == coarse else bar - coarse
