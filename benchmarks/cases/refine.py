"""FLOP/s of the refine stage against torch.mm of two 4096 x 4096 float32 matrices.

The whole of hisa.index is timed, with pooled keys given, and only the refine stage's multiply-adds
are counted: what coarse and select take is held against it. Every window is [0, keys), so the
count is exact. Random keys are the worst case: neighbouring queries keep different blocks.

The bound that applies is that of fp32 fused multiply-adds. AVX2 has no bf16 or fp8 arithmetic, so
q and k of these dtypes are widened to fp32 and every dtype can at best reach the fp32 rate.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

import hisa
from benchmarks.harness import Bench
from benchmarks.inputs import causal

MM = "torch.mm float32"
HISA = "hisa.index"
TOP1 = "hisa.index, topk 1"  # all but the selection: what it saves is the selection's share
TOPK, BLOCK_TOPK = 512, 16
MM_SIZE = 4096


def build(
    peer: str, *, rows: int, keys: int, heads: int, dim: int, dtype: str
) -> Callable[[], object]:
    """Return one peer's call."""
    if peer == MM:
        a, b = torch.randn(MM_SIZE, MM_SIZE), torch.randn(MM_SIZE, MM_SIZE)
        return partial(torch.mm, a, b)
    q, k, weights, _, _ = causal(rows, keys, heads, dim, "float32")
    scale = None
    if dtype == "float8_e4m3fn":
        k, scale = hisa.quantize_fp8(k)
    q, k = q.to(getattr(torch, dtype)), k.to(getattr(torch, dtype))
    pooled = hisa.pool_keys(k, k_scale=scale)
    topk = 1 if peer == TOP1 else TOPK

    def call() -> Tensor | tuple[Tensor, Tensor]:
        return hisa.index(
            q, k, weights, k_scale=scale, pooled=pooled, block_topk=BLOCK_TOPK, topk=topk
        )

    return call


def run(bench: Bench) -> None:
    """Measure one shape in three dtypes."""
    rows, keys = (512, 8192) if bench.quick else (2048, 8192)
    plan = hisa.plan(rows, keys, 64, 128, block_topk=BLOCK_TOPK, topk=TOPK, pooled=True)
    stages = plan.operations
    bench.say(f"\ncoarse adds {stages['coarse'] / stages['refine']:.1%} to refine's multiply-adds")
    for dtype in ("float32", "bfloat16", "float8_e4m3fn")[: 1 if bench.quick else 3]:
        found = bench.measure(
            build,
            (HISA, TOP1, MM),
            {"rows": rows, "keys": keys, "heads": 64, "dim": 128, "dtype": dtype},
            operations={MM: MM_SIZE**3, HISA: stages["refine"], TOP1: stages["refine"]},
            min_runs=3 if bench.quick else 5,
            ratio=False,
        )
        share = 100 * found[HISA].flops / found[MM].flops
        bench.goal(f"refine, {dtype}, % of torch.mm's FLOP/s", share, at_least=60, digits=0)
        saved = 1 - found[TOP1].median / found[HISA].median
        bench.say(
            f"\nselecting {TOPK} tokens rather than 1 takes {max(0.0, saved):.1%} of the time"
        )
