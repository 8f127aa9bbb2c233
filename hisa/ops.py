"""The operators: `index`, `flat_index`, `pool_keys`, each with its fake kernel below it.

`torch.ops.hisa.*` are the same operators as the dispatcher sees them: they always return two
tensors, and the second one has no rows where scores were not asked for. Their overload `out` writes
to the tensors that it is given and returns nothing.
"""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from . import _extension
from .checking import (
    NUMBER,
    OPTIONAL,
    SELECTION,
    check,
    check_index_types,
    check_types,
    check_values,
    named_results,
    selection,
    wants_check,
)
from .contract import check_contract, check_numbers
from .fakes import empty_selection, fake_kernel
from .pooled import PooledKeys, kept_pair

Pooled = tuple[Tensor, Tensor]


def pool_keys(
    k: Tensor,
    *,
    k_scale: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    block_size: int = 128,
    pooling: str = "mean",
    out: Pooled | None = None,
) -> Pooled:
    """Pool every complete block of keys to one key: stage 0 of the hierarchical indexer.

    Blocks of `block_size` tokens tile each packed sequence from its own start. Slot i of the result
    belongs to the block that holds token `i * block_size`, if that block is complete; otherwise it
    is zero and nothing reads it. With one sequence, slot j is simply block j.

    Args:
        k: `[N, D]` float32, bfloat16, float16 or float8_e4m3fn; D a multiple of 16 up to 256.
        k_scale: `[N]` float32, at least 0. A key is `k * k_scale`; absent means 1.
        cu_seqlens_k: `[S + 1]` int32, first token of each packed sequence, then N. Absent means one
            sequence.
        block_size: tokens per block: 8, 16, 32, 64, 128 or 256.
        pooling: "mean" or "max" (per channel).
        out: `(pooled_k, pooled_scale)` to write to, instead of new tensors: see `index`. A pooled
            key begins at a multiple of 16 bytes.

    Returns:
        `(pooled_k, pooled_scale)`: `[ceil(N / block_size), D]` of k's dtype and
        `[ceil(N / block_size)]` float32. The scale is `max(amax / 448, 1e-10)` for float8_e4m3fn, 1
        for every other dtype. Pass the pair to `index(pooled=...)`.

    Raises:
        TypeError: a tensor's dtype is not accepted.
        ValueError: a shape, device, `block_size`, `pooling` or `out` is not accepted.

    Source: arXiv 2603.28458; defined by `hisa.reference.pool_keys`.
    """
    _extension.require()
    check_types(Tensor, k=k)
    check_types(OPTIONAL, k_scale=k_scale, cu_seqlens_k=cu_seqlens_k)
    check_types(NUMBER, block_size=block_size)
    check_types(str, pooling=pooling)
    call: dict[str, object] = {"k_scale": k_scale, "cu_seqlens_k": cu_seqlens_k}
    call |= {"block_size": block_size, "pooling": pooling}
    if out is not None:
        torch.ops.hisa.pool_keys.out(k, **call, **named_results(out, "pooled_k", "pooled_scale"))
        return out
    pooled: Pooled = torch.ops.hisa.pool_keys.default(k, **call)
    return pooled


@fake_kernel("pool_keys", ("pooled_k", "pooled_scale"))
def _(
    k: Tensor,
    *,
    k_scale: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    block_size: int = 128,
    pooling: str = "mean",
) -> Pooled:
    check_numbers(block_size, 2, 1, pooling)
    check_contract(k, k_scale=k_scale, cu_seqlens_k=cu_seqlens_k)
    blocks = (k.shape[0] + block_size - 1) // block_size
    return k.new_empty(blocks, k.shape[1]), k.new_empty(blocks, dtype=torch.float32)


@overload
def index(
    q: Tensor,
    k: Tensor,
    weights: Tensor,
    *,
    k_scale: Tensor | None = ...,
    ks: Tensor | None = ...,
    ke: Tensor | None = ...,
    cu_seqlens_k: Tensor | None = ...,
    pooled: Pooled | PooledKeys | None = ...,
    block_size: int = ...,
    block_topk: int = ...,
    topk: int = ...,
    pooling: str = ...,
    return_scores: Literal[False] = ...,
    out: Tensor | None = ...,
) -> Tensor: ...


@overload
def index(
    q: Tensor,
    k: Tensor,
    weights: Tensor,
    *,
    k_scale: Tensor | None = ...,
    ks: Tensor | None = ...,
    ke: Tensor | None = ...,
    cu_seqlens_k: Tensor | None = ...,
    pooled: Pooled | PooledKeys | None = ...,
    block_size: int = ...,
    block_topk: int = ...,
    topk: int = ...,
    pooling: str = ...,
    return_scores: bool,
    out: Tensor | tuple[Tensor, Tensor] | None = ...,
) -> Tensor | tuple[Tensor, Tensor]: ...


