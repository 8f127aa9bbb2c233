"""T7 on sums that round, in the sizes that csrc/cuda/sm90 takes: a row's bytes are its own.

Where sums are exact, any order of them gives the same bits; here it does not. So a row gets the
same bytes alone, in a cluster of blocks of threads; among many rows, scored as one of a pair or by
itself; first or second of its pair; whatever its neighbour keeps; in one call or in several; in one
piece of memory or in pages. Queries are like their neighbours, as in text, so that pairs have much
in common, or unlike them.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from tests.builders import causal, random_case
from tests.case import Case, same_bytes
from tests.checker import Result
from tests.families import CUDA, CUDA_MANY, Family, hopper
from tests.numeric import FP8, short_name
from tests.paged import last_rows, new_pages, paginate, write

DTYPES = [FP8, torch.bfloat16]
KINDS = [(FP8, 128), (torch.bfloat16, 64), (torch.bfloat16, 128)]  # the last one has no pairs


def prompt(
    dtype: torch.dtype, rows: int, keys: int, heads: int, depth: int, alike: bool, size: int
) -> Case:
    """Return the last rows of a prompt, causal, most of them pruned."""
    case = random_case(heads + size, dtype, M=rows, N=keys, H=heads, D=depth, block_size=size,
                       block_topk=6, topk=3 * size // 2)  # fmt: skip
    if alike:
        q = case.q.float()
        for row in range(1, rows):
            q[row] = 0.97 * q[row - 1] + 0.25 * q[row]
        weights = case.weights[:1] + 0.1 * case.weights
        case = case.replace(q=q.to(dtype), weights=weights)
    return causal(case)


def same(got: Result, want: Result, note: object) -> None:
    """Assert equal bytes."""
    assert same_bytes(got.indices, want.indices), note
    assert same_bytes(got.scores, want.scores), note


def pick(result: Result, rows: object) -> Result:
    """Return some rows of a result."""
    return Result(result.indices[rows], result.scores[rows])  # type: ignore[index]


@pytest.mark.parametrize("alike", [True, False], ids=["alike", "unlike"])
@pytest.mark.parametrize("size", [64, 128, 256])
@pytest.mark.parametrize("heads", [16, 32, 64])
@pytest.mark.parametrize(("dtype", "depth"), KINDS, ids=lambda x: str(x).removeprefix("torch."))
def test_rows(
    family: Family, dtype: torch.dtype, depth: int, heads: int, size: int, alike: bool
) -> None:
    """Alone, reversed, in two calls of any sizes, by either kernel: as in the whole call."""
    if family.device == "cpu" and size * heads > 64 * 16:
        pytest.skip("takes long on a CPU, where every row is scored by itself")
    rows = 301 if family.device == "cuda" else 9
    case = prompt(dtype, rows, 11 * size + 5, heads, depth, alike, size)
    for run in (family.index, family.flat_index):
        whole = run(case)
        order = torch.arange(rows).flip(0)
        same(run(case.rows(order)), pick(whole, order), "reversed")
        same(run(case.rows(order[1:])), pick(whole, order[1:]), "other pairs")
        for row in {0, 1, 2, 7, rows // 2, rows - 2, rows - 1}:
            same(run(case.rows([row])), pick(whole, [row]), row)
        for split in sorted({1, 4, rows // 2, rows - 36, rows - 2} & set(range(1, rows))):
            for part in (slice(0, split), slice(split, rows)):
                same(run(case.rows(part)), pick(whole, part), part)
        if family.device == "cuda":
            for other in (replace(family, split=split) for split in (True, False)):
                with other.active():
                    same(getattr(other, run.__name__)(case), whole, other.name)
                    part = slice(0, 9)
                    same(getattr(other, run.__name__)(case.rows(part)), pick(whole, part), other)


@pytest.mark.gpu
@pytest.mark.skipif(not hopper(), reason="needs compute capability 9.0, and kernels for it")
@pytest.mark.parametrize("alike", [True, False], ids=["alike", "unlike"])
@pytest.mark.parametrize("heads", [32, 64])
def test_rows_where_the_gpu_chooses(heads: int, alike: bool) -> None:
    """So many that it decides by itself whether pairs pay: as in small calls, where none do."""
    rows, size = 32 * torch.cuda.get_device_properties("cuda").multi_processor_count + 37, 64
    case = prompt(FP8, rows, rows + 11 * size, heads, 128, alike, size)
    whole = CUDA.index(case)
    order = torch.arange(rows).flip(0)
    same(CUDA.index(case.rows(order)), pick(whole, order), "reversed")
    for part in (slice(0, 9), slice(rows // 2, rows // 2 + 301), slice(1, rows), slice(rows - 1)):
        for family in (CUDA, CUDA_MANY):
            with family.active():
                same(family.index(case.rows(part)), pick(whole, part), (part, family.name))


@pytest.mark.parametrize("depth", [64, 128])
@pytest.mark.parametrize("heads", [16, 64])
@pytest.mark.parametrize("dtype", DTYPES, ids=short_name)
def test_every_split(family: Family, dtype: torch.dtype, heads: int, depth: int) -> None:
    """A prompt of 61 tokens, in two chunks of all sizes and token by token, as in one call.

    Each chunk sees only the keys that exist by then.
    """
    n = 61
    case = prompt(dtype, n, n, heads, depth, True, 8).replace(block_topk=3, topk=10)
    whole = family.index(case)
    parts = [slice(a, b) for s in range(1, n) for a, b in ((0, s), (s, n), (s, s + 1))]
    for part in parts:
        scale = None if case.k_scale is None else case.k_scale[: part.stop]
        chunk = case.rows(part).replace(k=case.k[: part.stop], k_scale=scale)
        same(family.index(chunk), pick(whole, part), part)


@pytest.mark.parametrize("heads", [16, 64])
@pytest.mark.parametrize("dtype", DTYPES, ids=short_name)
def test_prefill_in_pages(family: Family, dtype: torch.dtype, heads: int) -> None:
    """In chunks of one row to more than the kernel for few rows takes, pooled as they come.

    Pages are poison until they are written, and so are the slots of pooled keys.
    """
    size, edges = 64, [0, 1, 2, 9, 309, 310, 601, 700]
    if family.device == "cpu":
        size, edges = 32, [0, 1, 2, 9, 70, 71, 230]
    n = edges[-1]
    case = prompt(dtype, n, n, heads, 128, True, size)
    whole = family.index(case)
    page = size // 2
    now = paginate(np.random.default_rng(heads), case.replace(**last_rows([n], n)), n, page)
    now = now.replace(pages=new_pages(len(now.pages), page, 128, dtype))
    for start, end in pairwise(edges):
        for token in range(start, end):
            scale = None if case.k_scale is None else case.k_scale[token : token + 1]
            page_id = int(now.block_table[0, token // page])
            write(now.pages, page_id, token % page, case.k[token : token + 1], scale)
        scale = None if case.k_scale is None else case.k_scale[:end]
        rows = case.rows(slice(start, end)).replace(k=case.k[:end], k_scale=scale)
        rows = rows.replace(**last_rows([end], end - start))
        now = now.replace(case=rows, seq_lens=torch.tensor([end]).int(), next_n=end - start)
        now = now.pool(family, new_tokens=end - start)
        same(now.index(family), pick(whole, slice(start, end)), (start, end))
