"""What a patch handle reports."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from .settings import Settings


@dataclass(frozen=True)
class LayerStatus:
    """One attention layer's part in a patch."""

    name: str
    state: Literal["patched", "shared", "removed"]  # shared: reuses an earlier layer's selection
    calls: int = 0  # those inside of compiled graphs do not count, here and below
    rows: int = 0  # queries answered by hisa
    pruned_rows: int = 0  # of these, the ones that saw more blocks than are kept
    fallbacks: Mapping[str, int] | None = None  # calls left to the model's own indexer, by reason
    escalated_rows: int | None = None  # pruned rows that flat answered; None: not patched as exact
    reused: int = 0  # calls that prepared new keys only, beside what is kept of earlier calls


@dataclass(frozen=True)
class Status:
    """A snapshot of a patch; `print` shows it as a table."""

    settings: Settings
    layers: tuple[LayerStatus, ...]
    mask_scans: int  # attention masks turned into windows: one per model forward
    audit: float = 0.0  # share of the rows that the flat indexer answers too

    def __str__(self) -> str:
        exact = any(layer.escalated_rows is not None for layer in self.layers)
        names = ("calls", "rows", "pruned", "reused", *(["escalated"] if exact else []))
        table: list[tuple[str, ...]] = [("layer", "state", *names, "fallbacks")]
        for layer in self.layers:
            reasons = (f"{count} x {why}" for why, count in (layer.fallbacks or {}).items())
            counts = [layer.calls, layer.rows, layer.pruned_rows, layer.reused]
            if exact:
                counts.append(layer.escalated_rows or 0)
            table.append((layer.name, layer.state, *map(str, counts), ", ".join(reasons) or "-"))
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = [
            "  ".join(
                cell.rjust(width) if 2 <= i < 2 + len(names) else cell.ljust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in table
        ]
        title = f"{self.settings}, {self.mask_scans} mask scans"
        if self.audit:
            title += f", audit={self.audit}"
        return "\n".join([title, *lines])
