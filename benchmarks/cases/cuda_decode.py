"""hisa.paged_index and paged_pool on a GPU: decode steps over a paged cache, in CUDA graphs.

fp8, 64 heads, D = 128, pages of 64 tokens in random order, DeepSeek-V3.2's setting: blocks of 128,
64 of them kept, 2048 tokens selected. `flat` is paged_index with every block kept, which is exact;
`append` is paged_pool after one token. A call is a replay of its graph, so no host time is in it.
In a graph is one call or, as in a model with so many layers, 16 of them, each with keys and queries
of its own. A sixteenth of that is given too: in it, the launch of a graph counts for less.

TileLang, whose pipeline has no pages, selects for one sequence of adjacent keys, not in a graph.
DeepGEMM's paged kernel makes the scores of the flat indexer, alone and with torch.topk, in a graph
likewise; the schedule that it takes is made beforehand.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import hisa
from benchmarks import deepgemm_peer, drift, report, tilelang_peer
from benchmarks.cases import cuda_prefill
from benchmarks.cases.cuda_prefill import DEEPGEMM, DEEPGEMM_SHARE, LOGITS, TILELANG
from benchmarks.harness import Bench, Measurement

DEVICE = "cuda"
HISA, FLAT, APPEND = "hisa.paged_index", "flat", "append"
ALL_COMPLETE = "append, all complete"
CALLS = 16
TOGETHER = f", {CALLS} in a graph"
HEADS, DIM, PAGE, BLOCK, BLOCK_TOPK, TOPK = 64, 128, 64, 128, 64, 2048
KEY_BYTES = DIM + 4
BANDWIDTH = 4.1e12  # bytes per second of an H200's memory, measured
LIMIT = """
One launch per call. What limits a single row is latency, 27,000 cycles of it: it waits for its
length and table, for the numbers of pooled keys, for these, for tokens' keys; two exchanges between
16 multiprocessors, two selections; and 2.8 us for the launch of any graph. `docs/kernels.md` says
what each step takes, and lists the designs tried, from 55 us on. Many rows are limited by how fast
a multiprocessor adds up products. One of 16 in a graph takes 4 to 5 us less, of `append` 2 or more:
the launch of the graph is paid once, and a call of `paged_index` gets ready while the one before it
ends.

`append`: each sequence is at another place of its block, so that one of 128 completes it;
`append, all complete`: all of them do, as in a batch that began together. Tried, for these: a block
of keys by one warp, each token's page looked up, 56 us; by 256 threads, keys copied while the table
is looked at, 6.7, each of 16 4.8; launched while the kernel before it ends, 4.4. What is left are
two dependent reads of memory, 128 sums in order and the launch."""


@dataclass(frozen=True)
class Shape:
    """One step; the fields are columns of the CSV file."""

    batch: int
    tokens: int
    next_n: int

    def __str__(self) -> str:
        """Write it as the goals do."""
        return f"batch {self.batch}, {self.tokens >> 10}K tokens, next_n {self.next_n}"


GOALS = {  # microseconds
    Shape(1, 1 << 17, 1): {HISA: 16},
    Shape(1, 1 << 20, 1): {HISA: 22},
    Shape(32, 1 << 17, 1): {HISA: 30},
    Shape(128, 1 << 17, 2): {HISA: 130, APPEND: 4, ALL_COMPLETE: 4},
}
QUICK = Shape(2, 1 << 14, 1)


@lru_cache(maxsize=CALLS)
def make_inputs(batch: int, tokens: int, next_n: int, layer: int = 0) -> dict[str, Any]:
    """Return a layer's full cache and queries, the same tensors for all peers."""
    torch.manual_seed(layer)
    pages = batch * tokens // PAGE
    cache = torch.empty(pages, PAGE * KEY_BYTES, dtype=torch.uint8, device=DEVICE)
    for some in cache.split(4096):
        keys = torch.randn(len(some), PAGE * DIM, device=DEVICE).to(torch.float8_e4m3fn)
        some[:, : PAGE * DIM] = keys.view(torch.uint8)
        some[:, PAGE * DIM :] = torch.rand(len(some), PAGE, device=DEVICE).view(torch.uint8)
    where: dict[str, Any] = {
        "block_table": torch.randperm(pages, device=DEVICE).int().view(batch, -1),
        "seq_lens": torch.full((batch,), tokens, dtype=torch.int32, device=DEVICE),
    }
    pooled = (
        torch.zeros(pages, DIM, dtype=torch.float8_e4m3fn, device=DEVICE),
        torch.zeros(pages, device=DEVICE),
    )
    hisa.paged_pool(cache, *pooled, new_tokens=None, **where)
    rows = batch * next_n
    q = torch.randn(rows, HEADS, DIM, device=DEVICE).to(torch.float8_e4m3fn)
    weights = torch.randn(rows, HEADS, device=DEVICE)
    return {"q": q, "pages": cache, "weights": weights, "pooled": pooled, "where": where}


def build(
    peer: str,
    *,
    tilelang: Path | None = None,
    deepgemm: Path | None = None,
    batch: int,
    tokens: int,
    next_n: int,
) -> Callable[[], object]:
    """Return one peer's call."""
    if peer == TILELANG:
        adjacent = drift.make_inputs(batch, tokens, HEADS, "random", "fp8")
        return cuda_prefill.call(peer, adjacent, tilelang=tilelang)
    shape = Shape(batch, tokens, next_n)
    if not peer.endswith(TOGETHER):
        return captured(make_call(peer, shape, deepgemm))
    alone = peer.removesuffix(TOGETHER)
    calls = [make_call(alone, shape, deepgemm, layer) for layer in range(CALLS)]
    return captured(lambda: [call() for call in calls][-1])


