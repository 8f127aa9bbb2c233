"""The operators on paged key caches, each with its fake kernel below it."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from . import _extension
from .checking import (
    NUMBER,
    SELECTION,
    check_paged_values,
    check_pair,
    check_types,
    selection,
    wants_check,
)
from .contract import check_numbers, check_paged_contract
from .fakes import empty_selection, fake_kernel
from .ops import Pooled


def paged_pool(
    pages: Tensor,
    pooled_k: Tensor,
    pooled_scale: Tensor,
    *,
    block_table: Tensor,
    seq_lens: Tensor,
    new_tokens: int | None = 1,
    block_size: int = 128,
    pooling: str = "mean",
) -> None:
    """Pool the blocks that new tokens complete, into the slots of a paged cache, in place.

    Blocks of `block_size` tokens tile each sequence. The pooled key of a complete block lies in the
    slot that has the id of the block's *last page*, so its life is that page's life: nothing has to
    be allocated or freed, sequences that share the pages of a common prefix share its pooled keys,
    and who copies a page copies its slot. No other slot is read or written.

    Call it whenever tokens have been appended. A sequence that was cut back (rejected drafts) needs
    nothing: its blocks are pooled again when they are complete again.

    Args:
        pages: keys of all pages, P of them, `page_size` tokens each: 16, 32, 64, 128 or 256.

            - uint8 `[P, page_size * (D + 4)]`, `[P, page_size, D + 4]` or
              `[P, page_size, 1, D + 4]`, as DeepGEMM has them: the `page_size * D` float8_e4m3fn
              of a page, then its `page_size` float32 scales, at least 0. A key is `k * scale`.
            - bfloat16, float16 or float32 `[P, page_size, D]`.

            D is a multiple of 16 up to 256. Each page is dense and begins at a multiple of 16
            bytes; from one to the next there may be more bytes than a page has, as in a slice of a
            larger pool.
        pooled_k: `[P, D]` float8_e4m3fn where pages are uint8, of their dtype otherwise; written.
            Rows are dense, begin at multiples of 16 bytes, and may lie apart, even behind the page
            that they belong to.
        pooled_scale: `[P]` float32; written.
        block_table: `[batch, W]` int32: ids of each sequence's pages, in order. A sequence ends
            before the first id outside [0, P).
        seq_lens: `[batch]` int32: tokens of each sequence, the new ones included. Values outside
            [0, W * page_size] are clamped: a padded entry, of length 0 or less, does nothing.
        new_tokens: how many were appended to each sequence, at most. A number too large repeats
            work and changes nothing. None: all of them, as after a prefill.
        block_size: tokens per block: 8, 16, 32, 64, 128 or 256, and a multiple of `page_size`.
        pooling: "mean" or "max" (per channel).

    Raises:
        TypeError: a tensor's dtype is not accepted.
        ValueError: a shape, device, layout or number is not accepted, or the pooled keys lie in
            memory that another argument has. Ids and lengths are data and are not looked at; the
            environment variable HISA_CHECK=1 finds bad ones.

    Cost: `new_tokens` keys per sequence and those that complete their blocks are read, and little
    but the table where no block is completed. Source: arXiv 2603.28458; defined by
    `hisa.reference_paged.paged_pool`.
    """
    module = _extension.require()
    check_types(Tensor, pages=pages, pooled_k=pooled_k, pooled_scale=pooled_scale)
    check_types(Tensor, block_table=block_table, seq_lens=seq_lens)
    if new_tokens is not None:
        check_types(NUMBER, new_tokens=new_tokens)
    check_types(NUMBER, block_size=block_size)
    check_types(str, pooling=pooling)
    if wants_check(pages, pooled_k, pooled_scale, block_table, seq_lens):
        module.check_paged_pool(
            pages, pooled_k, pooled_scale, block_table, seq_lens, new_tokens, block_size, pooling
        )
        check_paged_values(pages, pooled_k.shape[1], block_table, seq_lens)
    torch.ops.hisa.paged_pool(
        pages,
        pooled_k,
        pooled_scale,
        block_table=block_table,
        seq_lens=seq_lens,
        new_tokens=new_tokens,
        block_size=block_size,
        pooling=pooling,
    )


@fake_kernel("paged_pool")
def _(
    pages: Tensor,
    pooled_k: Tensor,
    pooled_scale: Tensor,
    *,
    block_table: Tensor,
    seq_lens: Tensor,
    new_tokens: int | None = 1,
    block_size: int = 128,
    pooling: str = "mean",
) -> None:
    check_numbers(block_size, 2, 1, pooling)
    check_paged_contract(
        pages,
        block_size=block_size,
        pooled_k=pooled_k,
        pooled_scale=pooled_scale,
        block_table=block_table,
        seq_lens=seq_lens,
    )
    if isinstance(new_tokens, int) and new_tokens < 1:
        raise ValueError(f"new_tokens: expected at least 1, or None for all, got {new_tokens}")


@overload
def paged_index(
    q: Tensor,
    pages: Tensor,
    weights: Tensor,
    *,
    block_table: Tensor,
    seq_lens: Tensor,
    pooled: Pooled,
    next_n: int = ...,
    block_size: int = ...,
    block_topk: int = ...,
    topk: int = ...,
    physical: bool = ...,
    return_scores: Literal[False] = ...,
    out: Tensor | None = ...,
) -> Tensor: ...


@overload
def paged_index(
    q: Tensor,
    pages: Tensor,
    weights: Tensor,
    *,
    block_table: Tensor,
    seq_lens: Tensor,
    pooled: Pooled,
    next_n: int = ...,
    block_size: int = ...,
    block_topk: int = ...,
    topk: int = ...,
    physical: bool = ...,
    return_scores: bool,
    out: Tensor | tuple[Tensor, Tensor] | None = ...,
) -> Tensor | tuple[Tensor, Tensor]: ...


def paged_index(
    q: Tensor,
    pages: Tensor,
    weights: Tensor,
    *,
    block_table: Tensor,
    seq_lens: Tensor,
    pooled: Pooled,
    next_n: int = 1,
    block_size: int = 128,
    block_topk: int = 64,
    topk: int = 2048,
    physical: bool = False,
    return_scores: bool = False,
    out: Tensor | tuple[Tensor, Tensor] | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Select tokens hierarchically from a paged key cache, for the last tokens of each sequence.

    Row r belongs to sequence `s = r // next_n` and sees its first
    `seq_lens[s] - next_n + r % next_n + 1` tokens. The result is bit for bit what `hisa.index`
    returns for these keys laid out one after the other.

    Args:
        q: `[batch * next_n, H, D]`, the indexer's queries; float8_e4m3fn where pages are uint8, of
            their dtype otherwise; H from 1 to 128.
        pages: keys of all pages, laid out as for `hisa.paged_pool`.
        weights: `[batch * next_n, H]` float32, any sign, with every scale of the queries folded in.
        block_table: `[batch, W]` int32: ids of each sequence's pages, in order. A sequence ends
            before the first id outside [0, P).
        seq_lens: `[batch]` int32: tokens of each sequence, those of the rows included. Values
            outside [0, W * page_size] are clamped: rows of padded entries select nothing.
        pooled: `(pooled_k, pooled_scale)`, `[P, D]` and `[P]`, which `hisa.paged_pool` has kept up
            to date. Of complete blocks only, in the slot of their last page; nothing else is read.
        next_n: rows per sequence: 1, or more with drafts or a chunk of a prompt.
        block_size: tokens per block: 8, 16, 32, 64, 128 or 256, and a multiple of the page's.
        block_topk: blocks kept per row, at least 2.
        topk: tokens selected per row, 1 to `block_topk * block_size`.
        physical: return `block_table[s, t // page_size] * page_size + t % page_size` instead of
            position t, for kernels that see all pages as one tensor of tokens.
        return_scores: return the selected tokens' scores as well.
        out: where to write to, instead of new tensors: see `hisa.index`.

    Returns:
        `indices`, `[batch * next_n, topk]` int32: positions in the sequence, or physical places, in
        ascending order of position, then -1. With `return_scores`, `(indices, scores)`: scores of
        the same shape and order, float32, then -inf. Neither carries a gradient.

    Raises:
        TypeError: a tensor's dtype is not accepted.
        ValueError: a shape, device, layout or number is not accepted, or `out` is not. Ids and
            lengths are data and are not looked at; the environment variable HISA_CHECK=1 finds bad
            ones.

    Cost: the operations of `hisa.index` with pooled keys, as `hisa.plan(batch * next_n,
    W * page_size, H, D, pooled=True)` gives them, and on a CPU its workspace: no keys are gathered.
    Nor are they on Hopper, where rows are few, at most two for each multiprocessor. On a GPU else
    pooled keys are, and where `hisa.plan` names no kernel "wgmma" the kept blocks' keys as well,
    `next_n * block_topk * block_size` of a sequence: of as many sequences at a time as fit into
    256 MiB, at least one; and where their rows are few, the scores of what they choose among, up to
    32 MiB. Source: arXiv 2603.28458; defined by
    `hisa.reference_paged.paged_index`.
    """
    module = _extension.require()
    check_types(Tensor, q=q, pages=pages, weights=weights)
    check_types(Tensor, block_table=block_table, seq_lens=seq_lens)
    pooled_k, pooled_scale = check_pair(pooled, "paged_pool takes")
    sizes = {"block_size": block_size, "block_topk": block_topk, "topk": topk}
    check_types(NUMBER, next_n=next_n, **sizes)
    check_types(bool, physical=physical, return_scores=return_scores)
    tensors = (q, pages, weights, block_table, seq_lens, pooled_k, pooled_scale)
    if wants_check(*tensors):
        module.check_paged_index(*tensors, next_n, *sizes.values(), physical)
        check_paged_values(pages, q.shape[2], block_table, seq_lens)
    call: dict[str, object] = {
        "block_table": block_table,
        "seq_lens": seq_lens,
        "pooled_k": pooled_k,
        "pooled_scale": pooled_scale,
        "next_n": next_n,
        **sizes,
        "physical": physical,
    }
    if out is not None:
        torch.ops.hisa.paged_index.out(q, pages, weights, **call, **selection(out, return_scores))
        return out
    indices, scores = torch.ops.hisa.paged_index(
        q, pages, weights, **call, return_scores=return_scores
    )
    return (indices, scores) if return_scores else indices


@fake_kernel("paged_index", SELECTION, "return_scores")
def _(
    q: Tensor,
    pages: Tensor,
    weights: Tensor,
    *,
    block_table: Tensor,
    seq_lens: Tensor,
    pooled_k: Tensor,
    pooled_scale: Tensor,
    next_n: int = 1,
    block_size: int = 128,
    block_topk: int = 64,
    topk: int = 2048,
    physical: bool = False,
    return_scores: bool = False,
) -> tuple[Tensor, Tensor]:
    check_numbers(block_size, block_topk, topk, "mean")
    sizes = check_paged_contract(
        pages,
        block_size=block_size,
        q=q,
        weights=weights,
        block_table=block_table,
        seq_lens=seq_lens,
        pooled_k=pooled_k,
        pooled_scale=pooled_scale,
    )
    if isinstance(next_n, int) and next_n < 1:
        raise ValueError(f"next_n: expected at least 1, got {next_n}")
    if sizes["M"] != sizes["S"] * next_n:
        raise ValueError(
            f"q: expected [batch * next_n, H, D] with {sizes['S']} * {next_n} rows, "
            f"got {list(q.shape)}"
        )
    return empty_selection(q, topk, return_scores)
