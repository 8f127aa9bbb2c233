"""T9: NaN and infinity in queries, keys, scales and weights follow the formula with IEEE fp32.

A NaN dot product adds 0; a NaN score ranks with -inf and is still taken when nothing better is
left; pooled keys carry NaN on as torch does. Where the finite values are small integers the order
of the sums does not matter, so every family must agree. Catches NaN compared as largest or dropped,
`relu` by `max(x, 0)` in the wrong operand order, rows left short, indices made of NaN bits.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests import oracle
from tests.builders import Rng, exact_case, shaped
from tests.case import Case
from tests.checker import assert_same
from tests.families import Family
from tests.numeric import DTYPES, FP8, decode, short_name

SPECIALS = [np.nan, np.inf, -np.inf]
SHARES = [0.003, 0.05, 0.5, 1.0]


def compare(family: Family, case: Case) -> None:
    """Compare every op with the oracle's IEEE arithmetic."""
    pooled, scale, _ = oracle.pool_keys(case)
    got = family.pool_keys(case)
    assert np.array_equal(decode(got[0]), pooled, equal_nan=True)
    assert np.array_equal(got[1].numpy(), scale, equal_nan=True)
    assert_same(family.flat_index(case), oracle.flat_index(case, oracle.ieee_score))
    assert_same(family.index(case), oracle.index(case, oracle.ieee_score))


def base_case(seed: int, dtype: torch.dtype) -> Case:
    """Return an exact call with some pruned rows."""
    return exact_case(
        seed, N=150, M=5, B=8, block_topk=5, topk=19, **shaped(dtype=dtype, H=2 + seed % 2, D=16)
    )


def sprinkle(rng: Rng, tensor: torch.Tensor, share: float) -> torch.Tensor:
    """Replace a share of the elements by NaN, inf or -inf (fp8: by its two NaN bytes)."""
    where = torch.from_numpy(rng.random(tuple(tensor.shape)) < share)
    if tensor.dtype == FP8:
        nan = torch.from_numpy(rng.choice(np.array([0x7F, 0xFF], np.uint8), tuple(tensor.shape)))
        return torch.where(where, nan, tensor.view(torch.uint8)).view(FP8)
    special = torch.from_numpy(rng.choice(SPECIALS, tuple(tensor.shape)))
    return torch.where(where, special.to(tensor.dtype), tensor)


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("field", ["q", "k", "weights", "k_scale"])
@pytest.mark.parametrize("dtype", DTYPES, ids=short_name)
def test_specials_in_one_argument(
    any_family: Family, dtype: torch.dtype, field: str, share: float
) -> None:
    """One, some, many and all elements of each argument."""
    for seed in range(3):
        case = base_case(seed, dtype)
        if case.k_scale is None:
            case = case.replace(k_scale=torch.ones(150))
        special = sprinkle(np.random.default_rng(seed), getattr(case, field), share)
        compare(any_family, case.replace(**{field: special}))


@pytest.mark.parametrize("dtype", DTYPES, ids=short_name)
def test_specials_everywhere(any_family: Family, dtype: torch.dtype) -> None:
    """Some of each in every argument at once, by mean and by maximum."""
    for seed in range(8):
        rng = np.random.default_rng(seed)
        case = base_case(seed, dtype).replace(k_scale=torch.ones(150))
        fields = ("q", "k", "weights", "k_scale")
        mixed = {field: sprinkle(rng, getattr(case, field), 0.02) for field in fields}
        compare(any_family, case.replace(**mixed, pooling=("mean", "max")[seed % 2]))


@pytest.mark.parametrize("bad", [1, 2, 18, 19, 20, 149, 150])
@pytest.mark.parametrize("value", SPECIALS, ids=str)
def test_number_of_bad_scores(any_family: Family, value: float, bad: int) -> None:
    """1, k - 1, k, k + 1, all but one and all scores of a row are NaN, +inf or -inf."""
    rng = np.random.default_rng(bad)
    case = base_case(4, torch.float32).replace(ks=None, ke=None, cu_seqlens_k=None)
    case = case.replace(
        q=torch.ones_like(case.q), k=case.k.abs() + 1, weights=torch.ones_like(case.weights)
    )
    scale = torch.ones(150)
    scale[torch.from_numpy(rng.permutation(150)[:bad])] = abs(value)
    if value < 0:
        case = case.replace(weights=-case.weights)
    compare(any_family, case.replace(k_scale=scale))


def test_nan_dot_adds_zero(any_family: Family) -> None:
    """A head whose dot product is NaN adds 0; the other head still decides."""
    case = base_case(0, torch.float32).replace(ks=None, ke=None, cu_seqlens_k=None, k_scale=None)
    q = torch.ones_like(case.q)
    q[:, 0, 3] = torch.nan
    k = case.k.abs()
    with_nan = any_family.flat_index(case, q=q, k=k, weights=torch.ones_like(case.weights))
    without = any_family.flat_index(
        case, q=q[:, 1:], k=k, weights=torch.ones_like(case.weights[:, 1:])
    )
    assert not with_nan.scores.isnan().any()
    assert torch.equal(with_nan.indices, without.indices)
    assert torch.equal(with_nan.scores, without.scores)


