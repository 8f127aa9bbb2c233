"""Tables for people, CSV files for everything else, and plots on request."""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

Cell = str | int | float | None
Record = dict[str, Cell]


def table(rows: Sequence[Sequence[str]]) -> str:
    """Lay out rows, the first of them the header, as an aligned Markdown table."""
    widths = [max(3, *map(len, column)) for column in zip(*rows, strict=True)]
    numeric = [False] + [True] * (len(widths) - 1)
    rule = [
        f"{'-' * (width - 1)}{':' if n else '-'}" for width, n in zip(widths, numeric, strict=True)
    ]
    lines = []
    for row in [rows[0], rule, *rows[1:]]:
        cells = [
            cell.rjust(width) if n else cell.ljust(width)
            for cell, width, n in zip(row, widths, numeric, strict=True)
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def time_text(seconds: float) -> str:
    """Write a time with three digits: 412 us, 38.1 ms, 1.25 s."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= scale or unit == "us":
            return f"{_three(seconds / scale)} {unit}"
    raise AssertionError  # the loop always returns


def bytes_text(count: int | None) -> str:
    """Write a size with three digits: 8.42 GiB, 31.0 MiB."""
    if count is None:
        return ""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20)):
        if count >= scale or unit == "MiB":
            return f"{_three(count / scale)} {unit}"
    raise AssertionError  # the loop always returns


def _three(value: float) -> str:
    return (
        f"{value:.0f}" if value >= 99.95 else f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"
    )


def write_csv(path: Path, records: Iterable[Record]) -> None:
    """Write records to a CSV file; the columns are all keys, in order of appearance."""
    records = list(records)
    columns = list(dict.fromkeys(key for record in records for key in record))
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(records)


def load_pyplot() -> Any:
    """Return matplotlib's pyplot, drawing into files; None, with a message, if it is missing."""
    try:
        import matplotlib as mpl

        mpl.use("agg")
        from matplotlib import pyplot as plt
    except ImportError:
        print("no plot: matplotlib is not installed (pip install matplotlib)", file=sys.stderr)
        return None
    return plt


def write_plot(path: Path, title: str, records: Sequence[Record]) -> None:
    """Plot the median times: lines over the number of keys, or bars if that does not vary."""
    plt = load_pyplot()
    if plt is None:
        return
    lines: dict[str, list[tuple[int, float]]] = {}
    for record in records:
        if record.get("median_s"):
            label = " ".join(
                str(record[key]) for key in ("peer", "series", "dtype") if record.get(key)
            )
            lines.setdefault(label, []).append(
                (int(record["keys"] or 0), float(record["median_s"] or 0))
            )
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    if len({x for points in lines.values() for x, _ in points}) > 2:
        _plot_lines(axes, lines)
    else:
        bars = [(f"{label}, {x} keys", y) for label, points in lines.items() for x, y in points]
        axes.barh([label for label, _ in bars], [y for _, y in bars])
        axes.invert_yaxis()
        axes.set(xlabel="median time (s)")
    axes.set_title(title)
    axes.grid(visible=True, alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _plot_lines(axes: Any, lines: dict[str, list[tuple[int, float]]]) -> None:
    for label, points in lines.items():
        axes.plot(*zip(*sorted(points), strict=True), marker="o", label=label)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set(xlabel="keys", ylabel="median time (s)")
    axes.legend()
