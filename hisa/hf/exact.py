"""Flat's own selection in one layer: by HISA where that is proved, by flat for the other rows."""

from __future__ import annotations

import threading
from typing import Any

from torch import Tensor

import hisa
from hisa.proof import check_limits


class LayerExact:
    """Stands in for `hisa.index` in one layer: returns what `hisa.flat_index` would.

    Args:
        indexer: the layer's own, for its sizes.

    Raises:
        ValueError: it has more heads or channels than a proof can have.
    """

    def __init__(self, indexer: Any) -> None:
        check_limits(heads=indexer.n_heads, dim=indexer.head_dim)
        self._lock = threading.Lock()
        self._escalated: Tensor | int = 0  # on the device, so that nothing waits for it

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        weights: Tensor,
        *,
        pooled: tuple[Tensor, Tensor] | None,
        return_scores: bool = False,
        **options: Any,
    ) -> Any:
        """Return what `hisa.flat_index` does, in the form of `hisa.index`."""
        if pooled is None:  # no row sees more blocks than are kept
            return hisa.index(q, k, weights, **options, return_scores=return_scores)
        found = hisa.exact_index(q, k, weights, pooled=pooled, **options)
        with self._lock:
            self._escalated = self._escalated + found.escalated.sum()
        return (found.indices, found.scores) if return_scores else found.indices

    def escalated(self) -> int:
        """Return for how many rows flat has run. Waits for the device."""
        with self._lock:
            return int(self._escalated)
