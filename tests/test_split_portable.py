"""Few rows on the portable kernels: several blocks of threads for each, against one for each.

The suite runs on either as `cuda-portable` and `cuda-portable-many`, and on the CPU they are
compared by `test_simt.py`. Here are sizes that only a GPU is fast enough for, and what decides
which of them takes a call.
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
from tests.families import CUDA_PORTABLE, CUDA_PORTABLE_MANY
from tests.numeric import DTYPES, FP8, short_name
from tests.test_split import SPOILED, check_beside_a_busy_stream, make_call

pytestmark = pytest.mark.gpu
# Heads and channels of every instance, and some that fill none.
SHAPES = [(16, 64), (32, 64), (64, 64), (100, 64), (16, 128), (32, 128), (64, 128), (128, 128),
          (1, 16), (20, 48), (5, 256)]  # fmt: skip
BUDGETS = [(128, 64, 2048), (8, 1000, 3000), (64, 100, 100), (32, 2, 64), (16, 3, 48)]


def normal(seed: int, *shape: int) -> Tensor:
    """Return normally distributed numbers on the GPU."""
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(*shape, device="cuda", generator=generator)


def call_of(dtype: torch.dtype, rows: int, tokens: int, heads: int, depth: int) -> dict[str, Any]:
    """Return queries, keys and weights; fp8 with scales."""
    scale = normal(4, tokens).abs() if dtype == FP8 else None
    return {"q": normal(1, rows, heads, depth).to(dtype), "k": normal(2, tokens, depth).to(dtype),
            "weights": normal(3, rows, heads), "k_scale": scale}  # fmt: skip


def int32(values: list[int]) -> Tensor:
    """Return windows on the GPU."""
    return torch.tensor(values, device="cuda", dtype=torch.int32)


def both(run: Callable[..., Any], *inputs: Any, **options: Any) -> None:
    """Compare the results of one call on either, byte for byte."""
    results = []
    for family in (CUDA_PORTABLE, CUDA_PORTABLE_MANY):
        with family.active():
            found = run(*inputs, **options)
            results.append(found if isinstance(found, tuple) else (found,))
    for mine, want in zip(*results, strict=True):
        assert same_bytes(mine, want)


def check(call: dict[str, Any], **options: Any) -> None:
    """Compare `index` and `flat_index`, with scores and without."""
    flat = {name: options[name] for name in ("ks", "ke", "topk") if name in options}
    for scores in (True, False):
        both(hisa.index, **call, **options, return_scores=scores)
        both(hisa.flat_index, **call, **flat, return_scores=scores)


def kernels_of(run: Callable[[], Any]) -> set[str]:
    """Say which of the kernels that score rows a call runs."""
    run()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    names = [event.key for event in profiler.key_averages()]
    known = ("scores_kernel", "select_kernel", "rows_kernel")
    return {kernel for kernel in known if any(kernel in name for name in names)}


SPLIT, WHOLE = {"scores_kernel", "select_kernel"}, {"rows_kernel"}


@pytest.mark.parametrize("dtype", DTYPES, ids=short_name)
@pytest.mark.parametrize(("heads", "depth"), SHAPES)
def test_every_kernel(dtype: torch.dtype, heads: int, depth: int) -> None:
    """Windows that begin and end inside of blocks, keep all of them, or have no token."""
    call = call_of(dtype, 6, 9000, heads, depth)
    ks, ke = int32([0, 77, 5000, 8990, 3, -7]), int32([9000, 8997, 8999, 9000, 3, 9999])
    for size, block_topk, topk in BUDGETS:
        check(call, ks=ks, ke=ke, block_size=size, block_topk=block_topk, topk=topk)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, FP8], ids=short_name)
@pytest.mark.parametrize("rows", [1, 2, 3, 7, 20, 33, 65, 66, 67, 108, 132, 133, 512])
def test_every_number_of_parts(dtype: torch.dtype, rows: int) -> None:
    """From two blocks of threads for each multiprocessor to one a row, and segments."""
    call = call_of(dtype, rows, 9000, 16, 64)
    ends = int32([9000 - 61 * i % 8000 for i in range(rows)])
    starts = int32([0 if 9000 - 61 * i % 8000 <= 4001 else 4001 for i in range(rows)])
    cu_seqlens_k = int32([0, 4001, 9000])
    for size, block_topk, topk in BUDGETS:
        options = {"block_size": size, "block_topk": block_topk, "topk": topk, "ke": ends}
        check(call, ks=starts, cu_seqlens_k=cu_seqlens_k, **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, FP8], ids=short_name)
@pytest.mark.parametrize("spoil", SPOILED, ids=lambda spoil: spoil.__name__)
def test_any_scores(spoil: Callable[[dict[str, Any]], None], dtype: torch.dtype) -> None:
    """Ties, outliers, infinities, NaN."""
    call = make_call(dtype, 3, 30000)
    spoil(call)
    for size, block_topk, topk in BUDGETS:
        check(call, ks=int32([0, 77, 5000]), block_size=size, block_topk=block_topk, topk=topk)


@pytest.mark.parametrize("rows", [1, 7])
def test_a_million_tokens(rows: int) -> None:
    """More blocks than in the other tests, and a budget of nothing but the ends."""
    call = call_of(torch.bfloat16, rows, 2**20 + 5, 16, 64)
    check(call, block_size=8, block_topk=3000, topk=9000)
    check(call, block_topk=2, topk=256)


@pytest.mark.parametrize("topk", [9000, 20000])
def test_all_tokens_are_selected(topk: int) -> None:
    """And as many slots again are not used."""
    check(call_of(FP8, 3, 9000, 32, 128), block_topk=2**40, topk=topk)


@pytest.mark.parametrize("dtype", [torch.float16, FP8], ids=short_name)
@pytest.mark.parametrize("next_n", [1, 2, 8])
@pytest.mark.parametrize("batch", [1, 5, 66, 512])
def test_pages(batch: int, next_n: int, dtype: torch.dtype) -> None:
    """Calls on keys in pages, of all sizes of batches: two such calls around a gather."""
    pages, width, page, depth = 700, 300, 64, 64
    keys = normal(1, pages, page * depth).to(dtype)
    if dtype == FP8:
        scales = normal(2, pages, page).abs().view(torch.uint8)
        keys = torch.cat([keys.view(torch.uint8), scales], 1)
    else:
        keys = keys.view(pages, page, depth)
    random = torch.Generator("cuda").manual_seed(batch)
    table = torch.randint(pages, (batch, width), device="cuda", generator=random).int()
    lengths = torch.randint(-3, width * page + 9, (batch,), device="cuda", generator=random).int()
    where: dict[str, Any] = {"block_table": table, "seq_lens": lengths, "block_size": 64}
    pooled = torch.zeros(pages, depth, device="cuda").to(dtype), torch.ones(pages, device="cuda")
    hisa.paged_pool(keys, *pooled, new_tokens=None, **where)
    q, weights = normal(3, batch * next_n, 9, depth).to(dtype), normal(4, batch * next_n, 9)
    options: dict[str, Any] = {"pooled": pooled, "next_n": next_n, "topk": 128, **where}
    for block_topk in (2, 20, 300):
        both(hisa.paged_index, q, keys, weights, **options, block_topk=block_topk,
             return_scores=True)  # fmt: skip
    with CUDA_PORTABLE.active():
        ran = kernels_of(lambda: hisa.paged_index(q, keys, weights, **options, block_topk=20))
        whole = kernels_of(lambda: hisa.paged_index(q, keys, weights, **options, block_topk=300))
    few = batch * next_n <= torch.cuda.get_device_properties("cuda").multi_processor_count
    assert ran == (SPLIT if few else WHOLE)
    assert whole == WHOLE


def test_which_calls_it_takes() -> None:
    """Up to a row for each multiprocessor, more than 128 candidates, 32 MiB; and what it prunes."""
    most = torch.cuda.get_device_properties("cuda").multi_processor_count

    def ran(rows: int, tokens: int, **options: Any) -> set[str]:
        call = call_of(torch.float16, rows, tokens, 3, 16)
        flat = "block_size" not in options
        run = hisa.flat_index if flat else hisa.index
        return kernels_of(lambda: run(**call, topk=16, **options))

    blocks = {"block_size": 8, "block_topk": 9}
    with CUDA_PORTABLE.active():
        assert ran(most, 1100, **blocks) == SPLIT
        assert ran(most + 1, 1100, **blocks) == WHOLE
        assert ran(1, 8 * 129, **blocks) == SPLIT
        assert ran(1, 8 * 128, **blocks) == WHOLE
        assert ran(1, 8 * 1000, block_size=8, block_topk=2) == WHOLE
        assert ran(8, 2**20, block_size=128, block_topk=8128) == SPLIT
        assert ran(8, 2**20, block_size=128, block_topk=8129) == WHOLE
        assert ran(1, 9000) == WHOLE  # flat
        assert ran(1, 9000, block_size=8, block_topk=1125) == WHOLE  # keeps all
    with CUDA_PORTABLE_MANY.active():
        assert ran(1, 1100, **blocks) == WHOLE


def test_beside_a_kernel_that_holds_the_device() -> None:
    """One launch waits for the other, on the stream of the call."""
    call = call_of(torch.bfloat16, 4, 9000, 64, 128)
    with CUDA_PORTABLE.active():
        check_beside_a_busy_stream(call)
