"""The interval oracle: what may be selected when fp32 rounding is not exact.

For scores computed in fp32 in any order, with unit roundoff u = 2^-24 (a family may state a larger
one for its dot products) and g(n) = (n + 1) u / (1 - (n + 1) u), standard error analysis gives

    dot     |dot^ - dot| <= g(D) * sum_d |q_d * k_d|
    head    relu is 1-Lipschitz, so each head adds |w_h| * that, and the sum over heads adds
            g(H) * sum_h |w_h| * (relu(dot_h) + its error)
    scale   one more rounding

which is `eps` below, computed in fp64 from the magnitudes of the terms. The fused or unfused
product is covered by the `+ 1`. Underflow is negligible for the inputs used here.

A selection is right if no unselected token is better than a selected one beyond both their bounds:
min over selected of (s + eps) >= max over unselected of (s - eps). With equal eps this is the bound
t_k +- 2 eps around the row's threshold.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from tests import oracle
from tests.case import Case
from tests.numeric import F32, FP8, decode

F64 = NDArray[np.float64]
UNIT = 2.0**-24


def gamma(terms: int, unit: float = UNIT) -> float:
    """Relative error bound of a sum of `terms` products."""
    return (terms + 1) * unit / (1 - (terms + 1) * unit)


def scores(q: F32, k: F32, weights: F32, scale: F32, dot_unit: float = UNIT) -> tuple[F64, F64]:
    """Return the fp64 scores of keys [n, D] for one query [H, D], and their error bounds."""
    query, keys = q.astype(np.float64), k.astype(np.float64)
    heads, factor = weights.astype(np.float64), scale.astype(np.float64)
    dots = keys @ query.T  # [n, H]
    error = gamma(q.shape[1], dot_unit) * (np.abs(keys) @ np.abs(query).T)
    relu = np.maximum(dots, 0)
    total = relu @ heads
    bound = error @ np.abs(heads)
    bound += gamma(len(heads)) * ((relu + error) @ np.abs(heads))
    return factor * total, np.abs(factor) * (bound * (1 + UNIT) + UNIT * np.abs(total))


def assert_selected(chosen: NDArray[np.bool_], exact: F64, eps: F64, note: str) -> None:
    """Assert that no unselected item is better than a selected one beyond the error bounds."""
    if not chosen.any() or chosen.all():
        return
    worst, best = (exact + eps)[chosen].min(), (exact - eps)[~chosen].max()
    assert worst >= best, (
        f"{note}: an unselected item is better by {best - worst:g} beyond rounding"
    )


def assert_pooled(case: Case, pooled: torch.Tensor, pooled_scale: torch.Tensor) -> None:
    """Assert that each pooled key is the fp64 mean or maximum within the rounding of its dtype."""
    keys = decode(case.k).astype(np.float64) * oracle.key_scales(case).astype(np.float64)[:, None]
    got = decode(pooled).astype(np.float64) * decode(pooled_scale).astype(np.float64)[:, None]
    unit = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, FP8: 2.0**-4}
    relative = unit[case.k.dtype] * (1 + 2.0**-10)
    _, _, used = oracle.pool_keys(case)
    for first, past in oracle.segments(case):
        for token in range(first, past - case.block_size + 1, case.block_size):
            slot = oracle.slot_of(case, token)
            block = keys[token : token + case.block_size]
            want = block.max(axis=0) if case.pooling == "max" else block.mean(axis=0)
            error = gamma(case.block_size + 1) * np.abs(block).mean(axis=0) + UNIT * np.abs(want)
            tiny = 2.0**-24  # fp16 steps below 2^-14
            if case.k.dtype == FP8:
                amax = np.abs(want).max()
                step = 4 * gamma(case.block_size + 1) * np.abs(block).max()
                assert abs(pooled_scale[slot].item() * 448 - amax) <= step
                tiny = 2.0**-9 * float(pooled_scale[slot])
            bound = relative * (np.abs(want) + error) + error + tiny
            assert used[slot] and (np.abs(got[slot] - want) <= bound).all()
    assert (got[~used] == 0).all() and (pooled_scale.numpy()[~used] == 1).all()
