"""Packed calls brought into paged caches: what a paged call has to give is known already.

`paginate` spreads the keys of a packed call over shuffled pages. All other memory is poison: free
pages, the rest of a sequence's last page, slots of pooled keys, and entries of the table behind a
sequence's end.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hisa import reference_paged
from tests.builders import (
    BLOCK_SIZES,
    INT_MAX,
    INT_MIN,
    Rng,
    exact_case,
    int32,
    random_dtype,
    shaped,
    with_exact_queries,
)
from tests.case import Case, moved
from tests.checker import Result
from tests.families import Family
from tests.numeric import FP8

PAGE_SIZES = (16, 32, 64, 128, 256)


@dataclass(frozen=True)
class Paged:
    """The arguments of `hisa.paged_pool` and `hisa.paged_index`, and the packed call they are."""

    case: Case  # rows and keys of all sequences
    pages: Tensor
    block_table: Tensor
    seq_lens: Tensor
    pooled_k: Tensor
    pooled_scale: Tensor
    next_n: int
    page_size: int

    def replace(self, **changes: Any) -> Paged:
        """Return a copy with some fields changed."""
        return replace(self, **changes)

    def slots(self) -> dict[int, int]:
        """Return the page whose slot has the pooled key, for each slot of the packed keys."""
        found = {}
        size = self.case.block_size
        for s, (first, past) in enumerate(pairwise(self.case.cu_seqlens_k.tolist())):
            for block in range((past - first) // size):
                page = self.block_table[s, (block + 1) * size // self.page_size - 1]
                found[-(-(first + block * size) // size)] = int(page)
        return found

    def where(self) -> dict[str, Any]:
        """Return the arguments that both operators take: the table, the lengths, the block size."""
        return {"block_table": self.block_table, "seq_lens": self.seq_lens,
                "block_size": self.case.block_size}  # fmt: skip

    def pool(self, family: Family, **changes: Any) -> Paged:
        """Run `paged_pool` on copies of the slots, and return a call that has them."""
        arguments = {**self.where(), "new_tokens": None, "pooling": self.case.pooling}
        on = {n: put(v, family.device) for n, v in {**arguments, **changes}.items()}
        pooled_k, pooled_scale = (put(copy_of(t), family.device) for t in self.pooled())
        api(family).paged_pool(put(self.pages, family.device), pooled_k, pooled_scale, **on)
        return self.replace(pooled_k=pooled_k.cpu(), pooled_scale=pooled_scale.cpu())

    def pooled(self) -> tuple[Tensor, Tensor]:
        """Return the pooled keys and their scales."""
        return self.pooled_k, self.pooled_scale

    def index(self, family: Family, **changes: Any) -> Result:
        """Run `paged_index` with scores, and check the form of positions that come back."""
        arguments = {
            **self.where(),
            "q": self.case.q,
            "pages": self.pages,
            "weights": self.case.weights,
            "pooled": self.pooled(),
            "next_n": self.next_n,
            "block_topk": self.case.block_topk,
            "topk": self.case.topk,
            "return_scores": True,
        }
        on = {n: put(v, family.device) for n, v in {**arguments, **changes}.items()}
        indices, scores = api(family).paged_index(**on)
        if on.get("physical"):
            return Result(indices.cpu(), scores.cpu())
        return family.checked(self.case, indices, scores, packed=True)

    def describe(self) -> str:
        """Return one line with the shapes and parameters."""
        return (
            f"{self.case.describe()} page_size={self.page_size} next_n={self.next_n} "
            f"seq_lens={self.seq_lens.tolist()}"
        )


def api(family: Family) -> Any:
    """Return the module that has the family's paged operators."""
    return reference_paged if family.name == "reference" else family.api


def put(value: Any, device: str) -> Any:
    """Bring tensors, also those of a tuple, to a device."""
    if isinstance(value, tuple):
        return tuple(put(part, device) for part in value)
    return moved(value, device) if isinstance(value, Tensor) else value


def copy_of(tensor: Tensor) -> Tensor:
    """Return a copy with the strides that a tensor has."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype).copy_(tensor)


def fill(tensor: Tensor) -> Tensor:
    """Fill a tensor with NaN: all bits of it are set."""
    tensor.view(torch.uint8).fill_(0xFF)
    return tensor


def new_pages(count: int, page_size: int, depth: int, dtype: torch.dtype) -> Tensor:
    """Return poisoned pages for keys of a dtype."""
    if dtype == FP8:
        return fill(torch.empty(count, page_size * (depth + 4), dtype=torch.uint8))
    return fill(torch.empty(count, page_size, depth, dtype=dtype))


def new_slots(count: int, depth: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return poisoned pooled keys and scales."""
    return fill(torch.empty(count, depth, dtype=dtype)), fill(torch.empty(count))


def write(pages: Tensor, page: int, place: int, k: Tensor, scale: Tensor | None) -> None:
    """Write keys [n, D], and their scales [n], into a page, from a place on."""
    n, depth = k.shape
    if pages.dtype != torch.uint8:
        pages[page, place : place + n] = k
        return
    scale = torch.ones(n) if scale is None else scale
    raw = pages[page].view(-1)
    raw[place * depth : (place + n) * depth] = k.contiguous().view(torch.uint8).view(-1)
    start = len(raw) // (depth + 4) * depth + place * 4
    raw[start : start + n * 4] = scale.contiguous().view(torch.uint8)


