"""The README's plot: how much faster hisa.index is than every peer, by length of the context.

Drawn from the committed CSV file of cuda_hopper, so that it can be drawn again without a GPU.
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path
from typing import Any

from .report import load_pyplot

OURS = "hisa.index"
PEERS = {  # from the slowest on, with their colours, which are told apart without colour vision too
    "torch in chunks": "#666666",
    "DeepGEMM + torch.topk": "#0072b2",
    "hisa.flat_index": "#009e73",
    "TileLang": "#d55e00",
}
Curve = list[tuple[int, float]]


def draw(source: Path, target: Path) -> None:
    """Write the plot as an SVG file, the same bytes for the same measurements."""
    plt = load_pyplot()
    curves = read(source)
    if plt is None or not curves:
        if not curves:
            print(f"no plot: {source} has no lengths to compare", file=sys.stderr)
        return
    settings = {"svg.hashsalt": "hisa", "svg.fonttype": "none", "font.family": "sans-serif"}
    with plt.rc_context(settings):
        figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
        for peer, curve in curves.items():
            length, gain = curve[-1]
            label = f"{peer}, {gain:.1f}x at {length // 1024}K"
            axes.plot(*zip(*curve, strict=True), marker="o", color=PEERS[peer], label=label)
        decorate(axes, sorted({length for curve in curves.values() for length, _ in curve}))
        figure.savefig(target, metadata={"Date": None})
        plt.close(figure)


def decorate(axes: Any, lengths: list[int]) -> None:
    """Set scales, labels and the line at 1."""
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xticks(lengths, [f"{length // 1024}K" for length in lengths])
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    axes.set(xlabel="tokens, a causal prefill of all of them", ylabel="time / time of hisa.index")
    axes.set_title("Speed-up of hisa.index: fp8, 64 heads, queries that drift as in a text")
    axes.grid(visible=True, alpha=0.3)
    axes.legend(frameon=False)


def read(source: Path) -> dict[str, Curve]:
    """Return the speed-up over each peer by length, for full prefills with 64 heads in fp8."""
    with source.open(newline="") as file:
        records = [
            r for r in csv.DictReader(file)
            if r["rows"] == r["keys"] and r["median_s"]
            and (r["heads"], r["queries"], r["dtype"]) == ("64", "text", "fp8")
        ]  # fmt: skip
    seconds = {(r["peer"], int(r["keys"])): float(r["median_s"]) for r in records}
    curves = {
        peer: sorted(
            (length, theirs / seconds[OURS, length])
            for (who, length), theirs in seconds.items()
            if who == peer and (OURS, length) in seconds
        )
        for peer in PEERS
    }
    return {peer: curve for peer, curve in curves.items() if len(curve) > 1}
