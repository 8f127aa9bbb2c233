"""T2: score rows that made real top-k kernels lose candidates, checked exactly.

Each row is realised as q, k, weights (see `adversarial`) and goes through both selections: tokens
(flat and hierarchical) and blocks (through given pooled keys). Catches bounded candidate buffers,
coarse bins, fp16 keys, ties broken by arrival, NaN and infinity in sort keys, thresholds that never
settle.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tests import oracle
from tests.adversarial import BUILDERS, narrow, one_bin, realise, realise_case
from tests.builders import shaped
from tests.case import Case
from tests.checker import Result, assert_same
from tests.families import CUDA, Family
from tests.numeric import DTYPES, F32, short_name
from tests.oracle import Expected

# Around the buffer and bin sizes that broke others: 4096, 16384, 65536.
LENGTHS = (1, 100, 2047, 2048, 2049, 4096, 16449, 65536)
# Keys and topk of each way in which csrc/cuda/launch.cpp lays out a row: at once, in a chunk or in
# a whole region; in chunks, shorter and shorter ones as topk grows; in the workspace.
CUDA_LAYOUTS = (
    (4000, 700), (18000, 2048), (31000, 2048), (41000, 9000), (61000, 16500), (61000, 25000),
    (71000, 33000),
)  # fmt: skip
# Heads and channels: each tensor-core kernel
CUDA_KERNELS = (
    (2, 64), (32, 64), (64, 64), (70, 64), (16, 128), (32, 128), (64, 128), (100, 128), (4, 16),
    (4, 256),
)  # fmt: skip
MILLION = 1_048_579
ANY = tuple(shaped(dtype=torch.float32, H=2, D=16).values())


@pytest.mark.parametrize("name", BUILDERS)
def test_scores_are_what_we_asked_for(name: str) -> None:
    """The trick itself: the oracle's scores of a realised row are the wanted values."""
    rng = np.random.default_rng(1)
    wanted = BUILDERS[name](3000, 700, rng)
    got = oracle.flat_index(realise_case(wanted, 3000), oracle.ieee_score).scores[0]
    assert np.array_equal(got, wanted, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=short_name)
@pytest.mark.parametrize("name", BUILDERS)
def test_scores_are_what_we_asked_for_in_fewer_bits(name: str, dtype: torch.dtype) -> None:
    """The trick in 16 and 8 bits."""
    wanted = BUILDERS[name](300, 70, np.random.default_rng(1))
    case = realise_case(wanted, 300, dtype, 3, 32)
    got = oracle.flat_index(case, oracle.ieee_score).scores[0]
    assert np.array_equal(got, wanted, equal_nan=True)


def flat(case: Case) -> Expected:
    """Return the answer of `flat_index` for a realised call."""
    return oracle.flat_index(narrow(case), oracle.ieee_score)


def index(case: Case) -> Expected:
    """Likewise that of `index`."""
    return oracle.index(narrow(case), oracle.ieee_score)


@pytest.mark.parametrize("name", BUILDERS)
def test_tokens(family: Family, name: str) -> None:
    """The flat selection at k = 2048 on lengths around every limit we know of, and at odd k."""
    rng = np.random.default_rng(2)
    for n in LENGTHS:
        case = realise_case(BUILDERS[name](n, 2048, rng), 2048, *ANY)
        assert_same(family.flat_index(case), flat(case), f"n={n}")
    for topk in (1, 513, 2051):
        case = realise_case(BUILDERS[name](5000, topk, rng), topk, *ANY)
        assert_same(family.flat_index(case), flat(case), f"k={topk}")


@pytest.mark.parametrize("name", BUILDERS)
def test_tokens_of_kept_blocks(family: Family, name: str) -> None:
    """The hierarchical selection of tokens, all blocks kept, unaligned windows."""
    rng = np.random.default_rng(3)
    case = realise_case(BUILDERS[name](9000, 2048, rng), 2048, *ANY)
    case = case.replace(block_size=128, block_topk=71, ks=torch.tensor([37], dtype=torch.int32))
    assert_same(family.index(case), index(case))


@pytest.mark.parametrize("name", BUILDERS)
def test_blocks(family: Family, name: str) -> None:
    """The selection of blocks: the row is the scores of the pooled keys, all tokens come back."""
    rng = np.random.default_rng(4)
    blocks, kept = 3000, 64
    case = block_case(BUILDERS[name](blocks, kept, rng), kept, *ANY)
    expected = index(case)
    assert len(expected.kept[0]) == kept
    assert_same(family.index(case), expected)


