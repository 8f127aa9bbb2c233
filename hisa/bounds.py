"""Balls around a few keys each, and what no score of such keys can exceed.

A score is Lipschitz in its key: with delta = k - c, by the Cauchy-Schwarz inequality over heads,

    |score(k) - score(c)| <= sum_h |w_h| * |dot(q_h, delta)| <= L * |delta|
    L = sqrt(sum_h |w_h|) * (largest singular value of the rows sqrt(|w_h|) * q_h)

or `sum_h |w_h| * |q_h|`, if that is less. So no key in a ball of centre c and radius r scores more
than `score(c) + L * r`. That is the score of the key [c, r] with one more head, which has the query
[0, 1] and the weight L: the operators compute it. Everything is rounded outwards, and `slack`
bounds what rounding does to such a score.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .planning import plan

CHANNELS = 16  # that a query and a ball have more than a key: the first holds the radius
CHUNK_BYTES = 64 * 2**20  # of keys in fp32 at a time
SAFE = 1 + 2.0**-10  # covers the rounding of norms in fp32
DOT_ROUNDOFF = {"cpu": 2.0**-24, "cuda": 2.0**-22}  # unit roundoff of sums: tensor cores truncate
LIMIT = 2.0**100  # keys from here on count as not finite


@dataclass(frozen=True)
class Balls:
    """One ball for every `size` tokens; slots are numbered as by `hisa.pool_keys`."""

    size: int
    keys: Tensor  # [slots, D + CHANNELS], [c, r, 0, ...] / scale
    scale: Tensor  # [slots] fp32, powers of two
    broken: (
        Tensor  # [slots + 1] int32: how many slots before this one hold a key that is not finite
    )
    longest: Tensor  # [] fp32: largest norm of a key
    top_scale: Tensor  # [] fp32: largest scale of a key or a ball


def make_balls(k: Tensor, k_scale: Tensor | None, cu_seqlens_k: Tensor | None, size: int) -> Balls:
    """Return the balls of all complete groups of `size` tokens; slots of others are not used."""
    n, dim = k.shape
    slots = -(-n // size)
    first = _first_tokens(n, slots, size, cu_seqlens_k, k.device)
    dtype = torch.float16 if k.dtype == torch.float8_e4m3fn else k.dtype
    keys = torch.zeros(slots, dim + CHANNELS, dtype=dtype, device=k.device)
    scale = torch.ones(slots, dtype=torch.float32, device=k.device)
    finite = torch.ones(slots, dtype=torch.bool, device=k.device)
    longest = torch.zeros((), dtype=torch.float32, device=k.device)
    step = max(1, CHUNK_BYTES // (4 * size * dim))
    for begin in range(0, slots, step):
        at = slice(begin, begin + step)
        tokens = (first[at, None] + torch.arange(size, device=k.device)).clamp(max=n - 1)
        members = k[tokens].float()  # [slots, size, D]
        if k_scale is not None:
            members *= k_scale[tokens, None]
        top = members.abs().amax((1, 2))
        finite[at] = top < LIMIT
        members = torch.where(finite[at, None, None], members, 0.0)
        # Powers of two divide exactly. The first keeps squares from vanishing, both together make
        # centre and radius less than 1, since twice the largest norm bounds them.
        unit = torch.ldexp(torch.ones_like(top), _exponent(top.where(finite[at], 1.0)))
        members = members / unit[:, None, None]
        norms = members.norm(dim=2).amax(1) * SAFE
        whole = torch.ldexp(torch.ones_like(top), _exponent(norms * 2))
        scale[at] = unit * whole
        longest = torch.maximum(longest, (norms * unit).amax())

        rounded = (members.mean(1) / whole[:, None]).to(dtype)
        centre = rounded.float() * whole[:, None]
        radius = (members - centre[:, None]).norm(dim=2).amax(1)
        radius = radius * SAFE + norms * 2.0**-18  # and that of the differences
        keys[at, :dim] = rounded
        keys[at, dim] = round_up(radius / whole, dtype)
    bad = (~finite).cumsum(0, dtype=torch.int32)
    scales = scale if k_scale is None else torch.cat([scale, k_scale])
    return Balls(
        size=size,
        keys=keys,
        scale=scale,
        broken=torch.nn.functional.pad(bad, (1, 0)),
        longest=longest,
        top_scale=torch.nn.functional.pad(scales, (0, 1)).amax(),
    )


@dataclass(frozen=True)
class BallQueries:
    """What rows ask balls for."""

    q: Tensor  # [M, H + 1, D + CHANNELS], of the balls' dtype
    weights: Tensor  # [M, H + 1] fp32
    reach: Tensor  # [M] fp32: sum_h |w_h| * |q_h|, not finite if anything in the row is not


def make_queries(q: Tensor, weights: Tensor) -> BallQueries:
    """Return queries for balls from `[M, H, D]` queries and `[M, H]` float32 weights."""
    rows, heads, dim = q.shape
    dtype = torch.float16 if q.dtype == torch.float8_e4m3fn else q.dtype
    queries = torch.zeros(rows, heads + 1, dim + CHANNELS, dtype=dtype, device=q.device)
    queries[:, :heads, :dim] = q.to(dtype)
    queries[:, heads, dim] = 1
    # NOTE: 0 * inf is NaN, so an infinite norm shows even where the weight is 0.
    reach = (weights.abs() * q.float().norm(dim=2)).sum(1) * SAFE
    steepest = torch.minimum(reach, _spectral(q, weights))
    return BallQueries(queries, torch.cat([weights, steepest[:, None]], dim=1), reach)


def _spectral(q: Tensor, weights: Tensor) -> Tensor:
    """Return the first form of L for each row, rounded up.

    The largest eigenvalue of a positive semidefinite G is at most the fourth root of the Frobenius
    norm of G^4. In fp64, whose rounding SAFE covers many times.
    """
    share = weights.abs().double()
    scaled = q.double() * share.sqrt()[:, :, None]
    gram = scaled @ scaled.mT
    trace = gram.diagonal(dim1=1, dim2=2).sum(1).clamp(min=torch.finfo(torch.float64).tiny)
    square = gram / trace[:, None, None]
    for _ in range(2):
        square = square @ square
    eigenvalue = square.square().sum((1, 2)).pow(1 / 8) * trace
    return ((share.sum(1) * eigenvalue).sqrt() * SAFE).float()


def slack(q: Tensor, asked: BallQueries, balls: Balls) -> Tensor:
    """Return how far rounding may lift a token's score above the computed score of its ball.

    Standard error analysis: a sum of n products in fp32, in any order, is off by at most
    `(n + 1) * u` times the sum of their magnitudes, which for a dot product is at most |q_h| * |k|.
    A ball's centre and radius together are at most three times as long as its longest key. What
    underflows is lost as a whole. Not finite if anything in the row is not.

    Args:
        q: `[M, H, D]`, the keys' own queries, for their sizes, dtype and device.
        asked: what `make_queries` made of them.
        balls: all that there are.
    """
    heads, dim = q.shape[1], q.shape[2]
    token = (dim + 2) * dot_roundoff(q) + (heads + 3) * 2.0**-24
    ball = (dim + CHANNELS + 2) * DOT_ROUNDOFF[q.device.type] + (heads + 4) * 2.0**-24
    rounding = asked.reach * balls.longest * (token + 3.1 * ball) * 1.01
    underflow = (asked.weights.abs().sum(1) + 1) * balls.top_scale * (dim + heads) * 2.0**-124
    return rounding + underflow + 2.0**-120


def dot_roundoff(q: Tensor) -> float:
    """Return the unit roundoff of dot products with this tensor on its device."""
    if q.device.type == "cuda" and q.dtype == torch.float8_e4m3fn and _multiplies_fp8(q):
        return 2.0**-12
    return DOT_ROUNDOFF[q.device.type]


def _multiplies_fp8(q: Tensor) -> bool:
    """Say whether tensor cores multiply fp8 itself, which keeps few bits, and not as fp16."""
    capability = torch.cuda.get_device_capability(q.device)
    if capability == (8, 9) or capability[0] >= 12:
        return True
    kernels = plan(1, 1, *q.shape[1:], dtype=q.dtype, device=q.device, op="flat_index").kernels
    return "wgmma" in kernels["flat"]


def round_up(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the smallest value of `dtype` that is at least x; x is not negative."""
    y = x.to(dtype)
    if dtype == torch.float32:
        return y
    return torch.where(y.float() < x, (y.view(torch.int16) + 1).view(dtype), y)


def _exponent(x: Tensor) -> Tensor:
    """Return the least e, within what fp32 can hold in any case, for which x < 2^e."""
    return torch.frexp(x.clamp(1 / LIMIT, LIMIT)).exponent


def _first_tokens(
    n: int, slots: int, size: int, cu_seqlens_k: Tensor | None, device: torch.device
) -> Tensor:
    """Return the first token of each slot's group; of one that is not complete, any token."""
    first = torch.arange(slots, device=device) * size
    if cu_seqlens_k is None:
        return first
    edges = cu_seqlens_k.long().contiguous()
    segment = torch.searchsorted(edges, first, right=True) - 1
    start = edges[segment.clamp(min=0)]
    return (start + (first - start) // size * size).clamp(0, n)
