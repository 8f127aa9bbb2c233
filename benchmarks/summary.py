"""The README's table, made from the CSV files of a run."""

from __future__ import annotations

import csv
import re
from pathlib import Path

from . import report
from .cases.cuda_decode import CALLS, TOGETHER
from .cases.cuda_decode_module import CAPTURED, COMPILED, STEPS
from .cases.cuda_hopper import Shape
from .cases.indexer_module import bytes_needed

README = Path(__file__).parent.parent / "README.md"
BEGIN, END = "<!-- begin: python -m benchmarks --readme -->", "<!-- end -->"

CPU_CASES = ("indexer_module", "flat", "refine", "scaling")
PREFILLS = ("cuda_hopper", "cuda_prefill")
CUDA_CASES = ("cuda_module", "cuda_decode_module", "cuda_decode", *PREFILLS)
DEEPGEMM = "DeepGEMM + torch.topk"
PEERS = ("hisa.index", "TileLang", DEEPGEMM, "torch in chunks", "hisa.flat_index")
OURS = {"hisa.index", "hisa.flat_index"}
NOTE = """\
On a GPU. fp8 where a row says nothing else, D 128, causal, `topk` 2048, `block_topk` 64,
`block_size` 128; the module in bfloat16, hidden 7168. Medians, and what multiple of the time of
`hisa.index` they are; memory beyond the inputs. A step of the module waits for the host, but where
a graph has many, as a model's has all layers. Random: queries are independent, the worst case.
Text: they drift, so that neighbours share three of four kept blocks or more. Portable: the kernels
that GPUs other than Hopper run, here in a build with `HISA_HOPPER=0`. Decode: 64 heads, in a CUDA
graph, alone or with others as in a model of so many layers; but for TileLang, which takes adjacent
keys and waits for the host, 0.2 to 1.5 ms. Flat is `hisa.paged_index` keeping every block.
`make bench ARGS=CASE` repeats the rows of a case, with peers as [below](#more)."""
PLOT = "![How much faster hisa.index is, by length](benchmarks/results/cuda_hopper.svg)"
HEADER = ("", "hisa", "compared with", "gain", "case")

Record = dict[str, str]


def summary(results: Path) -> str:
    """Return a table for each kind of device and where its numbers come from."""
    return f"{cuda_summary(results)}\n\n{cpu_summary(results)}"


def cuda_summary(results: Path) -> str:
    """Return the tables of what was measured on a GPU, and the plot where there is one."""
    prefills = prefill_rows(results)
    modules = report.table(
        [HEADER, *cuda_module_rows(results), *step_rows(results), *decode_rows(results)]
    )
    found = f"{modules}\n\n{report.table(prefills)}\n\n{NOTE}\n{origin(results, CUDA_CASES)}"
    return f"{found}\n\n{PLOT}" if any(row[-1] == "cuda_hopper" for row in prefills) else found


def cpu_summary(results: Path) -> str:
    """Return the table of what was measured on a CPU."""
    rows: list[tuple[str, ...]] = [HEADER]
    rows += [*module_rows(results), *flat_rows(results), *refine_rows(results)]
    rows += scaling_rows(results)
    note = (
        "On a CPU. 4096 tokens, 64 heads of 128 channels, float32, causal, where a row says\n"
        "nothing else; `topk` 512, `block_topk` 16, `block_size` 128, random inputs. Medians,\n"
        "memory beyond the inputs. `make bench ARGS=CASE` repeats a row, `make bench` all."
    )
    return f"{report.table(rows)}\n\n{note}\n{origin(results, CPU_CASES)}"


def origin(results: Path, cases: tuple[str, ...]) -> str:
    """Return where and with what some cases were measured."""
    present = [case for case in cases if (results / f"{case}.csv").exists()]
    records = [record for case in present for record in read(results, case)]
    first = records[0]
    commits, dates = (
        ", ".join(dict.fromkeys(record[name] for record in records)) for name in ("commit", "date")
    )
    where = first["gpu"] or f"{first['cpu']}, {first['threads']} threads, {first['cpu_isa']}"
    return (
        f"{where}; torch {first['torch']}, transformers {first['transformers']}; "
        f"commit {commits}, {dates}."
    )


