"""The proof that a hierarchical selection is flat's, some rows at a time.

balls    a bound for every few keys (hisa/bounds.py), once for all rows
certify  select, then the best bound among the discarded blocks against the worst selected score
escalate flat for the rows that this does not prove
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
from torch import Tensor

from . import _extension
from .bounds import CHANNELS, Balls, make_balls, make_queries, slack
from .ops import Pooled, flat_index, index, pool_keys
from .windows import clamp_windows

CHUNK_BYTES = 256 * 2**20  # of queries and selections at a time
BOUND_SIZES = (8, 16, 32, 64, 128, 256)


class Proved(NamedTuple):
    """What `certify` finds for some rows: the fields of `hisa.Certificate`."""

    indices: Tensor
    scores: Tensor
    proved: Tensor
    margin: Tensor


def check_limits(*, heads: int, dim: int) -> None:
    """Raise ValueError if there are more heads or channels than a proof can have.

    What rounding does is bounded for any number of them. But a ball is scored by the operators
    themselves, as a key whose radius takes channels of its own and is weighed by a head of its own,
    and they have a limit.
    """
    limits = _extension.require().build_info()
    for name, got, limit, own in (
        ("D", dim, limits["max_dim"], CHANNELS),
        ("H", heads, limits["max_heads"], 1),
    ):
        if got > limit - own:
            raise ValueError(
                f"{name}: expected at most {limit - own} for a proof, which needs {own} of {limit} "
                f"for itself, got {got}"
            )


def check_bound_size(bound_size: int, block_size: int) -> None:
    """Raise ValueError if so many keys cannot share a bound."""
    if bound_size not in BOUND_SIZES or bound_size > block_size:
        raise ValueError(
            f"bound_size: expected one of {list(BOUND_SIZES)}, at most block_size = {block_size}, "
            f"got {bound_size}"
        )


@dataclass(frozen=True)
class Proof:
    """A call's tensors, checked, and what is computed once for all its rows."""

    q: Tensor
    k: Tensor
    weights: Tensor
    k_scale: Tensor | None
    cu_seqlens_k: Tensor | None
    block_size: int
    block_topk: int
    topk: int
    start: Tensor  # [M] int32, of the windows as read
    end: Tensor
    origin: Tensor
    pooled: Pooled
    balls: Balls

    @classmethod
    def make(
        cls,
        q: Tensor,
        k: Tensor,
        weights: Tensor,
        k_scale: Tensor | None,
        ks: Tensor | None,
        ke: Tensor | None,
        cu_seqlens_k: Tensor | None,
        pooled: Pooled | None,
        block_size: int,
        block_topk: int,
        topk: int,
        pooling: str,
        bound_size: int,
    ) -> Proof:
        """Compute what all rows share; the arguments have been checked."""
        start, end, origin = clamp_windows(
            ks, ke, cu_seqlens_k, rows=len(q), keys=len(k), device=k.device
        )
        if pooled is None:
            pooled = pool_keys(
                k,
                k_scale=k_scale,
                cu_seqlens_k=cu_seqlens_k,
                block_size=block_size,
                pooling=pooling,
            )
        balls = make_balls(k, k_scale, cu_seqlens_k, bound_size)
        return cls(q, k, weights, k_scale, cu_seqlens_k, block_size, block_topk, topk, start, end,
                   origin, pooled, balls)  # fmt: skip

    def chunks(self) -> list[slice]:
        """Return the rows to handle at a time; one empty slice if there are none."""
        per_row = self.q.shape[1] * (self.q.shape[2] + CHANNELS) * 8 + 32 * (self.topk + 1)
        rows = max(1, CHUNK_BYTES // per_row)
        return [slice(begin, begin + rows) for begin in range(0, max(1, len(self.q)), rows)]

    def certify(self, at: slice) -> Proved:
        """Select for some rows, and prove what can be proved."""
        indices, scores = _pair(
            index(
                self.q[at],
                self.k,
                self.weights[at],
                k_scale=self.k_scale,
                ks=self.start[at],
                ke=self.end[at],
                cu_seqlens_k=self.cu_seqlens_k,
                pooled=self.pooled,
                block_size=self.block_size,
                block_topk=self.block_topk,
                topk=self.topk,
                return_scores=True,
            )
        )
        inner = self._inner_blocks(at)
        discards = inner[1] - inner[0] > self.block_topk - 2
        worst = scores.amin(1)  # -inf if a slot is not used
        margin = torch.where(discards, worst - self._bound(at, inner), torch.inf)
        return Proved(indices, scores, margin > 0, margin)

    def escalate(self, at: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Certify, and run flat for rows that are not proved: all others have an empty window."""
        own = self.certify(at)
        proved = own.proved
        indices, scores = _pair(
            flat_index(
                self.q[at],
                self.k,
                self.weights[at],
                k_scale=self.k_scale,
                ks=self.start[at],
                ke=torch.where(proved, self.start[at], self.end[at]),
                topk=self.topk,
                return_scores=True,
            )
        )
        keep = proved[:, None]
        return (
            torch.where(keep, own.indices, indices),
            torch.where(keep, own.scores, scores),
            ~proved,
        )

    def _inner_blocks(self, at: slice) -> tuple[Tensor, Tensor]:
        """Return the segment's blocks [first, past) between the two that are always kept."""
        start, end, origin = self.start[at], self.end[at], self.origin[at]
        first = (start - origin) // self.block_size + 1
        past = (end - 1 - origin) // self.block_size
        return first, torch.where(end > start, torch.maximum(first, past), first)

    def _slots(self, at: slice, blocks: Tensor, size: int) -> Tensor:
        """Return the slots, of `size` tokens each, where the segment's blocks begin."""
        zeroth = (self.origin[at].long() + size - 1) // size
        slots = zeroth + blocks * (self.block_size // size)
        return slots.clamp(max=-(-len(self.k) // size)).int()

    def _bound(self, at: slice, inner: tuple[Tensor, Tensor]) -> Tensor:
        """Return what no score in a discarded block exceeds; NaN or inf where that is unknown."""
        q, weights, balls = self.q[at], self.weights[at], self.balls
        budget, ratio = self.block_topk - 2, self.block_size // balls.size
        asked = make_queries(q, weights)
        first, past = (self._slots(at, blocks, balls.size) for blocks in inner)
        # The best balls, one more than kept blocks have: the best discarded one is among them.
        count = min(budget * ratio + 1, max(1, len(balls.scale)))
        best, bounds = _pair(
            flat_index(
                asked.q, balls.keys, asked.weights, k_scale=balls.scale, ks=first, ke=past,
                topk=count, return_scores=True,
            )
        )  # fmt: skip
        discarded = (best >= 0) & ~self._is_kept(at, inner, best // ratio)
        bound = torch.where(discarded, bounds, -torch.inf).amax(1)
        broken = balls.broken[past.long()] > balls.broken[first.long()]
        unknown = broken | ~bounds.isfinite().where(best >= 0, True).all(1)
        return torch.where(unknown, torch.inf, bound + slack(q, asked, balls))

    def _is_kept(self, at: slice, inner: tuple[Tensor, Tensor], blocks: Tensor) -> Tensor:
        """Return which blocks, numbered from the first inner one on, the coarse stage keeps."""
        if self.block_topk == 2:
            return torch.zeros_like(blocks, dtype=torch.bool)
        first, past = (self._slots(at, number, self.block_size) for number in inner)
        keys, scale = self.pooled
        kept = flat_index(
            self.q[at], keys, self.weights[at], k_scale=scale, ks=first, ke=past,
            topk=min(self.block_topk - 2, max(1, len(scale))),
        )  # fmt: skip
        kept = torch.where(kept < 0, torch.iinfo(torch.int32).max, kept)
        where = torch.searchsorted(kept, blocks).clamp(max=kept.shape[1] - 1)
        return kept.gather(1, where) == blocks


def _pair(selection: Tensor | tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return cast("tuple[Tensor, Tensor]", selection)
