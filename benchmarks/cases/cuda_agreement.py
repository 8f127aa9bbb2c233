"""What it costs to know, on a GPU: see benchmarks/cases/agreement.py."""

from __future__ import annotations

from benchmarks import report
from benchmarks.cases.agreement import measure, shares
from benchmarks.harness import Bench

DEVICE = "cuda"


def run(bench: Bench) -> None:
    """Measure the instruments, and what there is to see."""
    measure(bench, DEVICE, rows=512 if bench.quick else 8192, keys=65536, heads=64)
    bench.say()
    bench.say(report.table(shares(64, DEVICE)))