def cuda_module_rows(results: Path) -> list[tuple[str, ...]]:
    """Return the rows about the patched module on a GPU."""
    records = read(results, "cuda_module")
    rows: list[tuple[str, ...]] = []
    for ours in (r for r in records if r["peer"] in ("patched", "patched, fp8")):
        own = [r for r in records if r["peer"] == "Hugging Face" and r["keys"] == ours["keys"]
               and r["median_s"]]  # fmt: skip
        needed = report.bytes_text(bytes_needed(int(ours["keys"])))
        compared, gain = f"Hugging Face: not run, needs about {needed}", ""
        if own:
            less = int(own[0]["peak_extra_bytes"]) / int(ours["peak_extra_bytes"])
            compared = f"Hugging Face: {time(own[0])}, {memory(own[0])}"
            gain = f"{ratio(own[0], ours):.1f}x time, {less:.0f}x memory"
        kind = ours["peer"].removeprefix("patched")
        what = f"V3.2 indexer module, {ours['keys']} tokens{kind}"
        rows.append((what, f"{time(ours)}, {memory(ours)}", compared, gain, "cuda_module"))
    return rows


def step_rows(results: Path) -> list[tuple[str, ...]]:
    """Return the rows about a decode step of the patched module."""
    if not (results / "cuda_decode_module.csv").exists():
        return []
    records = {(r["cache"], r["peer"]): r for r in read(results, "cuda_decode_module")}
    rows: list[tuple[str, ...]] = []
    for cache, how in (("dynamic", ""), ("static", COMPILED), ("static", CAPTURED)):
        ours, own = (records[cache, f"{peer}{how}"] for peer in ("patched", "Hugging Face"))
        ours_s, own_s = (float(record["median_s"]) / STEPS for record in (ours, own))
        told = f"{COMPILED}, {STEPS} in a graph" if how == CAPTURED else how
        what = f"a step of the module, {ours['keys']} tokens, {cache} cache{told}"
        compared = f"Hugging Face: {report.time_text(own_s)}"
        gain = f"{own_s / ours_s:.1f}x time"
        rows.append((what, report.time_text(ours_s), compared, gain, "cuda_decode_module"))
    return rows


def decode_rows(results: Path) -> list[tuple[str, ...]]:
    """Return the rows about decode steps over a paged cache."""
    if not (results / "cuda_decode.csv").exists():
        return []
    rows: dict[tuple[str, ...], dict[str, Record]] = {}
    for record in (r for r in read(results, "cuda_decode") if r["median_s"]):
        shape = tuple(record[name] for name in ("batch", "tokens", "next_n"))
        rows.setdefault(shape, {})[record["peer"]] = record
    found: list[tuple[str, ...]] = []
    for (batch, tokens, next_n), peers in rows.items():
        ours = peers["hisa.paged_index"]
        others = {name: peers[name] for name in (DEEPGEMM, "TileLang", "flat") if name in peers}
        compared = "; ".join(f"{name}: {time(other)}" for name, other in others.items())
        # Not TileLang's, which is the host's.
        gains = (ratio(other, ours) for name, other in others.items() if name != "TileLang")
        gain = ", ".join(f"{gain:.1f}x" for gain in gains)
        drafts = "" if next_n == "1" else f", {next_n} tokens each"
        what = f"decode, {batch} x {tokens} tokens{drafts}, paged"
        cell, together = time(ours), peers.get(f"hisa.paged_index{TOGETHER}")
        if together:
            each = report.time_text(float(together["median_s"]) / CALLS)
            cell += f"; {each} each of {CALLS} in a graph"
        found.append((what, cell, compared, f"{gain} time", "cuda_decode"))
    return found


def prefill_rows(results: Path) -> list[tuple[str, ...]]:
    """Return the rows about prefills on a GPU, a column for each peer; the header comes first."""
    rows: list[tuple[str, ...]] = [("", *(f"`{p}`" if p in OURS else p for p in PEERS), "case")]
    memories: list[tuple[str, ...]] = []
    for case in (case for case in PREFILLS if (results / f"{case}.csv").exists()):
        records = [r for r in read(results, case) if r["median_s"]]
        kind = "" if "wgmma" in records[0].get("kernels", "") else ", portable"
        by_shape: dict[Shape, dict[str, Record]] = {}
        for record in records:
            by_shape.setdefault(shape_of(record), {})[record["peer"]] = record
        shapes = {shape: peers for shape, peers in by_shape.items() if {*PEERS} - OURS & {*peers}}
        for shape, peers in shapes.items():
            ours = peers["hisa.index"]
            others = (peers.get(peer) for peer in PEERS[1:])
            cells = (f"{time(r)}, {ratio(r, ours):.1f}x" if r else "" for r in others)
            rows.append((f"{shape}{kind}", time(ours), *cells, case))
        largest = max(shapes, key=lambda shape: shape.rows * shape.keys * shape.heads)
        held = (shapes[largest].get(peer) for peer in PEERS)
        cells = (memory(r) if r else "" for r in held)
        memories.append((f"memory of {largest}{kind}", *cells, case))
    return [*rows, *memories[:1]]


def shape_of(record: Record) -> Shape:
    """Return the prefill that a record is of."""
    rows, keys, heads = (int(record[name]) for name in ("rows", "keys", "heads"))
    return Shape(rows, keys, heads, record.get("queries", "random"), record.get("dtype", "fp8"))


