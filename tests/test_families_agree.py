"""The kernels for Hopper and the portable ones, in one process: the same sets, but for rounding.

Guarantee 6: two families may differ only in tokens whose exact score lies within the rounding of
the row's bar. Catches a family that is right by itself, on inputs of its own, and another indexer.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import permutations

import numpy as np
import pytest
import torch
from torch import Tensor

from tests import interval, oracle
from tests.builders import exact_case, int32, random_case
from tests.case import Case, same_bytes
from tests.checker import Result
from tests.families import CUDA, CUDA_PORTABLE, Family, hopper
from tests.numeric import FP8, decode, short_name
from tests.paged import exact_paged
from tests.test_paged import random_paged
from tests.test_t08_dense_equivalence import revealed_blocks
from tests.test_t10_float_tolerance import check_blocks, check_tokens

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not hopper(), reason="needs compute capability 9.0, and kernels for it"),
]
DTYPES = [FP8, torch.bfloat16]
SHAPES = [(heads, depth) for heads in (16, 32, 64, 128) for depth in (64, 128)]

FAMILIES = (CUDA, CUDA_PORTABLE)


@dataclass(frozen=True)
class Selected:
    """What one family makes of a call."""

    flat: Result
    index: Result
    kept: list[np.ndarray]  # blocks of each row
    pooled: tuple[Tensor, Tensor]

    @classmethod
    def by(cls, family: Family, case: Case) -> Selected:
        """Run everything."""
        with family.active():
            return cls(family.flat_index(case), family.index(case), revealed_blocks(family, case),
                       family.pool_keys(case))  # fmt: skip


def check_row(family: Family, case: Case, got: Selected, row: int) -> None:
    """Check one row's tokens, blocks, and tokens of these blocks, each within its own bounds."""
    seen = oracle.window(case, row)
    assert seen is not None
    tokens = np.arange(seen.start, seen.end)
    check_tokens(family, case, got.flat, row, seen.start, tokens)
    check_blocks(family, case, got.pooled, row, got.kept[row])
    tokens = tokens[np.isin((tokens - seen.origin) // case.block_size, got.kept[row])]
    check_tokens(family, case, got.index, row, seen.start, tokens)


def check_difference(case: Case, flat: tuple[Result, Result], row: int) -> int:
    """Check the tokens that only one of them selects; returns how many there are."""
    at = slice(int(case.ks[row]), int(case.ke[row]))
    call = (decode(case.q)[row], decode(case.k)[at], decode(case.weights)[row],
            oracle.key_scales(case)[at])  # fmt: skip
    (exact, mine), (_, other) = (interval.scores(*call, f.roundoff(case)) for f in FAMILIES)
    widths = [2 * mine.max(), 2 * other.max()]
    selected = [result.indices[row].numpy() for result in flat]
    bar = np.sort(exact)[-case.topk]
    number = 0
    for (one, below), (another, above) in permutations(zip(selected, widths, strict=True)):
        alone = exact[np.setdiff1d(one, another)]
        assert (alone >= bar - below).all() and (alone <= bar + above).all(), f"row {row}"
        number += len(alone)
    return number


@pytest.mark.parametrize("dtype", DTYPES, ids=short_name)
@pytest.mark.parametrize(("heads", "depth"), SHAPES)
def test_the_same_sets(dtype: torch.dtype, heads: int, depth: int) -> None:
    """Each is right within its own rounding; what only one of them selects is near the bar."""
    case = random_case(heads + depth, dtype, M=4, N=1500, H=heads, D=depth, topk=200,
                       block_size=32, block_topk=9, ks=int32([0, 0, 401, 405]),
                       ke=int32([400, 399, 1500, 1499]),
                       cu_seqlens_k=int32([0, 400, 1500]))  # fmt: skip
    got = [Selected.by(family, case) for family in FAMILIES]
    assert all(same_bytes(*keys) for keys in zip(got[0].pooled, got[1].pooled, strict=True))
    different = 0
    for row in range(4):
        for family, selected in zip(FAMILIES, got, strict=True):
            check_row(family, case, selected, row)
        different += check_difference(case, (got[0].flat, got[1].flat), row)
    assert different < 4 * case.topk / 10  # of 800


@pytest.mark.parametrize("dtype", DTYPES, ids=short_name)
@pytest.mark.parametrize(("heads", "depth"), SHAPES)
def test_pages_change_nothing(dtype: torch.dtype, heads: int, depth: int) -> None:
    """Paged calls are packed ones to the bit: gathered, or read where they lie."""
    for seed in range(4):
        paged = random_paged(seed, dtype, heads, depth)
        for family in FAMILIES:
            with family.active():
                result, packed = paged.pool(family).index(family), family.index(paged.case)
            for mine, want in zip(result, packed, strict=True):
                assert same_bytes(mine, want), f"{family.name}: {paged.describe()}"


@pytest.mark.parametrize("dtype", DTYPES, ids=short_name)
@pytest.mark.parametrize(("heads", "depth"), SHAPES)
def test_the_same_bits_where_sums_are_exact(dtype: torch.dtype, heads: int, depth: int) -> None:
    """Integers, whose order of the sum and bits of a product do not matter."""
    for seed in range(3):
        case = exact_case(seed, dtype=dtype, M=5, N=900, H=heads, D=depth)
        paged = exact_paged(seed, dtype=dtype, H=heads, D=depth)
        results = []
        for family in FAMILIES:
            with family.active():
                results.append((family.index(case), family.flat_index(case),
                                paged.pool(family).index(family)))  # fmt: skip
        for mine, other in zip(*results, strict=True):
            assert torch.equal(mine.indices, other.indices)
            assert torch.equal(mine.scores, other.scores)


def test_it_is_another_family() -> None:
    """The comparison above means something: Hopper's fp8 scores have other bits."""
    case = random_case(1, FP8, M=4, N=500, H=64, D=128, topk=100)
    scores = []
    for family in FAMILIES:
        with family.active():
            scores.append(family.flat_index(case).scores)
    assert not same_bytes(*scores)
