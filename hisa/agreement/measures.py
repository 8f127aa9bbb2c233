"""The measures of one selection against the flat one, for many rows at once.

A row's selection is `topk` tokens, ascending, then -1; its scores lie in the same order.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

LAST = torch.iinfo(torch.int32).max  # sorts behind every token


class Measures(NamedTuple):
    """One value for each row; for F the tokens of flat and S those to be judged."""

    recall: Tensor  # [M] fp32: |F & S| / |F|
    iou: Tensor  # [M] fp32: |F & S| / |F | S|
    mass: Tensor  # [M] fp32: sum(score[S] - lowest) / sum(score[F] - lowest)
    worst_miss: Tensor  # [M] int32: best rank in F, from 1 on, of a token that S lacks; 0: none


def measure(flat: tuple[Tensor, Tensor], chosen: tuple[Tensor, Tensor], lowest: Tensor) -> Measures:
    """Compare selections row by row.

    Args:
        flat, chosen: `(indices, scores)`, `[M, topk]` int32 and float32, as `hisa.flat_index` and
            `hisa.index` return them.
        lowest: `[M]` float32, the lowest score in each row's window.

    Where flat selects nothing, nothing is lost: 1, 1, 1, 0.
    """
    wanted, got = flat[0], chosen[0]
    in_flat = wanted >= 0
    sorted_got = torch.where(got < 0, LAST, got)
    at = torch.searchsorted(sorted_got, wanted).clamp(max=got.shape[1] - 1)
    hit = sorted_got.gather(1, at) == wanted  # never so for -1
    hits = hit.sum(1)
    in_flat_count, got_count = in_flat.sum(1), (got >= 0).sum(1)
    either = in_flat_count + got_count - hits
    return Measures(
        recall=_share(hits, in_flat_count),
        iou=_share(hits, either),
        mass=_share(_mass(*chosen, lowest), _mass(*flat, lowest)),
        worst_miss=_worst_miss(flat[1], in_flat, hit),
    )


def _share(part: Tensor, whole: Tensor) -> Tensor:
    """Return part / whole in fp32; all of nothing is 1."""
    share = part.double() / whole.double()
    return torch.where(whole == 0, 1.0, share).float()


def _mass(indices: Tensor, scores: Tensor, lowest: Tensor) -> Tensor:
    """Sum what each selected score is above the lowest one, in fp64."""
    above = scores.double() - lowest.double()[:, None]
    return torch.where(indices < 0, 0.0, above).sum(1)


def _worst_miss(scores: Tensor, in_flat: Tensor, hit: Tensor) -> Tensor:
    """Return the best rank that was missed: by score, then by position, as flat prefers them."""
    ranked = torch.where(scores.isnan(), -torch.inf, scores)
    order = ranked.sort(dim=1, descending=True, stable=True).indices
    missed = (in_flat & ~hit).gather(1, order)
    # NOTE: unused slots come last among equals, -inf, since they lie behind all tokens.
    first = missed.int().argmax(1) + 1
    return torch.where(missed.any(1), first, 0).int()
