"""Score rows that broke real top-k kernels, and a way to make the indexer compute any given row.

The ops take q, k and weights, not scores. `realise` builds a call whose scores are exactly the
wanted fp32 values: one head (weight +1) reads channel 0, where the key holds a positive value, the
other (weight -1) reads channel 1, where it holds the magnitude of a negative one. A key scale of 0
or NaN gives a zero with a sign and a NaN score. In 16 and 8 bits the key holds a 1 in the one
channel or the other, and its scale is the magnitude.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from tests.case import Case
from tests.numeric import F32

Builder = Callable[[int, int, np.random.Generator], F32]


def realise(
    wanted: F32, dtype: torch.dtype = torch.float32, heads: int = 2, depth: int = 16
) -> dict[str, Any]:
    """Return q [1, H, D], k [n, D], weights [1, H] and k_scale [n] whose scores are `wanted`."""
    n = len(wanted)
    q, weights = torch.zeros(1, heads, depth), torch.zeros(1, heads)
    q[0, 0, 0] = q[0, 1, 1] = 1
    weights[0, 0], weights[0, 1] = 1, -1
    if dtype != torch.float32:
        channels = torch.from_numpy(np.signbit(wanted).astype(np.int64))
        ones = torch.zeros(n, depth).scatter_(1, channels[:, None], 1.0)
        magnitudes = torch.from_numpy(np.abs(wanted))
        return {"q": q.to(dtype), "k": ones.to(dtype), "weights": weights, "k_scale": magnitudes}
    k, scale = np.zeros((n, depth), np.float32), np.ones(n, np.float32)
    k[:, 0] = np.where(wanted > 0, wanted, 0)
    k[:, 1] = np.where(wanted < 0, -wanted, 0)
    negative_zero = (wanted == 0) & np.signbit(wanted)
    k[negative_zero, 1], scale[negative_zero] = 1, 0
    scale[np.isnan(wanted)] = np.nan
    arrays = {"k": torch.from_numpy(k), "k_scale": torch.from_numpy(scale)}
    return {"q": q, "weights": weights, **arrays}


def realise_case(wanted: F32, topk: int, *kernel: Any) -> Case:
    """Return a call for `flat_index` with the wanted scores; dtype, H and D name a kernel."""
    return Case(**realise(wanted, *kernel), topk=topk)


def narrow(case: Case) -> Case:
    """Return a realised call without most of the heads and channels that are zeros.

    The oracle's IEEE arithmetic takes a step for each of them.
    """
    pooled = case.pooled and (case.pooled[0][:, :16], case.pooled[1])
    return case.replace(q=case.q[:, :2, :16], k=case.k[:, :16], weights=case.weights[:, :2],
                        pooled=pooled)  # fmt: skip


def bits(pattern: np.ndarray) -> F32:
    """Return the floats with these bit patterns."""
    return np.ascontiguousarray(pattern.astype(np.uint32)).view(np.float32)


def normal(n: int, k: int, rng: np.random.Generator) -> F32:
    """Standard normal values."""
    return rng.standard_normal(n).astype(np.float32)


def ten_low_bits(n: int, k: int, rng: np.random.Generator) -> F32:
    """Values that differ in their last 10 bits only."""
    return bits(0x3F900000 | rng.integers(0, 1024, n))


def consecutive(n: int, k: int, rng: np.random.Generator) -> F32:
    """One coarse bin, all values different: 0x3F800000 + i, shuffled."""
    return bits(0x3F800000 + rng.permutation(n))


def all_equal(n: int, k: int, rng: np.random.Generator) -> F32:
    """One value everywhere: the first k tokens win."""
    return np.full(n, 1.25, np.float32)


def all_zero(n: int, k: int, rng: np.random.Generator) -> F32:
    """The ReLU plateau."""
    return np.zeros(n, np.float32)


def plateau(share: float, level: float = 0.0) -> Builder:
    """A plateau over a share of the row and normal values elsewhere."""

    def build(n: int, k: int, rng: np.random.Generator) -> F32:
        row = np.abs(normal(n, k, rng))
        row[rng.random(n) < share] = level
        return row

    return build


def plateau_at_k(n: int, k: int, rng: np.random.Generator) -> F32:
    """Some winners, then a plateau of zeros across the threshold."""
    row = np.zeros(n, np.float32)
    row[rng.permutation(n)[: min(100, k // 2 + 1)]] = 1 + rng.random(min(100, k // 2 + 1))[:n]
    return row


def rising(n: int, k: int, rng: np.random.Generator) -> F32:
    """Each token better than the one before."""
    return np.arange(n, dtype=np.float32)


def falling(n: int, k: int, rng: np.random.Generator) -> F32:
    """Each token worse than the one before."""
    return -np.arange(n, dtype=np.float32)


def one_bin(size: int) -> Builder:
    """`size` different values in one coarse bin at the threshold, all others far below."""

    def build(n: int, k: int, rng: np.random.Generator) -> F32:
        row = np.full(n, -1, np.float32)
        place = rng.permutation(n)[: min(size, n)]
        row[place] = bits(0x40000000 + rng.permutation(len(place)))
        return row

    return build


def signed_zeros(n: int, k: int, rng: np.random.Generator) -> F32:
    """Zeros of both signs, which are equal, and a few other values."""
    row = np.where(rng.random(n) < 0.5, np.float32(0), np.float32(-0.0))
    row[rng.permutation(n)[: k // 4]] = 1
    return row


def denormals(n: int, k: int, rng: np.random.Generator) -> F32:
    """Subnormal values of both signs; flushing them to zero loses the order."""
    return bits(rng.integers(0, 1 << 12, n) | (rng.integers(0, 2, n) << 31))


def infinities(n: int, k: int, rng: np.random.Generator) -> F32:
    """Both infinities and finite values."""
    return rng.choice(np.array([np.inf, -np.inf, 0, 1, -1], np.float32), n)


def mostly(value: float, others: int) -> Builder:
    """One special value everywhere except `others` tokens."""

    def build(n: int, k: int, rng: np.random.Generator) -> F32:
        row = np.full(n, value, np.float32)
        row[rng.permutation(n)[:others]] = rng.standard_normal(min(others, n))
        return row

    return build


def beyond_fp16(n: int, k: int, rng: np.random.Generator) -> F32:
    """Magnitudes that overflow fp16: 65504, 65505, 1e6, 3e38, of both signs."""
    sizes = np.array([65504, 65505, 1e6, 3e38], np.float32)
    return np.concatenate([sizes, -sizes])[rng.integers(0, 8, n)]


def two_values(n: int, k: int, rng: np.random.Generator) -> F32:
    """Two values, the better one on fewer than k tokens."""
    row = np.full(n, 2, np.float32)
    row[rng.permutation(n)[: k - 1]] = np.float32(2) + np.float32(2.0**-22)
    return row


def few_values(n: int, k: int, rng: np.random.Generator) -> F32:
    """Sixty-four values: bf16-like scores modulo 64."""
    return (rng.integers(0, 64, n)).astype(np.float32)


def some_nan(n: int, k: int, rng: np.random.Generator) -> F32:
    """Half NaN; NaN ranks with -inf."""
    row = normal(n, k, rng)
    row[rng.random(n) < 0.5] = np.nan
    return row


def nan_and_inf_tail(n: int, k: int, rng: np.random.Generator) -> F32:
    """Fewer good tokens than k: the rest of the slots go to NaN and -inf by position."""
    row = rng.choice(np.array([np.nan, -np.inf], np.float32), n)
    row[rng.permutation(n)[: k // 2]] = rng.random(min(n, k // 2))
    return row


def all_negative(n: int, k: int, rng: np.random.Generator) -> F32:
    """Negative scores only."""
    return -np.abs(normal(n, k, rng)) - np.float32(0.1)


def outliers(n: int, k: int, rng: np.random.Generator) -> F32:
    """One huge value stretches the range; all others share a narrow band."""
    row = bits(0x3F800000 + rng.integers(0, 1 << 14, n))
    row[rng.integers(n)] = 3e38
    return row


def every_exponent(n: int, k: int, rng: np.random.Generator) -> F32:
    """Random bit patterns of finite floats: every exponent and sign."""
    row = bits(rng.integers(0, 1 << 32, n, dtype=np.uint64))
    return np.where(np.isfinite(row), row, np.float32(0))


BUILDERS: dict[str, Builder] = {
    "normal": normal,
    "ten low bits": ten_low_bits,
    "consecutive": consecutive,
    "all equal": all_equal,
    "all zero": all_zero,
    **{f"plateau {p}%": plateau(p / 100) for p in (5, 50, 90, 99)},
    "plateau on top": plateau(0.5, 9.0),
    "plateau at k": plateau_at_k,
    "rising": rising,
    "falling": falling,
    **{f"one bin {n}": one_bin(n) for n in
       (2047, 2048, 2049, 4095, 4096, 4097, 8192, 16383, 16384, 16385, 65536)},
    "signed zeros": signed_zeros,
    "denormals": denormals,
    "infinities": infinities,
    "all nan": mostly(np.nan, 0),
    "all but one nan": mostly(np.nan, 1),
    "one below k nan": mostly(np.nan, 2047),
    "all -inf": mostly(-np.inf, 0),
    "all +inf": mostly(np.inf, 0),
    "-inf and some": mostly(-np.inf, 100),
    "beyond fp16": beyond_fp16,
    "two values": two_values,
    "few values": few_values,
    "some nan": some_nan,
    "nan and -inf tail": nan_and_inf_tail,
    "all negative": all_negative,
    "outliers": outliers,
    "every exponent": every_exponent,
}  # fmt: skip
