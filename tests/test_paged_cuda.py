"""Paged calls on a GPU: CUDA graphs (T13), calls in several parts, and which kernels run.

Catches lengths fixed at capture, a part that begins with the wrong sequence, row or table row, and
a path that is never taken.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import hisa
from tests.case import same_bytes
from tests.families import CUDA, CUDA_MANY, Family
from tests.numeric import FP8, short_name

pytestmark = pytest.mark.gpu
BATCH, WIDTH, PAGE, D = 6, 40, 16, 64
OPTIONS: dict[str, Any] = {"block_topk": 4, "topk": 50, "return_scores": True}
# Those that csrc/cuda/sm90 takes on an H100, and others.
KINDS = [(torch.bfloat16, 16), (torch.bfloat16, 5), (FP8, 64), (FP8, 7), (torch.float32, 16)]


class Cache:
    """A paged cache at fixed addresses, refilled for every call."""

    def __init__(self, dtype: torch.dtype, heads: int, next_n: int, width: int = WIDTH) -> None:
        pages = BATCH * WIDTH
        self.fp8 = dtype == FP8
        shape = (pages, PAGE * (D + 4)) if self.fp8 else (pages, PAGE, D)
        self.pages = torch.zeros(shape, device="cuda", dtype=torch.uint8 if self.fp8 else dtype)
        self.q = torch.zeros(BATCH * next_n, heads, D, device="cuda", dtype=dtype)
        self.weights = torch.zeros(BATCH * next_n, heads, device="cuda")
        self.pooled_k = torch.zeros(pages, D, device="cuda", dtype=dtype)
        self.pooled_scale = torch.zeros(pages, device="cuda")
        self.next_n = next_n
        self.where: dict[str, Any] = {
            "block_table": torch.full((BATCH, width), -1, device="cuda", dtype=torch.int32),
            "seq_lens": torch.zeros(BATCH, device="cuda", dtype=torch.int32),
            "block_size": 32,
        }

    def refill(self, seed: int) -> None:
        """New keys, pages in another order, and lengths that shrink, grow, or are 0 or less."""
        random = torch.Generator("cuda").manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, device="cuda", generator=random)

        if self.fp8:
            keys = normal(len(self.pages), PAGE * D).to(FP8).view(torch.uint8)
            scales = normal(len(self.pages), PAGE).abs().view(torch.uint8)
            self.pages.copy_(torch.cat([keys, scales], 1))
        else:
            self.pages.copy_(normal(*self.pages.shape).to(self.pages.dtype))
        self.q.copy_(normal(*self.q.shape).to(self.q.dtype))
        self.weights.copy_(normal(*self.weights.shape))
        order = torch.randperm(len(self.pages), device="cuda", generator=random)
        self.where["block_table"][:, :WIDTH] = order.view(BATCH, WIDTH)
        longest = (WIDTH * PAGE + 5, 0, WIDTH * PAGE // 2, 70)[seed % 4]
        self.where["seq_lens"].random_(-4, longest + 1, generator=random)

    def call(self, **changes: Any) -> list[Tensor]:
        """Pool all complete blocks, and select twice."""
        pooled = (self.pooled_k, self.pooled_scale)
        where = {**self.where, **changes}
        hisa.paged_pool(self.pages, *pooled, new_tokens=None, **where)
        options = {"pooled": pooled, "next_n": self.next_n, **where, **OPTIONS}
        return [
            *hisa.paged_index(self.q, self.pages, self.weights, **options),
            *hisa.paged_index(self.q, self.pages, self.weights, physical=True, **options),
        ]


@pytest.mark.parametrize(
    ("dtype", "heads"), KINDS, ids=lambda x: short_name(x) if isinstance(x, torch.dtype) else x
)
@pytest.mark.parametrize("next_n", [1, 3])
def test_graph_replays(dtype: torch.dtype, heads: int, next_n: int) -> None:
    """1,000 replays on other keys, tables and lengths give the bytes of eager calls.

    Integration bugs: padding of a CUDA graph.
    """
    cache = Cache(dtype, heads, next_n)
    cache.refill(0)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        cache.call()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = cache.call()
    for seed in range(1000):
        cache.refill(seed)
        graph.replay()
        replayed = [tensor.clone() for tensor in captured]
        for mine, eager in zip(replayed, cache.call(), strict=True):
            assert same_bytes(mine, eager), seed


@pytest.mark.parametrize("kernels", [CUDA, CUDA_MANY], ids=lambda kernels: kernels.name)
@pytest.mark.parametrize("next_n", [1, 8])
def test_pooling_waits_for_what_reads_slots(kernels: Family, next_n: int) -> None:
    """Slots that are written right behind a call that reads them do not change what it selects.

    `paged_pool` starts while the kernel before it ends.
    """
    cache = Cache(torch.bfloat16, 16, next_n)
    cache.refill(0)
    cache.call()
    pooled = cache.pooled_k, cache.pooled_scale
    before = [slots.clone() for slots in pooled]
    cache.pages.copy_(cache.pages.roll(1, 0))  # other keys: pooled keys change

    def select() -> list[Tensor]:
        for slots, kept in zip(pooled, before, strict=True):
            slots.copy_(kept)
        options = {"pooled": pooled, "next_n": next_n, **cache.where, **OPTIONS}
        with kernels.active():
            return list(hisa.paged_index(cache.q, cache.pages, cache.weights, **options))

    wanted = select()
    torch.cuda.synchronize()
    for _ in range(300):
        torch.cuda._sleep(500_000)  # cycles, in which the host gets ahead
        selected = select()
        hisa.paged_pool(cache.pages, *pooled, new_tokens=None, **cache.where)
        assert all(map(same_bytes, selected, wanted))
    assert not same_bytes(pooled[0], before[0])


@pytest.mark.parametrize(
    ("dtype", "heads"), KINDS, ids=lambda x: short_name(x) if isinstance(x, torch.dtype) else x
)
def test_calls_in_several_parts(dtype: torch.dtype, heads: int) -> None:
    """A table so wide that a few sequences fill the workspace: they are taken a few at a time.

    Integration bugs: chunked prefill with a buffer that is too small.
    """
    width = 2**22
    narrow, wide = Cache(dtype, heads, 2), Cache(dtype, heads, 2, width)
    assert width // 2 * D * 3 > 2**28  # bytes of pooled keys of three sequences
    for cache in (narrow, wide):
        cache.refill(4)
    for mine, want in zip(wide.call(), narrow.call(), strict=True):
        assert same_bytes(mine, want)


@pytest.mark.parametrize(
    ("dtype", "heads"), KINDS, ids=lambda x: short_name(x) if isinstance(x, torch.dtype) else x
)
def test_which_kernels_run(dtype: torch.dtype, heads: int) -> None:
    """On Hopper a cluster for each row, or pages read where they lie; else blocks are gathered."""
    cache = Cache(dtype, heads, 1)
    cache.refill(0)

    def kernels_of(family: Family) -> set[str]:
        with family.active():
            cache.call()
            with profile(activities=[ProfilerActivity.CUDA]) as profiler:
                cache.call()
                torch.cuda.synchronize()
        names = [event.key for event in profiler.key_averages()]
        known = ("split_kernel", "tokens_kernel", "pooled_kernel", "paged_pool_kernel")
        return {kernel for kernel in known if any(kernel in name for name in names)}

    plan = hisa.plan(1, 1000, heads, D, dtype=dtype, device="cuda")
    if any("wgmma" in kernel for kernel in plan.kernels.values()):
        assert kernels_of(CUDA) == {"paged_pool_kernel", "split_kernel"}
        assert kernels_of(CUDA_MANY) == {"paged_pool_kernel", "pooled_kernel"}
    else:
        assert kernels_of(CUDA) == {"paged_pool_kernel", "pooled_kernel", "tokens_kernel"}
