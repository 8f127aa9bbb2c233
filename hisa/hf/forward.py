"""The callable that replaces an indexer's forward: find the windows, select or fall back, count."""

from __future__ import annotations

import threading
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from .audit import LayerAudit
from .exact import LayerExact
from .indexer import Projections, make_hierarchical, select
from .kept import KeptKeys
from .masks import WindowCache, Windows, trace
from .models import IndexerSpec
from .rotation import Angles, Indexer
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
        self._pruned = False
        self.compiled = False  # whether there were calls of which nothing is known
        self._warned: set[str] = set()

    def note(self, longest: int, prunes: bool) -> None:
        """Remember, with the lock held, how long windows are and whether any was to be pruned."""
        self._longest = max(self._longest, longest)
        self._pruned = self._pruned or prunes

    def warn_if_never_pruned(self) -> None:
        """Warn if no window so far was long enough for a block to be skipped."""
        with self.lock:
            longest = 0 if self._pruned or self.compiled else self._longest
        if longest:
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
        "_count_last",
        "_fallbacks",
        "_last_had_windows",
        "_pruned_rows",
        "_rows",
        "audit",
        "exact",
        "hierarchical",
        "kept",
        "layer",
        "name",
        "shared",
        "spec",
    )

    def __init__(
        self,
        name: str,
        layer: int,
        module: Indexer,
        spec: IndexerSpec,
        shared: Shared,
        exact: LayerExact | None,
        audit: LayerAudit | None,
    ) -> None:
        super().__init__(module)
        self.name = name
        self.layer = layer  # its number among the indexers of the patch
        self.spec = spec
        self.shared = shared
        self.exact = exact
        self.audit = audit
        settings = shared.settings
        self.hierarchical = make_hierarchical(settings, settings.topk or module.index_topk)
        self.kept = KeptKeys(settings)
        self._calls = self._rows = self._pruned_rows = 0
        self._count_last: Callable[[], int] = lambda: 0  # pruned rows of the last call
        self._fallbacks: Counter[str] = Counter()
        self._last_had_windows = False  # the last call's mask

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
        own = (hidden_states, q_resid, position_embeddings, attention_mask, position_ids, cache)
        if not self.installed:  # the patch was removed, but something still holds this forward
            return cast(Tensor, self.original(*own))
        if torch.compiler.is_compiling() and self._in_graph(cache):
            return self._trace(*own)
        return cast(Tensor, self._run(*own))

    def clear(self) -> None:
        """Forget what is kept beside caches."""
        self.kept.clear()

    def _in_graph(self, cache: Any) -> bool:
        """Say whether a compiled model can have this in its graph: nothing happens on the host."""
        return not (self.audit or self.exact) and (cache is None or cache.is_compileable)

    def _trace(
        self,
        hidden_states: Tensor,
        q_resid: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor,
        position_ids: Tensor | None,
        cache: Any | None,
    ) -> Tensor:
        """Select inside of a compiled model, where sizes are known and no data is.

        So a mask cannot make it fall back, nothing is counted, and all keys are prepared again:
        whether what is kept still holds is found out on the host.
        """
        own = (hidden_states, q_resid, position_embeddings, attention_mask, position_ids, cache)
        windows = trace(attention_mask, *hidden_states.shape[:2])
        if isinstance(windows, str):
            return cast(Tensor, self.original(*own))
        self.shared.compiled = True
        projections = self._projections(hidden_states, q_resid, position_embeddings)
        return select(projections, self.hierarchical, windows, cache)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _run(
        self,
        hidden_states: Tensor,
        q_resid: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor,
        position_ids: Tensor | None,
        cache: Any | None,
    ) -> Tensor:
        """Select with what is known of the mask and the cache on the host."""
        own = (hidden_states, q_resid, position_embeddings, attention_mask, position_ids, cache)
        shared, (batch, queries) = self.shared, hidden_states.shape[:2]
        scan = shared.windows.begin(attention_mask, batch, queries, self.layer)
        projections = self._projections(hidden_states, q_resid, position_embeddings)
        # So that the device has something to do. Not if the call may well fall back: that would
        # waste it, and with dropout random numbers too.
        if scan.pending and self._last_had_windows and not self.module.training:
            projections.begin()
        windows = scan.wait()
        self._last_had_windows = not isinstance(windows, str)
        if isinstance(windows, str):
            del projections
            self._count_fallback(windows)
            return cast(Tensor, self.original(*own))

        index = self.audit or self.exact
        selected = select(projections, self.hierarchical, windows, cache, index, self.kept)
        self._count(windows, batch * queries)
        if queries == 1:  # a prefill may go on in another chunk; generation has the whole prompt
            shared.warn_if_never_pruned()
        return selected

    def _projections(
        self, hidden_states: Tensor, q_resid: Tensor, position_embeddings: Angles
    ) -> Projections:
        settings = self.hierarchical.settings
        return Projections(
            self.module, self.spec, settings, hidden_states, q_resid, position_embeddings
        )

    def _count(self, windows: Windows, rows: int) -> None:
        settings = self.shared.settings
        prunes = windows.prunes(settings.block_size, settings.block_topk)
        count = windows.count_pruned(settings.block_size, settings.block_topk)
        with self.shared.lock:
            self._calls += 1
            self._rows += rows
            self._pruned_rows += self._count_last()  # the device has had a whole call for it
            self._count_last = count
            self.shared.note(windows.longest, prunes)

    def _count_fallback(self, reason: str) -> None:
        with self.shared.lock:
            self._calls += 1
            self._fallbacks[reason] += 1
        self.shared.warn_once(
            "fallback",
            f"{reason}: hisa needs one range of keys per query, so the model's own indexer answers "
            "such calls; see the handle's status()",
        )

    def status(self) -> LayerStatus:
        """Return a snapshot of this layer's counters. Waits for the device."""
        with self.shared.lock:
            count_last = self._count_last
            now = LayerStatus(
                name=self.name,
                state="patched" if self.installed else "removed",
                calls=self._calls,
                rows=self._rows,
                pruned_rows=self._pruned_rows,
                fallbacks=dict(self._fallbacks),
                escalated_rows=None if self.exact is None else self.exact.escalated(),
                reused=self.kept.reused,
            )
        return replace(now, pruned_rows=now.pruned_rows + count_last())
