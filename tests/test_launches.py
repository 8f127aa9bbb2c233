"""How many kernels a call launches on a GPU: on Hopper, one for few rows, two or three for many.

Catches a fill, a copy or a cast that torch adds around a kernel, which for few rows takes as long
as the kernel itself, and a path that nobody meant a call to take.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import hisa
from tests.families import hopper
from tests.numeric import FP8, short_name

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not hopper(), reason="needs compute capability 9.0, and kernels for it"),
]
KEYS, BLOCK = 4096, 64
FEW: dict[str, Any] = {"block_topk": 8, "topk": 200}


def launches(run: Callable[[], Any]) -> list[str]:
    """Return what a call, not the first of its kind, has the device do: kernels, copies, fills."""
    run()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    return [event.name for event in profiler.events() if event.device_type.name == "CUDA"]


def normal(*shape: int) -> Tensor:
    """Random numbers."""
    return torch.randn(*shape, device="cuda")


@pytest.fixture(params=[FP8, torch.bfloat16], ids=short_name)
def keys(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Keys, and scales if they are fp8."""
    scale = torch.rand(KEYS, device="cuda") + 0.5 if request.param == FP8 else None
    return {"k": normal(KEYS, 128).to(request.param), "k_scale": scale}


def rows(keys: dict[str, Any], count: int, heads: int = 64) -> dict[str, Any]:
    """Queries of causal rows, and their weights."""
    ke = torch.arange(KEYS - count + 1, KEYS + 1, device="cuda").int()
    q = normal(count, heads, 128).to(keys["k"].dtype)
    return {**keys, "q": q, "weights": normal(count, heads), "ke": ke}


@pytest.mark.parametrize("scores", [False, True])
@pytest.mark.parametrize(
    ("count", "most"), [(1, 1), (8, 1), (200, 1), (300, 3), (2000, 3)], ids=str
)
def test_index(keys: dict[str, Any], count: int, most: int, scores: bool) -> None:
    """Blocks and tokens of few rows by one kernel; of many by one each, and pairs by another."""
    call = rows(keys, count)
    pooled = hisa.pool_keys(**keys, block_size=BLOCK)
    options: dict[str, Any] = {"block_size": BLOCK, "return_scores": scores, **FEW}
    given = launches(lambda: hisa.index(**call, pooled=pooled, **options))
    assert 1 <= len(given) <= most, given
    assert all("hisa" in name for name in given), given
    not_given = launches(lambda: hisa.index(**call, **options))
    assert len(not_given) == len(given) + 1, not_given
    out = torch.empty(count, FEW["topk"], dtype=torch.int32, device="cuda")
    written = launches(lambda: hisa.index(**call, pooled=pooled, block_size=BLOCK, out=out, **FEW))
    assert len(written) == len(given), written


@pytest.mark.parametrize("count", [1, 300])
def test_flat_index_and_pool_keys(keys: dict[str, Any], count: int) -> None:
    """One kernel each."""
    call = rows(keys, count)
    for run in (
        lambda: hisa.flat_index(**call, topk=200),
        lambda: hisa.pool_keys(**keys, block_size=BLOCK),
    ):
        assert len(found := launches(run)) == 1, found


@pytest.mark.parametrize(("sequences", "next_n"), [(1, 1), (8, 1), (8, 4)])
def test_a_decode_step(keys: dict[str, Any], sequences: int, next_n: int) -> None:
    """Pages are pooled by one kernel, and selected from by one."""
    page, width, dtype = 64, 20, keys["k"].dtype
    count = sequences * width
    pages = torch.zeros(count, page * 132, dtype=torch.uint8, device="cuda")
    if dtype != FP8:
        pages = normal(count, page, 128).to(dtype)
    pooled = torch.zeros(count, 128, device="cuda").to(dtype), torch.ones(count, device="cuda")
    where: dict[str, Any] = {
        "block_table": torch.arange(count, device="cuda").int().view(sequences, width),
        "seq_lens": torch.full((sequences,), page * width - 3, device="cuda").int(),
        "block_size": BLOCK,
    }
    q = normal(sequences * next_n, 64, 128).to(dtype)
    weights = normal(sequences * next_n, 64)
    for run in (
        lambda: hisa.paged_pool(pages, *pooled, new_tokens=next_n, **where),
        lambda: hisa.paged_index(q, pages, weights, pooled=pooled, next_n=next_n, **where, **FEW),
    ):
        assert len(found := launches(run)) == 1, found
