"""One decode step of DeepSeek-V3.2's indexer module, with its cache: as it is, and patched.

The module appends a key to a cache of transformers and selects for one query. `nothing kept` is the
patch when it finds a cache for the first time: it pools all keys, and quantises them for fp8.
`projections and cache` is what every peer does besides: three products, and appending the key, for
which a dynamic cache copies all keys. 16 heads, batch 1. What the patch finds out once for all
layers, from the mask, counts in full, since there is one layer.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor

import hisa
from benchmarks.cases.indexer_module import SIZES
from benchmarks.harness import Bench
from benchmarks.inputs import overlap

OWN, REST = "Hugging Face", "projections and cache"
HISA, HISA_FP8 = "patched", "patched, fp8"
AGAIN = ", nothing kept"
HEADS, DIM, TOPK, BLOCK_TOPK = 16, 128, 512, 16
LIMIT = """
What limits the gain in one step of one layer at 32K tokens is what every peer does: with full
projections the reading of their weights, and in a dynamic cache the copy of all keys. In float32
and a dynamic cache that alone takes a quarter of the unpatched module's time or more, so that a
fourth of it is out of reach. What the patch adds is 0.6 to 0.9 ms in bfloat16 where the copy is no
matter: 0.1 of selecting by two threads, by torch's profiler 0.3 to 0.4 by which the three products
take longer with other work between them, and some twenty small operations with the Python around
them, 0.26 ms, in fp8 0.33. A copy of all keys in a dynamic cache takes 2 ms or 7, as the allocator
has memory for it at hand or gets fresh pages. Tried: quantising all keys in a step, most of it in
fp8; pooling them all; a row selected by one thread; fewer checks in Python, no gain. On another
machine the unpatched module took 8.5 ms where it took 6.7 in this run, and ratios were up to 4.3
and 5.9."""
STEPS = 256  # for which a static cache has room


class Decoder:
    """An indexer whose cache is full of random keys, and its inputs for one token."""

    def __init__(
        self,
        keys: int,
        hidden: int,
        q_lora: int,
        dtype: torch.dtype,
        cache: str,
        *,
        heads: int = HEADS,
        topk: int = TOPK,
        steps: int = STEPS,
    ) -> None:
        from transformers import DynamicCache, StaticCache
        from transformers.models.deepseek_v32 import DeepseekV32Config
        from transformers.models.deepseek_v32 import modeling_deepseek_v32 as deepseek

        torch.manual_seed(0)
        config = DeepseekV32Config(
            hidden_size=hidden,
            q_lora_rank=q_lora,
            index_n_heads=heads,
            index_head_dim=DIM,
            index_topk=topk,
            num_hidden_layers=1,
            mlp_layer_types=["dense"],
        )
        self.indexer: Any = deepseek.DeepseekV32Indexer(config, 0).to(dtype).eval()
        self.rotary = deepseek.DeepseekV32RotaryEmbedding(config)
        self.states = torch.randn(1, 1, hidden, dtype=dtype)
        self.resid = torch.randn(1, 1, q_lora, dtype=dtype)
        self.room = keys + steps if cache == "static" else 0
        self.past: Any = (
            StaticCache(config=config, max_cache_len=self.room)
            if self.room
            else DynamicCache(config=config)
        )
        self.length = keys
        self.past.update_indexer(torch.randn(1, keys, DIM, dtype=dtype), 0)

    def step(self) -> Tensor:
        """Append a token and select for it."""
        position = torch.full((1, 1), self.length)
        self.length += 1
        mask = torch.arange(self.room or self.length)[None, None] < self.length
        turn = self.rotary(self.states, position)
        found: Tensor = self.indexer(self.states, self.resid, turn, mask, position, self.past)
        return found

    @torch.no_grad()
    def rest(self) -> tuple[Tensor, ...]:
        """Append a token and project what selecting needs."""
        indexer = self.indexer
        key = indexer.wk(self.states)
        return (
            indexer.wq_b(self.resid),
            indexer.weights_proj(self.states),
            self.past.update_indexer(key, 0),
        )


def build(
    peer: str, *, keys: int, hidden: int, q_lora: int, dtype: str, cache: str
) -> Callable[[], object]:
    """Return one peer's call: a step with one token more than the one before."""
    decoder = Decoder(keys, hidden, q_lora, getattr(torch, dtype), cache)
    if peer == REST:
        return decoder.rest
    if peer != OWN:
        precision = "fp8" if peer.startswith(HISA_FP8) else "model"
        hisa.patch(decoder.indexer, block_topk=BLOCK_TOPK, precision=precision)
    decoder.step()  # in generation there is one before
    if not peer.endswith(AGAIN):
        return decoder.step
    forward = decoder.indexer.forward

    def forget_and_step() -> Tensor:
        forward.clear()
        return decoder.step()

    return forget_and_step


def check_own(results: Mapping[str, object]) -> None:
    """Raise if the peers differ by more than near-ties, at a length that the budget covers."""
    own, ours = (cast(Tensor, results[peer])[0] for peer in (OWN, HISA))
    share = overlap(own, ours)
    if share < 0.999:
        raise RuntimeError(f"the patched module has only {share:.2%} of the tokens of {OWN}")


def check_kept(results: Mapping[str, object]) -> None:
    """Raise if what is kept changes what is selected."""
    for peer in (HISA, HISA_FP8):
        if not torch.equal(*(cast(Tensor, results[name]) for name in (peer, peer + AGAIN))):
            raise RuntimeError(f"{peer} selects other tokens than with nothing kept")


def run(bench: Bench) -> None:
    """Measure steps with two sizes of projections, in both dtypes, with both caches."""
    every = itertools.product(SIZES, ("float32", "bfloat16"), ("dynamic", "static"))
    for size, dtype, cache in [("small", "float32", "dynamic")] if bench.quick else every:
        hidden, q_lora = SIZES[size]
        keys = 4096 if bench.quick else 32768
        shape: dict[str, int | str] = {
            "keys": keys,
            "hidden": hidden,
            "q_lora": q_lora,
            "dtype": dtype,
            "cache": cache,
        }
        measure(bench, size, shape)
    bench.say(LIMIT)


def measure(bench: Bench, size: str, shape: dict[str, int | str]) -> None:
    """Measure one shape."""
    patched = [f"{peer}{how}" for peer in (HISA, HISA_FP8) for how in ("", AGAIN)]
    covered = {**shape, "keys": (BLOCK_TOPK - 1) * 128}
    bench.agree(build, (HISA, OWN), covered, check_own)
    bench.agree(build, patched, shape, check_kept)
    peers = (*patched, OWN, REST)
    found = bench.measure(build, peers, shape, min_runs=15, max_runs=51, seconds=2.0)
    label = f"{shape['dtype']}, {shape['cache']} cache, {size} projections"
    ratio = found[OWN].median / found[HISA].median
    bench.goal(f"Hugging Face's time / patched time, {label}", ratio, at_least=4, digits=2)
