"""The output contract (T4), applied to every result that any test looks at.

`assert_valid_output` needs no scores and no reference: shape, dtype, order, -1 tail, window, number
of valid slots and number of blocks follow from the call alone. `assert_same` compares with an
oracle.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from hisa.testing import assert_valid_indices
from tests.case import Case
from tests.oracle import Expected


class Result(NamedTuple):
    """What an op returned, on the CPU."""

    indices: Tensor
    scores: Tensor


def assert_valid_output(case: Case, result: Result, packed: bool = True) -> None:
    """Assert everything that SPEC.md says about an output of `index` (packed) or `flat_index`."""
    indices, scores = result
    assert len(indices) == len(case.q)
    assert indices.is_contiguous() and scores.is_contiguous()
    assert not indices.requires_grad and not scores.requires_grad
    call: dict[str, Any] = {"ks": case.ks, "ke": case.ke, "topk": case.topk, "scores": scores}
    if packed:
        call.update(cu_seqlens_k=case.cu_seqlens_k, block_size=case.block_size,
                    block_topk=case.block_topk)  # fmt: skip
    try:
        assert_valid_indices(indices, keys=len(case.k), **call)
    except AssertionError as error:
        raise AssertionError(f"{error} ({case.describe()})") from None


def assert_same(result: Result, expected: Expected, note: str = "") -> None:
    """Assert equality with an oracle: indices exactly, scores by value (any NaN equals any NaN)."""
    indices, scores = result.indices.numpy(), result.scores.numpy()
    wrong = (indices != expected.indices).any(axis=1)
    differs = (scores != expected.scores) & ~(np.isnan(scores) & np.isnan(expected.scores))
    rows = np.flatnonzero(wrong | differs.any(axis=1))
    if len(rows) == 0:
        return
    row = int(rows[0])
    slot = int(np.flatnonzero((indices[row] != expected.indices[row]) | differs[row])[0])
    raise AssertionError(
        f"{len(rows)} of {len(indices)} rows are wrong; first: row {row}, slot {slot}\n"
        f"  indices got  {indices[row, slot : slot + 8]}\n"
        f"  indices want {expected.indices[row, slot : slot + 8]}\n"
        f"  scores got   {scores[row, slot : slot + 8]}\n"
        f"  scores want  {expected.scores[row, slot : slot + 8]}\n"
        f"  kept blocks  {expected.kept[row]}\n{note}"
    )
