"""Causal prefill on a GPU: hisa.index and hisa.flat_index against torch, TileLang and DeepGEMM.

fp8 queries and keys, D = 128, and DeepSeek-V3.2's setting: blocks of 128, 64 of them kept, 2048
tokens selected. Queries are the last of the keys. Inputs are independent random numbers, the worst
case for caches: neighbouring rows share few blocks. The chunked peer gets bf16, which it needs
for its matrix product, dequantised outside of the measured time. TileLang is the authors' own HISA
(benchmarks/tilelang_peer.py), which pools the keys in the measured time, as hisa.index does;
DeepGEMM (benchmarks/deepgemm_peer.py) the flat indexer, its scores alone and with torch.topk.

The goals for times are those of the portable kernels, which GPUs other than Hopper run, and so are
the committed figures: measured on Hopper, in a build with HISA_HOPPER=0. Those of the kernels for
Hopper are cuda_hopper's. In a build with them this case measures them, and leaves these goals out.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, cast

import torch
from torch import Tensor

import hisa
from benchmarks import deepgemm_peer, tilelang_peer
from benchmarks.harness import Bench, Measurement
from benchmarks.inputs import overlap
from benchmarks.machine import installed_version

DEVICE = "cuda"
INDEX, FLAT, TORCH = "hisa.index", "hisa.flat_index", "torch in chunks"
TILELANG = "TileLang"
DEEPGEMM, LOGITS = "DeepGEMM + torch.topk", "DeepGEMM logits"
TOPK, DIM = 2048, 128
TILELANG_SHARE = 0.95  # of our tokens, at least; an emulation on the CPU has 0.97 in its worst row
DEEPGEMM_SHARE = 0.98  # of hisa.flat_index's tokens; tensor cores add with fewer than 24 bits
CHUNK_BYTES = 1 << 30  # of dot products that the chunked peer makes at a time


NOT_PORTABLE = """
These are the kernels for Hopper. Goals for times are the portable kernels' (HISA_HOPPER=0), and
therefore left out."""
LIMIT = """
What limits hisa.index at 64K x 64K, H=64: the tensor cores' issue, and power. By ncu, on an H100,
the tensor pipe is busy in 62% of the cycles, 6 for each of 3.9 million products a scheduler, in
which little else is issued; issue slots are in 38%, L2 is at 59%, and the clock is down to 1.83 of
1.98 GHz, so that what saves cycles hardly saves time any more. At H=32, L2 is at 81%. In loops made
for the question, instructions between products added 0.7 to 1.2 cycles each, a load of 16 bytes a
lane from shared memory 3.2. Designs, of bare kernels, in milliseconds at H=64, H=32 and for
hisa.flat_index at H=64. Heads as the A operand, queries in registers: 24.5, 16.7, 103. Keys as the
A operand, three blocks of threads per multiprocessor, queries in shared memory: 22.9, 15.8, 105; in
pairs of units 24.7, 16.0, 112; a quarter of them in registers 21.3, 16.6, 98. Two blocks, half of
the queries in registers: 22.6, 16.9, 95; all of them 21.6, 16.9, 92; another loop around fewer
registers 22.5, 20.5, 87; different keys behind the end 21.1, 16.1, 87; two tiles ahead 21.2, 17.1,
88. With a shorter selection and loop 20.8, 16.0, 86, and with three blocks at H=32, as it is now:
20.8, 15.0, 85. From there: a quarter of the queries in registers and three blocks 20.9 and 98, none
21.3 and 99; two blocks, half of them 21.8 and 95, three quarters 21.0 and 92; queries converted by
one warp for all 20.9; read before the first tile is waited for 20.9; a histogram of its own, and
selection without branches 20.9."""


def make_inputs(rows: int, keys: int, heads: int) -> dict[str, Any]:
    """Return fp8 queries and keys with their scales, weights and causal windows."""
    random = torch.Generator("cuda").manual_seed(rows + keys + heads)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device="cuda", generator=random, dtype=torch.bfloat16)

    q, q_scale = hisa.quantize_fp8(normal(rows, heads, DIM))
    k, k_scale = hisa.quantize_fp8(normal(keys, DIM))
    ke = torch.arange(keys - rows + 1, keys + 1, device="cuda", dtype=torch.int32)
    return {"q": q, "k": k, "weights": normal(rows, heads) * q_scale, "k_scale": k_scale, "ke": ke}


def build(
    peer: str,
    *,
    rows: int,
    keys: int,
    heads: int,
    tilelang: Path | None = None,
    deepgemm: Path | None = None,
) -> Callable[[], Tensor | None]:
    """Return one peer's call."""
    return call(peer, make_inputs(rows, keys, heads), tilelang=tilelang, deepgemm=deepgemm)


