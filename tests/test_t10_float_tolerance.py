"""T10: random floats, by the interval oracle of `interval`.

Never an overlap percentage: each wrong token is wrong. Holds for any order of the sums, so it is
the test of families whose arithmetic differs from the CPU's. Catches low-precision scores or block
scores, wrong quantisation, and everything T1's small integers are too coarse to see.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests import interval, oracle
from tests.builders import causal, int32, random_case, shaped
from tests.case import Case
from tests.checker import Result
from tests.families import Family
from tests.numeric import DTYPES, decode, short_name
from tests.test_t08_dense_equivalence import revealed_blocks

SHAPES = [(1, 16), (4, 64), (64, 128), (3, 256), (128, 32)]


def check_tokens(
    family: Family, case: Case, result: Result, row: int, start: int, tokens: np.ndarray
) -> None:
    """Check one row's selected tokens and scores among the `tokens` it could choose from."""
    k, scale = decode(case.k)[tokens], oracle.key_scales(case)[tokens]
    q, weights = decode(case.q)[row], decode(case.weights)[row]
    exact, eps = interval.scores(q, k, weights, scale, family.roundoff(case))
    count = min(case.topk, len(tokens))
    selected = result.indices[row, :count].numpy() + start
    chosen = np.isin(tokens, selected)
    assert chosen.sum() == count
    interval.assert_selected(chosen, exact, eps, f"row {row}")
    got = result.scores[row, :count].numpy()
    assert (np.abs(got - exact[chosen]) <= eps[chosen]).all(), f"row {row}: scores"


@pytest.mark.parametrize("dtype", DTYPES, ids=short_name)
@pytest.mark.parametrize(("heads", "depth"), SHAPES)
def test_flat(any_family: Family, dtype: torch.dtype, heads: int, depth: int) -> None:
    """The flat selection."""
    case = causal(random_case(0, dtype, M=4, N=300, topk=64, **shaped(H=heads, D=depth)))
    result = any_family.flat_index(case)
    for row in range(4):
        check_tokens(any_family, case, result, row, 0, np.arange(int(case.ke[row])))


@pytest.mark.parametrize("pooling", ["mean", "max"])
@pytest.mark.parametrize("dtype", DTYPES, ids=short_name)
@pytest.mark.parametrize(("heads", "depth"), SHAPES)
def test_hierarchical(
    any_family: Family, dtype: torch.dtype, heads: int, depth: int, pooling: str
) -> None:
    """Pooled keys, then kept blocks, then tokens of the kept blocks, each within its own bounds."""
    case = random_case(1, dtype, M=4, N=301, **shaped(H=heads, D=depth), topk=48,
                       block_topk=9, pooling=pooling, ks=int32([0, 13, 14, 29]),
                       ke=int32([301, 301, 200, 281]),
                       cu_seqlens_k=int32([0, 13, 301]))  # fmt: skip
    case.ke[0] = 13
    pooled, pooled_scale = any_family.pool_keys(case)
    interval.assert_pooled(case, pooled, pooled_scale)
    result = any_family.index(case)
    for row, kept in enumerate(revealed_blocks(any_family, case)):
        seen = oracle.window(case, row)
        assert seen is not None
        check_blocks(any_family, case, (pooled, pooled_scale), row, kept)
        tokens = np.arange(seen.start, seen.end)
        tokens = tokens[np.isin((tokens - seen.origin) // case.block_size, kept)]
        check_tokens(any_family, case, result, row, seen.start, tokens)


def check_blocks(
    family: Family,
    case: Case,
    pooled: tuple[torch.Tensor, torch.Tensor],
    row: int,
    kept: np.ndarray,
) -> None:
    """Check which inner blocks one row kept, given the pooled keys."""
    seen = oracle.window(case, row)
    assert seen is not None
    inner = oracle.candidates(case, seen)[1:-1]
    if not inner:
        return
    slots = [oracle.slot_of(case, first) for first in inner]
    k, scale = decode(pooled[0])[slots], decode(pooled[1])[slots]
    q, weights = decode(case.q)[row], decode(case.weights)[row]
    exact, eps = interval.scores(q, k, weights, scale, family.roundoff(case))
    chosen = np.isin([(first - seen.origin) // case.block_size for first in inner], kept)
    interval.assert_selected(chosen, exact, eps, f"row {row}, blocks")


def test_interval_oracle_is_not_blind() -> None:
    """Positive control: one clearly wrong token is reported, one inside the bounds is not."""
    exact, eps = np.array([3.0, 2.0, 1.0]), np.full(3, 1e-6)
    interval.assert_selected(np.array([True, True, False]), exact, eps, "right")
    with pytest.raises(AssertionError):
        interval.assert_selected(np.array([True, False, True]), exact, eps, "wrong")
    near = np.array([3.0, 2.0, 2.0 + 1e-6])
    interval.assert_selected(np.array([True, True, False]), near, eps, "near-tie")


def test_bounds_are_tight_enough() -> None:
    """The bounds stay below 1/500 of the spread of the scores: the check has teeth."""
    for dtype in DTYPES:
        case = random_case(2, dtype, M=1, N=300, H=64, D=128)
        exact, eps = interval.scores(decode(case.q)[0], decode(case.k), decode(case.weights)[0],
                                     oracle.key_scales(case))  # fmt: skip
        assert eps.max() < 2e-3 * exact.std()


def test_quantised_keys_rank_like_the_originals(family: Family) -> None:
    """`quantize_fp8` of queries and keys changes scores by no more than fp8's own rounding."""
    import hisa

    x = torch.randn(200, 64, generator=torch.Generator().manual_seed(0)) * 3
    k, scale = hisa.quantize_fp8(x)
    assert k.dtype == torch.float8_e4m3fn and scale.shape == (200,)
    assert torch.equal(scale, (x.abs().amax(1) / 448).clamp(min=1e-10))
    error = (k.float() * scale[:, None] - x).abs()
    assert (error <= x.abs() * 2.0**-4 * 1.001 + scale[:, None] * 2.0**-9).all()
    zero, tiny = hisa.quantize_fp8(torch.zeros(3, 16))
    assert (zero.float() == 0).all() and (tiny == 1e-10).all()
    empty, none = hisa.quantize_fp8(torch.zeros(0, 16))
    assert empty.shape == (0, 16) and none.shape == (0,)