def make_call(
    peer: str, shape: Shape, deepgemm: Path | None, layer: int = 0
) -> Callable[[], Tensor | None]:
    """Return one peer's call for a layer, to be captured."""
    inputs, next_n = make_inputs(**asdict(shape), layer=layer), shape.next_n
    q, pages, weights = (inputs[name] for name in ("q", "pages", "weights"))
    pooled, where = inputs["pooled"], inputs["where"]
    if peer in (DEEPGEMM, LOGITS):
        same: dict[str, Any] = {"q": q, "pages": pages, "weights": weights, "next_n": next_n}
        if peer == LOGITS:
            return deepgemm_peer.build_paged_logits(deepgemm, **same, **where)
        return deepgemm_peer.build_paged(deepgemm, topk=TOPK, **same, **where)
    if peer in (APPEND, ALL_COMPLETE):
        lengths = where["seq_lens"]
        if peer == APPEND:
            places = torch.arange(shape.batch, device=DEVICE).int() % BLOCK
            where = {**where, "seq_lens": lengths - places}
        return lambda: hisa.paged_pool(pages, *pooled, **where)
    kept = BLOCK_TOPK if peer == HISA else shape.tokens // BLOCK
    options: dict[str, Any] = {
        "pooled": pooled,
        "next_n": next_n,
        "block_topk": kept,
        "topk": TOPK,
        **where,
    }
    return lambda: hisa.paged_index(q, pages, weights, **options)


def captured(call: Callable[[], Tensor | None]) -> Callable[[], object]:
    """Capture a call in a CUDA graph, and return its replay."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    stream.synchronize()
    # NOTE: cuBLAS's workspace for the stream that captures may be another graph's memory by now, or
    # be let go of by torch's compiler: the graph gets one of its own.
    torch._C._cuda_clearCublasWorkspaces()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()

    def replay(_held: object = call) -> object:  # the tensors that the graph reads stay alive
        graph.replay()
        return result

    return replay


def bytes_read(shape: Shape) -> int:
    """Return what one call reads: pooled keys of all blocks, keys of the kept ones."""
    kept = min(BLOCK_TOPK * BLOCK, shape.tokens)
    return shape.batch * KEY_BYTES * (shape.tokens // BLOCK + shape.next_n * kept)


def foreign(bench: Bench, shape: Shape) -> list[str]:
    """Return the peers from elsewhere that can run, after a look at what they select."""
    if bench.quick:
        return []
    peers = {DEEPGEMM: deepgemm_peer.obstacle(bench.deepgemm)}
    if shape.batch * shape.next_n == 1:
        peers[TILELANG] = tilelang_peer.obstacle(bench.tilelang)
    for peer, reason in peers.items():
        if reason:
            bench.skip(peer, asdict(shape), reason)
    ready = [peer for peer, reason in peers.items() if not reason]
    if DEEPGEMM in ready:
        build_both = partial(build, deepgemm=bench.deepgemm)
        bench.agree(build_both, (FLAT, DEEPGEMM), asdict(shape), partial(check_deepgemm, bench))
        ready.append(LOGITS)
    return ready


def check_deepgemm(bench: Bench, results: Mapping[str, object]) -> None:
    """Note what share of the tokens of `flat` DeepGEMM has; raise if it is too small."""
    cuda_prefill.check_share(bench, FLAT, DEEPGEMM, DEEPGEMM, DEEPGEMM_SHARE, HEADS, results)


def run(bench: Bench) -> None:
    """Measure every shape with its peers, then say what they are of memory's speed."""
    bench.note_kernels((HEADS, torch.float8_e4m3fn))
    found = {}
    for shape in [QUICK] if bench.quick else list(GOALS):
        peers = [HISA, FLAT, APPEND, ALL_COMPLETE, *foreign(bench, shape)]
        found[shape] = bench.measure(
            partial(build, tilelang=bench.tilelang, deepgemm=bench.deepgemm), peers, asdict(shape),
            memory=[HISA], min_runs=20, max_runs=50, seconds=0.5,
        )  # fmt: skip
        if not bench.quick:
            many = [peer + TOGETHER for peer in (HISA, APPEND, ALL_COMPLETE)]
            found[shape] |= bench.measure(
                build, many, asdict(shape), min_runs=20, max_runs=50, seconds=0.5, ratio=False
            )
        make_inputs.cache_clear()
        torch.cuda.empty_cache()
    bench.say()
    bench.say(report.table(summary(found)))
    if bench.quick:
        return
    bench.say(LIMIT)
    for shape, goals in GOALS.items():
        for peer, most in goals.items():
            alone, together = (found[shape][name].median * 1e6 for name in (peer, peer + TOGETHER))
            bench.goal(f"us of {peer}, {shape}", alone, at_most=most)
            name = f"us of {peer}, one of {CALLS} in a graph, {shape}"
            bench.goal(name, together / CALLS, at_most=most)


def summary(found: Mapping[Shape, Mapping[str, Measurement]]) -> list[tuple[str, ...]]:
    """Return the lines of a table: what a call takes, and what that is of memory's speed."""
    speed = f"of {BANDWIDTH / 1e12:g} TB/s"
    lines: list[tuple[str, ...]] = [
        ("", "median", f"one of {CALLS}", "bytes read", "TB/s", speed, "flat / it")
    ]
    for shape, measured in found.items():
        ours, size = measured[HISA].median, bytes_read(shape)
        together = measured.get(HISA + TOGETHER)
        lines.append(
            (
                str(shape),
                report.time_text(ours),
                "" if together is None else report.time_text(together.median / CALLS),
                report.bytes_text(size),
                f"{size / ours / 1e12:.2f}",
                f"{size / ours / BANDWIDTH:.0%}",
                f"{measured[FLAT].median / ours:.1f}",
            )
        )
    return lines
