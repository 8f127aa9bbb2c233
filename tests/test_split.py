"""Few rows on Hopper: the kernel that takes each by a cluster, against those for many rows.

The rest of the suite has few rows, so it runs on this kernel, and again on the others as the family
`cuda-many`. Here are the calls that only this kernel has a reason to fear: scores that crowd in one
bin of its histogram or lie far from all others, ties that the last warp decides, clusters of every
size, parts of a row without a tile, and rows just few enough, or too many.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import hisa
from tests.case import same_bytes
from tests.families import CUDA, CUDA_MANY, hopper
from tests.numeric import FP8, short_name

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not hopper(), reason="needs compute capability 9.0, and kernels for it"),
]
DTYPES = [FP8, torch.bfloat16]
BUDGETS = [(128, 64, 2048), (8, 1000, 3000), (64, 100, 100), (32, 2, 64)]


def make_call(dtype: torch.dtype, rows: int, tokens: int, heads: int = 64) -> dict[str, Any]:
    """Normal keys, queries and weights; fp8 with scales."""
    random = torch.Generator("cuda").manual_seed(rows + tokens)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device="cuda", generator=random)

    scale = torch.rand(tokens, device="cuda", generator=random) if dtype == FP8 else None
    return {"q": normal(rows, heads, 128).to(dtype), "k": normal(tokens, 128).to(dtype),
            "weights": normal(rows, heads), "k_scale": scale}  # fmt: skip


def check(call: dict[str, Any], **options: Any) -> None:
    """Compare with the kernels for many rows, scores bit for bit."""
    results = []
    for family in (CUDA, CUDA_MANY):
        with family.active():
            results.append(hisa.index(**call, **options, return_scores=True))
    for mine, want in zip(*results, strict=True):
        assert same_bytes(mine, want)


def all_alike(call: dict[str, Any]) -> None:
    call["k"][:] = call["k"][:1].clone()
    call["k_scale"] = None


def few_values(call: dict[str, Any]) -> None:
    call["k"] = call["k"][torch.arange(len(call["k"]), device="cuda") * 7 % 5]
    call["k_scale"] = None


def far_from_all(call: dict[str, Any]) -> None:
    scale = torch.ones(len(call["k"]), device="cuda")
    scale[-200] = 1e30
    call["k_scale"] = scale


def in_steps(call: dict[str, Any]) -> None:
    """Magnitudes from 2^-100 to 2^100: evenly spaced bins hold all but a few in one."""
    call["k_scale"] = torch.exp2(torch.arange(len(call["k"]), device="cuda") * 37 % 200 - 100.0)


def not_numbers(call: dict[str, Any]) -> None:
    scale = torch.ones(len(call["k"]), device="cuda")
    scale[::7] = float("nan")
    call["k_scale"] = scale


def almost_all_nan(call: dict[str, Any]) -> None:
    scale = torch.full((len(call["k"]),), float("nan"), device="cuda")
    scale[::97] = 1.0
    call["k_scale"] = scale


def infinite(call: dict[str, Any]) -> None:
    scale = torch.ones(len(call["k"]), device="cuda")
    scale[::3] = float("inf")
    call["k_scale"] = scale


def all_zero(call: dict[str, Any]) -> None:
    call["weights"].zero_()


def huge_weights(call: dict[str, Any]) -> None:
    call["weights"][0] *= 1e35


SPOILED = [all_alike, few_values, far_from_all, in_steps, not_numbers, almost_all_nan, infinite,
           all_zero, huge_weights]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=short_name)
@pytest.mark.parametrize("spoil", SPOILED, ids=lambda spoil: spoil.__name__)
@pytest.mark.parametrize(("size", "block_topk", "topk"), BUDGETS)
def test_any_scores(
    spoil: Callable[[dict[str, Any]], None], size: int, block_topk: int, topk: int,
    dtype: torch.dtype,
) -> None:  # fmt: skip
    """Windows that begin and end inside of blocks, over scores of every kind."""
    call = make_call(dtype, 3, 30000)
    spoil(call)
    ks, ke = (torch.tensor(x, device="cuda").int() for x in ([0, 77, 5000], [30000, 29997, 29999]))
    check(call, ks=ks, ke=ke, block_size=size, block_topk=block_topk, topk=topk)


@pytest.mark.parametrize("dtype", DTYPES, ids=short_name)
@pytest.mark.parametrize("rows", [1, 5, 8, 11, 14, 18, 24, 33, 50, 70, 132, 264])
def test_every_size_of_cluster(rows: int, dtype: torch.dtype) -> None:
    """From 16 blocks of threads a row to one: parts of 1 to 128 tiles, some of them empty."""
    multiprocessors = torch.cuda.get_device_properties("cuda").multi_processor_count
    call = make_call(dtype, min(rows, 2 * multiprocessors), 9000, 16)
    for size, block_topk, topk in BUDGETS:
        for ke in (9000, 8777, 500, 64, 1):
            ends = torch.full((len(call["q"]),), ke, device="cuda").int()
            check(
                call, ke=ends, block_size=size, block_topk=min(block_topk, 512), topk=min(topk, 99)
            )


@pytest.mark.parametrize("slots", [1023, 1024, 1025, 8192, 16383, 16384])
@pytest.mark.parametrize("block_topk", [2, 3, 17, 2048])
def test_number_of_blocks(slots: int, block_topk: int) -> None:
    """Up to the most blocks, and blocks kept, that there is room for on chip."""
    check(make_call(FP8, 2, slots * 8 - 3, 32), block_size=8, block_topk=block_topk, topk=16)


@pytest.mark.parametrize("block_topk", [2**31, 2**32 + 2, 2**32 + 3, 2**63 - 1])
def test_budget_of_any_size(block_topk: int) -> None:
    """It is clamped to the blocks there are, not cut to 32 bits."""
    call = make_call(FP8, 2, 1000)
    check(call, block_size=64, block_topk=block_topk, topk=64)
    want = hisa.flat_index(**call, topk=64)
    assert same_bytes(hisa.index(**call, block_size=64, block_topk=block_topk, topk=64), want)


def ran_split(call: dict[str, Any], **options: Any) -> bool:
    """Say whether this kernel took a call."""
    hisa.index(**call, **options)
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        hisa.index(**call, **options)
        torch.cuda.synchronize()
    return any("split_kernel" in event.key for event in profiler.key_averages())


def test_which_calls_it_takes() -> None:
    """Up to two rows for each multiprocessor, and scores that fit on chip; nothing else."""
    most = 2 * torch.cuda.get_device_properties("cuda").multi_processor_count
    options: dict[str, Any] = {"block_size": 8, "block_topk": 9, "topk": 16}
    assert ran_split(make_call(FP8, most, 500), **options)
    assert not ran_split(make_call(FP8, most + 1, 500), **options)
    assert ran_split(make_call(FP8, 1, 8 * 16384), **options)
    assert not ran_split(make_call(FP8, 1, 8 * 16384 + 1), **options)
    assert ran_split(make_call(FP8, 1, 30000), **options | {"block_topk": 2048})
    assert not ran_split(make_call(FP8, 1, 30000), **options | {"block_topk": 2049})
    with CUDA_MANY.active():
        assert not ran_split(make_call(FP8, 1, 500), **options)


def test_beside_a_kernel_that_holds_the_device() -> None:
    """Clusters wait for room; they do not hang (T14)."""
    check_beside_a_busy_stream(make_call(FP8, 4, 9000))


def check_beside_a_busy_stream(call: dict[str, Any]) -> None:
    """Make a call while another stream's products hold the device."""
    want = hisa.index(**call)
    busy = torch.cuda.Stream()
    matrix = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    torch.cuda.synchronize()
    for _ in range(20):
        with torch.cuda.stream(busy):
            matrix @ matrix
        assert same_bytes(hisa.index(**call), want)


@pytest.mark.long
@pytest.mark.seconds(300)
def test_soak() -> None:
    """100,000 launches of all sizes of clusters, back to back, give the same bytes each time."""
    calls = [make_call(dtype, rows, 9000, 16) for dtype in DTYPES
             for rows in (1, 2, 7, 11, 20, 30, 60, 100, 132, 260)]  # fmt: skip
    with CUDA_MANY.active():
        wanted = [hisa.index(**call) for call in calls]
    out = [torch.empty_like(want) for want in wanted]
    wrong = torch.zeros((), device="cuda", dtype=torch.int64)

    def run() -> None:
        for call, mine, want in zip(calls, out, wanted, strict=True):
            mine.fill_(-2)
            hisa.index(**call, out=mine)
            wrong.add_((mine != want).sum())

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    for _ in range(100_000 // len(calls)):
        graph.replay()
    assert wrong.item() == 0
