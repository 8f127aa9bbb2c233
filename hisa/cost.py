"""What an exact selection has cost, counted in multiply-adds as `hisa.plan` counts them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .bounds import CHANNELS
from .windows import clamp_windows


@dataclass(frozen=True)
class ExactCost:
    """What `hisa.ExactSelection.cost` returns.

    Attributes:
        rows: how many there are.
        discarding: rows that meet more blocks than are kept, which therefore need a proof.
        escalated: those of them that are not proved: flat has run for them.
        operations: for each stage, at most this many multiply-adds (for pool: additions). "balls"
            makes the balls, "bound" scores them, "flat" is that of the escalated rows.
        flat_operations: what flat alone would take for all rows.
    """

    rows: int
    discarding: int
    escalated: int
    operations: dict[str, int]
    flat_operations: int

    @property
    def ratio(self) -> float:
        """The sum of `operations` in units of `flat_operations`; NaN if flat has none."""
        if not self.flat_operations:
            return float("nan")
        return sum(self.operations.values()) / self.flat_operations

    def __str__(self) -> str:
        text = f"flat has run for {self.escalated} of {self.rows} rows"
        if self.flat_operations:
            text += f"; in all {self.ratio:.2f} times the operations of flat"
        proved = self.discarding - self.escalated
        if proved * 2 < self.discarding:
            text += (
                f"; the bounds prove little: {proved} of the {self.discarding} rows that discard "
                "blocks"
            )
        if self.ratio >= 1:
            text += "; flat alone would cost less"
        return text

    __repr__ = __str__


class Work(NamedTuple):
    """What the cost of one call follows from. Windows are the caller's, and read only on demand."""

    rows: int
    keys: int
    heads: int
    dim: int
    block_size: int
    block_topk: int
    bound_size: int
    pools: bool  # pooled keys were not given
    ks: Tensor | None
    ke: Tensor | None
    cu_seqlens_k: Tensor | None

    def cost(self, escalated: Tensor) -> ExactCost:
        """Count, given for which rows flat has run: `[M]` bool. Waits for the device."""
        start, end, origin = clamp_windows(
            self.ks, self.ke, self.cu_seqlens_k,
            rows=self.rows, keys=self.keys, device=escalated.device,
        )  # fmt: skip
        width = (end - start).long()
        first = (start - origin) // self.block_size + 1
        inner = ((end - 1 - origin) // self.block_size - first).clamp(min=0).long()
        discards = inner > self.block_topk - 2
        scored = inner if self.block_topk > 2 else torch.zeros_like(inner)
        sums = (
            discards,
            escalated,
            scored * discards,
            scored,  # once more, for every row, to tell which blocks are kept
            width.clamp(max=self.block_topk * self.block_size),
            inner,
            width * escalated,
            width,
        )
        discarding, count, coarse, again, refine, bounded, flat, whole = (
            torch.stack([each.sum() for each in sums]).tolist()
        )  # fmt: skip
        pair = self.heads * self.dim
        ball = (self.heads + 1) * (self.dim + CHANNELS)
        # A query's constant: H x H products of D channels, squared twice.
        constant = self.heads**2 * (self.dim + 2 * self.heads)
        return ExactCost(
            rows=self.rows,
            discarding=discarding,
            escalated=count,
            operations={
                "pool": self.keys * self.dim * self.pools,
                "balls": self.keys * self.dim * 3,  # norm, centre, distance
                "coarse": (coarse + again) * pair,
                "refine": refine * pair,
                "bound": bounded * (self.block_size // self.bound_size) * ball
                + self.rows * constant,
                "flat": flat * pair,
            },
            flat_operations=whole * pair,
        )
