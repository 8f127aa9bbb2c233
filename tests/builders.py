"""Input builders: random calls on which fp32 arithmetic is exact, with many real ties.

Exactness is what makes a test exact on every device: small integers, power-of-two key scales,
integer weights, and block sizes that are powers of two. `exact_case` proves it for each call it
returns (see `is_exact`), for the keys and for the pooled keys, and thins out the queries until it
holds.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hisa.testing import random_inputs
from tests import oracle
from tests.case import Case
from tests.numeric import DTYPES, F32, FP8, decode

BLOCK_SIZES = (8, 16, 32, 64, 128, 256)
SHAPES = {  # of random calls: heads and head dimensions, the frequent ones several times
    "any": ((1, 1, 2, 2, 3, 4, 5, 8, 16, 64), (16, 16, 16, 32, 48, 80, 128, 256)),
    "hopper": ((16, 16, 16, 32, 32, 64, 128), (64, 64, 128)),  # csrc/cuda/sm90
}
INT_MIN, INT_MAX = -(2**31), 2**31 - 1
Rng = np.random.Generator
# What csrc/cuda/sm90 takes, and what tests have there instead of other dtypes.
HOPPER_HEADS, HOPPER_DEPTHS = (16, 32, 64, 128), (64, 128)
HOPPER_DTYPES = {torch.float32: torch.bfloat16, torch.float16: FP8}
shapes = "any"  # set by the option --shapes


def shaped(**wanted: Any) -> dict[str, Any]:
    """Return the H, D and dtype of a test that would do with others: as they are, or as `--shapes`.

    With `--shapes hopper` small numbers become some that csrc/cuda/sm90 takes, still different
    ones: heads 8 times as many or more, channels twice as many. It has neither fp32 nor fp16.
    """
    if shapes == "any":
        return wanted

    def fit(name: str, value: Any) -> Any:
        if name == "dtype":
            return HOPPER_DTYPES.get(value, value)
        factor, fitting = {"H": (8, HOPPER_HEADS), "D": (2, HOPPER_DEPTHS)}[name]
        enough = (n for n in fitting if n >= factor * value)
        return value if value in fitting else next(enough, fitting[-1])

    return {name: fit(name, value) for name, value in wanted.items()}


def exact_case(seed: int, *, budget: float = 1.5e6, **fixed: Any) -> Case:
    """Return a random call, exact in fp32; `fixed` pins dtype, H, D, N, M, B or any other field.

    `budget` bounds M * N * H * D. `--shapes` says which dtypes, H and D there are; with larger ones
    it is more.
    """
    rng = np.random.default_rng(seed)
    all_heads, depths = SHAPES[shapes]
    budget *= 1 if shapes == "any" else 8
    dtype = fixed.pop("dtype", random_dtype(rng))
    heads = fixed.pop("H", int(rng.choice(all_heads)))
    depth = fixed.pop("D", int(rng.choice(depths)))
    size = fixed.pop("B", int(rng.choice(BLOCK_SIZES, p=[0.3, 0.2, 0.15, 0.15, 0.1, 0.1])))
    n = fixed.pop("N", random_length(rng, size, budget / (heads * depth)))
    rows = int(min(rng.integers(1, 13), 1 + budget // (max(n, 1) * heads * depth)))
    rows = fixed.pop("M", rows if rng.random() > 0.02 else 0)
    block_topk = fixed.pop("block_topk", int(rng.choice([2, 2, 3, 3, 4, 6, 9])))
    topk = fixed.pop("topk", random_topk(rng, block_topk * size))
    cu = fixed.pop("cu_seqlens_k", random_segments(rng, n) if rng.random() < 0.5 else None)
    if "ks" in fixed or "ke" in fixed:
        ks, ke = fixed.pop("ks", None), fixed.pop("ke", None)
    else:
        ks, ke = random_windows(rng, rows, n, cu)
    keys = random_keys(rng, n, depth, size)
    if rng.random() < 0.3:  # some blocks of zeros: their fp8 scale is the smallest one
        start = int(rng.integers(0, n + 1))
        keys[start : start + int(rng.integers(1, 4)) * size] = 0
    scale = None
    if rng.random() < (0.8 if dtype == FP8 else 0.3):
        scale = torch.from_numpy(rng.choice([0.5, 1, 2], n).astype(np.float32))
    scale = fixed.pop("k_scale", scale)
    case = Case(
        q=as_tensor(np.zeros((rows, heads, depth)), dtype),
        k=as_tensor(keys, dtype),
        weights=as_tensor(random_weights(rng, rows, heads)),
        k_scale=scale,
        ks=ks,
        ke=ke,
        cu_seqlens_k=cu,
        block_size=size,
        block_topk=block_topk,
        topk=topk,
        pooling=fixed.pop("pooling", str(rng.choice(["mean", "mean", "max"]))),
    ).replace(**fixed)
    return with_exact_queries(rng, case)


def with_exact_queries(rng: Rng, case: Case) -> Case:
    """Fill in queries, ever sparser until every sum is exact in fp32 in any order."""
    pooled = oracle.pool_keys(case)[0]
    queries = rng.integers(-2, 3, tuple(case.q.shape)).astype(np.float32)
    dot_limit = 2**13 if case.q.dtype == FP8 else 2**24
    for _ in range(48):
        tried = case.replace(q=as_tensor(queries, case.q.dtype))
        weights = decode(case.weights)
        if all(is_exact(queries, keys, weights, dot_limit) for keys in (decode(case.k), pooled)):
            return tried
        queries = queries * (rng.random(queries.shape) < 0.7)
    raise AssertionError("no exact queries found")


def is_exact(q: F32, k: F32, weights: F32, dot_limit: int) -> bool:
    """Say whether all sums of a score are exact in fp32, in any order.

    They are when every term is a multiple of some power of two and the sum of the terms'
    magnitudes, in units of it, stays below 2^24 (for the dot product: below `dot_limit`).
    """
    if min(q.size, k.size) == 0:
        return True
    dots = np.abs(q).astype(np.float64) @ np.abs(k).astype(np.float64).T  # [M, H, N]
    totals = np.einsum("mh,mhn->mn", np.abs(weights).astype(np.float64), dots)
    step = lowest_bit(q) * lowest_bit(k)
    return bool(dots.max() < dot_limit * step and totals.max() < 2**24 * step * lowest_bit(weights))


def lowest_bit(x: F32) -> float:
    """Return the largest power of two that divides every value."""
    mantissa, exponent = np.frexp(x[x != 0].astype(np.float64))
    whole = np.abs(mantissa * 2.0**24).astype(np.int64)
    return float(np.min((whole & -whole) * 2.0 ** (exponent - 24.0), initial=2.0**60))


def random_dtype(rng: Rng) -> torch.dtype:
    """Return one of the dtypes, or of those of `--shapes`."""
    dtype: torch.dtype = shaped(dtype=DTYPES[rng.integers(4)])["dtype"]
    return dtype


def random_length(rng: Rng, size: int, limit: float) -> int:
    """Return a number of keys: often a few blocks and a ragged end, sometimes none or one."""
    if rng.random() < 0.05:
        return int(rng.integers(0, 3))
    blocks = int(rng.integers(0, 24))
    return int(
        max(1, min(blocks * size + rng.choice([0, 1, size - 1, int(rng.integers(size))]), limit))
    )


def random_topk(rng: Rng, most: int) -> int:
    """Return a topk, odd ones and both limits included."""
    return int(
        rng.choice([1, most, int(rng.integers(1, most + 1)), int(rng.integers(1, most // 2 + 1))])
    )


def random_keys(rng: Rng, n: int, depth: int, size: int) -> NDArray[np.float64]:
    """Return integer keys of one of four kinds; all but the first bring ties on purpose."""
    kind = rng.integers(4)
    if kind == 0:
        return rng.integers(-2, 3, (n, depth)).astype(np.float64)
    palette = rng.integers(-2, 3, (4, depth)).astype(np.float64)
    if kind == 1:  # a few distinct keys
        return palette[rng.integers(0, 4, n)]
    if kind == 2:  # equal keys all over a block: blocks tie, then tokens tie
        return palette[rng.integers(0, 4, n // size + 1)].repeat(size, axis=0)[:n]
    return np.where(rng.random((n, depth)) < 0.1, rng.integers(-2, 3, (n, depth)), 0.0)


def random_weights(rng: Rng, rows: int, heads: int) -> NDArray[np.float64]:
    """Return integer weights: any sign, all positive, all negative, or with zeros."""
    low, high = [(-2, 3), (-2, 3), (1, 3), (-2, 0), (0, 2)][rng.integers(5)]
    return rng.integers(low, high, (rows, heads)).astype(np.float64)


def random_segments(rng: Rng, n: int) -> Tensor:
    """Return ragged segment edges: empty segments, and sometimes keys that belong to none."""
    inner = np.sort(rng.integers(0, n + 1, rng.integers(0, 5)))
    first = rng.integers(0, n + 1) if rng.random() < 0.1 else 0
    last = rng.integers(0, n + 1) if rng.random() < 0.1 else n
    inner = np.clip(inner, min(first, last), max(first, last))
    return int32([min(first, last), *inner, max(first, last)])


def random_windows(
    rng: Rng, rows: int, n: int, cu: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Return windows of one of five kinds: none, causal, inside a segment, wild, one-sided."""
    kind = rng.integers(5)
    if kind == 0:
        return None, None
    if kind == 1 and rng.random() < 0.5:
        return None, int32(rng.integers(0, n + 1, rows))
    if kind == 2 and rng.random() < 0.5:
        return int32(rng.integers(0, n + 1, rows)), None
    if kind == 3:
        wild = [INT_MIN, -n - 1, -4, -1, 0, 1, n // 2, n - 1, n, n + 1, 2 * n + 7, INT_MAX]
        return int32(rng.choice(wild, rows)), int32(rng.choice(wild, rows))
    edges = [0, n] if cu is None else cu.tolist()
    chosen = rng.integers(0, len(edges) - 1, rows)
    first, past = np.array(edges)[chosen], np.array(edges)[chosen + 1]
    start = first if kind == 1 else rng.integers(first, past + 1)
    return int32(start), int32(rng.integers(start, past + 1))


def int32(values: Any) -> Tensor:
    """Return an int32 tensor."""
    return torch.from_numpy(np.asarray(values, dtype=np.int64)).to(torch.int32)


def as_tensor(values: Any, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return a tensor of exactly representable values."""
    tensor = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32)).to(dtype)
    assert (tensor.float().numpy() == values).all()
    return tensor


def random_case(seed: int, dtype: torch.dtype, *, M: int = 6, N: int = 300, **fields: Any) -> Case:
    """Return a call on normally distributed floats: inexact sums, hardly any tie."""
    sizes = {name: fields.pop(name, n) for name, n in shaped(H=4, D=32).items()}
    inputs = random_inputs(seed, M=M, N=N, **sizes, dtype=dtype, causal=False)
    return Case(**{**inputs, "ks": None, "ke": None, **fields})


def causal(case: Case, start: int = 0) -> Case:
    """Give the rows the windows of the last M tokens: row i sees [start, N - M + i + 1)."""
    m, n = case.shape[:2]
    return case.replace(ks=int32(np.full(m, start)), ke=int32(np.arange(n - m + 1, n + 1)))
