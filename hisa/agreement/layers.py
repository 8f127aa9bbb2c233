"""What the audit of a patched model returns: agreement with flat, layer by layer."""

from __future__ import annotations

import html
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .display import html_table, optional, text_table
from .report import HEADER, Comparison, Setting, Summary, axes_for, cells, draw

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from pandas import DataFrame

SETTING = len(Setting._fields)  # columns that a comparison's table begins with


@dataclass(frozen=True, eq=False, repr=False)
class LayerReport:
    """How much of flat's selection each layer finds, in the rows that were audited.

    Attributes:
        layers: a `Comparison`, of a single setting, for each layer, by its name.
    """

    layers: Mapping[str, Comparison]

    def summary(self) -> dict[str, list[Summary]]:
        """Summarise each layer over rows of similar context, as `Comparison.summary` does."""
        return {name: comparison.summary() for name, comparison in self.layers.items()}

    def to_pandas(self, *, rows: bool = False) -> DataFrame:
        """Return `summary()` as a table, or every audited row of every layer.

        Raises:
            ImportError: pandas is not installed; says how to get it.
        """
        pandas = optional("pandas")
        tables = [c.to_pandas(rows=rows).assign(layer=name) for name, c in self.layers.items()]
        table = pandas.concat(tables or [pandas.DataFrame()], ignore_index=True)
        return table[sorted(table.columns, key="layer".__ne__)]  # the layer comes first

    def plot(self, measure: str = "recall", ax: Axes | None = None) -> Axes:
        """Draw a measure against the layers, in their order: one line for similar contexts.

        Args:
            measure: "recall", "iou" or "mass".
            ax: matplotlib's axes to draw into; new ones by default.

        Raises:
            ImportError: matplotlib is not installed; says how to get it.
            ValueError: `measure` is none of these.
        """
        ax = axes_for(measure, ax)
        groups: dict[int, list[tuple[int, Summary]]] = defaultdict(list)
        for number, summaries in enumerate(self.summary().values()):
            for summary in summaries:
                groups[(summary.longest - 1).bit_length()].append((number, summary))
        for exponent, group in sorted(groups.items()):
            at, summaries = [number for number, _ in group], [summary for _, summary in group]
            draw(ax, measure, at, summaries, f"up to {2**exponent}")
        ax.set_xlabel("indexer, in the order of the layers")
        ax.xaxis.set_major_locator(optional("matplotlib.ticker").MaxNLocator(integer=True))
        if groups:
            ax.legend(title="context, tokens")
        return ax

    def __str__(self) -> str:
        return "\n".join([self._title(), *text_table(self._table())])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        """Return the table for Jupyter."""
        return f"<p>{html.escape(self._title())}</p>{html_table(self._table())}"

    def _table(self) -> list[tuple[str, ...]]:
        table: list[tuple[str, ...]] = [("layer", *HEADER[SETTING:])]
        for name, summaries in self.summary().items():
            table += [(name, *cells(summary)[SETTING:]) for summary in summaries]
        return table

    def _title(self) -> str:
        settings = dict.fromkeys(str(c.settings[0]) for c in self.layers.values())
        rows = sum(len(c.context) for c in self.layers.values())
        kept = "; ".join(settings) or "nothing"
        return f"audit of {len(self.layers)} layers, {rows} rows: {kept}"
