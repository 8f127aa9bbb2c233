"""How an indexer selects, checked once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from . import _extension

POOLINGS = ("mean", "max")
PRECISIONS = ("model", "fp8")


@dataclass(frozen=True)
class Settings:
    """How an indexer selects. Immutable.

    Args:
        block_size: Tokens per block, one of 8, 16, 32, 64, 128, 256.
        block_topk: Blocks kept per query, at least 2 (the first and the last always are).
        topk: Tokens selected per query; None means what the indexer itself says.
        pooling: How a block's keys become one, "mean" or "max".
        precision: Of queries and keys when they are scored, "model" or "fp8".
        power_of_two: With "fp8", round each scale up to a power of two.
        hadamard: With "fp8", rotate queries and keys by a Hadamard matrix first.

    Raises:
        TypeError: if a number is not an int.
        ValueError: if a value is not supported.
        RuntimeError: if hisa's extension is not built.
    """

    block_size: int = 128
    block_topk: int = 64
    topk: int | None = None
    pooling: str = "mean"
    precision: str = "model"
    power_of_two: bool = False
    hadamard: bool = False

    def __post_init__(self) -> None:
        for name in ("block_size", "block_topk", "topk"):
            value = getattr(self, name)
            if not (type(value) is int or (value is None and name == "topk")):
                raise TypeError(f"{name}: expected an int, got {value!r}")
        for name, known in (("pooling", POOLINGS), ("precision", PRECISIONS)):
            if getattr(self, name) not in known:
                expected = " or ".join(map(repr, known))
                raise ValueError(f"{name}: expected {expected}, got {getattr(self, name)!r}")
        for name in ("power_of_two", "hadamard"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name}: expected a bool, got {getattr(self, name)!r}")
            if getattr(self, name) and self.precision != "fp8":
                raise ValueError(
                    f'{name}: expected precision="fp8" with it, got {self.precision!r}'
                )
        limits: dict[str, Any] = _extension.require().build_info()
        if self.block_size not in limits["block_sizes"]:
            raise ValueError(
                f"block_size: expected one of {limits['block_sizes']}, got {self.block_size}"
            )
        if self.block_topk < limits["min_block_topk"]:
            raise ValueError(
                f"block_topk: expected at least {limits['min_block_topk']} (the first and the last "
                f"block are always kept), got {self.block_topk}"
            )
        if self.topk is not None:
            self.check_topk(self.topk, "topk")

    @property
    def budget(self) -> int:
        """Tokens in the kept blocks: rows that see no more than this are not pruned."""
        return self.block_size * self.block_topk

    def check_topk(self, topk: int, source: str) -> None:
        """Raise ValueError if `topk`, which `source` gives, is not positive or over the budget."""
        if topk < 1:
            raise ValueError(f"{source}: expected at least 1, got {topk}")
        if topk > self.budget:
            raise ValueError(
                f"{source}: expected at most block_topk * block_size = {self.block_topk} * "
                f"{self.block_size} = {self.budget}, got {topk}. Raise block_topk to at least "
                f"{-(-topk // self.block_size)}, or pass a smaller topk"
            )
