"""`hisa.recommend`: the cheapest setting that selects enough of what flat does, by measurement."""

from __future__ import annotations

import html
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hisa.checking import NUMBER, check_inputs, check_types
from hisa.ops import flat_index, index
from hisa.windows import clamp_windows

from .comparing import OneOrMore, combine, compare_settings, progress_bar
from .display import html_table, optional, text_table
from .report import Setting, Statistics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from pandas import DataFrame

CALLS = 5  # timed for each setting, after one that is not
STATISTICS = {"mean": "mean", "p1": "1st percentile of"}
HEADER = (
    "block_size", "block_topk", "pooling", "recall", "1st percentile", "minimum", "ms", "speed-up",
    "",
)  # fmt: skip


@dataclass(frozen=True)
class Candidate:
    """A setting that was measured."""

    setting: Setting
    recall: Statistics
    seconds: float  # of one call of `hisa.index`, pooling included


@dataclass(frozen=True, repr=False)
class Recommendation:
    """What each setting finds of flat's selection and what it costs, and which one to take.

    Attributes:
        candidates: what was measured.
        topk: tokens selected per row.
        target: the recall that is wanted.
        statistic: of which value of the rows' recall: "mean" or "p1", the 1st percentile.
        flat_seconds: of one call of `hisa.flat_index`.
    """

    candidates: tuple[Candidate, ...]
    topk: int
    target: float
    statistic: str
    flat_seconds: float

    @property
    def pick(self) -> Candidate | None:
        """The fastest candidate that reaches the target; None if none does."""
        # NOTE: recall is in float32, where 9 of 10 is a little less than 0.9.
        rounded = torch.tensor(self.target, dtype=torch.float32, device="cpu")
        target = min(self.target, float(rounded))
        enough = [c for c in self.candidates if self.value(c) >= target]
        return min(enough, key=self._order, default=None)

    @property
    def frontier(self) -> tuple[Candidate, ...]:
        """The candidates that no other one beats, in time and recall alike; the fastest first."""
        found: list[Candidate] = []
        for candidate in sorted(self.candidates, key=self._order):
            if not found or self.value(candidate) > self.value(found[-1]):
                found.append(candidate)
        return tuple(found)

    def value(self, candidate: Candidate) -> float:
        """Return the recall that is compared with the target."""
        return float(getattr(candidate.recall, self.statistic))

    def to_pandas(self) -> DataFrame:
        """Return the candidates as a table, the fastest first.

        Raises:
            ImportError: pandas is not installed; says how to get it.
        """
        return optional("pandas").DataFrame([self._record(c) for c in self._sorted()])

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw recall against time: the candidates, the frontier, the target, the pick, and flat.

        Args:
            ax: matplotlib's axes to draw into; new ones by default.

        Raises:
            ImportError: matplotlib is not installed; says how to get it.
        """
        pyplot = optional("matplotlib.pyplot")
        ax = pyplot.subplots()[1] if ax is None else ax
        ax.scatter(*self._points(self.candidates), color="tab:gray", label="candidates")
        ax.plot(*self._points(self.frontier), marker="o", label="frontier")
        ax.axhline(self.target, color="tab:green", linestyle="--", label=f"target {self.target:g}")
        ax.axvline(self.flat_seconds * 1e3, color="tab:red", linestyle=":", label="flat")
        if self.pick is not None:
            ax.plot(*self._points([self.pick]), marker="*", markersize=16, linestyle="",
                    label=str(self.pick.setting))  # fmt: skip
        ax.set_xscale("log")
        ax.set_xlabel("time of a call, ms")
        ax.set_ylabel(f"{STATISTICS[self.statistic]} recall")
        ax.legend(title=f"topk {self.topk}")
        return ax

    def __str__(self) -> str:
        return "\n".join([self._title(), *text_table(self._table()), self._verdict()])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        """Return the table for Jupyter."""
        title, verdict = html.escape(self._title()), html.escape(self._verdict())
        return f"<p>{title}</p>{html_table(self._table())}<p>{verdict}</p>"

    def _order(self, candidate: Candidate) -> tuple[float, float]:
        """Order by time, and the better first where it is equal."""
        return candidate.seconds, -self.value(candidate)

    def _sorted(self) -> list[Candidate]:
        return sorted(self.candidates, key=self._order)

    def _points(self, candidates: Sequence[Candidate]) -> tuple[list[float], list[float]]:
        """Return times in ms, and recalls."""
        return [c.seconds * 1e3 for c in candidates], [self.value(c) for c in candidates]

    def _title(self) -> str:
        statistic = STATISTICS[self.statistic]
        return f"hisa.recommend: {statistic} recall of at least {self.target:g}, topk {self.topk}"

    def _verdict(self) -> str:
        """Say which setting to take."""
        flat = f"hisa.flat_index takes {_ms(self.flat_seconds)} ms"
        if (pick := self.pick) is None:
            best = max(self.candidates, key=self.value)
            return (
                f"No setting reaches the target. The best is {best.setting}, with "
                f"{self.value(best):.4f}. {flat}."
            )
        if pick.seconds >= self.flat_seconds:
            return f"The pick is {pick.setting}, but nothing is gained: {flat}."
        return f"Take {pick.setting}: {_ms(pick.seconds)} ms. {flat}."

    def _table(self) -> list[tuple[str, ...]]:
        return [HEADER, *map(self._cells, self._sorted())]

    def _cells(self, candidate: Candidate) -> tuple[str, ...]:
        """Return a row of the table, in the order of HEADER."""
        setting = map(str, tuple(candidate.setting))
        recall = (f"{value:.4f}" for value in candidate.recall)
        gain = f"{self.flat_seconds / candidate.seconds:.2f}x"
        return (*setting, *recall, _ms(candidate.seconds), gain, self._mark(candidate))

    def _mark(self, candidate: Candidate) -> str:
        if candidate == self.pick:
            return "pick"
        return "frontier" if candidate in self.frontier else ""

    def _record(self, candidate: Candidate) -> dict[str, object]:
        """Return a candidate as a row of the data frame."""
        recall = {f"recall_{name}": value for name, value in candidate.recall._asdict().items()}
        return {
            **candidate.setting._asdict(),
            **recall,
            "seconds": candidate.seconds,
            "frontier": candidate in self.frontier,
            "pick": candidate == self.pick,
        }


def recommend(
    q: Tensor,
    k: Tensor,
    weights: Tensor,
    *,
    target: float = 0.99,
    k_scale: Tensor | None = None,
    ks: Tensor | None = None,
    ke: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    block_size: OneOrMore = (32, 64, 128, 256),
    block_topk: OneOrMore = (16, 32, 64, 128, 256),
    topk: int = 2048,
    pooling: str | Sequence[str] = ("mean", "max"),
    statistic: str = "mean",
    progress: bool = True,
) -> Recommendation:
    """Find the fastest setting whose recall of flat's selection reaches a target.

    Recall and time are measured with your own queries and keys, so take them from the model and the
    context length that you mean to serve (`hisa.capture` records them), on the device you serve on.

        found = hisa.recommend(q, k, weights, ks=ks, ke=ke, target=0.99)
        print(found)  # or show it in Jupyter, .to_pandas(), .plot()
        hisa.index(q, k, weights, ks=ks, ke=ke, **found.pick.setting._asdict())

    Recall is over the rows whose window is not empty. Time is the median of a few calls of
    `hisa.index` for all rows at once, the pooling of the keys included. The settings take turns,
    so that none is favoured by a machine that slows down meanwhile; other work on the device makes
    the pick among settings that are about as fast less certain.

    Args:
        q, k, weights, k_scale, ks, ke, cu_seqlens_k, topk: as for `hisa.index`.
        target: recall, from 0 to 1.
        block_size, block_topk, pooling: one value, or several. Every combination is measured but
            those with `block_topk * block_size < topk`, which cannot select as many.
        statistic: what has to reach the target: "mean", the rows' mean recall, or "p1", the 1st
            percentile: the value that 1% of the rows do not exceed.
        progress: show a progress bar, if tqdm is installed and it takes more than two seconds.

    Returns:
        A `Recommendation`: the candidates, their frontier, and the pick.

    Raises:
        TypeError, ValueError: what `hisa.index` would raise for one of the settings.
        ValueError: `target` or `statistic` is not one of these, no setting can select `topk`
            tokens, or no row sees any.

    Cost: that of `hisa.compare`, and six calls of flat and of hisa for each setting.
    """
    check_types((float, int), target=target)
    check_types(NUMBER, topk=topk)
    if not 0 <= target <= 1:
        raise ValueError(f"target: expected a number from 0 to 1, got {target}")
    if statistic not in STATISTICS:
        known = " or ".join(map(repr, STATISTICS))
        raise ValueError(f"statistic: expected {known}, got {statistic!r}")
    inputs = {"k_scale": k_scale, "ks": ks, "ke": ke, "cu_seqlens_k": cu_seqlens_k}
    settings = combine(block_size, block_topk, pooling)
    for s in settings:  # also those that are left out
        sizes = (s.block_size, s.block_topk, 1, s.pooling)
        check_inputs(q, k, weights, k_scale, ks, ke, cu_seqlens_k, None, *sizes)
    most = max(s.block_size * s.block_topk for s in settings)
    if topk > most:
        raise ValueError(
            f"topk: expected at most {most}, the largest block_topk * block_size, got {topk}"
        )
    settings = tuple(s for s in settings if s.block_size * s.block_topk >= topk)
    compared = compare_settings(
        q, k, weights, **inputs, settings=settings, topk=topk, progress=progress
    )
    if not bool((compared.context > 0).any()):
        raise ValueError(f"q: expected a row that sees a token, got none in {q.shape[0]} rows")

    start, end, _ = clamp_windows(
        ks, ke, cu_seqlens_k, rows=q.shape[0], keys=k.shape[0], device=k.device
    )
    calls: list[Callable[[], object]] = [
        partial(flat_index, q, k, weights, k_scale=k_scale, ks=start, ke=end, topk=topk),
        *(partial(index, q, k, weights, **inputs, **s._asdict(), topk=topk) for s in settings),
    ]
    with progress_bar("hisa.recommend", (1 + CALLS) * len(calls), progress) as step:
        flat_seconds, *seconds = _measure(calls, q.device, step)
    candidates = tuple(
        Candidate(summary.setting, summary.recall, taken)
        for summary, taken in zip(compared.overall(), seconds, strict=True)
    )
    return Recommendation(candidates, topk, float(target), statistic, flat_seconds)


def _measure(
    calls: Sequence[Callable[[], object]], device: torch.device, step: Callable[[], object]
) -> list[float]:
    """Return the median time of each call, warm, in seconds.

    In rounds, one call of each, so that a machine which grows slower or faster meanwhile does so
    for all; every other round backwards, so that none always follows the same one.
    """
    time_once = _time_on_cuda if device.type == "cuda" else _time_on_cpu
    taken: list[list[float]] = [[] for _ in calls]
    for turn in range(1 + CALLS):
        order = range(len(calls))
        for number in order if turn % 2 else reversed(order):
            taken[number].append(time_once(calls[number], device))
            step()
    return [median(times[1:]) for times in taken]


def _time_on_cuda(call: Callable[[], object], device: torch.device) -> float:
    with torch.cuda.device(device):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def _time_on_cpu(call: Callable[[], object], device: torch.device) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g}"
