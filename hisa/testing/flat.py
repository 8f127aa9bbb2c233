"""Whether a selection is the flat one, up to ties within rounding."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from hisa.bounds import dot_roundoff as default_dot_roundoff
from hisa.checking import OPTIONAL, check_types
from hisa.contract import check_contract
from hisa.windows import clamp_windows

from .form import assert_valid_indices, first_true, row_chunks
from .rounding import score_bounds

KEYS = 4096  # scored at a time
PAIR_BYTES = 64  # of [M, H, KEYS] and of [M, N], for the rows at hand


def assert_matches_flat(
    indices: Tensor,
    q: Tensor,
    k: Tensor,
    weights: Tensor,
    *,
    k_scale: Tensor | None = None,
    ks: Tensor | None = None,
    ke: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    topk: int | None = None,
    scores: Tensor | None = None,
    dot_roundoff: float | None = None,
) -> None:
    """Assert that a selection is the flat indexer's, up to ties within rounding.

    For the selections of `hisa.flat_index`, of `hisa.index` where `block_topk` blocks cover the
    windows, and of any other indexer, brought into their form (`to_selection` does that). The
    scores are computed anew in float64, with a bound of what float32 rounding in any order can do
    to each. A selection is wrong if it lacks a token that is better than one it has, beyond both
    their bounds. Nothing is averaged: one wrong token fails.

    Args:
        indices: `[M, topk]` int32, of the form that `assert_valid_indices` checks.
        q, k, weights, k_scale, ks, ke: what the indexer was given, as for `hisa.flat_index`.
        cu_seqlens_k: `[S + 1]` int32: windows end with their packed sequence, as for `hisa.index`.
        topk: the width that `indices` must have; any by default.
        scores: `[M, topk]` float32, the selected tokens' scores, to be checked too.
        dot_roundoff: unit roundoff of the sums inside a dot product. By default 2**-24, on a GPU
            2**-22, since tensor cores truncate, and 2**-12 where they keep 13 bits: where
            `hisa.flat_index` has them multiply fp8. Coarser sums need more, such as 2**-10 for
            TF32.

    Raises:
        AssertionError: the form is wrong, or a token; names the first row at fault, the tokens,
            their reference scores, the threshold and the allowed error.
        TypeError, ValueError: another argument is not as for `hisa.flat_index`.

    A score that may overflow float32 bounds nothing. Reads from the device. Cost: two products
    of `[M, H, D]` and `[D, N]` in float64. Memory: 256 MiB beside the arguments, or what one row
    takes.
    """
    __tracebackhide__ = True
    check_types(Tensor, indices=indices, q=q, k=k, weights=weights)
    check_types(OPTIONAL, k_scale=k_scale, ks=ks, ke=ke, cu_seqlens_k=cu_seqlens_k, scores=scores)
    check_contract(
        k, q=q, weights=weights, k_scale=k_scale, ks=ks, ke=ke, cu_seqlens_k=cu_seqlens_k
    )
    rows, heads, keys, device = q.shape[0], q.shape[1], k.shape[0], k.device
    start, end, _ = clamp_windows(ks, ke, cu_seqlens_k, rows=rows, keys=keys, device=device)
    if topk is None:
        topk = indices.shape[-1] if indices.dim() else 0
    assert_valid_indices(indices, keys=keys, topk=topk, ks=start, ke=end, scores=scores)
    indices = indices.to(device)
    scale = torch.ones(keys, device=device) if k_scale is None else k_scale
    if dot_roundoff is None:
        dot_roundoff = default_dot_roundoff(q)

    for at in row_chunks(rows, PAIR_BYTES * (heads * min(KEYS, keys) + keys)):
        seen = slice(int(start[at].min()), int(end[at].max()))
        if seen.start >= seen.stop:
            continue
        parts = [
            score_bounds(q[at], k[part], weights[at], scale[part], dot_roundoff=dot_roundoff)
            for part in _cut(seen)
        ]
        exact, eps = (torch.cat(columns, dim=1) for columns in zip(*parts, strict=True))
        rows_seen = _Rows(at.start, start[at], end[at], seen.start, indices[at], exact, eps)
        fault = _token_fault(rows_seen)
        if fault is None and scores is not None:
            fault = _score_fault(rows_seen, scores[at].to(device))
        if fault is not None:
            raise AssertionError(fault)


class _Rows(NamedTuple):
    """Some rows, and the reference scores of the keys from `base` on, R rows and W keys."""

    first: int  # number of the first row
    start: Tensor  # [R] int32, window
    end: Tensor
    base: int
    indices: Tensor  # [R, topk] int32
    exact: Tensor  # [R, W] fp64
    eps: Tensor  # [R, W] fp64

    def columns(self) -> Tensor:
        """Return where each slot's token lies in `exact`: `[R, topk]`, W for unused slots."""
        column = self.indices.long() + (self.start[:, None] - self.base)
        return torch.where(self.indices < 0, self.exact.shape[1], column)

    def where(self, row: int) -> str:
        """Return the row's number and window, for a message."""
        return f"row {self.first + row}, window [{int(self.start[row])}, {int(self.end[row])})"

    def token(self, row: int, column: int) -> str:
        """Describe a token, for a message."""
        token = column + self.base - int(self.start[row])
        exact, eps = float(self.exact[row, column]), float(self.eps[row, column])
        return f"token {token} (reference score {exact:.9g}, allowed error {eps:.3g})"


def _cut(seen: slice) -> Iterator[slice]:
    """Cut a range of keys into parts of KEYS."""
    return (
        slice(first, min(first + KEYS, seen.stop)) for first in range(seen.start, seen.stop, KEYS)
    )


def _token_fault(rows: _Rows) -> str | None:
    """Say which row lacks a token that is better than one it has, beyond both their bounds."""
    count, width = rows.exact.shape
    chosen = torch.zeros(count, width + 1, dtype=torch.bool, device=rows.exact.device)
    chosen = chosen.scatter_(1, rows.columns(), True)[:, :width]
    key = torch.arange(rows.base, rows.base + width, device=chosen.device)
    inside = (key >= rows.start[:, None]) & (key < rows.end[:, None])
    highest = torch.where(chosen, rows.exact + rows.eps, torch.inf)
    lowest = torch.where(inside & ~chosen, rows.exact - rows.eps, -torch.inf)
    worst, best = highest.min(1), lowest.max(1)
    row = first_true(worst.values < best.values)
    if row is None:
        return None
    taken = int(chosen[row].sum())
    threshold = float(rows.exact[row][inside[row]].sort(descending=True).values[taken - 1])
    has, lacks = (rows.token(row, int(found.indices[row])) for found in (worst, best))
    return (
        f"{rows.where(row)}: has {has} but lacks {lacks}; the threshold, score {taken} of "
        f"{int(inside[row].sum())}, is {threshold:.9g}"
    )


def _score_fault(rows: _Rows, scores: Tensor) -> str | None:
    """Say which token's score is not within its bound."""
    columns = rows.columns()
    at = columns.clamp(max=rows.exact.shape[1] - 1)
    got = torch.where(scores.isnan(), -torch.inf, scores.double())
    want, eps = rows.exact.gather(1, at), rows.eps.gather(1, at)
    right = (got == want) | ((got - want).abs() <= eps) | (rows.indices < 0)
    row = first_true(~right.all(1))
    if row is None:
        return None
    slot = int((~right[row]).int().argmax())
    token = rows.token(row, int(columns[row, slot]))
    return f"{rows.where(row)}: the score {float(scores[row, slot]):.9g} of {token} is wrong"
