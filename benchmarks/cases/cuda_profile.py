"""Where the time of cuda_hopper's calls goes: hardware counters of each of their kernels, by ncu.

Of a kernel: its time, the clock, what share of the tensor cores' rate its products are (4096
multiply-adds of fp8 a cycle and multiprocessor, half as many of bf16), and what share of its time
issued instructions, shared memory, L2 and memory take of what there is of each. A call is profiled
once, behind a first one, at the clock that the board gives it (`--clock-control none`), caches as
they are. A kernel is run again for each few counters; that is not timed, so times are those of a
single run, while in cuda_hopper the board is at its power limit. Needs ncu and counters that this
user may read.
"""

from __future__ import annotations

import csv
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

import hisa
from benchmarks import drift, profiled, report
from benchmarks.cases import cuda_hopper
from benchmarks.cases.cuda_prefill import FLAT, TOPK
from benchmarks.harness import Bench

DEVICE = "cuda"
ELAPSED = ".avg.pct_of_peak_sustained_elapsed"
TIME, CLOCK = "gpu__time_duration.sum", "sm__cycles_elapsed.avg.per_second"
SHARES = {
    "issue slots": "sm__inst_issued" + ELAPSED,
    "ALU": "sm__pipe_alu_cycles_active" + ELAPSED,
    "FMA": "sm__pipe_fma_cycles_active" + ELAPSED,
    "shared memory": "l1tex__data_pipe_lsu_wavefronts_mem_shared" + ELAPSED,
    "L2": "lts__t_sectors" + ELAPSED,
    "memory": "dram__throughput" + ELAPSED,
}
SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9, "second": 1.0, "msecond": 1e-3,
           "usecond": 1e-6, "nsecond": 1e-9}  # fmt: skip
HERTZ = {"Ghz": 1e9, "GHz": 1e9, "Mhz": 1e6, "MHz": 1e6, "hz": 1.0, "Hz": 1.0}
SMALLEST = 0.006  # of a call's time: kernels that are listed, not one that ends at once
RATES = {torch.float8_e4m3fn: 4096, torch.bfloat16: 2048}  # multiply-adds of a cycle

Kernel = dict[str, float | str]  # its name, TIME, CLOCK and SHARES


def run(bench: Bench) -> None:
    """Profile, and print one line for each kernel."""
    ncu = shutil.which("ncu")
    if ncu is None:
        bench.skip("ncu", {}, "it is not on the PATH")
        return
    bench.note_kernels((64, torch.float8_e4m3fn), (64, torch.bfloat16))
    if bench.portable:
        bench.skip("ncu", {}, "this build, or this GPU, has not the kernels for Hopper")
        return
    wanted = profiled.profiled(bench.quick)
    calls = list(split_calls(profile(ncu, bench.quick)))
    if len(calls) != len(wanted):
        raise RuntimeError(f"ncu reported {len(calls)} calls, not {len(wanted)}")
    lines = [["", "kernel", "time", "GHz", "products", *SHARES]]
    for row, kernels in zip(wanted, calls, strict=True):
        label = f"{row.shape}: {row.peer}"
        for number, (stage, kernel) in enumerate(name_stages(kernels)):
            share = products(row, stage, kernel)
            bench.records.append({"call": label, "stage": stage, "products": share, **kernel})
            hertz = float(kernel[CLOCK])
            lines.append(
                ["" if number else label, stage,
                 report.time_text(float(kernel[TIME])), f"{hertz / 1e9:.2f}",
                 "" if share is None else f"{share:.0%}",
                 *(f"{float(kernel[metric]):.0f}%" for metric in SHARES.values())]
            )  # fmt: skip
    bench.say("\n" + report.table(lines))


def products(row: cuda_hopper.Row, stage: str, kernel: Kernel) -> float | None:
    """Return what share of the tensor cores' rate a stage's multiply-adds are; None if it has none.

    As many as its row selects need; pairs of rows make a few more, for blocks that only one keeps.
    """
    shape, op = row.shape, "flat_index" if row.peer == FLAT else "index"
    plan = hisa.plan(shape.rows, shape.keys, shape.heads, drift.DIM, dtype=shape.torch_dtype,
                     device=DEVICE, op=op, topk=TOPK, causal=True)  # fmt: skip
    number = plan.operations.get(stage.split()[0])
    if not number or stage == "pool":
        return None
    processors = torch.cuda.get_device_properties(DEVICE).multi_processor_count
    cycles = float(kernel[TIME]) * float(kernel[CLOCK]) * processors
    return number / (cycles * RATES[shape.torch_dtype])


def profile(ncu: str, quick: bool) -> list[Kernel]:
    """Return the kernels of all calls, MARK among them, in order."""
    with TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        command = [ncu, "--clock-control", "none", "--cache-control", "none", "--csv", "--page",
                   "raw", "--profile-from-start", "off", "--kernel-name-base", "demangled",
                   "--kernel-name", "regex:hisa", "--log-file", str(log),
                   "--metrics", ",".join([TIME, CLOCK, *SHARES.values()]),
                   sys.executable, "-m", "benchmarks.profiled", *["--quick"] * quick]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        text = log.read_text() if log.exists() else ""
    kernels = list(parse(text.splitlines()))
    if done.returncode != 0 or not kernels:
        raise RuntimeError(f"ncu failed: {(text or done.stderr)[-2000:]}")
    return kernels


def parse(lines: Iterable[str]) -> Iterator[Kernel]:
    """Yield the kernels of a report: a line of names, one of units, and one for each kernel."""
    rows = csv.DictReader(line for line in lines if line.startswith('"'))
    units = next(rows, {})
    for row in rows:
        kernel: Kernel = {"kernel": row["Kernel Name"]}
        for metric, factors in ((TIME, SECONDS), (CLOCK, HERTZ)):
            kernel[metric] = number(row[metric]) * factors[units[metric]]
        kernel |= {metric: number(row[metric]) for metric in SHARES.values()}
        yield kernel


def number(text: str) -> float:
    """Read a number with commas between its thousands."""
    return float(text.replace(",", ""))


def split_calls(kernels: Iterable[Kernel]) -> Iterator[list[Kernel]]:
    """Yield the kernels of each call, those behind a MARK."""
    call: list[Kernel] | None = None
    for kernel in kernels:
        if profiled.MARK in str(kernel["kernel"]):
            if call is not None:
                yield call
            call = []
        elif call is not None:
            call.append(kernel)
    if call is not None:
        yield call


def name_stages(kernels: list[Kernel]) -> Iterator[tuple[str, Kernel]]:
    """Yield kernels that take time, and which stage each is."""
    whole = sum(float(kernel[TIME]) for kernel in kernels)
    scoring = [kernel for kernel in kernels if "Config<" in str(kernel["kernel"])]
    for kernel in kernels:
        if float(kernel[TIME]) < SMALLEST * whole:
            continue
        name = str(kernel["kernel"])
        if kernel not in scoring:
            stage = "pool" if "pool" in name else re.sub(r"[(<].*", "", name).split("::")[-1]
        elif len(scoring) == 1:
            stage = "flat"
        elif kernel is scoring[0]:
            stage = "coarse"
        else:
            pairs = re.search(r"Config<[^>]*, (\(int\))?2, ((\(bool\))?1|true)", name)
            stage = "refine by pairs" if pairs else "refine row by row"
        yield stage, kernel