def update_readme(text: str) -> None:
    """Put the summary between the README's two markers."""
    pattern = re.compile(f"({re.escape(BEGIN)}\n).*?({re.escape(END)})", re.DOTALL)
    readme, count = pattern.subn(lambda m: f"{m[1]}{text}\n{m[2]}", README.read_text())
    if count != 1:
        raise RuntimeError(f"{README}: expected the line {BEGIN} and the line {END} once")
    README.write_text(readme)


def module_rows(results: Path) -> list[tuple[str, ...]]:
    """Return the rows about the patched module."""
    records = read(results, "indexer_module")
    rows: list[tuple[str, ...]] = []
    for own in (r for r in records if r["peer"] == "Hugging Face" and r.get("median_s")):
        same = {key: own[key] for key in ("keys", "hidden", "q_lora", "dtype")}
        ours = find(records, peer="patched", **same)
        shared = find(records, peer="projections alone", **same)
        gain = f"{ratio(own, ours):.1f}x time"
        if own["peak_extra_bytes"] and ours["peak_extra_bytes"]:
            less = int(own["peak_extra_bytes"]) / int(ours["peak_extra_bytes"])
            gain += f", {less:.0f}x memory"
        what = f"V3.2 indexer module, {own['dtype']}, hidden {own['hidden']}"
        rows.append(
            (
                f"{what} ({time(shared)} is projections)",
                f"{time(ours)}, {memory(ours)}",
                f"Hugging Face: {time(own)}, {memory(own)}",
                gain,
                "indexer_module",
            )
        )
    return rows


def flat_rows(results: Path) -> list[tuple[str, ...]]:
    """Return the rows about the flat indexer."""
    records = read(results, "flat")
    rows: list[tuple[str, ...]] = []
    for ours in (r for r in records if r["peer"] == "hisa.flat_index"):
        same = {key: ours[key] for key in ("keys", "dtype")}
        plain = find(records, peer="torch in chunks", **same)
        tuned = find(records, peer="torch in chunks, tuned", **same)
        rows.append(
            (
                f"`flat_index`, {ours['keys']} tokens, {ours['dtype']}",
                f"{time(ours)}, {memory(ours)}",
                f"torch in chunks: {time(plain)}; tuned: {time(tuned)}",
                f"{ratio(plain, ours):.1f}x, {ratio(tuned, ours):.1f}x time",
                "flat",
            )
        )
    return rows


def refine_rows(results: Path) -> list[tuple[str, ...]]:
    """Return the row about the refine stage."""
    records = read(results, "refine")
    ours = find(records, peer="hisa.index", dtype="float32")
    other = find(records, peer="torch.mm float32", dtype="float32")
    gflops = [2e-9 * int(r["multiply_adds"]) / float(r["median_s"]) for r in (ours, other)]
    return [
        (
            "refine stage, float32",
            f"{gflops[0]:.0f} GFLOP/s",
            f"`torch.mm`: {gflops[1]:.0f} GFLOP/s",
            f"{gflops[0] / gflops[1]:.0%} of it",
            "refine",
        )
    ]


def scaling_rows(results: Path) -> list[tuple[str, ...]]:
    """Return the rows about long contexts."""
    records = [r for r in read(results, "scaling") if r["series"] == "last rows"]
    rows: list[tuple[str, ...]] = []
    for keys in sorted({int(r["keys"]) for r in records})[1::3]:
        ours = find(records, peer="hisa.index", keys=str(keys))
        flat = find(records, peer="hisa.flat_index", keys=str(keys))
        per_query = [
            f"{1e6 * float(r['median_s']) / int(r['rows']):.0f} us a query" for r in (ours, flat)
        ]
        rows.append(
            (
                f"last {ours['rows']} queries of {keys} tokens, 16 heads",
                per_query[0],
                f"`flat_index`: {per_query[1]}",
                f"{ratio(flat, ours):.1f}x time",
                "scaling",
            )
        )
    return rows


def read(results: Path, case: str) -> list[Record]:
    """Read a case's CSV file."""
    with (results / f"{case}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def find(records: list[Record], **wanted: str) -> Record:
    """Return the one record with the wanted values."""
    (found,) = (r for r in records if all(r[key] == value for key, value in wanted.items()))
    return found


def ratio(a: Record, b: Record) -> float:
    """Return the ratio of two median times."""
    return float(a["median_s"]) / float(b["median_s"])


def time(record: Record) -> str:
    """Write a record's median time."""
    return report.time_text(float(record["median_s"]))


def memory(record: Record) -> str:
    """Write a record's extra memory."""
    size = record["peak_extra_bytes"]
    return report.bytes_text(int(size)) if size else "memory not measured"