def paginate(rng: Rng, case: Case, next_n: int, page_size: int, shared: int = 0) -> Paged:
    """Spread a packed call's keys over pages; the first `shared` pages of all are the same ones."""
    edges = case.cu_seqlens_k.tolist()
    lengths = [past - first for first, past in pairwise(edges)]
    needed = [-(-n // page_size) for n in lengths]
    count = sum(needed) + 3
    pages = new_pages(count, page_size, case.k.shape[1], case.k.dtype)
    order = iter(rng.permutation(count).tolist())
    table = rng.integers(-2, count, (len(lengths), max(needed, default=0) + 2))
    table[rng.random(table.shape) < 0.2] = rng.choice([INT_MIN, INT_MAX, count])
    for s, n in enumerate(lengths):
        for i in range(needed[s]):
            if i < shared and s > 0:
                table[s, i] = table[0, i]
                continue
            table[s, i] = next(order)
            tokens = slice(edges[s] + i * page_size, edges[s] + min((i + 1) * page_size, n))
            scale = None if case.k_scale is None else case.k_scale[tokens]
            write(pages, table[s, i], 0, case.k[tokens], scale)
    pooled_k, pooled_scale = new_slots(count, case.k.shape[1], case.k.dtype)
    return Paged(case, pages, int32(table), int32(lengths), pooled_k, pooled_scale, next_n,
                 page_size)  # fmt: skip


def last_rows(lengths: list[int], next_n: int) -> dict[str, Any]:
    """Return the edges and windows of packed sequences whose rows are their last tokens."""
    edges = np.concatenate([[0], np.cumsum(lengths)])
    ks = edges[:-1].repeat(next_n)
    ke = edges[1:].repeat(next_n) - next_n + 1 + np.tile(np.arange(next_n), len(lengths))
    return {"cu_seqlens_k": int32(edges), "ks": int32(ks), "ke": int32(ke)}


def exact_paged(seed: int, **fixed: Any) -> Paged:
    """Return a random paged call, exact in fp32: lengths ragged and empty, prefixes shared."""
    rng = np.random.default_rng([seed, 1])
    dtype = fixed.pop("dtype", random_dtype(rng))
    size = fixed.pop("B", int(rng.choice(BLOCK_SIZES[1:], p=[0.35, 0.25, 0.2, 0.1, 0.1])))
    page_size = fixed.pop("page_size", int(rng.choice([p for p in PAGE_SIZES if p <= size])))
    next_n = fixed.pop("next_n", int(rng.choice([1, 1, 2, 3, 5, 8])))
    lengths = fixed.pop("lengths", random_lengths(rng, size, page_size))
    sizes = shaped(H=int(rng.choice([1, 2, 3, 5])), D=int(rng.choice([16, 32, 48])))
    case = exact_case(seed, dtype=dtype, B=size, M=len(lengths) * next_n, N=sum(lengths),
                      **{**sizes, **last_rows(lengths, next_n), **fixed})  # fmt: skip
    if dtype != FP8:
        case = case.replace(k_scale=None)
    shared = min(lengths) // page_size if rng.random() < 0.4 else 0
    if shared and len(lengths) > 1:
        case = with_exact_queries(rng, share(case, shared * page_size))
    return paginate(rng, case, next_n, page_size, shared)


def share(case: Case, tokens: int) -> Case:
    """Give all sequences the first sequence's first keys."""
    k, scale = case.k.clone(), None if case.k_scale is None else case.k_scale.clone()
    for first in case.cu_seqlens_k.tolist()[1:-1]:
        k[first : first + tokens] = k[:tokens]
        if scale is not None:
            scale[first : first + tokens] = scale[:tokens]
    return case.replace(k=k, k_scale=scale)


def small(dtype: torch.dtype = FP8, **fixed: Any) -> Paged:
    """Return a call that loses blocks: 2 sequences, 2 rows each, 16 tokens a page, 2 pages a block.

    With the lengths that it has unless others are given there are 35 pages.
    """
    sizes: dict[str, Any] = {"B": 32, "page_size": 16, "next_n": 2, "lengths": [300, 205], "H": 2,
                             "D": 32, "block_topk": 4, "topk": 50, "pooling": "mean"}  # fmt: skip
    return exact_paged(1, dtype=dtype, **{**sizes, **fixed})


def random_lengths(rng: Rng, size: int, page_size: int) -> list[int]:
    """Return lengths of one to four sequences, often at an edge of a page or a block."""
    lengths = []
    least = int(rng.choice([0, 0, 2 * page_size]))
    for _ in range(rng.integers(1, 5)):
        near = least + int(rng.choice([0, size, page_size])) * int(rng.integers(0, 9))
        lengths.append(max(0, near + int(rng.choice([-1, 0, 0, 1, int(rng.integers(size))]))))
    return lengths


def physical(paged: Paged, indices: Tensor) -> Tensor:
    """Return the places of positions, one after the other."""
    places = torch.full_like(indices, -1)
    for row, positions in enumerate(indices.tolist()):
        ids = paged.block_table[row // paged.next_n].tolist()
        for slot, token in enumerate(positions):
            if token >= 0:
                page, place = divmod(token, paged.page_size)
                places[row, slot] = ids[page] * paged.page_size + place
    return places
