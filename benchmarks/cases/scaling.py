"""Cost grows as S * (S / B + m * B): prefills of 4K to 64K tokens, flat beside them.

Two views. `prefill` is the whole sequence (for flat up to 16K: it takes minutes beyond).
`last rows` is the last 1024 queries only, at every length: what a query costs at that context.

The time of one planned multiply-add should hardly depend on the length. It rises a little, for two
reasons: the keys outgrow the caches, and with random keys neighbouring queries have fewer of their
blocks in common the more blocks there are, so that a block's load serves fewer of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import hisa
from benchmarks import report
from benchmarks.harness import Bench, Measurement
from benchmarks.inputs import causal

HEADS, DIM, TOPK, BLOCK_TOPK = 16, 128, 512, 16
HISA, FLAT = "hisa.index", "hisa.flat_index"
LONGEST_FLAT = 16384  # tokens of the longest prefill that the flat indexer is given
LAST_ROWS = 1024


def build(peer: str, *, series: str, rows: int, keys: int) -> Callable[[], Tensor]:
    """Return one peer's call."""
    q, k, weights, ks, ke = causal(rows, keys, HEADS, DIM, "float32")
    if peer == FLAT:
        return lambda: hisa.flat_index(q, k, weights, ks=ks, ke=ke, topk=TOPK)
    return lambda: hisa.index(q, k, weights, ks=ks, ke=ke, topk=TOPK, block_topk=BLOCK_TOPK)


def operations(rows: int, keys: int) -> dict[str, int]:
    """Return each peer's planned multiply-adds."""
    options: dict[str, Any] = {"dtype": torch.float32, "topk": TOPK, "causal": True}
    hierarchical = hisa.plan(rows, keys, HEADS, DIM, block_topk=BLOCK_TOPK, **options)
    flat = hisa.plan(rows, keys, HEADS, DIM, op="flat_index", **options)
    return {HISA: sum(hierarchical.operations.values()), FLAT: sum(flat.operations.values())}


def run(bench: Bench) -> None:
    """Measure both views at doubling lengths."""
    lengths = [1024, 2048, 4096] if bench.quick else [4096, 8192, 16384, 32768, 65536]
    prefills = [measure(bench, "prefill", keys, keys) for keys in lengths]
    last = [measure(bench, "last rows", min(LAST_ROWS, keys), keys) for keys in lengths]
    summary = [
        (
            "tokens",
            "hisa prefill",
            "planned GMAC",
            "ps per MAC",
            "flat prefill",
            "us per query: hisa",
            "flat",
        )
    ]
    for keys, prefill, rows in zip(lengths, prefills, last, strict=True):
        hisa_prefill = prefill[HISA]
        summary.append(
            (
                str(keys),
                report.time_text(hisa_prefill.median),
                f"{(hisa_prefill.operations or 0) / 1e9:.1f}",
                f"{1e12 * per_operation(hisa_prefill):.1f}",
                report.time_text(prefill[FLAT].median) if FLAT in prefill else "not run",
                f"{1e6 * rows[HISA].median / min(LAST_ROWS, keys):.0f}",
                f"{1e6 * rows[FLAT].median / min(LAST_ROWS, keys):.0f}",
            )
        )
    bench.say()
    bench.say(report.table(summary))
    costs = [per_operation(prefill[HISA]) for prefill in prefills]
    what = (
        f"time per planned multiply-add, {lengths[0]} to {lengths[-1]} tokens: largest / smallest"
    )
    bench.goal(what, max(costs) / min(costs), at_most=1.25, digits=2)


def measure(bench: Bench, series: str, rows: int, keys: int) -> dict[str, Measurement]:
    """Measure one length."""
    short = keys <= LONGEST_FLAT
    return bench.measure(
        build,
        (HISA, FLAT) if short or rows < keys else (HISA,),
        {"series": series, "rows": rows, "keys": keys},
        operations=operations(rows, keys),
        warm_up=keys == 4096,
        min_runs=3,
        seconds=2.0,
    )


def per_operation(measurement: Measurement) -> float:
    """Return seconds per planned multiply-add."""
    return measurement.median / (measurement.operations or 1)
