"""The interval oracle: what may be selected when fp32 rounding is not exact.

The bounds are those of `hisa.testing.rounding`, on values decoded without torch's casts.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from hisa.testing.rounding import UNIT, gamma, score_bounds
from tests import oracle
from tests.case import Case
from tests.numeric import F32, FP8, decode

F64 = NDArray[np.float64]


def scores(q: F32, k: F32, weights: F32, scale: F32, dot_unit: float = UNIT) -> tuple[F64, F64]:
    """Return the fp64 scores of keys [n, D] for one query [H, D], and their error bounds."""
    one = [torch.from_numpy(x) for x in (q[None], k, weights[None], scale)]
    exact, eps = score_bounds(*one, dot_roundoff=dot_unit)
    return exact[0].numpy(), eps[0].numpy()


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
