"""The callable that replaces an indexer's forward: find the windows, select or fall back, count."""

from __future__ import annotations

import threading
import warnings
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

from .indexer import select
from .masks import WindowCache, Windows
from .models import IndexerSpec
from .settings import Settings
from .slots import Replacement
from .status import LayerStatus


class Shared:
    """What all layers of one patch have in common."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.windows = WindowCache()
        self.lock = threading.Lock()  # guards what follows, and the counters of all layers
        self._longest = 0
        self._warned: set[str] = set()

    def note_length(self, longest: int) -> None:
        """Warn if no window seen so far is long enough for a block to be skipped."""
        with self.lock:
            self._longest = max(self._longest, longest)
            too_short = 0 < self._longest <= self.settings.budget
        if too_short:
            self.warn_once(
                "budget",
                f"block_topk * block_size = {self.settings.budget} covers all of the {longest} "
                "tokens seen so far, so no block can be skipped and the selection is that of the "
                "flat indexer. Lower block_topk to prune contexts of this length",
            )

    def warn_once(self, kind: str, message: str) -> None:
        """Warn, but no more than once per patch and kind."""
        with self.lock:
            first = kind not in self._warned
            self._warned.add(kind)
        if first:
            warnings.warn(f"hisa: {message}", UserWarning, stacklevel=2)


class PatchedForward(Replacement):
    """The forward of one patched indexer. Takes and returns what the model's own does."""

    __slots__ = (
        "_calls",
        "_fallbacks",
        "_pruned_rows",
        "_rows",
        "name",
        "number",
        "shared",
        "spec",
    )

    def __init__(
        self, name: str, number: int, module: nn.Module, spec: IndexerSpec, shared: Shared
    ) -> None:
        super().__init__(module)
        self.name = name
        self.number = number  # of this layer among the layers of the patch
        self.spec = spec
        self.shared = shared
        self._calls = self._rows = self._pruned_rows = 0
        self._fallbacks: Counter[str] = Counter()

    # Whether a mask can be turned into windows is decided on the host, so a compiled model breaks
    # its graph here and the selection runs eagerly.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    @torch.no_grad()
    def __call__(
        self,
        hidden_states: Tensor,
        q_resid: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor,
        position_ids: Tensor | None = None,
        cache: Any | None = None,
        *,
        past_key_values: Any | None = None,
    ) -> Tensor:
        """Return the selected tokens of every query, [B, S, min(topk, T)] int32.

        Callers name the cache `cache`, up to transformers 5.23 `past_key_values`.
        """
        cache = past_key_values if cache is None else cache
        found = self._find_windows(attention_mask, hidden_states)
        if found is None:
            own: Tensor = self.original(
                hidden_states,
                q_resid,
                position_embeddings,
                attention_mask,
                position_ids,
                cache,
            )
            return own
        selected = select(
            self.module,
            self.spec,
            self.shared.settings,
            found,
            hidden_states,
            q_resid,
            position_embeddings,
            cache,
        )
        settings = self.shared.settings
        pruned = found.pruned_rows(settings.block_size, settings.block_topk)
        with self.shared.lock:
            self._calls += 1
            self._rows += selected.shape[0] * selected.shape[1]
            self._pruned_rows += pruned
        return selected

    def _find_windows(self, mask: Tensor, hidden_states: Tensor) -> Windows | None:
        """Return the windows of this call, None if the model's own indexer has to answer it."""
        if not self.installed:
            return None  # the patch was removed, but something still holds this forward
        batch, queries = hidden_states.shape[:2]
        found = self.shared.windows.get(mask, batch, queries, self.number)
        if isinstance(found, Windows):
            self.shared.note_length(found.longest)
            return found
        with self.shared.lock:
            self._calls += 1
            self._fallbacks[found] += 1
        self.shared.warn_once(
            "fallback",
            f"{found}: hisa needs one range of keys per query, so the model's own indexer answers "
            "such calls; see the handle's status()",
        )
        return None

    def status(self) -> LayerStatus:
        """Return a snapshot of this layer's counters."""
        with self.shared.lock:
            return LayerStatus(
                name=self.name,
                state="patched" if self.installed else "removed",
                calls=self._calls,
                rows=self._rows,
                pruned_rows=self._pruned_rows,
                fallbacks=dict(self._fallbacks),
            )
