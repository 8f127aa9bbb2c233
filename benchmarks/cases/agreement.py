"""What it costs to know: hisa.compare, hisa.certify and hisa.exact_index against flat and hisa.

Keys lie in groups of 512 around random centres, as far from them as `spread` says, in units of what
the centres are from zero: 1 is nearly random. Queries are random, the last of the keys, bf16.
The table says how much of flat's selection hisa finds, and of how many rows that can be proved.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import hisa
from benchmarks import report
from benchmarks.harness import Bench

HISA, FLAT, BOTH = "hisa.index", "hisa.flat_index", "hisa.index and hisa.flat_index"
COMPARE, CERTIFY, EXACT = "hisa.compare", "hisa.certify", "hisa.exact_index"
DIM, GROUP = 128, 512
SPREADS = (0.01, 0.03, 0.1, 0.3, 1.0)


def make_inputs(rows: int, keys: int, heads: int, spread: float, device: str) -> dict[str, Any]:
    """Return queries, keys, weights and causal windows."""
    random = torch.Generator(device).manual_seed(rows + keys)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, generator=random)

    centres = normal(keys // GROUP, DIM).repeat_interleave(GROUP, 0)
    return {
        "q": normal(rows, heads, DIM).bfloat16(),
        "k": (centres + spread * normal(keys, DIM)).bfloat16(),
        "weights": normal(rows, heads).abs(),
        "ke": torch.arange(keys - rows + 1, keys + 1, device=device, dtype=torch.int32),
    }


def build(
    peer: str, *, rows: int, keys: int, heads: int, spread: float = 0.03, device: str = "cpu"
) -> Callable[[], object]:
    """Return one peer's call, with the default setting: 64 blocks of 128, 2048 tokens."""
    inputs = make_inputs(rows, keys, heads, spread, device)
    if peer == COMPARE:
        return lambda: hisa.compare(**inputs, progress=False)
    if peer == BOTH:
        return lambda: (hisa.index(**inputs), hisa.flat_index(**inputs))
    one: dict[str, Callable[..., object]] = {
        HISA: hisa.index,
        FLAT: hisa.flat_index,
        CERTIFY: hisa.certify,
        EXACT: hisa.exact_index,
    }
    return lambda: one[peer](**inputs)


def run(bench: Bench) -> None:
    """Measure the instruments, and what there is to see."""
    shape = {"rows": 512 if bench.quick else 4096, "keys": 16384, "heads": 16}
    measure(bench, "cpu", **shape)
    bench.say()
    bench.say(report.table(shares(shape["heads"])))


def measure(bench: Bench, device: str, rows: int, keys: int, heads: int) -> None:
    """Measure every instrument at one shape, and note its goal."""
    peers = (BOTH, HISA, FLAT, COMPARE, CERTIFY, EXACT)

    def on_device(peer: str, **shape: Any) -> Callable[[], object]:
        return build(peer, device=device, **shape)

    found = bench.measure(on_device, peers, {"rows": rows, "keys": keys, "heads": heads},
                          memory=(), min_runs=3, max_runs=20, seconds=1.0)  # fmt: skip
    at = f"{rows} x {keys}, H={heads}"
    both, flat = found[BOTH].median, found[FLAT].median
    bench.goal(
        f"{COMPARE} / flat and hisa, {at}", found[COMPARE].median / both, at_most=3, digits=2
    )
    bench.goal(f"{CERTIFY} / flat, {at}", found[CERTIFY].median / flat, at_most=2, digits=2)
    if device == "cpu":
        bench.goal(f"seconds of {COMPARE}, {at}", found[COMPARE].median, at_most=60, digits=1)


def shares(heads: int, device: str = "cpu") -> list[tuple[str, ...]]:
    """Say for each spread and topk what hisa finds, and what is proved."""
    lines: list[tuple[str, ...]] = [
        ("spread", "topk", "recall", "rows as flat", "proved, bound_size 8", "16", "64")
    ]
    for spread in SPREADS:
        inputs = make_inputs(512, 32768, heads, spread, device)
        for topk in (256, 2048):
            found = hisa.compare(**inputs, topk=topk, progress=False)
            proved = [
                hisa.certify(**inputs, topk=topk, bound_size=size).proved.float().mean()
                for size in (8, 16, 64)
            ]
            same = (found.worst_miss == 0).float().mean()
            cells = (found.recall.mean(), same, *proved)
            lines.append((f"{spread:g}", str(topk), *(f"{float(cell):.3f}" for cell in cells)))
    return lines
