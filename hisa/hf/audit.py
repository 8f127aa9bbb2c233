"""The audit of one layer: flat for a sampled share of the rows, and how well hisa agrees with it.

    draw     which rows of a call, decided on the host           [M]    -> [n]
    judge    flat for these rows, measures of hisa's selection   [n]    -> [5, n] on the device
    keep     on the device, MOST_ROWS at most                    [5, n] -> [5, kept]

Nothing is read from the device until the report is asked for.
"""

from __future__ import annotations

import threading
from typing import Any, cast

import torch
from torch import Tensor

import hisa
from hisa.agreement import Comparison, Setting
from hisa.agreement.comparing import Selection, find_lowest, rows_at_a_time, select_flat
from hisa.agreement.measures import Measures, measure
from hisa.module import Index
from hisa.transfer import upload

from .settings import Settings

MOST_ROWS = 32768  # kept for a layer, 20 bytes each


def check_share(audit: object) -> None:
    """Raise TypeError or ValueError if `audit` is not a share of the rows."""
    if isinstance(audit, bool) or not isinstance(audit, float | int):
        raise TypeError(f"audit: expected a float, got {audit!r}")
    if not 0 <= audit <= 1:
        raise ValueError(f"audit: expected a share of the rows, 0 to 1, got {audit!r}")


class LayerAudit:
    """Stands in for `hisa.index` in one layer: returns the same, and judges some of the rows.

    Given an `index`, it stands in for that.

    Args:
        settings: of the patch.
        indexer: the layer's own, for its `index_topk`.
        share: of the rows, to begin with.
        seed: of the layer's own generator, so that torch's global ones are left alone.
    """

    def __init__(
        self,
        settings: Settings,
        indexer: Any,
        share: float,
        *,
        seed: int,
        index: Index | None = None,
    ) -> None:
        self._index = index
        self._setting = Setting(settings.block_size, settings.block_topk, settings.pooling)
        self._topk: int = settings.topk or indexer.index_topk
        self._share = share
        self._generator = torch.Generator("cpu").manual_seed(seed)
        self._lock = threading.Lock()  # guards the share, the generator and what follows
        # The measures as bits, then the context lengths.
        self._kept = torch.empty(len(Measures._fields) + 1, 0, dtype=torch.int32, device="cpu")

    def __call__(self, q: Tensor, k: Tensor, weights: Tensor, **options: Any) -> Tensor:
        """Return what `hisa.index` does."""
        index = self._index or hisa.index
        with self._lock:
            drawn = self._draw(len(q), self._share)
        if len(drawn) == 0:
            return cast(Tensor, index(q, k, weights, **options))
        chosen = cast(Selection, index(q, k, weights, **options, return_scores=True))
        topk: int = options["topk"]
        for at in upload(drawn, q.device).split(rows_at_a_time(topk)):
            windows = {name: options[name][at] for name in ("ks", "ke")}
            row = {"k_scale": options["k_scale"], **windows}
            flat = select_flat(q[at], k, weights[at], row, topk)
            lowest = find_lowest(q[at], k, weights[at], row)
            measures = measure(flat, (chosen[0][at], chosen[1][at]), lowest)
            bits = [column.view(torch.int32) for column in measures]
            self._keep(torch.stack([*bits, windows["ke"] - windows["ks"]]))
        return chosen[0]

    def comparison(self) -> Comparison:
        """Return the measures of the rows that are kept. Waits for the device."""
        with self._lock:
            *measures, context = self._kept.cpu()
        return Comparison(
            settings=(self._setting,),
            topk=self._topk,
            context=context,
            **{
                name: (bits if name == "worst_miss" else bits.view(torch.float32))[None]
                for name, bits in zip(Measures._fields, measures, strict=True)
            },
        )

    def _draw(self, rows: int, share: float) -> Tensor:
        """Return which of some rows to take, on the host."""
        return (torch.rand(rows, generator=self._generator, device="cpu") < share).nonzero()[:, 0]

    def _keep(self, found: Tensor) -> None:
        with self._lock:
            kept = torch.cat([self._kept.to(found.device), found], dim=1)
            while kept.shape[1] > MOST_ROWS:
                kept = kept[:, upload(self._draw(kept.shape[1], 0.5), kept.device)]
                self._share /= 2
            self._kept = kept
