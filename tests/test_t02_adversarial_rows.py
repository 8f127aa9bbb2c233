"""T2: score rows that made real top-k kernels lose candidates, checked exactly.

Each row is realised as q, k, weights (see `adversarial`) and goes through both selections: tokens
(flat and hierarchical) and blocks (through given pooled keys). Catches bounded candidate buffers,
coarse bins, fp16 keys, ties broken by arrival, NaN and infinity in sort keys, thresholds that never
settle.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests import oracle
from tests.adversarial import BUILDERS, realise, realise_case
from tests.case import Case
from tests.checker import assert_same
from tests.families import Family

# Around the buffer and bin sizes that broke others: 4096, 16384, 65536.
LENGTHS = (1, 100, 2047, 2048, 2049, 4096, 16449, 65536)


@pytest.mark.parametrize("name", BUILDERS)
def test_scores_are_what_we_asked_for(name: str) -> None:
    """The trick itself: the oracle's scores of a realised row are the wanted values."""
    rng = np.random.default_rng(1)
    wanted = BUILDERS[name](3000, 700, rng)
    got = oracle.flat_index(realise_case(wanted, 3000), oracle.ieee_score).scores[0]
    assert np.array_equal(got, wanted, equal_nan=True)


@pytest.mark.parametrize("name", BUILDERS)
def test_tokens(family: Family, name: str) -> None:
    """The flat selection at k = 2048 on lengths around every limit we know of, and at odd k."""
    rng = np.random.default_rng(2)
    for n in LENGTHS:
        case = realise_case(BUILDERS[name](n, 2048, rng), 2048)
        assert_same(family.flat_index(case), oracle.flat_index(case, oracle.ieee_score), f"n={n}")
    for topk in (1, 513, 2051):
        case = realise_case(BUILDERS[name](5000, topk, rng), topk)
        assert_same(
            family.flat_index(case), oracle.flat_index(case, oracle.ieee_score), f"k={topk}"
        )


@pytest.mark.parametrize("name", BUILDERS)
def test_tokens_of_kept_blocks(family: Family, name: str) -> None:
    """The hierarchical selection of tokens, all blocks kept, unaligned windows."""
    rng = np.random.default_rng(3)
    case = realise_case(BUILDERS[name](9000, 2048, rng), 2048)
    case = case.replace(block_size=128, block_topk=71, ks=torch.tensor([37], dtype=torch.int32))
    assert_same(family.index(case), oracle.index(case, oracle.ieee_score))


@pytest.mark.parametrize("name", BUILDERS)
def test_blocks(family: Family, name: str) -> None:
    """The selection of blocks: the row is the scores of the pooled keys, all tokens come back."""
    rng = np.random.default_rng(4)
    blocks, kept = 3000, 64
    case = block_case(BUILDERS[name](blocks, kept, rng), kept)
    expected = oracle.index(case, oracle.ieee_score)
    assert len(expected.kept[0]) == kept
    assert_same(family.index(case), expected)


def block_case(wanted: np.ndarray, kept: int) -> Case:
    """Return a call whose blocks score `wanted` (first and last do not matter) and keep `kept`."""
    made = realise(wanted)
    return Case(
        q=made["q"],
        k=torch.zeros(len(wanted) * 8, 16),
        weights=made["weights"],
        pooled=(made["k"], made["k_scale"]),
        block_size=8,
        block_topk=kept,
        topk=kept * 8,
    )


@pytest.mark.parametrize("name", ["normal", "one bin 65536", "ten low bits", "all zero", "rising"])
def test_wide_rows(family: Family, name: str) -> None:
    """262,145 columns: where a 4096-entry candidate buffer lost tokens in every row."""
    case = realise_case(BUILDERS[name](262145, 2048, np.random.default_rng(5)), 2048)
    assert_same(family.flat_index(case), oracle.flat_index(case, oracle.ieee_score))


def test_rows_of_every_kind_in_one_call(family: Family) -> None:
    """Short and long rows, hard and easy ones, next to each other in one batch."""
    rng = np.random.default_rng(6)
    row = np.concatenate([build(1000, 200, rng) for build in BUILDERS.values()])
    made = realise(row)
    m = len(BUILDERS)
    start = torch.arange(m, dtype=torch.int32) * 1000
    case = Case(
        q=made["q"].expand(m, 2, 16).contiguous(),
        k=made["k"],
        weights=made["weights"].expand(m, 2).contiguous(),
        k_scale=made["k_scale"],
        ks=start,
        ke=start + torch.tensor([1000, 3, 2000, 200])[torch.arange(m) % 4].int(),
        topk=200,
        block_size=16,
        block_topk=20,
    )
    assert_same(family.flat_index(case), oracle.flat_index(case, oracle.ieee_score))
    assert_same(family.index(case), oracle.index(case, oracle.ieee_score))
