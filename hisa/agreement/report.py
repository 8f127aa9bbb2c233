"""What `hisa.compare` returns: the measures of every row, summaries of them, a table, a plot."""

from __future__ import annotations

import html
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .display import html_table, optional, text_table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from pandas import DataFrame

MEASURES = ("recall", "iou", "mass")
HEADER = (
    "block_size", "block_topk", "pooling", "context", "rows", "recall", "1st percentile", "minimum",
    "IoU", "mass", "worst miss",
)  # fmt: skip


class Setting(NamedTuple):
    """One way to prune."""

    block_size: int
    block_topk: int
    pooling: str

    def __str__(self) -> str:
        return f"{self.block_topk} blocks of {self.block_size}, {self.pooling}"


class Statistics(NamedTuple):
    """A measure over some rows."""

    mean: float
    p1: float  # 1st percentile: the value that 1% of the rows do not exceed
    minimum: float


class Summary(NamedTuple):
    """Some rows, of about the same context length, under one setting."""

    setting: Setting
    shortest: int  # context length
    longest: int
    rows: int
    recall: Statistics
    iou: Statistics
    mass: Statistics
    worst_miss: int  # best rank in flat that a row lacks, from 1 on; 0: no row lacks any

    @property
    def context(self) -> str:
        """The context lengths, for a table."""
        return f"{self.shortest} to {self.longest}" if self.rows else "-"


@dataclass(frozen=True, eq=False, repr=False)
class Comparison:
    """How much of flat's selection the hierarchical one finds, for every row and setting.

    Attributes:
        settings: what was compared.
        topk: tokens selected per row.
        context: `[M]` int32, tokens in each row's window.
        recall: `[settings, M]` float32, `|F & S| / |F|` for the tokens F of flat and S of hisa.
        iou: `[settings, M]` float32, `|F & S| / |F | S|`.
        mass: `[settings, M]` float32, the sum of S's scores over the sum of F's, each less the
            lowest score in the window. NaN where a score that counts is not finite.
        worst_miss: `[settings, M]` int32, the best rank in flat, from 1 on, of a token that S
            lacks; 0 where it lacks none.

    All are on the CPU. A row whose window is empty counts as found: 1, 1, 1, 0.
    """

    settings: tuple[Setting, ...]
    topk: int
    context: Tensor
    recall: Tensor
    iou: Tensor
    mass: Tensor
    worst_miss: Tensor

    def summary(self) -> list[Summary]:
        """Summarise each setting over rows of similar context, from one power of two to the next.

        Rows with an empty window are left out.
        """
        return [
            self._summarise(setting, which)
            for setting in range(len(self.settings))
            for which in self._groups()
        ]

    def overall(self) -> list[Summary]:
        """Summarise each setting over all rows whose window is not empty."""
        which = self.context > 0
        return [self._summarise(setting, which) for setting in range(len(self.settings))]

    def to_pandas(self, *, rows: bool = False) -> DataFrame:
        """Return `summary()` as a table, or every row of every setting.

        Raises:
            ImportError: pandas is not installed; says how to get it.
        """
        pandas = optional("pandas")
        if not rows:
            return pandas.DataFrame([_flatten(summary) for summary in self.summary()])
        tables = []
        for i, setting in enumerate(self.settings):
            columns = {name: getattr(self, name)[i].numpy() for name in (*MEASURES, "worst_miss")}
            columns = {"row": range(len(self.context)), "context": self.context.numpy(), **columns}
            tables.append(pandas.DataFrame(columns).assign(**setting._asdict()))
        return pandas.concat(tables, ignore_index=True)

    def plot(self, measure: str = "recall", ax: Axes | None = None) -> Axes:
        """Draw a measure against context length: the mean, and a band down to the 1st percentile.

        Args:
            measure: "recall", "iou" or "mass".
            ax: matplotlib's axes to draw into; new ones by default.

        Raises:
            ImportError: matplotlib is not installed; says how to get it.
            ValueError: `measure` is none of these.
        """
        ax = axes_for(measure, ax)
        for i, setting in enumerate(self.settings):
            groups = [self._summarise(i, which) for which in self._groups()]
            draw(ax, measure, [group.longest for group in groups], groups, str(setting))
        ax.set_xscale("log", base=2)
        ax.set_xlabel("context length, tokens")
        ax.legend(title=f"topk {self.topk}")
        return ax

    def __str__(self) -> str:
        return "\n".join([self._title(), *text_table(self._table())])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        """Return the table for Jupyter."""
        return f"<p>{html.escape(self._title())}</p>{html_table(self._table())}"

    def _table(self) -> list[tuple[str, ...]]:
        return [HEADER, *map(cells, self.summary())]

    def _title(self) -> str:
        rows = len(self.context)
        return f"hisa.index against hisa.flat_index: {rows} rows, topk {self.topk}"

    def _groups(self) -> Iterator[Tensor]:
        """Return which rows have a context in (2^i, 2^(i + 1)], for each i that has any."""
        exponents = torch.log2(self.context.double()).ceil().where(self.context > 0, -1).int()
        for exponent in exponents[exponents >= 0].unique().tolist():
            yield exponents == exponent

    def _summarise(self, setting: int, which: Tensor) -> Summary:
        context = self.context[which]
        misses = self.worst_miss[setting, which]
        misses = misses[misses > 0]
        return Summary(
            setting=self.settings[setting],
            shortest=int(context.min()) if len(context) else 0,
            longest=int(context.max()) if len(context) else 0,
            rows=len(context),
            recall=_statistics(self.recall[setting, which]),
            iou=_statistics(self.iou[setting, which]),
            mass=_statistics(self.mass[setting, which]),
            worst_miss=int(misses.min()) if len(misses) else 0,
        )