def block_case(wanted: F32, kept: int, *kernel: Any) -> Case:
    """Return a call whose blocks score `wanted` (first and last do not matter) and keep `kept`."""
    made = realise(wanted, *kernel)
    return Case(
        q=made["q"],
        k=torch.zeros(len(wanted) * 8, made["q"].shape[2]).to(made["q"].dtype),
        weights=made["weights"],
        pooled=(made["k"], made["k_scale"]),
        block_size=8,
        block_topk=kept,
        topk=kept * 8,
    )


@pytest.mark.parametrize("name", ["normal", "one bin 65536", "ten low bits", "all zero", "rising"])
def test_wide_rows(family: Family, name: str) -> None:
    """262,145 columns: where a 4096-entry candidate buffer lost tokens in every row."""
    case = realise_case(BUILDERS[name](262145, 2048, np.random.default_rng(5)), 2048, *ANY)
    assert_same(family.flat_index(case), flat(case))


def test_rows_of_every_kind_in_one_call(family: Family) -> None:
    """Short and long rows, hard and easy ones, next to each other in one batch."""
    rng = np.random.default_rng(6)
    row = np.concatenate([build(1000, 200, rng) for build in BUILDERS.values()])
    made = realise(row, *ANY)
    m = len(BUILDERS)
    start = torch.arange(m, dtype=torch.int32) * 1000
    case = Case(
        q=made["q"].expand(m, -1, -1).contiguous(),
        k=made["k"],
        weights=made["weights"].expand(m, -1).contiguous(),
        k_scale=made["k_scale"],
        ks=start,
        ke=start + torch.tensor([1000, 3, 2000, 200])[torch.arange(m) % 4].int(),
        topk=200,
        block_size=16,
        block_topk=20,
    )
    assert_same(family.flat_index(case), flat(case))
    assert_same(family.index(case), index(case))


def assert_selects(result: Result, wanted: F32, note: str) -> None:
    """Assert that a row of scores `wanted` gave its best tokens and their scores."""
    best = oracle.best(wanted, result.indices.shape[1])
    got = result.indices[0].numpy()
    wrong = np.flatnonzero(got != best)
    assert len(wrong) == 0, (
        f"{note}: {len(wrong)} of {len(best)} slots are wrong, the first is {wrong[0]}: "
        f"got {got[wrong[:8]]}, want {best[wrong[:8]]}"
    )
    assert np.array_equal(result.scores[0].numpy(), wanted[best], equal_nan=True), note


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=short_name)
@pytest.mark.parametrize("name", BUILDERS)
def test_tokens_on_every_path_of_cuda(name: str, dtype: torch.dtype) -> None:
    """Each builder in each layout of a row's scores; the kernels of a dtype take turns."""
    rng = np.random.default_rng(7)
    turn = list(BUILDERS).index(name)
    for i, (n, topk) in enumerate(CUDA_LAYOUTS):
        wanted = BUILDERS[name](n, topk, rng)
        kernel = CUDA_KERNELS[(turn + i) % len(CUDA_KERNELS)]
        result = CUDA.flat_index(realise_case(wanted, topk, dtype, *kernel))
        assert_selects(result, wanted, f"n={n} k={topk} {kernel}")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=short_name)
@pytest.mark.parametrize("name", BUILDERS)
def test_blocks_on_every_path_of_cuda(name: str, dtype: torch.dtype) -> None:
    """The same for the selection of blocks, at once and in chunks."""
    rng = np.random.default_rng(8)
    turn = list(BUILDERS).index(name)
    for i, (blocks, kept) in enumerate([(700, 64), (5000, 2), (5000, 3), (40000, 128)]):
        wanted = BUILDERS[name](blocks, kept, rng)
        kernel = CUDA_KERNELS[(turn + i) % len(CUDA_KERNELS)]
        result = CUDA.index(block_case(wanted, kept, dtype, *kernel))
        inner = oracle.best(wanted[1:-1], kept - 2) + 1
        want = np.concatenate([[0], inner, [blocks - 1]])
        got = result.indices[0].numpy().reshape(kept, 8)[:, 0] // 8
        assert got.tolist() == want.tolist(), (blocks, kept, kernel)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=short_name)
def test_a_million_columns_on_cuda(dtype: torch.dtype) -> None:
    """N(0, 1), monotone and tied rows, and bins of 262,145 and a million candidates."""
    names = (
        "normal",
        "ten low bits",
        "consecutive",
        "all equal",
        "rising",
        "falling",
        "few values",
    )
    builders = [BUILDERS[name] for name in names] + [one_bin(262145), one_bin(1_000_000)]
    for i, build in enumerate(builders):
        wanted = build(MILLION, 2048, np.random.default_rng(9))
        assert_selects(CUDA.flat_index(realise_case(wanted, 2048, dtype)), wanted, f"row {i}")
