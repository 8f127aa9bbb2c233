"""hisa.flat_index against the flat indexer in plain torch, in row chunks of the best size.

All compute the same thing, causal. `torch in chunks` is what one writes, `tuned` what one arrives
at; for each the best chunk for this machine and shape is found before anything is measured.

"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import cast

from torch import Tensor

import hisa
from benchmarks.harness import Bench
from benchmarks.inputs import causal, overlap, torch_flat, torch_flat_tuned
from benchmarks.meters import METERS

CHUNKS = (8, 16, 32, 64, 128)
LIMIT = """
What limits the gain over the tuned peer: both do the same fp32 multiply-adds. On the AVX-512 EPYC
of the committed run bare fused multiply-adds reach 231 GFLOP/s on 2 threads and torch.mm 185, so
the tuned peer's matrix product alone takes longer than hisa.flat_index in all, which is at 91% of
the former; twice the tuned peer's speed would be 1.2 times the former. The 12 x 2 tile of AVX-512
registers and the 6 x 2 tile of AVX2 registers get there alike (0.64 s each), and so do bf16 inputs,
whose sums are fp32 as well."""
HISA, TORCH, TUNED = "hisa.flat_index", "torch in chunks", "torch in chunks, tuned"
CHUNK_OF = {TORCH: "chunk", TUNED: "tuned_chunk"}  # a shape's entries that hold the chunk sizes


def build(
    peer: str,
    *,
    rows: int,
    keys: int,
    heads: int,
    dim: int,
    dtype: str,
    topk: int,
    chunk: int,
    tuned_chunk: int,
) -> Callable[[], Tensor]:
    """Return one peer's call."""
    inputs = causal(rows, keys, heads, dim, dtype)
    if peer == TORCH:
        return lambda: torch_flat(inputs, topk, chunk)
    if peer == TUNED:
        return lambda: torch_flat_tuned(inputs, topk, tuned_chunk)
    q, k, weights, ks, ke = inputs
    return lambda: hisa.flat_index(q, k, weights, ks=ks, ke=ke, topk=topk)


def check(results: Mapping[str, object]) -> None:
    """Raise if the peers select different tokens, but for those whose scores nearly tie."""
    for peer in CHUNK_OF:
        share = overlap(cast(Tensor, results[peer]), cast(Tensor, results[HISA]))
        if share < 0.999:
            raise RuntimeError(f"{HISA} has only {share:.2%} of the tokens of {peer}")


def best_chunk(bench: Bench, peer: str, shape: dict[str, int | str]) -> int:
    """Return the chunk size with which a torch peer is fastest on this shape's last rows."""
    tuned = {**shape, "rows": min(128, int(shape["rows"])), "chunk": 0, "tuned_chunk": 0}
    calls: dict[int, Callable[[], Tensor]] = {
        chunk: build(peer, **{**tuned, CHUNK_OF[peer]: chunk})  # type: ignore[arg-type]
        for chunk in CHUNKS
    }
    times: dict[int, list[float]] = {chunk: [] for chunk in CHUNKS}
    for _ in range(3):
        for chunk, call in calls.items():
            times[chunk].append(METERS[bench.device].seconds(call))
    return min(CHUNKS, key=lambda chunk: min(times[chunk]))


def run(bench: Bench) -> None:
    """Measure prefills of two lengths, the shorter one in two dtypes."""
    cases = [(1024, "float32")] if bench.quick else [(4096, "float32"), (4096, "bfloat16")]
    for keys, dtype in cases if bench.quick else [*cases, (8192, "float32")]:
        shape: dict[str, int | str] = {
            "rows": keys,
            "keys": keys,
            "heads": 64,
            "dim": 128,
            "dtype": dtype,
            "topk": 512,
        }
        for peer, name in CHUNK_OF.items():
            shape[name] = best_chunk(bench, peer, shape)
        peers = (HISA, *CHUNK_OF)
        bench.agree(build, peers, {**shape, "rows": 256}, check)
        work = hisa.plan(keys, keys, 64, 128, op="flat_index", topk=512, causal=True).operations
        found = bench.measure(
            build,
            peers,
            shape,
            operations=dict.fromkeys(peers, sum(work.values())),
            memory=peers,
            warm_up=False,
            seconds=6.0,
        )
        for peer in CHUNK_OF:
            ratio = found[peer].median / found[HISA].median
            bench.goal(f"{peer}: time / hisa's, {keys} tokens, {dtype}", ratio, at_least=2)
    bench.say(LIMIT)
