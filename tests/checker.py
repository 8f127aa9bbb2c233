"""The output contract (T4), applied to every result that any test looks at.

`assert_valid_output` needs no scores and no reference: shape, dtype, order, -1 tail, window, number
of valid slots and number of blocks follow from the call alone. `assert_same` compares with an
oracle.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tests import oracle
from tests.case import Case
from tests.oracle import Expected


class Result(NamedTuple):
    """What an op returned, on the CPU."""

    indices: Tensor
    scores: Tensor


def assert_valid_output(case: Case, result: Result, packed: bool = True) -> None:
    """Assert everything that SPEC.md says about an output of `index` (packed) or `flat_index`."""
    indices, scores = result
    shape = (case.q.shape[0], case.topk)
    assert indices.dtype == torch.int32 and tuple(indices.shape) == shape
    assert scores.dtype == torch.float32 and tuple(scores.shape) == shape
    assert indices.is_contiguous() and scores.is_contiguous()
    assert not indices.requires_grad and not scores.requires_grad
    for row, (tokens, values) in enumerate(zip(indices.numpy(), scores.numpy(), strict=True)):
        count = oracle.count_of_row(case, row, packed)
        where = f"row {row} ({case.describe()})"
        assert (tokens[count:] == -1).all(), f"{where}: slots from {count} on must be -1: {tokens}"
        assert (values[count:] == -np.inf).all(), f"{where}: unused slots must score -inf"
        valid = tokens[:count].astype(np.int64)
        assert (valid >= 0).all(), f"{where}: {count} valid slots expected, got {tokens}"
        assert (np.diff(valid) > 0).all(), f"{where}: not ascending and unique: {tokens}"
        seen = oracle.window(case, row, packed)
        if seen is None:
            continue
        assert (valid < seen.end - seen.start).all(), f"{where}: outside the window: {tokens}"
        if packed:
            first = (valid + seen.start - seen.origin) // case.block_size
            kept = len(np.unique(first))
            assert kept <= case.block_topk, f"{where}: tokens of {kept} blocks"


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