def test_nan_scores_are_reported_and_taken_last(any_family: Family) -> None:
    """NaN and -inf tokens share the last rank: the lower token wins, and its score is unchanged."""
    heads, depth, dtype = shaped(H=1, D=16, dtype=torch.float32).values()
    k = torch.ones(6, depth).to(dtype)
    scale = torch.tensor([torch.nan, 1, torch.inf, 2, torch.nan, torch.inf])
    q, weights = torch.zeros(1, heads, depth).to(dtype), -torch.ones(1, heads)
    q[0, 0, :16] = 1
    case = Case(q=q, k=k, weights=weights, k_scale=scale, topk=4)
    result = any_family.flat_index(case)
    assert result.indices.tolist() == [[0, 1, 2, 3]]
    assert result.scores[0].isnan().tolist() == [True, False, False, False]
    assert result.scores[0, 1:].tolist() == [-16, -torch.inf, -32]
    assert_same(any_family.index(case), oracle.index(case, oracle.ieee_score))


def test_nan_blocks_never_repeat_or_shorten_a_row(any_family: Family) -> None:
    """Blocks whose pooled score is NaN are taken last, each once, and still fill the row."""
    case = base_case(1, torch.float32).replace(ks=None, ke=None, cu_seqlens_k=None, topk=38)
    pooled = (torch.ones(19, case.shape[3]).to(case.k.dtype), torch.full((19,), torch.nan))
    blocks = (any_family.index(case, pooled=pooled).indices // 8).unique().tolist()
    assert blocks == [0, 1, 2, 3, 18]
    pooled[1][11] = 1
    one = case.replace(q=torch.ones_like(case.q), weights=torch.ones_like(case.weights))
    blocks = (any_family.index(one, pooled=pooled).indices // 8).unique().tolist()
    assert blocks == [0, 1, 2, 11, 18]


@pytest.mark.parametrize("argument", ["q", "k"])
def test_every_fp8_byte(any_family: Family, argument: str) -> None:
    """All 256 byte values of float8_e4m3fn decode as the format says, in queries and in keys."""
    byte = torch.arange(256, dtype=torch.uint8)
    heads, depth = shaped(H=2 if argument == "k" else 1, D=16).values()
    one = torch.zeros(depth).to(FP8)
    one[0] = 1.0
    every = torch.zeros(256, depth, dtype=torch.uint8)
    every[:, 0] = byte
    if argument == "k":
        both, weights = torch.zeros(1, heads, depth), torch.zeros(1, heads)
        both[0, 0], both[0, 1] = one.float(), -one.float()
        weights[0, 0], weights[0, 1] = 1, -1
        case = Case(q=both.to(FP8), k=every.view(FP8), weights=weights, topk=256)
        values = any_family.flat_index(case).scores[0]
        want = byte.view(FP8).float()
        want = torch.where(want.isnan(), 0.0, want)
        assert torch.equal(values, want)
    else:
        keys = torch.stack([one.float(), -one.float()]).to(FP8)
        queries = torch.zeros(256, heads, depth, dtype=torch.uint8)
        queries[:, 0] = every
        case = Case(q=queries.view(FP8), k=keys, weights=torch.ones(256, heads), topk=2)
        values = any_family.flat_index(case).scores
        want = byte.view(FP8).float()
        want = torch.where(want.isnan(), 0.0, want)
        assert torch.equal(values[:, 0], want.clamp(min=0))
        assert torch.equal(values[:, 1], (-want).clamp(min=0))
    few = case.replace(q=case.q[..., :16], k=case.k[:, :16])  # the other channels are zeros
    assert_same(any_family.flat_index(case), oracle.flat_index(few, oracle.ieee_score))


def test_every_half_and_bfloat16_pattern(any_family: Family) -> None:
    """All 65,536 patterns of fp16 and bf16 as keys: subnormals, infinities and NaN included."""
    heads, depth = shaped(H=2, D=16).values()
    for dtype in (torch.float16, torch.bfloat16):
        k = torch.zeros(65536, depth, dtype=torch.int16)
        k[:, 0] = torch.arange(-32768, 32768).short()
        q, weights = torch.zeros(1, heads, depth, dtype=dtype), torch.zeros(1, heads)
        q[0, 0, 0], q[0, 1, 0] = 1, -1
        weights[0, 0], weights[0, 1] = 1, -1
        case = Case(q=q, k=k.view(dtype), weights=weights, topk=65536)
        values = any_family.flat_index(case).scores[0]
        want = k.view(dtype)[:, 0].float()
        assert torch.equal(values, torch.where(want.isnan(), 0.0, want))


def test_pooled_overflow_to_infinity(any_family: Family) -> None:
    """fp16 keys whose scaled mean leaves the range of fp16 pool to infinity, not to garbage."""
    case = base_case(2, torch.float16)
    compare(any_family, case.replace(k_scale=torch.full((150,), 65536.0)))


@pytest.mark.parametrize("dtype", DTYPES, ids=short_name)
def test_blocks_of_zeros(any_family: Family, dtype: torch.dtype) -> None:
    """A block of zeros pools to zeros, with the smallest scale in fp8: no division by zero."""
    case = base_case(3, dtype)
    compare(any_family, case.replace(k=torch.zeros(case.k.shape).to(dtype)))
    tiny = torch.full((150,), 2.0**-40)  # amax / 448 below the smallest scale
    compare(any_family, case.replace(k_scale=tiny))
