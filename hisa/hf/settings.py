"""The options of a patch, checked once, when the model is patched."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import hisa
from hisa import settings


@dataclass(frozen=True)
class Settings(settings.Settings):
    """How a patched indexer selects. Immutable: to change them, patch again.

    Args and Raises: those of `hisa.settings.Settings`; a `topk` of None means each indexer's own
    `index_topk`.
    """

    def check(self, name: str, indexer: Any) -> None:
        """Raise ValueError if hisa cannot stand in for `indexer`, of class `name`."""
        if self.topk is None:
            self.check_topk(indexer.index_topk, f"index_topk of {name}")
        if self.hadamard and indexer.head_dim & (indexer.head_dim - 1):
            raise ValueError(
                f"hadamard: expected {name} to have a power of two as head_dim, "
                f"got {indexer.head_dim}"
            )
        on_cuda = any(parameter.is_cuda for parameter in indexer.parameters())
        try:
            hisa.plan(
                0,
                0,
                indexer.n_heads,
                indexer.head_dim,
                device="cuda" if on_cuda else "cpu",
                block_size=8,
                block_topk=2,
                topk=1,
            )
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
