"""T3: windows of every length at every offset, and windows that make no sense.

Catches ignored or unaligned `ks`, blocks cut on the wrong side, complete blocks mistaken for cut
ones, negative or huge windows read as unsigned, short rows that disturb their neighbours, and
outputs narrower than topk when there are few keys.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch

from tests import oracle
from tests.builders import INT_MAX, INT_MIN, exact_case, int32, shaped
from tests.case import Case
from tests.checker import assert_same
from tests.families import Family
from tests.numeric import FP8


def windows_case(spans: list[tuple[int, int]], *, seed: int = 0, **fields: Any) -> Case:
    """Return an exact call with one row per window."""
    ks, ke = int32([s for s, _ in spans]), int32([e for _, e in spans])
    base: dict[str, Any] = {
        **shaped(dtype=torch.float32, H=2, D=16),
        "N": 80,
        "B": 8,
        "block_topk": 3,
        "topk": 5,
    }
    return exact_case(seed, M=len(spans), ks=ks, ke=ke, **{"cu_seqlens_k": None, **base, **fields})


@pytest.mark.parametrize("block_topk", [2, 3])
@pytest.mark.parametrize("size", [8, 16])
def test_every_length_at_every_offset(any_family: Family, size: int, block_topk: int) -> None:
    """Every length 0..4B+1 at every ks mod B, each row checked against the oracle.

    Up to 2B + 1 tokens meet at most 3 blocks; the longer ones also prune.
    """
    start = 3 * size
    spans = [
        (start + offset, start + offset + length)
        for offset, length in itertools.product(range(size), range(4 * size + 2))
    ]
    case = windows_case(spans, N=9 * size, B=size, block_topk=block_topk, topk=2 * size - 3)
    assert_same(any_family.index(case), oracle.index(case))
    assert_same(any_family.flat_index(case), oracle.flat_index(case))


@pytest.mark.parametrize("shift", range(8))
def test_every_length_in_a_shifted_segment(family: Family, shift: int) -> None:
    """The same in a segment that starts at every offset mod B: blocks tile from its own start."""
    cu = int32([0, 8 + shift, 8 + shift, 61, 80])
    spans = [(8 + shift + offset, 8 + shift + offset + n) for offset in range(9) for n in range(45)]
    case = windows_case(spans, cu_seqlens_k=cu, block_topk=2, topk=9)
    assert_same(family.index(case), oracle.index(case))


# The tests around this one have fp32; tensor cores take keys eight at a time, in tiles of 8 to 64.
@pytest.mark.gpu
@pytest.mark.parametrize("block_topk", [2, 3])
@pytest.mark.parametrize(
    ("dtype", "heads", "depth"),
    [
        (torch.bfloat16, 2, 64),
        (torch.bfloat16, 16, 64),
        (torch.bfloat16, 3, 256),
        (torch.float16, 40, 128),
        (FP8, 5, 48),
        (FP8, 20, 128),
        (FP8, 64, 128),
    ],
    ids=str,
)
def test_windows_on_tensor_cores(
    cuda_family: Family, dtype: torch.dtype, heads: int, depth: int, block_topk: int
) -> None:
    """Every length at every offset and in shifted segments, and the senseless windows."""
    kernel: dict[str, Any] = {"dtype": dtype, "H": heads, "D": depth, "block_topk": block_topk}
    every = [(24 + offset, 24 + offset + n) for offset in range(8) for n in range(34)]
    cases = [windows_case(every, N=72, topk=13, **kernel)]
    for shift in (1, 3, 7):
        cu = int32([0, 8 + shift, 8 + shift, 61, 80])
        spans = [(8 + shift + offset, 8 + shift + offset + n) for offset in range(9)
                 for n in range(45)]  # fmt: skip
        cases.append(windows_case(spans, cu_seqlens_k=cu, topk=9, **kernel))
    edges = [INT_MIN, -81, -4, -1, 0, 1, 7, 8, 79, 80, 81, 200, INT_MAX]
    cases.append(windows_case(list(itertools.product(edges, edges)), **kernel))
    for case in cases:
        assert_same(cuda_family.index(case), oracle.index(case))
        assert_same(cuda_family.flat_index(case), oracle.flat_index(case))


def test_senseless_windows(any_family: Family) -> None:
    """Every pair of edges from a list with negative, too large and extreme int32 values."""
    edges = [INT_MIN, INT_MIN + 1, -81, -4, -3, -2, -1, 0, 1, 7, 8, 79, 80, 81, 200, INT_MAX - 1]
    edges.append(INT_MAX)
    case = windows_case(list(itertools.product(edges, edges)))
    assert_same(any_family.index(case), oracle.index(case))
    assert_same(any_family.flat_index(case), oracle.flat_index(case))
    packed = case.replace(cu_seqlens_k=int32([0, 5, 40, 80]))
    assert_same(any_family.index(packed), oracle.index(packed))


@pytest.mark.parametrize("topk", [1, 2, 7, 8, 9, 16, 23, 24])
def test_lengths_around_topk(family: Family, topk: int) -> None:
    """Windows of k - 1, k and k + 1 tokens; the width is always k."""
    spans = [(s, s + n) for s in (0, 1, 8, 13) for n in (topk - 1, topk, topk + 1, 60)]
    case = windows_case(spans, topk=topk)
    assert_same(family.index(case), oracle.index(case))
    assert_same(family.flat_index(case), oracle.flat_index(case))


@pytest.mark.parametrize(("ks", "ke"), [(True, False), (False, True), (False, False)])
@pytest.mark.parametrize("packed", [False, True])
def test_missing_windows(any_family: Family, ks: bool, ke: bool, packed: bool) -> None:
    """A missing ks means 0, a missing ke means N, each on its own; a segment still ends a row."""
    case = windows_case([(3, 40), (16, 17), (70, 80), (0, 80)])
    case = case.replace(ks=case.ks if ks else None, ke=case.ke if ke else None)
    case = case.replace(cu_seqlens_k=int32([0, 30, 80]) if packed else None)
    assert_same(any_family.index(case), oracle.index(case))
    assert_same(any_family.flat_index(case), oracle.flat_index(case))


@pytest.mark.parametrize(("rows", "keys"), [(0, 0), (0, 40), (3, 0), (3, 1)])
def test_no_rows_no_keys(any_family: Family, rows: int, keys: int) -> None:
    """M = 0 and N = 0 are valid calls with the obvious answer, of full width."""
    case = exact_case(1, M=rows, N=keys, **shaped(H=3, D=16), B=8, topk=9, block_topk=2,
                      ks=None)  # fmt: skip
    for dtype in (torch.float32, torch.bfloat16, torch.float8_e4m3fn):
        typed = case.replace(q=case.q.float().to(dtype), k=case.k.float().to(dtype))
        assert_same(any_family.index(typed), oracle.index(typed))
        assert_same(any_family.flat_index(typed), oracle.flat_index(typed))


def test_fewer_keys_than_topk(family: Family) -> None:
    """All tokens, then -1 up to the full width, with k far above N."""
    case = exact_case(2, M=4, N=21, **shaped(H=1, D=16), B=256, block_topk=9, topk=2304,
                      ks=None)  # fmt: skip
    result = family.index(case)
    assert result.indices.shape == (4, 2304)
    assert_same(result, oracle.index(case))


def test_long_and_short_rows_alternate(family: Family) -> None:
    """A short row between long ones neither sees nor leaves stale state."""
    spans = [(0, 80), (5, 5), (0, 80), (79, 80), (3, 77), (9, 2), (0, 80), (12, 15)] * 8
    case = windows_case(spans, seed=5)
    assert_same(family.index(case), oracle.index(case))
    assert_same(family.flat_index(case), oracle.flat_index(case))


def test_windows_of_empty_and_missing_segments(any_family: Family) -> None:
    """Empty segments hold no row; keys before the first and after the last segment are nobody's."""
    cu = int32([5, 5, 20, 20, 20, 63, 63])
    spans = [(start, 80) for start in range(80)]
    case = windows_case(spans, cu_seqlens_k=cu, block_topk=2)
    result = any_family.index(case)
    assert_same(result, oracle.index(case))
    assert (result.indices[:5] == -1).all() and (result.indices[63:] == -1).all()
    assert (result.indices[5:63, 0] >= 0).all()


@pytest.mark.parametrize(
    "cu",
    [[0, 200], [-7, 30, 80], [0, 50, 20, 80], [80, 0], [INT_MIN, INT_MAX], [INT_MAX, INT_MAX]],
    ids=str,
)
def test_senseless_segments_are_harmless(family: Family, cu: list[int]) -> None:
    """Segment edges are device data too: garbage never crashes or leads outside the keys.

    What such a call returns is not specified beyond safety: tokens of the row's own window, in
    order.
    """
    case = windows_case([(s, s + 60) for s in range(-2, 80)])
    on = case.replace(cu_seqlens_k=int32(cu)).to(family.device)
    for _ in range(2):
        pooled = family.api.pool_keys(on.k, **on.pool_args())
        assert len(pooled[0]) == 10
    indices = family.api.index(on.q, on.k, on.weights, **on.index_args()).cpu().numpy()
    starts = np.clip(np.arange(-2, 80), 0, 80)
    lengths = np.clip(np.arange(-2, 80) + 60, 0, 80) - starts
    assert (indices >= -1).all() and (indices < lengths[:, None]).all()
