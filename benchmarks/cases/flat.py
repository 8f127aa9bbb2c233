"""hisa.flat_index against the flat indexer in plain torch, in row chunks of the best size.

Both compute the same thing, causal. The torch peer multiplies `chunk` rows at a time by the keys
that they may see; the best `chunk` for this machine and shape is found before anything is measured.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import cast

from torch import Tensor

import hisa
from benchmarks.harness import Bench
from benchmarks.inputs import causal, overlap, torch_flat
from benchmarks.meters import METERS

CHUNKS = (8, 16, 32, 64, 128)
HISA, TORCH = "hisa.flat_index", "torch in chunks"


def build(
    peer: str, *, rows: int, keys: int, heads: int, dim: int, dtype: str, topk: int, chunk: int
) -> Callable[[], Tensor]:
    """Return one peer's call."""
    inputs = causal(rows, keys, heads, dim, dtype)
    if peer == TORCH:
        return lambda: torch_flat(inputs, topk, chunk)
    q, k, weights, ks, ke = inputs
    return lambda: hisa.flat_index(q, k, weights, ks=ks, ke=ke, topk=topk)


def check(results: Mapping[str, object]) -> None:
    """Raise if the peers select different tokens, but for those whose scores nearly tie."""
    share = overlap(cast(Tensor, results[TORCH]), cast(Tensor, results[HISA]))
    if share < 0.999:
        raise RuntimeError(f"{HISA} has only {share:.2%} of the tokens that torch selects")


def best_chunk(bench: Bench, shape: dict[str, int | str]) -> int:
    """Return the chunk size with which the torch peer is fastest on this shape's last rows."""
    tuned = {**shape, "rows": min(128, int(shape["rows"]))}
    calls: dict[int, Callable[[], Tensor]] = {
        chunk: build(TORCH, **{**tuned, "chunk": chunk})  # type: ignore[arg-type]
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
        shape["chunk"] = best_chunk(bench, shape)
        bench.agree(build, (HISA, TORCH), {**shape, "rows": 256}, check)
        found = bench.measure(
            build, (HISA, TORCH), shape, memory=(HISA, TORCH), warm_up=False, seconds=6.0
        )
        ratio = found[TORCH].median / found[HISA].median
        bench.goal(f"torch's time / hisa's, {keys} tokens, {dtype}", ratio, at_least=2)