def index(
    q: Tensor,
    k: Tensor,
    weights: Tensor,
    *,
    k_scale: Tensor | None = None,
    ks: Tensor | None = None,
    ke: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    pooled: Pooled | PooledKeys | None = None,
    block_size: int = 128,
    block_topk: int = 64,
    topk: int = 2048,
    pooling: str = "mean",
    return_scores: bool = False,
    out: Tensor | tuple[Tensor, Tensor] | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Select tokens hierarchically: the best blocks by their pooled keys, then their best tokens.

    A token's score is `k_scale[n] * sum_h weights[m, h] * relu(q[m, h] . k[n])` in float32. For
    each row the first and the last block that meet its window are kept, and the best
    `block_topk - 2` of the others; of the kept blocks' tokens inside the window the best `topk` are
    returned. Where the window meets at most `block_topk` blocks, that is bit for bit what
    `flat_index` returns.

    Among equal scores the lower token wins, and a NaN ranks with -inf. A row's result depends
    on nothing but the row: not on M, other rows, chunking, padding or the number of threads.

    Args:
        q: `[M, H, D]` of k's dtype, the indexer's queries; H from 1 to 128.
        k: `[N, D]` float32, bfloat16, float16 or float8_e4m3fn; D a multiple of 16 up to 256.
        weights: `[M, H]` float32, any sign, with every scale of the queries folded in.
        k_scale: `[N]` float32, at least 0. A key is `k * k_scale`; absent means 1.
        ks, ke: `[M]` int32: row m may select tokens `[ks[m], ke[m])`. Absent means 0 and N. Values
            outside [0, N] are clamped, and `ke <= ks` is an empty row.
        cu_seqlens_k: `[S + 1]` int32, first token of each packed sequence, then N: blocks tile each
            sequence from its own start. A window lies inside the sequence that holds its first
            token; what reaches beyond is cut off. Absent means one sequence.
        pooled: what `pool_keys` returns for these keys, to save computing it again; or the
            `PooledKeys` of which k is `keys` and k_scale is `k_scale`.
        block_size: tokens per block: 8, 16, 32, 64, 128 or 256.
        block_topk: blocks kept per row, at least 2.
        topk: tokens selected per row, 1 to `block_topk * block_size`.
        pooling: "mean" or "max"; not used if `pooled` is given.
        return_scores: return the selected tokens' scores as well.
        out: where to write to, instead of new tensors: indices, or with `return_scores` a tuple
            `(indices, scores)`. Exactly of the shape, dtype and device of what would be returned,
            contiguous, without a gradient, and no memory of another argument. Every element is
            written, and `out` is returned.

    Returns:
        `indices`, `[M, topk]` int32: the selected tokens relative to `ks[m]`, ascending, then -1.
        With `return_scores`, `(indices, scores)`: scores `[M, topk]` float32 in the same order,
        then -inf. Neither carries a gradient.

    Raises:
        TypeError: a tensor's dtype is not accepted.
        ValueError: a shape, device or number is not accepted, or `out` is not. Windows are data and
            are not looked at; `hisa.check`, or the environment variable HISA_CHECK=1, finds bad
            ones.

    Cost: `M * (N / block_size + block_topk * block_size) * H * D` multiply-adds and a workspace
    that does not depend on M (`hisa.plan` gives both). Source: arXiv 2603.28458; defined by
    `hisa.reference.index`.
    """
    _extension.require()
    if isinstance(pooled, PooledKeys):
        pooled = kept_pair(pooled, k, k_scale, cu_seqlens_k, block_size)
    check_index_types(
        q,
        k,
        weights,
        k_scale,
        ks,
        ke,
        cu_seqlens_k,
        pooled,
        block_size,
        block_topk,
        topk,
        pooling,
        return_scores,
    )
    pooled_k, pooled_scale = (None, None) if pooled is None else pooled
    if wants_check(q, k, weights, k_scale, ks, ke, cu_seqlens_k, pooled_k, pooled_scale):
        check(
            q,
            k,
            weights,
            k_scale=k_scale,
            ks=ks,
            ke=ke,
            cu_seqlens_k=cu_seqlens_k,
            pooled=pooled,
            block_size=block_size,
            block_topk=block_topk,
            topk=topk,
            pooling=pooling,
        )
    call: dict[str, object] = {
        "k_scale": k_scale,
        "ks": ks,
        "ke": ke,
        "cu_seqlens_k": cu_seqlens_k,
        "pooled_k": pooled_k,
        "pooled_scale": pooled_scale,
        "block_size": block_size,
        "block_topk": block_topk,
        "topk": topk,
        "pooling": pooling,
    }
    if out is not None:
        torch.ops.hisa.index.out(q, k, weights, **call, **selection(out, return_scores))
        return out
    indices, scores = torch.ops.hisa.index.default(
        q, k, weights, **call, return_scores=return_scores
    )
    return (indices, scores) if return_scores else indices


@fake_kernel("index", SELECTION, "return_scores")
def _(
    q: Tensor,
    k: Tensor,
    weights: Tensor,
    *,
    k_scale: Tensor | None = None,
    ks: Tensor | None = None,
    ke: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    pooled_k: Tensor | None = None,
    pooled_scale: Tensor | None = None,
    block_size: int = 128,
    block_topk: int = 64,
    topk: int = 2048,
    pooling: str = "mean",
    return_scores: bool = False,
) -> tuple[Tensor, Tensor]:
    check_numbers(block_size, block_topk, topk, pooling)
    check_contract(
        k,
        block_size=block_size,
        q=q,
        weights=weights,
        k_scale=k_scale,
        ks=ks,
        ke=ke,
        cu_seqlens_k=cu_seqlens_k,
        pooled_k=pooled_k,
        pooled_scale=pooled_scale,
    )
    return empty_selection(q, topk, return_scores)


@overload
def flat_index(
    q: Tensor,
    k: Tensor,
    weights: Tensor,
    *,
    k_scale: Tensor | None = ...,
    ks: Tensor | None = ...,
    ke: Tensor | None = ...,
    topk: int = ...,
    return_scores: Literal[False] = ...,
    out: Tensor | None = ...,
) -> Tensor: ...


@overload
def flat_index(
    q: Tensor,
    k: Tensor,
    weights: Tensor,
    *,
    k_scale: Tensor | None = ...,
    ks: Tensor | None = ...,
    ke: Tensor | None = ...,
    topk: int = ...,
    return_scores: bool,
    out: Tensor | tuple[Tensor, Tensor] | None = ...,
) -> Tensor | tuple[Tensor, Tensor]: ...


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
    out: Tensor | tuple[Tensor, Tensor] | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Select the best tokens of the whole window: the indexer that `index` stands in for.

    Same scores, order of preference and output as `index`. The workspace grows with neither M nor
    N.

    Args:
        q: `[M, H, D]` of k's dtype, the indexer's queries; H from 1 to 128.
        k: `[N, D]` float32, bfloat16, float16 or float8_e4m3fn; D a multiple of 16 up to 256.
        weights: `[M, H]` float32, any sign, with every scale of the queries folded in.
        k_scale: `[N]` float32, at least 0. A key is `k * k_scale`; absent means 1.
        ks, ke: `[M]` int32: row m may select tokens `[ks[m], ke[m])`. Absent means 0 and N. Values
            outside [0, N] are clamped, and `ke <= ks` is an empty row.
        topk: tokens selected per row, at least 1.
        return_scores: return the selected tokens' scores as well.
        out: where to write to, instead of new tensors: see `index`.

    Returns:
        `indices`, `[M, topk]` int32: the selected tokens relative to `ks[m]`, ascending, then -1.
        With `return_scores`, `(indices, scores)`: scores `[M, topk]` float32 in the same order,
        then -inf. Neither carries a gradient.

    Raises:
        TypeError: a tensor's dtype is not accepted.
        ValueError: a shape, device or number is not accepted, or `out` is not. Windows are not
            looked at; the environment variable HISA_CHECK=1 finds bad ones.

    Cost: `M * N * H * D` multiply-adds. Source: DeepSeek-V3.2's lightning indexer; defined by
    `hisa.reference.flat_index`.
    """
    _extension.require()
    check_types(Tensor, q=q, k=k, weights=weights)
    check_types(OPTIONAL, k_scale=k_scale, ks=ks, ke=ke)
    check_types(NUMBER, topk=topk)
    check_types(bool, return_scores=return_scores)
    if wants_check(q, k, weights, k_scale, ks, ke):
        _extension.require().check_flat_index(q, k, weights, k_scale, ks, ke, topk)
        check_values(k, k_scale, ks, ke, None)
    call: dict[str, object] = {"k_scale": k_scale, "ks": ks, "ke": ke, "topk": topk}
    if out is not None:
        torch.ops.hisa.flat_index.out(q, k, weights, **call, **selection(out, return_scores))
        return out
    indices, scores = torch.ops.hisa.flat_index.default(
        q, k, weights, **call, return_scores=return_scores
    )
    return (indices, scores) if return_scores else indices


@fake_kernel("flat_index", SELECTION, "return_scores")
def _(
    q: Tensor,
    k: Tensor,
    weights: Tensor,
    *,
    k_scale: Tensor | None = None,
    ks: Tensor | None = None,
    ke: Tensor | None = None,
    topk: int = 2048,
    return_scores: bool = False,
) -> tuple[Tensor, Tensor]:
    check_contract(k, q=q, weights=weights, k_scale=k_scale, ks=ks, ke=ke)
    if isinstance(topk, int):
        _extension.require().check_topk(topk)
    return empty_selection(q, topk, return_scores)
