"""How far a score computed in fp32 may be from its true value.

For scores computed in fp32 in any order, with unit roundoff u = 2^-24 (a larger one where the sums
inside a dot product are coarser) and g(n) = (n + 1) u / (1 - (n + 1) u), standard error analysis
gives

    dot     |dot^ - dot| <= g(D) * sum_d |q_d * k_d|
    head    relu is 1-Lipschitz, so each head adds |w_h| * that, and the sum over heads adds
            g(H) * sum_h |w_h| * (relu(dot_h) + its error)
    scale   one more rounding

which is `eps` below, computed in fp64 from the magnitudes of the terms. The fused or unfused
product is covered by the `+ 1`. A product that underflows is off by 2^-126 at most. A dot product
that stays below 0 whatever its rounding contributes 0, without error.

A selection is right if no unselected token is better than a selected one beyond both their bounds:
min over selected of (s + eps) >= max over unselected of (s - eps). With equal eps this is the bound
t_k +- 2 eps around the row's threshold.
"""

from __future__ import annotations

import torch
from torch import Tensor

UNIT = 2.0**-24
TINY = 2.0**-126  # the smallest normal fp32
LARGEST = torch.finfo(torch.float32).max


def gamma(terms: int, unit: float = UNIT) -> float:
    """Relative error bound of a sum of `terms` products."""
    return (terms + 1) * unit / (1 - (terms + 1) * unit)


def score_bounds(
    q: Tensor, k: Tensor, weights: Tensor, scale: Tensor, *, dot_roundoff: float = UNIT
) -> tuple[Tensor, Tensor]:
    """Return the fp64 scores of keys and their error bounds.

    Args:
        q: `[M, H, D]`, any dtype.
        k: `[n, D]`.
        weights: `[M, H]`.
        scale: `[n]`.
        dot_roundoff: unit roundoff of the sums inside a dot product.

    Returns:
        `(exact, eps)`, both `[M, n]` float64. A NaN score is -inf, as it ranks. What may overflow
        in fp32 has the bound inf.
    """
    query, keys, heads, factor = q.double(), k.double(), weights.double(), scale.double()
    size = query.abs() @ keys.abs().T  # [M, H, n]
    dots = query @ keys.T
    error = gamma(q.shape[2], dot_roundoff) * size + q.shape[2] * TINY
    error = torch.where(dots + error > 0, error, 0.0)
    relu = torch.where(dots > 0, dots, 0.0)

    total = _weighted(heads, relu)  # [M, n]
    reach = _weighted(heads.abs(), relu + error)
    bound = _weighted(heads.abs(), error) + gamma(q.shape[1]) * reach + q.shape[1] * TINY
    exact = factor * total
    eps = factor.abs() * (bound * (1 + UNIT) + UNIT * total.abs()) + TINY

    overflow = _overflows(size).any(1) | _overflows(reach) | _overflows(exact.abs())
    eps = torch.where(overflow, torch.inf, torch.where(exact.isfinite(), eps, 0.0))
    return torch.where(exact.isnan(), -torch.inf, exact), eps


def _weighted(weights: Tensor, values: Tensor) -> Tensor:
    """Sum `[M, H, n]` values over heads."""
    return (weights[:, None] @ values)[:, 0]


def _overflows(size: Tensor) -> Tensor:
    """Whether fp32 may overflow here; an infinite input is none."""
    return (size > LARGEST) & size.isfinite()
