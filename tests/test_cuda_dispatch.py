"""Every CUDA kernel and every way to lay out its memory: each is reached, and right.

The rows of a call can be scored at once in shared memory, in chunks with a buffer in shared memory,
or with both in a workspace; which it is follows from the sizes. Catches a branch that no other test
takes, and a plan that names another kernel than the one that runs.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import hisa
from tests import oracle
from tests.builders import HOPPER_DEPTHS, HOPPER_HEADS, exact_case, int32
from tests.case import Case
from tests.checker import assert_same
from tests.families import CUDA_MANY, Family, hopper
from tests.numeric import DTYPES, short_name

pytestmark = pytest.mark.gpu

# heads, head dimension, and the portable kernel: all of them, whatever the ones for Hopper take
KERNELS = [
    (1, 64, "16x64"), (16, 64, "16x64"), (17, 64, "32x64"), (32, 64, "32x64"), (33, 64, "64x64"),
    (64, 64, "64x64"), (65, 64, "64x64"), (128, 64, "64x64"), (8, 128, "16x128"),
    (16, 128, "16x128"), (17, 128, "32x128"), (32, 128, "32x128"), (33, 128, "64x128"),
    (64, 128, "64x128"), (100, 128, "32x128"), (128, 128, "32x128"), (4, 16, "32x64"),
    (70, 48, "32x64"), (4, 80, "16x256"), (33, 256, "16x256"),
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=short_name)
@pytest.mark.parametrize(("heads", "depth", "kernel"), KERNELS)
def test_every_kernel(
    cuda_family: Family, dtype: torch.dtype, heads: int, depth: int, kernel: str
) -> None:
    """The planned kernel gives the oracle's bytes, with windows that cut tiles and blocks."""
    plan = hisa.plan(8, 900, heads, depth, dtype=dtype, device="cuda", block_size=8, block_topk=9,
                     topk=21)  # fmt: skip
    name = "cuda/fma" if dtype == torch.float32 else f"cuda/mma-{kernel}"
    if cuda_family.hopper and is_hopper(dtype, heads, depth):
        name = f"cuda/wgmma-{heads}x{depth}"
    assert set(plan.kernels.values()) == {name} and plan.kernels.keys() >= {"pool", "coarse"}
    for seed in range(2):
        case = exact_case(seed, dtype=dtype, M=8, N=900, H=heads, D=depth, B=8, topk=21,
                          block_topk=9)  # fmt: skip
        assert_same(cuda_family.index(case), oracle.index(case))
        assert_same(cuda_family.flat_index(case), oracle.flat_index(case))


def is_hopper(dtype: torch.dtype, heads: int, depth: int) -> bool:
    """Say whether the kernels of csrc/cuda/sm90 take such calls here."""
    return (
        hopper()
        and dtype in (torch.float8_e4m3fn, torch.bfloat16)
        and heads in HOPPER_HEADS
        and depth in HOPPER_DEPTHS
    )


@pytest.fixture
def many_rows() -> Iterator[Family]:
    """The kernels for many rows, which lay out scores in these ways."""
    with CUDA_MANY.active():
        yield CUDA_MANY


def workspace(case: Case, **changes: Any) -> int:
    """Bytes that a call takes beside its pooled keys."""
    m, n, h, d = case.shape
    sizes = {"block_size": case.block_size, "block_topk": case.block_topk, "topk": case.topk}
    plan = hisa.plan(m, n, h, d, dtype=case.q.dtype, device="cuda", pooled=True,
                     **{**sizes, **changes})  # fmt: skip
    return plan.workspace_bytes


@pytest.mark.parametrize("dtype", DTYPES, ids=short_name)
@pytest.mark.parametrize("topk", [1, 2048, 9000, 30000, 70000])
def test_flat_in_every_layout(many_rows: Family, dtype: torch.dtype, topk: int) -> None:
    """From a few to more tokens than there are: at once, in chunks, in the workspace."""
    windows: dict[str, Any] = {
        "ks": int32([0, 5, 70, 9]),
        "ke": int32([60000, 59999, 40001, 9]),
    }
    case = exact_case(3, dtype=dtype, M=4, N=60000, H=2, D=16, topk=topk, **windows)
    assert (workspace(case, op="flat_index") > 0) == (topk >= 30000)
    assert_same(many_rows.flat_index(case), oracle.flat_index(case))


@pytest.mark.parametrize(("block_topk", "topk"), [(100, 40), (3000, 900), (6000, 40000)])
def test_hierarchical_in_every_layout(many_rows: Family, block_topk: int, topk: int) -> None:
    """Budgets of 800, 24,000 and 48,000 tokens."""
    case = exact_case(4, dtype=torch.bfloat16, M=3, N=60000, H=2, D=16, B=8, topk=topk,
                      block_topk=block_topk, ke=int32([60000, 59999, 50001]))  # fmt: skip
    assert (workspace(case) > 0) == (topk == 40000)
    assert_same(many_rows.index(case), oracle.index(case))


@pytest.mark.parametrize("dtype", DTYPES, ids=short_name)
def test_more_blocks_than_tokens(many_rows: Family, dtype: torch.dtype) -> None:
    """The blocks of a row, of which more are kept than tokens, do not fit in memory at once."""
    case = exact_case(6, dtype=dtype, M=2, N=400_000, H=1, D=16, B=8, block_topk=3000, topk=5,
                      ke=int32([400_000, 399_995]), cu_seqlens_k=None)  # fmt: skip
    assert_same(many_rows.index(case), oracle.index(case))


def test_more_rows_than_blocks_of_the_workspace(many_rows: Family) -> None:
    """A layout in the workspace has few blocks, and each handles many rows, long and short."""
    ke = [60000 - 37 * i if i % 3 else 50 * i for i in range(600)]
    case = exact_case(5, dtype=torch.float16, M=600, N=60000, H=1, D=16, topk=40000, ke=int32(ke))
    assert 0 < workspace(case, op="flat_index") < 600 * 40000 * 8
    got = many_rows.flat_index(case)
    some = [0, 1, 2, 299, 300, 597, 598, 599]
    few = case.rows(some)
    want = oracle.flat_index(few)
    assert_same(type(got)(got.indices[some], got.scores[some]), want)


@pytest.mark.skipif("HISA_TESTED" not in os.environ, reason="for make test-cuda-fp8")
def test_right_build() -> None:
    """It proves nothing if the ordinary extension was imported."""
    extension = Path(str(importlib.import_module("hisa._C").__file__))
    assert Path(os.environ["HISA_TESTED"]) in extension.parents
    assert not hisa.build_info()["hopper"]