def call(
    peer: str,
    inputs: dict[str, Any],
    *,
    tilelang: Path | None = None,
    deepgemm: Path | None = None,
) -> Callable[[], Tensor | None]:
    """Return one peer's call on the inputs."""
    if peer == INDEX:
        return lambda: cast(Tensor, hisa.index(**inputs, topk=TOPK))
    if peer == FLAT:
        return lambda: cast(Tensor, hisa.flat_index(**inputs, topk=TOPK))
    if peer == TILELANG:
        return tilelang_peer.build(tilelang, **inputs, topk=TOPK)
    if peer == DEEPGEMM:
        return deepgemm_peer.build(deepgemm, **inputs, topk=TOPK)
    if peer == LOGITS:
        return deepgemm_peer.build_logits(deepgemm, **inputs)
    q = inputs["q"].bfloat16()
    k = inputs["k"]
    if "k_scale" in inputs:
        k = (k.float() * inputs["k_scale"][:, None]).bfloat16()
    return lambda: flat_in_chunks(q, k, inputs["weights"], inputs["ke"])


def flat_in_chunks(q: Tensor, k: Tensor, weights: Tensor, ke: Tensor) -> Tensor:
    """Flat indexer in plain torch: a matrix product, ReLU, weighted sum and topk for a few rows."""
    rows, heads, _ = q.shape
    keys = len(k)
    step = max(1, CHUNK_BYTES // (2 * heads * keys))
    indices = torch.full((rows, TOPK), -1, device=q.device, dtype=torch.int32)
    tokens = torch.arange(keys, device=q.device, dtype=torch.int32)
    half = weights.bfloat16()
    for start in range(0, rows, step):
        at = slice(start, min(start + step, rows))
        end = keys - rows + at.stop  # no row of the chunk sees more
        dots = (q[at].flatten(0, 1) @ k[:end].T).relu_().view(-1, heads, end)
        scores = (half[at, None] @ dots).squeeze(1)
        scores.masked_fill_(tokens[:end] >= ke[at, None], -torch.inf)
        best = scores.topk(min(TOPK, end), sorted=False)
        indices[at, : best.indices.shape[1]] = best.indices.masked_fill_(
            best.values == -torch.inf, -1
        ).int()
    return indices


def check(results: Mapping[str, object]) -> None:
    """Raise if the peers differ by more than bf16 explains, at a length that the budget covers."""
    wanted = cast(Tensor, results[FLAT])
    if not torch.equal(wanted, cast(Tensor, results[INDEX])):
        raise RuntimeError("hisa.index differs from hisa.flat_index where it must not")
    share = overlap(wanted[::64].cpu(), cast(Tensor, results[TORCH])[::64].cpu())
    if share < 0.98:
        raise RuntimeError(f"{TORCH} has only {share:.2%} of the tokens of {FLAT}")


def check_tilelang(bench: Bench, heads: int, results: Mapping[str, object]) -> None:
    """Note what share of the tokens of hisa.index TileLang selects; raise if it is too small."""
    name = f"{TILELANG} {installed_version('tilelang')}"
    check_share(bench, INDEX, TILELANG, name, TILELANG_SHARE, heads, results)


def check_deepgemm(bench: Bench, heads: int, results: Mapping[str, object]) -> None:
    """Note what share of the tokens of hisa.flat_index DeepGEMM has; raise if it is too small."""
    check_share(bench, FLAT, DEEPGEMM, DEEPGEMM, DEEPGEMM_SHARE, heads, results)


def check_share(
    bench: Bench,
    own: str,
    other: str,
    name: str,
    at_least: float,
    heads: int,
    results: Mapping[str, object],
) -> None:
    """Note what share of our tokens another peer selects; raise if it is too small."""
    ours, theirs = (cast(Tensor, results[peer]) for peer in (own, other))
    if ours.shape != theirs.shape:
        raise RuntimeError(f"{other} returns {[*theirs.shape]}, {own} {[*ours.shape]}")
    share = overlap(ours[::251].cpu(), theirs[::251].cpu())
    if share < at_least:
        raise RuntimeError(f"{other} has only {share:.2%} of the tokens of {own}")
    bench.say(f"\n{name} selects {share:.1%} of the tokens of {own} (H={heads}, every 251st row)")


def run(bench: Bench) -> None:
    """Measure prefills, the last rows of long contexts, and the crossover."""
    bench.note_kernels((64, torch.float8_e4m3fn), (32, torch.float8_e4m3fn))
    if not bench.portable:
        bench.say(NOT_PORTABLE)
    bench.agree(build, (INDEX, FLAT, TORCH), {"rows": 4096, "keys": 4096, "heads": 64}, check)
    if bench.quick:
        prefill(bench, 1024, 16384, 64)
        return
    for length, heads in [(16384, 64), (16384, 32), (65536, 64), (65536, 32)]:
        goals(bench, prefill(bench, length, length, heads), length, heads)
    found = measure(bench, (INDEX, FLAT), 8192, 1 << 20, 64)
    beyond = cast(int, found[INDEX].peak_bytes) - 8192 * TOPK * 4
    bench.goal("MiB beyond the output, 8192 x 1M, H=64", beyond / 2**20, at_most=512)
    worst = 0.0
    for keys in [2**i for i in range(11, 21)]:
        found = measure(bench, (INDEX, FLAT), min(keys, 4096), keys, 64, memory=False)
        worst = max(worst, found[INDEX].median / found[FLAT].median)
    bench.goal("hisa.index / hisa.flat_index, the worst of 2K to 1M keys", worst, at_most=1.05,
               digits=2)  # fmt: skip
    times = ", ".join(f"{host_time(peer) * 1e6:.0f} us for {peer}" for peer in (INDEX, FLAT))
    bench.say(f"\nUntil a call returns, its kernels launched: {times}.")
    if bench.portable:
        bench.say(LIMIT)


def prefill(bench: Bench, rows: int, keys: int, heads: int) -> dict[str, Measurement]:
    """Measure every peer that can run, those from elsewhere after a look at what they select."""
    peers: tuple[str, ...] = (INDEX, FLAT, TORCH)
    shape = {"rows": rows, "keys": keys, "heads": heads}
    build_all = partial(build, tilelang=bench.tilelang, deepgemm=bench.deepgemm)
    for peer, reason, own, check_both in (
        (TILELANG, tilelang_peer.obstacle(bench.tilelang), INDEX, check_tilelang),
        (DEEPGEMM, deepgemm_peer.obstacle(bench.deepgemm), FLAT, check_deepgemm),
    ):
        if reason:
            bench.skip(peer, shape, reason)
            continue
        peers = (*peers, peer)
        if keys == 16384:
            bench.agree(build_all, (own, peer), shape, partial(check_both, bench, heads))
    if DEEPGEMM in peers:
        peers = (*peers, LOGITS)
    return measure(bench, peers, rows, keys, heads)


def measure(
    bench: Bench, peers: tuple[str, ...], rows: int, keys: int, heads: int, memory: bool = True
) -> dict[str, Measurement]:
    """Measure one shape."""
    shape = {"M": rows, "N": keys, "H": heads, "D": DIM, "topk": TOPK, "causal": True}
    options: dict[str, Any] = {"dtype": torch.float8_e4m3fn, "device": "cuda"}
    operations: dict[str, int] = {}
    for op, same in (("index", (INDEX, TILELANG)), ("flat_index", (FLAT, TORCH, DEEPGEMM, LOGITS))):
        stages = hisa.plan(**shape, op=op, **options).operations  # type: ignore[arg-type]
        operations |= dict.fromkeys(same, sum(n for s, n in stages.items() if s != "pool"))
    return bench.measure(
        partial(build, tilelang=bench.tilelang, deepgemm=bench.deepgemm),
        peers,
        {"rows": rows, "keys": keys, "heads": heads},
        operations=operations,
        memory=peers if memory else (),
        min_runs=3,
        max_runs=20,
        seconds=0.5,
    )


def host_time(peer: str) -> float:
    """Return the median time that a call takes on the host, where the device is idle."""
    call = build(peer, rows=64, keys=2048, heads=64)
    times = []
    for _ in range(200):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return median(times)


def goals(bench: Bench, found: Mapping[str, Measurement], keys: int, heads: int) -> None:
    """Note the goals of one prefill."""
    at = f"{keys // 1024}K x {keys // 1024}K, H={heads}"
    asked = {
        (65536, 64): {INDEX: 21.0, FLAT: 95.0},
        (65536, 32): {INDEX: 16.0},
        (16384, 64): {FLAT: 6.0},
    }
    for peer, limit in asked.get((keys, heads), {}).items() if bench.portable else ():
        bench.goal(f"ms of {peer}, {at}", found[peer].median * 1e3, at_most=limit, digits=2)
    if (keys, heads) == (65536, 64):
        beyond = cast(int, found[FLAT].peak_bytes) - keys * TOPK * 4
        bench.goal(f"MiB of {FLAT} beyond the output, {at}", beyond / 2**20, at_most=256)
