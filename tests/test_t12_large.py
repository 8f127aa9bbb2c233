"""T12: sizes where 32-bit products overflow: M * N and offsets beyond 2^31, a million keys.

Few rows are checked, exactly: the first, the last and random ones. Catches int32 offsets, grids and
loops limited to 65,535 or to a power of two.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch

from tests import oracle
from tests.builders import int32, shaped
from tests.case import Case
from tests.checker import Result, assert_same
from tests.families import CUDA, Family
from tests.numeric import DTYPES, FP8, short_name
from tests.oracle import Expected

MILLION = 1_048_579


def integer_case(
    m: int, n: int, seed: int = 0, dtype: torch.dtype = torch.float32, **fields: Any
) -> Case:
    """Return few heads of small integers: exact, and cheap to make."""
    generator = torch.Generator().manual_seed(seed)
    heads, depth, dtype = shaped(H=1, D=16, dtype=dtype).values()
    q = torch.randint(-2, 3, (m, heads, depth), generator=generator).to(dtype)
    k = torch.randint(-2, 3, (n, depth), generator=generator).to(dtype)
    weights = torch.randint(1, 3, (m, heads), generator=generator).float()
    arguments = {"q": q, "k": k, "weights": weights, "block_size": 128, "topk": 512, **fields}
    return Case(**arguments)


def assert_rows(got: Result, case: Case, rows: torch.Tensor, flat: bool = False) -> None:
    """Compare some rows with the oracle."""
    part = Result(got.indices[rows], got.scores[rows])
    few = case.rows(rows)
    assert_same(part, oracle.flat_index(few) if flat else oracle.index(few))


@functools.cache
def million() -> tuple[Case, Expected, Expected]:
    """Return a call over a million keys and its answers, computed once."""
    case = integer_case(3, MILLION, block_topk=64, ke=int32([MILLION, MILLION - 1, MILLION // 2]))
    return case, oracle.index(case), oracle.flat_index(case)


@pytest.mark.seconds(180)
def test_a_million_keys(family: Family) -> None:
    """N = 1,048,579: blocks up to the ragged last one, and flat selection over all of them."""
    case, index, flat = million()
    assert_same(family.index(case), index)
    assert_same(family.flat_index(case), flat)


@pytest.mark.gpu
@pytest.mark.seconds(180)
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=short_name)
def test_a_million_keys_on_tensor_cores(cuda_family: Family, dtype: torch.dtype) -> None:
    """The same in 16 and 8 bits."""
    ke = int32([MILLION, MILLION - 1, MILLION // 2])
    case = integer_case(3, MILLION, dtype=dtype, block_topk=64, ke=ke)
    assert_same(cuda_family.flat_index(case), oracle.flat_index(case))
    if dtype == FP8:  # pooled keys are not exact; zeros are
        case = case.replace(k=torch.zeros(case.k.shape).to(FP8))
    assert_same(cuda_family.index(case), oracle.index(case))


@pytest.mark.seconds(180)
@pytest.mark.parametrize("m", [70_000, 131_073])
def test_many_rows(family: Family, m: int) -> None:
    """More rows than a 16-bit grid dimension holds, and more than twice as many."""
    case = integer_case(m, 90, block_size=8, block_topk=3, topk=7, ke=int32(np.arange(m) % 91))
    rows = torch.cat(
        [torch.tensor([0, 1, 65535, 65536, m - 2, m - 1]), torch.randint(0, m, (300,))]
    )
    on = case.to(family.device)
    got = family.api.index(on.q, on.k, on.weights, **on.index_args(), return_scores=True)
    assert_rows(Result(*(t.cpu() for t in got)), case, rows)
    got = family.api.flat_index(on.q, on.k, on.weights, **on.flat_args(), return_scores=True)
    assert_rows(Result(*(t.cpu() for t in got)), case, rows, flat=True)


@pytest.mark.seconds(180)
def test_rows_times_keys_beyond_32_bits(family: Family) -> None:
    """M * N = 7 * 10^10, with short windows all over the keys."""
    m = 70_000
    start = np.linspace(0, MILLION - 30, m).astype(np.int64)
    case = integer_case(m, MILLION, block_size=8, block_topk=3, topk=5, ks=int32(start),
                        ke=int32(start + 30))  # fmt: skip
    rows = torch.cat([torch.tensor([0, m - 1]), torch.randint(0, m, (100,))])
    on = case.to(family.device)
    got = family.api.index(on.q, on.k, on.weights, **on.index_args(), return_scores=True)
    part = Result(got[0][rows].cpu(), got[1][rows].cpu())
    want = brute_force(case, rows)
    assert part.indices.tolist() == want


def brute_force(case: Case, rows: torch.Tensor) -> list[list[int]]:
    """Select by the oracle on the window's own blocks, shifted to token 0."""
    answers = []
    for row in rows.tolist():
        start, end = int(case.ks[row]), int(case.ke[row])
        first = start // 8 * 8
        part = case.rows([row]).replace(k=case.k[first : end + 8], ks=case.ks[[row]] - first,
                                        ke=case.ke[[row]] - first)  # fmt: skip
        answers.append(oracle.index(part).indices[0].tolist())
    return answers


