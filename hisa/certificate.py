"""Which rows of a hierarchical selection are proved to be flat's, and the selection that always is.

A discarded block cannot hold one of flat's tokens if no key in it can score as much as the worst
token that was selected. Such a bound follows from balls around a few keys each (hisa/bounds.py). It
is sound in floating point: what is proved is what `hisa.flat_index` returns on the same device.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import NamedTuple, cast

import torch
from torch import Tensor

from . import _extension
from .bounds import CHANNELS, Balls, make_balls, make_queries, slack
from .checking import check_inputs, check_types
from .ops import Pooled, flat_index, index, pool_keys
from .windows import clamp_windows

CHUNK_BYTES = 256 * 2**20  # of queries and selections at a time
BOUND_SIZES = (8, 16, 32, 64, 128, 256)


@dataclass(frozen=True, eq=False, repr=False)
class Certificate:
    """What `hisa.certify` returns.

    Attributes:
        indices: `[M, topk]` int32, what `hisa.index` selects.
        scores: `[M, topk]` float32, in the same order.
        proved: `[M]` bool: the row's tokens are flat's.
        margin: `[M]` float32: the worst selected score less the bound of the discarded blocks;
            positive where the row is proved, inf where nothing is discarded, otherwise what is
            missing. -inf or NaN where fewer than `topk` tokens are selected, or where a query, key
            or weight that counts is not finite.
    """

    indices: Tensor
    scores: Tensor
    proved: Tensor
    margin: Tensor

    def __str__(self) -> str:
        proved, whole = int(self.proved.sum()), int((self.margin == torch.inf).sum())
        return (
            f"{proved} of {len(self.proved)} rows are proved equal to flat, {whole} of them since "
            "nothing is discarded"
        )

    __repr__ = __str__


class ExactSelection(NamedTuple):
    """What `hisa.exact_index` returns.

    Attributes:
        indices: `[M, topk]` int32, the same set as `hisa.flat_index` selects.
        scores: `[M, topk]` float32, in the same order.
        escalated: `[M]` bool: the row was not proved, and flat has run for it.
    """

    indices: Tensor
    scores: Tensor
    escalated: Tensor


def certify(
    q: Tensor,
    k: Tensor,
    weights: Tensor,
    *,
    k_scale: Tensor | None = None,
    ks: Tensor | None = None,
    ke: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    pooled: Pooled | None = None,
    block_size: int = 128,
    block_topk: int = 64,
    topk: int = 2048,
    pooling: str = "mean",
    bound_size: int | None = None,
) -> Certificate:
    """Select hierarchically, and prove for as many rows as possible that flat would do the same.

    For each row the scores of all tokens in discarded blocks are bounded from above. If no bound
    reaches the worst selected score, the row is proved. The proof allows for rounding, and for any
    signs of the weights. How many rows it reaches depends on the keys: it needs keys that lie close
    together within `bound_size` neighbours, and proves next to nothing for random ones.

    Args:
        q, k, weights, k_scale, ks, ke, cu_seqlens_k, pooled, block_size, block_topk, topk, pooling:
            as for `hisa.index`, but D is at most 240 and H at most 127.
        bound_size: keys that share a bound, at most `block_size`: 8, 16, 32, 64, 128 or 256. Fewer
            give tighter bounds at a higher cost. By default 64, or `block_size` if that is less.

    Returns:
        A `Certificate`, of tensors on the device of k. Nothing is read back from the device.

    Raises:
        TypeError, ValueError: what `hisa.index` would raise, or `bound_size` is not accepted.

    Cost: hisa, its coarse stage once more, and flat over `N / bound_size` keys of D + 16 channels.
    Source: the certificate of HISA's definition, with balls in place of boxes.
    """
    call = _Call.checked(
        q, k, weights, k_scale, ks, ke, cu_seqlens_k, pooled, block_size, block_topk, topk, pooling,
        bound_size,
    )  # fmt: skip
    parts = [call.certify(at) for at in call.chunks()]
    names = [field.name for field in fields(Certificate)]
    return Certificate(*(torch.cat([getattr(part, name) for part in parts]) for name in names))


def exact_index(
    q: Tensor,
    k: Tensor,
    weights: Tensor,
    *,
    k_scale: Tensor | None = None,
    ks: Tensor | None = None,
    ke: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    pooled: Pooled | None = None,
    block_size: int = 128,
    block_topk: int = 64,
    topk: int = 2048,
    pooling: str = "mean",
    bound_size: int | None = None,
) -> ExactSelection:
    """Select flat's tokens, by the hierarchical indexer wherever that can be proved.

    HISA first, then the proof of `hisa.certify`, then `hisa.flat_index` for just the rows that are
    not proved. So the result is always flat's, and the cost lies between the two: that of `certify`
    plus the share of escalated rows of that of flat. Where few rows are proved it is slower than
    flat alone; `escalated.float().mean()` says.

    Args: those of `hisa.certify`.

    Returns:
        An `ExactSelection`, of tensors on the device of k. Nothing is read back from the device.

    Raises:
        TypeError, ValueError: what `hisa.certify` would raise.
    """
    call = _Call.checked(
        q, k, weights, k_scale, ks, ke, cu_seqlens_k, pooled, block_size, block_topk, topk, pooling,
        bound_size,
    )  # fmt: skip
    parts = [call.escalate(at, call.certify(at)) for at in call.chunks()]
    return ExactSelection(*(torch.cat(column) for column in zip(*parts, strict=True)))


def check_limits(*, heads: int, dim: int) -> None:
    """Raise ValueError if there are more heads or channels than a proof can have."""
    limits = _extension.require().build_info()
    most = {"D": limits["max_dim"] - CHANNELS, "H": limits["max_heads"] - 1}
    for name, got in (("D", dim), ("H", heads)):
        if got > most[name]:
            raise ValueError(f"{name}: expected at most {most[name]} for a proof, got {got}")


@dataclass(frozen=True)
class _Call:
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
    def checked(
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
        bound_size: int | None,
    ) -> _Call:
        sizes = (block_size, block_topk, topk, pooling)
        check_inputs(q, k, weights, k_scale, ks, ke, cu_seqlens_k, pooled, *sizes)
        bound_size = min(64, block_size) if bound_size is None else bound_size
        check_types(int, bound_size=bound_size)
        if bound_size not in BOUND_SIZES or bound_size > block_size:
            raise ValueError(
                f"bound_size: expected one of {list(BOUND_SIZES)}, at most block_size = "
                f"{block_size}, got {bound_size}"
            )
        check_limits(heads=q.shape[1], dim=k.shape[1])
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

    def certify(self, at: slice) -> Certificate:
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
        return Certificate(indices, scores, margin > 0, margin)

    def escalate(self, at: slice, certificate: Certificate) -> ExactSelection:
        """Run flat for rows that are not proved: all others have an empty window."""
        proved = certificate.proved
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
        return ExactSelection(
            torch.where(keep, certificate.indices, indices),
            torch.where(keep, certificate.scores, scores),
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
