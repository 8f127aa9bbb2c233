"""DeepSeek-V3.2's indexer module on a GPU, bf16: Hugging Face's own forward against it patched.

The model's own dimensions (hidden 7168, q_lora 1536, 64 heads, 2048 tokens selected), blocks of 128
of which 64 are kept; batch 1, causal mask, no cache. The mask is an input of both, and found again
on every call, as in a model's first layer. The patched module scores in bf16, or with
`precision="fp8"`, which the module's own forward does not have.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

import hisa
from benchmarks.cases.indexer_module import HISA, OWN, bytes_needed, make_module
from benchmarks.harness import Bench, Measurement
from benchmarks.report import bytes_text

DEVICE = "cuda"
HISA_FP8 = f"{HISA}, fp8"
PATCHED = (HISA, HISA_FP8)
HIDDEN, Q_LORA = 7168, 1536
OWN_BYTES = 130 * 2**30  # what Hugging Face's module takes for 16384 tokens


LIMIT = """
What limits the patched module at 16K tokens, by torch's profiler, ms: of fp8's kernels hisa.index
takes 1.86, projections 0.66, turning and quantising queries and keys 0.12, the mask [S, S], read
once, 0.07; of bf16's 3.0, 0.68, 0.15 and 0.07. Before the first projection the device waits for the
host, Python that runs once a call: 0.15 to 0.4 on different machines, where fp8 took 3.03 and 3.26.
It waited twice more for what the host wanted to know of the mask, 0.5 and 0.15: now it projects
meanwhile, the longest product first, and pruned rows are counted later. Tried for queries, fp8:
torch's operators 3.5; one kernel, conversions one by one 0.7; its loads apart, two conversions at a
time 0.25; four heads a warp, two products at a time 0.12."""


def build(peer: str, *, keys: int) -> Callable[[], Tensor]:
    """Return one peer's call: a prefill of `keys` tokens."""
    with torch.device("cuda"):
        indexer, arguments = make_module(keys, HIDDEN, Q_LORA, torch.bfloat16, topk=2048)
    if peer == HISA:
        hisa.patch(indexer, block_size=128, block_topk=64)
    if peer == HISA_FP8:
        hisa.patch(indexer, block_size=128, block_topk=64, precision="fp8")

    def call() -> Tensor:
        mask: Any = arguments["attention_mask"]
        mask[0, 0, 0] = True  # a new version of the mask, so that it is looked at again
        return cast(Tensor, indexer(**arguments))

    return call


def measure_patched(bench: Bench, shape: dict[str, int]) -> Measurement:
    """Measure the patched module in both precisions, note the goals; return bf16's measurement."""
    found = bench.measure(build, PATCHED, shape, memory=PATCHED)
    for peer, limit in ((HISA, 4.5), (HISA_FP8, 2.8)):
        bench.goal(f"ms {peer}, 16K tokens", found[peer].median * 1e3, at_most=limit, digits=2)
        gib = (found[peer].peak_bytes or 0) / 2**30
        bench.goal(f"GiB {peer}, 16K tokens", gib, at_most=1, digits=2)
    return found[HISA]


def run(bench: Bench) -> None:
    """Measure the longest prefill that Hugging Face's module can do, and a long one."""
    bench.note_kernels((64, torch.bfloat16), (64, torch.float8_e4m3fn))
    if bench.quick:
        bench.measure(build, (*PATCHED, OWN), {"keys": 2048})
        return
    shape = {"keys": 16384}
    if torch.cuda.get_device_properties(0).total_memory > OWN_BYTES:
        own = bench.measure(build, (OWN,), shape, memory=(OWN,), ratio=False, max_runs=5)[OWN]
        torch.cuda.empty_cache()
        ours = measure_patched(bench, shape)
        bench.goal("Hugging Face's time / patched, 16K tokens", own.median / ours.median,
                   at_least=20)  # fmt: skip
    else:
        bench.skip(OWN, shape, "needs about 130 GiB")
        measure_patched(bench, shape)
    bench.skip(OWN, {"keys": 131072}, f"needs about {bytes_text(bytes_needed(131072))}")
    found = bench.measure(build, PATCHED, {"keys": 131072}, memory=PATCHED, max_runs=3)
    bench.goal("GiB patched, 128K tokens, of which 1 is the output",
               (found[HISA].peak_bytes or 0) / 2**30, at_most=4, digits=2)  # fmt: skip
    bench.say(LIMIT)