def far_apart(tensor: torch.Tensor, stride: int, device: str = "cpu") -> torch.Tensor:
    """Copy a tensor, rows `stride` elements apart; on the CPU, untouched pages take no memory."""
    room = torch.empty(tensor.shape[0] * stride, dtype=tensor.dtype, device=device)
    strides = (stride, *tensor[0].stride())
    return room.as_strided(tensor.shape, strides).copy_(tensor)


@pytest.mark.parametrize("name", ["q", "k", "weights", "pooled"])
def test_strides_beyond_32_bits(family: Family, name: str) -> None:
    """Rows that lie 2^27 elements apart: the last offsets exceed 2^32 elements."""
    if family.device != "cpu":
        pytest.skip("takes no memory on the CPU; on CUDA it is a test of its own")
    case = integer_case(40, 40, block_size=8, block_topk=3, topk=7)
    want, flat = oracle.index(case), oracle.flat_index(case)
    if name == "pooled":  # five slots, so further apart
        pooled, scale = family.pool_keys(case)
        case = case.replace(pooled=(far_apart(pooled, 2**30), scale))
    else:
        case = case.replace(**{name: far_apart(getattr(case, name), 2**27)})
    assert_same(family.index(case), want)
    assert_same(family.flat_index(case), flat)
    if name == "k":
        assert torch.equal(family.pool_keys(case)[0], torch.from_numpy(oracle.pool_keys(case)[0]))


@pytest.mark.gpu
@pytest.mark.long
@pytest.mark.parametrize("name", ["q", "k", "pooled"])
def test_strides_beyond_32_bits_on_cuda(name: str) -> None:
    """The same in 11 GB of bf16: the last offsets exceed 2^32 elements."""
    case = integer_case(40, 40, dtype=torch.bfloat16, block_size=8, block_topk=3, topk=7)
    want, flat = oracle.index(case), oracle.flat_index(case)
    if name == "pooled":
        pooled, scale = CUDA.pool_keys(case)
        case = case.replace(pooled=(far_apart(pooled, 2**30, "cuda"), scale))
    else:
        case = case.replace(**{name: far_apart(getattr(case, name), 2**27, "cuda")})
    try:
        assert_same(CUDA.index(case), want)
        assert_same(CUDA.flat_index(case), flat)
    finally:
        del case
        torch.cuda.empty_cache()


@pytest.mark.long
def test_output_beyond_32_bits(family: Family) -> None:
    """M * topk > 2^31 elements: 9 GB of indices, the last rows right, whether scored or not."""
    m = 2**20 + 70
    ke = np.arange(m) % 91
    ke[[1, 2**20 + 1, m - 1]] = 4000, 3999, 3000  # of which 2560 tokens are kept
    case = integer_case(m, 4000, block_size=256, block_topk=10, topk=2048, ke=int32(ke))
    rows = torch.tensor([0, 1, 2**20 - 1, 2**20, 2**20 + 1, m - 1])
    on = case.to(family.device)
    got = family.api.index(on.q, on.k, on.weights, **on.index_args())[rows].cpu()
    assert np.array_equal(got.numpy(), oracle.index(case.rows(rows)).indices)


@pytest.mark.long
def test_keys_beyond_32_bits(family: Family) -> None:
    """N * D > 2^31 bytes of fp8 keys: the last tokens are found."""
    n, depth = 2**23 + 1000, 256
    k = torch.zeros(n, depth, dtype=torch.uint8)
    k[:, 0] = (torch.arange(n) % 100).to(torch.uint8)
    q = torch.zeros(1, 1, depth)
    q[..., 0] = 1
    case = Case(q=q.to(FP8), k=k.view(FP8), weights=torch.ones(1, 1), topk=64, block_size=256,
                ks=int32([n - 5000]), block_topk=4)  # fmt: skip
    tail = case.replace(k=case.k[n - n % 256 - 5120 :], ks=int32([n % 256 + 120]))
    assert torch.equal(family.flat_index(case).indices, family.flat_index(tail).indices)
    assert torch.equal(family.index(case).indices, family.index(tail).indices)
