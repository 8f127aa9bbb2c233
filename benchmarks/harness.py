"""The harness that every case shares: how a number comes about.

A case is a module in `benchmarks.cases` with a docstring that says what it asks, and

    build(peer, **shape)   make the inputs; return a callable that does the peer's work once
    run(bench)             for each shape: bench.agree(...), bench.measure(...), bench.goal(...)

Time     Peers take turns, one call each per round, so that a slow minute of the machine hits all of
         them. Each is called `min_runs` times at least, then until its share of `seconds` is used
         up. Reported: median, quartiles, minimum. Ratios are ratios of medians.
Memory   See meters.py: one call in a fresh process per peer.
Results  Peers must agree on a small shape before anything is timed; that is also the warm-up.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from . import meters, report
from .machine import environment, kernels
from .meters import Build, Shape


@dataclass(frozen=True)
class Measurement:
    """One peer at one shape."""

    peer: str
    shape: Shape
    seconds: tuple[float, ...]
    peak_bytes: int | None  # None: not measured
    operations: int | None  # multiply-adds; None: not stated

    @property
    def median(self) -> float:
        """Median time in seconds."""
        return statistics.median(self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        """First and third quartile of the times, in seconds."""
        if len(self.seconds) == 1:
            return self.seconds[0], self.seconds[0]
        first, _, third = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return first, third

    @property
    def flops(self) -> float:
        """Floating-point operations per second, two for each multiply-add."""
        return 2 * (self.operations or 0) / self.median

    def record(self) -> report.Record:
        """Return the columns of the CSV file that this measurement fills."""
        first, third = self.quartiles
        return {
            "peer": self.peer,
            **self.shape,
            "runs": len(self.seconds),
            "median_s": f"{self.median:.6g}",
            "min_s": f"{min(self.seconds):.6g}",
            "q1_s": f"{first:.6g}",
            "q3_s": f"{third:.6g}",
            "peak_extra_bytes": self.peak_bytes,
            "multiply_adds": self.operations,
        }


class Bench:
    """Runs the measurements of one case, prints them, and keeps them for the files.

    Attributes:
        quick: shapes should be small: the run only shows that everything works.
        device: which device the case runs on.
        tilelang: where TileLang's examples/dsa_hisa is, if that was given.
        deepgemm: where a clone of DeepGEMM is, if that was given.
    """

    def __init__(
        self,
        case: str,
        *,
        quick: bool,
        device: str = "cpu",
        tilelang: Path | None = None,
        deepgemm: Path | None = None,
    ) -> None:
        self.case = case
        self.quick = quick
        self.device = device
        self.tilelang = tilelang
        self.deepgemm = deepgemm
        self.environment = environment(device)
        self.records: list[report.Record] = []
        self.text: list[str] = []
        self.goals: list[tuple[str, str, str, str]] = []

    def say(self, text: str = "") -> None:
        """Print a line of the report."""
        print(text, flush=True)
        self.text.append(text)

    def note_kernels(self, *calls: tuple[int, torch.dtype]) -> None:
        """Say which kernels run for some numbers of heads, and keep it as a column."""
        names = dict.fromkeys(kernels(heads, dtype, self.device) for heads, dtype in calls)
        self.environment["kernels"] = ", ".join(names)
        self.say(f"\nkernels {self.environment['kernels']}")

    @property
    def portable(self) -> bool:
        """Whether none of the noted kernels is for Hopper alone."""
        return "wgmma" not in str(self.environment["kernels"])

    def agree(
        self,
        build: Build,
        peers: Sequence[str],
        shape: Shape,
        check: Callable[[Mapping[str, object]], None],
    ) -> None:
        """Run each peer once and hand the results to `check`, which raises if they disagree."""
        results = {}
        with progress(f"{self.case}: do the peers agree?", len(peers)) as step:
            for peer in peers:
                results[peer] = build(peer, **shape)()
                step()
        check(results)

    def measure(
        self,
        build: Build,
        peers: Sequence[str],
        shape: Shape,
        *,
        operations: Mapping[str, int] | None = None,
        memory: Sequence[str] = (),
        warm_up: bool = True,
        ratio: bool = True,
        min_runs: int = 3,
        max_runs: int = 25,
        seconds: float = 5.0,
        runs: Mapping[str, int] | None = None,
    ) -> dict[str, Measurement]:
        """Measure the peers at one shape, print a table and return what was found.

        Args:
            build: called as `build(peer, **shape)` to make the callable that is measured.
            peers: names that `build` knows.
            shape: plain numbers and strings; they become columns of the CSV file.
            operations: multiply-adds of a peer's call, for the peers where that is known.
            memory: peers whose peak memory is measured as well.
            warm_up: call each once before timing; not needed where `agree` has just done so.
            ratio: print each peer's time over that of the first.
            min_runs, max_runs, seconds: how often each peer is called, and for how long.
            runs: for some peers, what takes the place of min_runs, but in a quick run.
        """
        meter = meters.METERS[self.device]
        least = runs or {}
        calls = {peer: build(peer, **shape) for peer in peers}
        times: dict[str, list[float]] = {peer: [] for peer in peers}
        with progress(f"{self.case} {_shape_text(shape)}") as step:
            for call in calls.values() if warm_up else ():
                call()
                step()
            for number in range(min_runs if self.quick else max_runs):
                for peer, call in calls.items():
                    if number < least.get(peer, min_runs) or sum(times[peer]) < seconds:
                        times[peer].append(meter.seconds(call))
                        step()
            calls.clear()  # the memory of the inputs is needed below
            peaks = {}
            for peer in memory:
                peaks[peer] = meters.peak_bytes(self.device, build, peer, shape)
                step()
        known = operations or {}
        found = {
            peer: Measurement(peer, shape, tuple(times[peer]), peaks.get(peer), known.get(peer))
            for peer in peers
        }
        self.records += [m.record() for m in found.values()]
        self._print(list(found.values()), ratio)
        return found

    def skip(self, peer: str, shape: Shape, reason: str) -> None:
        """Record that a peer was not measured, and why."""
        self.say(f"\n{_shape_text(shape)}: {peer} skipped: {reason}")
        self.records.append({"peer": peer, **shape, "runs": 0, "note": f"skipped: {reason}"})

    def goal(
        self,
        what: str,
        reached: float,
        *,
        at_least: float | None = None,
        at_most: float | None = None,
        digits: int = 1,
    ) -> None:
        """Note a goal and what was reached."""
        if at_least is not None:
            asked, met = f">= {at_least:g}", reached >= at_least
        elif at_most is not None:
            asked, met = f"<= {at_most:g}", reached <= at_most
        else:
            raise ValueError("at_least or at_most: expected one of them, got neither")
        verdict = "quick run" if self.quick else "met" if met else "MISSED"
        self.goals.append((what, asked, f"{reached:.{digits}f}", verdict))

    def print_goals(self) -> None:
        """Print the table of goals."""
        if self.goals:
            self.say()
            self.say(report.table([("goal", "asked", "reached", ""), *self.goals]))

    def rows(self) -> list[report.Record]:
        """Return what the CSV file holds: every measurement with the environment beside it."""
        return [{"case": self.case, **record, **self.environment} for record in self.records]

    def _print(self, found: Sequence[Measurement], ratio: bool) -> None:
        with_memory = any(m.peak_bytes is not None for m in found)
        with_flops = any(m.operations for m in found)
        header = ["peer", "median", "quartiles", "min", "runs"]
        header += [f"time / {found[0].peer}"] * ratio
        header += ["extra memory"] * with_memory + ["GFLOP/s"] * with_flops
        rows = [header]
        for m in found:
            first, third = (report.time_text(value) for value in m.quartiles)
            row = [m.peer, report.time_text(m.median), f"{first} .. {third}"]
            row += [report.time_text(min(m.seconds)), str(len(m.seconds))]
            row += [f"{m.median / found[0].median:.2f}"] * ratio
            row += [report.bytes_text(m.peak_bytes)] * with_memory
            row += [f"{m.flops / 1e9:.1f}" if m.operations else ""] * with_flops
            rows.append(row)
        self.say(f"\n{_shape_text(found[0].shape)}\n")
        self.say(report.table(rows))


@contextmanager
def progress(label: str, total: int | None = None) -> Iterator[Callable[[], object]]:
    """Show on standard error that something is going on; yields a function to call per step."""
    try:
        from tqdm import tqdm  # type: ignore[import-untyped,unused-ignore]
    except ImportError:
        print(label, file=sys.stderr, flush=True)
        yield lambda: None
        return
    with tqdm(total=total, desc=label, leave=False, file=sys.stderr, unit="call") as bar:
        yield bar.update


def _shape_text(shape: Shape) -> str:
    return ", ".join(f"{name} {value}" for name, value in shape.items())
