"""What hisa computes on a paged cache, in plain PyTorch: gather a sequence's keys, then as ever.

A sequence's keys lie in pages, in the order of its row of `block_table`; `hisa.reference` defines
all that follows once they lie one after the other. The pooled key of a complete block lies in the
slot that has the id of the block's last page. The arguments and results are those of the functions
of the same name in `hisa`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import reference


class Sequence(NamedTuple):
    """The keys of one sequence, one after the other, and where they were."""

    k: Tensor  # [N, D]
    scale: Tensor  # [N] fp32
    pages: list[int]  # ids, the last one perhaps in part

    def slots(self, block_size: int, page_size: int) -> list[int]:
        """Return where the pooled key of each complete block lies."""
        step = block_size // page_size
        return self.pages[step - 1 : len(self.k) // page_size : step]


def split_pages(pages: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Return the keys [P, page_size, D] of all pages, and their scales [P, page_size] fp32."""
    if pages.dtype != torch.uint8:
        return pages, torch.ones(pages.shape[:2], device=pages.device)
    pages = pages.reshape(pages.shape[0], -1)
    page_size = pages.shape[1] // (dim + 4)
    keys, scales = pages[:, : page_size * dim], pages[:, page_size * dim :]
    shape = (pages.shape[0], page_size)
    return (
        keys.contiguous().view(torch.float8_e4m3fn).view(*shape, dim),
        scales.contiguous().view(torch.float32).view(shape),
    )


def gather(pages: Tensor, dim: int, ids: Tensor, length: int) -> Sequence:
    """Collect the keys of a sequence: at most `length`, and none behind a page that is none."""
    keys, scales = split_pages(pages, dim)
    used: list[int] = []
    for page in ids.tolist():
        if len(used) * keys.shape[1] >= length or not 0 <= page < len(pages):
            break
        used.append(page)
    n = max(0, min(length, len(used) * keys.shape[1]))
    return Sequence(keys[used].flatten(0, 1)[:n], scales[used].flatten()[:n], used)


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
    """Pool the blocks that new tokens complete, one after the other; see `hisa.paged_pool`."""
    page_size = split_pages(pages, pooled_k.shape[1])[0].shape[1]
    for ids, length in zip(block_table, seq_lens.tolist(), strict=True):
        sequence = gather(pages, pooled_k.shape[1], ids, length)
        n = len(sequence.k)
        keys, scales = reference.pool_keys(
            sequence.k, k_scale=sequence.scale, block_size=block_size, pooling=pooling
        )
        for block, slot in enumerate(sequence.slots(block_size, page_size)):
            if new_tokens is None or n - new_tokens < (block + 1) * block_size:
                pooled_k[slot], pooled_scale[slot] = keys[block], scales[block]


def paged_index(
    q: Tensor,
    pages: Tensor,
    weights: Tensor,
    *,
    block_table: Tensor,
    seq_lens: Tensor,
    pooled: tuple[Tensor, Tensor],
    next_n: int = 1,
    block_size: int = 128,
    block_topk: int = 64,
    topk: int = 2048,
    physical: bool = False,
    return_scores: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Hierarchical selection, one sequence after the other; see `hisa.paged_index`."""
    page_size = split_pages(pages, q.shape[2])[0].shape[1]
    indices, scores = reference.empty_output(q, topk)
    for s, (ids, length) in enumerate(zip(block_table, seq_lens.tolist(), strict=True)):
        sequence = gather(pages, q.shape[2], ids, length)
        rows, n = slice(s * next_n, (s + 1) * next_n), len(sequence.k)
        incomplete = -(-n // block_size) - n // block_size  # one slot more, which is not read
        slots = [*sequence.slots(block_size, page_size), *[0] * incomplete]
        indices[rows], scores[rows] = reference.index(
            q[rows],
            sequence.k,
            weights[rows],
            k_scale=sequence.scale,
            ke=torch.arange(n - next_n + 1, n + 1, dtype=torch.int32, device=q.device),
            pooled=(pooled[0][slots], pooled[1][slots]),
            block_size=block_size,
            block_topk=block_topk,
            topk=topk,
            return_scores=True,
        )
        if physical:
            there = indices[rows] >= 0
            token = indices[rows].clamp(min=0).long()
            page = ids.long()[token // page_size] if len(ids) else token
            place = page * page_size + token % page_size
            indices[rows] = torch.where(there, place, -1).to(torch.int32)
    return (indices, scores) if return_scores else indices
