"""The memory of `PooledKeys`: slots of tokens and of their blocks, lengths, growing and copying."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .checking import NUMBER, check_types
from .transfer import upload

MOST_KEYS = 2**31 - 1  # in all slots: windows are int32

Segments = int | Sequence[int] | None


class Slots(NamedTuple):
    """S slots of C tokens, C a multiple of the block size B."""

    k: Tensor  # [S, C, D]
    k_scale: Tensor | None  # [S, C] fp32
    pooled_k: Tensor  # [S, C / B, D]
    pooled_scale: Tensor  # [S, C / B] fp32
    edges: Tensor  # [S + 1] int32: 0, C, 2 * C and so on


class Storage:
    """Slots for segments, which are known by the number of their slot.

    Args:
        segments: that there are at first, all empty.
        capacity: tokens of each. Absent, there is no memory at first, and it doubles when it is
            full.
        like: a tensor `[..., D]` with the keys' dtype and device.
        scaled: whether keys have scales.
        block_size: B.

    Raises:
        ValueError: more than MOST_KEYS tokens.
    """

    def __init__(
        self, segments: int, capacity: int | None, like: Tensor, scaled: bool, block_size: int
    ) -> None:
        self._like = like
        self._block_size = block_size
        self._scaled = scaled
        self._fixed = capacity is not None
        self.slots = self._allocate(segments, capacity or 0)
        self.lengths: list[int | None] = [0] * segments  # None where a slot is not in use

    @property
    def segments(self) -> dict[int, int]:
        """The lengths of the segments that there are, by number, ascending."""
        return {s: length for s, length in enumerate(self.lengths) if length is not None}

    def find(self, segment: int, name: str) -> int:
        """Return a segment's length.

        Args:
            name: of the argument that says which segment.

        Raises:
            TypeError: not a number.
            ValueError: there is no such segment.
        """
        check_types(NUMBER, **{name: segment})
        found = self.segments
        if segment not in found:
            raise ValueError(f"{name}: expected one of {list(found)}, got {segment}")
        return found[segment]

    def find_all(self, segments: Segments) -> dict[int, int]:
        """Return the lengths of the segments that an argument names, None meaning all of them.

        Raises:
            TypeError: not numbers.
            ValueError: there is no such segment, or one is named twice.
        """
        if segments is None:
            return self.segments
        named = [segments] if isinstance(segments, int) else list(segments)
        lengths = {segment: self.find(segment, "segments") for segment in named}
        if len(lengths) < len(named):
            raise ValueError(f"segments: expected each of them once, got {named}")
        return lengths

    def begin(self) -> int:
        """Make an empty segment of the first slot that is not in use, and return its number.

        Raises:
            ValueError: there is no room.
        """
        unused = (s for s, length in enumerate(self.lengths) if length is None)
        segment = next(unused, len(self.lengths))
        self.reserve(segment + 1, 0)
        self.lengths[segment] = 0
        return segment

    def reserve(self, slots: int, tokens: int) -> None:
        """Have memory for so many slots of so many tokens.

        Raises:
            ValueError: there is no room.
        """
        old, (had_slots, had_tokens) = self.slots, self.slots.k.shape[:2]
        if slots <= had_slots and tokens <= had_tokens:
            return
        if self._fixed:
            raise ValueError(
                f"capacity: expected at most {had_slots} segments of {had_tokens} tokens, "
                f"got {slots} of {tokens}"
            )
        self.slots = self._allocate(
            had_slots if slots <= had_slots else max(slots, 2 * had_slots),
            had_tokens if tokens <= had_tokens else max(tokens, 2 * had_tokens),
        )
        for segment, length in self.segments.items():
            self.fill(segment, self._views(old, segment, length))
        self.lengths += [None] * (len(self.slots.k) - had_slots)

    def held(self, segment: int) -> list[Tensor]:
        """Return views of all that a segment holds."""
        return self._views(self.slots, segment, self.lengths[segment] or 0)

    def fill(self, segment: int, held: list[Tensor]) -> None:
        """Write what a segment of the same length held."""
        for to, source in zip(self.held(segment), held, strict=True):
            to.copy_(source)

    def upload(self, numbers: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Bring numbers to the device of the keys, without waiting for it."""
        return upload(torch.tensor(numbers, dtype=dtype, device="cpu"), self._like.device)

    def _allocate(self, slots: int, tokens: int) -> Slots:
        blocks, dim = -(-tokens // self._block_size), self._like.shape[-1]
        tokens = blocks * self._block_size
        if slots * tokens > MOST_KEYS:
            raise ValueError(
                f"capacity: expected at most {MOST_KEYS} tokens in all segments, "
                f"got {slots} * {tokens}"
            )
        with torch.inference_mode(False):  # or it could be written to in that mode only
            step = torch.full((slots + 1,), tokens, dtype=torch.int32, device=self._like.device)
            scale = self._like.new_empty(0, dtype=torch.float32)
            return Slots(
                k=self._like.new_empty(slots, tokens, dim),
                # HISA_CHECK=1 looks at all of them
                k_scale=scale.new_zeros(slots, tokens) if self._scaled else None,
                pooled_k=self._like.new_empty(slots, blocks, dim),
                pooled_scale=scale.new_empty(slots, blocks),
                edges=step.cumsum(0, dtype=torch.int32) - step,
            )

    def _views(self, slots: Slots, segment: int, length: int) -> list[Tensor]:
        blocks = length // self._block_size
        per_token = [t[segment, :length] for t in (slots.k, slots.k_scale) if t is not None]
        return [*per_token, slots.pooled_k[segment, :blocks], slots.pooled_scale[segment, :blocks]]