def _statistics(values: Tensor) -> Statistics:
    """Return the statistics of `[n]`; NaN for no rows, or where one value is NaN."""
    if len(values) == 0 or bool(values.isnan().any()):
        return Statistics(math.nan, math.nan, math.nan)
    ordered = values.sort().values
    first = math.ceil(len(values) / 100) - 1
    return Statistics(float(values.double().mean()), float(ordered[first]), float(ordered[0]))


def axes_for(measure: str, ax: Axes | None) -> Axes:
    """Return axes, new ones by default, for `draw` to draw a measure into.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: there is no such measure.
    """
    if measure not in MEASURES:
        raise ValueError(f"measure: expected one of {', '.join(MEASURES)}, got {measure!r}")
    pyplot = optional("matplotlib.pyplot")
    axes: Axes = pyplot.subplots()[1] if ax is None else ax
    axes.set_ylabel(f"{measure}: mean, and down to the 1st percentile")
    return axes


def draw(ax: Axes, measure: str, at: list[int], summaries: list[Summary], label: str) -> None:
    """Draw a line through the means, and a band down to the 1st percentile."""
    values = [getattr(summary, measure) for summary in summaries]
    means = [v.mean for v in values]
    (line,) = ax.plot(at, means, marker="o", label=label)
    ax.fill_between(at, [v.p1 for v in values], means, alpha=0.15, color=line.get_color())


def cells(summary: Summary) -> tuple[str, ...]:
    """Return a row of the table, in the order of HEADER."""
    recall = (f"{value:.4f}" for value in summary.recall)
    means = (f"{summary.iou.mean:.4f}", f"{summary.mass.mean:.4f}")
    miss = str(summary.worst_miss) if summary.worst_miss else "none"
    setting = map(str, tuple(summary.setting))
    return (*setting, summary.context, str(summary.rows), *recall, *means, miss)


def _flatten(summary: Summary) -> dict[str, object]:
    """Return a summary as one record."""
    record: dict[str, object] = {**summary.setting._asdict()}
    record.update(shortest=summary.shortest, longest=summary.longest, rows=summary.rows)
    for name in MEASURES:
        for kind, value in getattr(summary, name)._asdict().items():
            record[f"{name}_{kind}"] = value
    return {**record, "worst_miss": summary.worst_miss}
