"""Decode steps of DeepSeek-V3.2's indexer module on a GPU: as it is, patched, and both compiled.

The model's own dimensions (hidden 7168, q_lora 1536, 64 heads, 2048 tokens selected), blocks of 128
of which 64 are kept; bf16, one layer, batch 1. A call is 16 steps, one after the other, so that the
host's time counts wherever the device waits for it. Masks and angles, which a model makes once for
all layers, are made once for all steps; what hisa finds out from a mask, once for all layers too,
counts in full. Compiled is as `generate` compiles a model with a static cache: one graph, mode
"reduce-overhead", which replays a CUDA graph in each step. In one graph are all steps of a call,
compiled, as a model's layers are: the host's time is spent once. Beside the time of a step stands
what of it kernels take, by torch's profiler: the rest of the other steps is the host's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import hisa
from benchmarks import report
from benchmarks.cases.cuda_decode import captured
from benchmarks.cases.cuda_module import HIDDEN, Q_LORA
from benchmarks.cases.decode_module import HISA, HISA_FP8, OWN, REST, Decoder
from benchmarks.harness import Bench
from benchmarks.inputs import overlap

DEVICE = "cuda"
COMPILED, CAPTURED = ", compiled", ", in one graph"
COMPILING: dict[str, dict[str, Any]] = {
    COMPILED: {"fullgraph": True, "mode": "reduce-overhead"},
    CAPTURED: {"fullgraph": True},
}
HEADS, TOPK, BLOCK_TOPK = 64, 2048, 64
STEPS, ROOM = 16, 2048  # of a call, and for all calls
MOST_RUNS = 40
LIMIT = """
What limits a step of a single layer is the host, patched or not: its kernels are done long before
the next are launched. Patched, kernels take a fifth to a fourth of what they take unpatched in
bf16; in fp8, where a compiled step quantises all keys again, a third. Eager, what is left are some
twenty small operators beyond the projections and the cache, with the Python around them: windows
from the mask, RoPE, what is kept, the call itself. Compiled, a step is one replayed graph, and
dynamo's guards and the copies of its inputs take 0.15 to 0.35 ms, as fast as the host is: most of
what the unpatched module's kernels take, or more. In a model the graph of a step has all layers,
and that is spent once, as in the rows "in one graph": there a step is what its kernels take. Tried,
eager: 36 small operators, 50 in fp8, before windows, weights and what is kept took fewer; RoPE and
scales by torch's operators; the host waiting for the mask before it projects; fewer checks, which
gained nothing."""

Calls = dict[str, Callable[[], object]]


class CudaDecoder(Decoder):
    """Counts tokens on the device, so that a step may be compiled."""

    def __init__(self, keys: int, cache: str) -> None:
        super().__init__(
            keys, HIDDEN, Q_LORA, torch.bfloat16, cache, heads=HEADS, topk=TOPK, steps=ROOM
        )
        self.positions = keys + torch.arange(STEPS)[None]
        self.tokens = torch.arange(keys + ROOM)
        self.select: Callable[..., Tensor] = self.run

    def run(self, mask: Tensor, cos: Tensor, sin: Tensor, position: Tensor) -> Tensor:
        """Append a token and select for it."""
        turn = cos, sin
        found: Tensor = self.indexer(self.states, self.resid, turn, mask, position, self.past)
        return found

    def steps(self) -> Tensor:
        """Append STEPS tokens, one after the other, and select for each; return the last's."""
        masks = self.tokens <= self.positions[..., None]
        cos, sin = self.rotary(self.states, self.positions)
        for step in range(STEPS):
            self.length += 1
            one = slice(step, step + 1)
            found = self.select(
                masks[:, one, : self.room or self.length],
                cos[:, one],
                sin[:, one],
                self.positions[:, one],
            )
        self.positions += STEPS
        return found


def build(peer: str, *, keys: int, cache: str) -> Callable[[], object]:
    """Return one peer's call: STEPS steps, the result of the last one."""
    with torch.device(DEVICE):
        decoder = CudaDecoder(keys, cache)
    if not peer.startswith((OWN, REST)):
        precision = "fp8" if peer.startswith(HISA_FP8) else "model"
        hisa.patch(decoder.indexer, block_topk=BLOCK_TOPK, precision=precision)
    if peer == REST:
        return lambda: [decoder.rest() for _ in range(STEPS)]
    if not peer.endswith(CAPTURED):
        decoder.steps()  # in generation there are some before
    for how, options in COMPILING.items():
        if peer.endswith(how):
            decoder.select = torch.compile(decoder.run, **options)

    @torch.no_grad()
    def call() -> Tensor:
        return decoder.steps().clone()  # what a replayed graph returns, its next replay overwrites

    return captured(call) if peer.endswith(CAPTURED) else call


def build_and_keep(calls: Calls, peer: str, **shape: Any) -> Callable[[], object]:
    """Return one peer's call, which is in `calls` too."""
    calls[peer] = build(peer, **shape)
    return calls[peer]


def kernel_seconds(call: Callable[[], object]) -> float:
    """Return the time of all kernels of a call."""
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as profiler:
        call()
        torch.cuda.synchronize()
    return sum(float(event.self_device_time_total) for event in profiler.key_averages()) * 1e-6


def check(results: Mapping[str, object]) -> None:
    """Raise if peers differ by more than near-ties, at a length that the budget covers.

    Compiled, even the same module rounds in other places: it has had 99.80% of its own tokens.
    """
    wanted = cast(Tensor, results[OWN])[0]
    for peer, found in results.items():
        share = overlap(wanted, cast(Tensor, found)[0])
        if share < (0.999 if peer in (OWN, HISA) else 0.995):
            raise RuntimeError(f"{peer} has only {share:.2%} of the tokens of {OWN}")


def run(bench: Bench) -> None:
    """Measure both caches at 128K tokens, and the static one compiled."""
    bench.note_kernels((HEADS, torch.bfloat16), (HEADS, torch.float8_e4m3fn))
    keys, covered = 4096 if bench.quick else 131072, (BLOCK_TOPK - 1) * 128
    for cache, hows in (("dynamic", ("",)), ("static", ("", *COMPILING))):
        same = [f"{peer}{how}" for how in hows for peer in (OWN, HISA)]
        bench.agree(build, same, {"keys": covered, "cache": cache}, check)
        torch._dynamo.reset()  # else every step looks through the graphs of these modules first
        peers = [f"{peer}{how}" for how in hows for peer in (HISA, HISA_FP8, OWN)]
        shape: dict[str, int | str] = {"keys": keys, "cache": cache}
        calls: Calls = {}
        found = bench.measure(
            partial(build_and_keep, calls), (*peers, REST), shape,
            min_runs=10, max_runs=MOST_RUNS, seconds=1.0,
        )  # fmt: skip
        lines = [["", "a step", "kernels of it"]]
        for peer, call in calls.items():
            step = found[peer].median / STEPS
            lines.append([peer, *map(report.time_text, (step, kernel_seconds(call) / STEPS))])
        bench.say("\n" + report.table(lines))
        calls.clear()
        for how in hows:
            bench.goal(
                f"Hugging Face's time / patched time, {cache} cache{how}",
                found[OWN + how].median / found[HISA + how].median,
                at_least=4 if how else 2,
            )
    bench.say(LIMIT)
