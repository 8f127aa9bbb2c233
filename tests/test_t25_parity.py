"""T25: every CPU instruction set gives the same bytes, and they are those of the documented order.

Catches a vector kernel that adds up in another order, contracts or splits a multiply-add, flushes
subnormals, treats a remainder loop differently, or a dispatcher that runs something else than it
says.
"""

from __future__ import annotations

import importlib
import itertools
from itertools import pairwise

import numpy as np
import pytest
import torch

from tests import oracle
from tests.builders import causal, exact_case, int32, random_case
from tests.case import Case, same_bytes
from tests.checker import Result, assert_same
from tests.families import CUDA, REFERENCE, Family, available, usable_isas
from tests.numeric import DTYPES, decode, short_name

CPU = [family for family in available() if family.device == "cpu"]


def everything(family: Family, case: Case) -> list[torch.Tensor]:
    """Run every op and return all outputs."""
    with family.active():
        return [*family.index(case), *family.flat_index(case), *family.pool_keys(case)]


@pytest.mark.parametrize("pooling", ["mean", "max"])
@pytest.mark.parametrize("dtype", DTYPES, ids=short_name)
@pytest.mark.parametrize(
    ("heads", "depth"), [(1, 16), (3, 48), (8, 128), (64, 128), (5, 256), (128, 64)]
)
def test_all_instruction_sets_agree(
    dtype: torch.dtype, heads: int, depth: int, pooling: str
) -> None:
    """Random floats, odd numbers of keys: byte-equal outputs on every instruction set."""
    for seed, n in enumerate((1, 33, 255)):
        case = random_case(seed, dtype, M=3, N=n, H=heads, D=depth, block_topk=4, topk=21,
                           pooling=pooling, cu_seqlens_k=int32([0, n // 8, n]))  # fmt: skip
        case = causal(case, n // 8) if n > 3 else case
        outputs = [everything(family, case) for family in CPU]
        for a, b in pairwise(outputs):
            assert all(same_bytes(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=short_name)
def test_subnormals_and_extremes_agree(dtype: torch.dtype) -> None:
    """Magnitudes from subnormal to overflowing: the same bytes, by value where a result is NaN."""
    generator = torch.Generator().manual_seed(0)
    case = random_case(0, dtype, M=8, N=120, H=3, D=16, block_topk=4, topk=32)
    weights = torch.randn(8, 3, generator=generator) * 10.0 ** torch.linspace(-44, 38, 8)[:, None]
    scale = torch.rand(120, generator=generator) * 10.0 ** torch.linspace(-40, 30, 120)
    for extreme in (case.replace(weights=weights), case.replace(weights=weights, k_scale=scale)):
        outputs = [everything(family, extreme) for family in CPU]
        for a, b in pairwise(outputs):
            for x, y in zip(a, b, strict=True):
                assert np.array_equal(decode(x), decode(y), equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=short_name)
@pytest.mark.parametrize(("heads", "depth"), [(1, 16), (4, 32), (3, 80), (9, 64)])
def test_documented_order_of_arithmetic(
    family: Family, dtype: torch.dtype, heads: int, depth: int
) -> None:
    """One fused multiply-add after another over channels, then over heads; the key scale last."""
    if not family.cpu_order:
        pytest.skip("the order is documented for the CPU")
    for seed in range(3):
        case = random_case(seed, dtype, M=3, N=130, H=heads, D=depth, block_topk=5, topk=29,
                           ke=int32([130, 97, 64]), pooling=("mean", "max")[seed % 2])  # fmt: skip
        if seed:
            case = case.replace(k_scale=torch.rand(130, generator=torch.Generator().manual_seed(1)))
        want = oracle.index(case, oracle.ieee_score)
        got = family.index(case)
        assert_same(got, want)
        assert (np.signbit(got.scores.numpy()) == np.signbit(want.scores)).all()
        assert_same(family.flat_index(case), oracle.flat_index(case, oracle.ieee_score))
        pooled, scale, _ = oracle.pool_keys(case)
        got_pooled = family.pool_keys(case)
        assert (decode(got_pooled[0]) == pooled).all() and (got_pooled[1].numpy() == scale).all()


@pytest.mark.gpu
@pytest.mark.parametrize("start", range(0, 500, 25))
def test_cuda_is_cpu_where_sums_are_exact(start: int) -> None:
    """500 inputs on which every order of a sum gives the same: the same bytes on both devices."""
    for seed in range(start, start + 25):
        case = exact_case(seed)
        for ours, theirs in zip(everything(CUDA, case), everything(CPU[-1], case), strict=True):
            assert same_bytes(ours, theirs), f"seed {seed}: {case.describe()}"


@pytest.mark.gpu
@pytest.mark.parametrize(("heads", "depth"), [(1, 16), (3, 48), (64, 128), (70, 256)])
def test_cuda_is_cpu_in_fp32(heads: int, depth: int) -> None:
    """The fp32 kernels add up in the CPU's order: the same bytes on any input."""
    for seed in range(3):
        case = causal(random_case(seed, torch.float32, M=5, N=300, H=heads, D=depth, topk=21), 290)
        for ours, theirs in zip(everything(CUDA, case), everything(CPU[-1], case), strict=True):
            assert same_bytes(ours, theirs)


def test_plan_names_the_kernels_that_run(family: Family) -> None:
    """`hisa.plan` and `build_info` name the family that was forced: each branch is reached."""
    import hisa

    for op, stages in (("index", {"pool", "coarse", "refine"}), ("flat_index", {"flat"})):
        plan = hisa.plan(64, 9000, 4, 64, device=family.device, op=op, block_topk=16)
        assert stages <= set(plan.kernels), plan
        names = {plan.kernels[stage].replace("/", "-") for stage in stages}
        assert len(names) == 1, plan
        known = {"cuda": "cuda-", "auto": "cpu-"}.get(family.isa or family.device, family.name)
        assert names.pop().startswith(known), plan
    if family.isa in usable_isas():
        assert hisa.build_info()["cpu_isa"] == family.isa


def test_a_family_within_another() -> None:
    """Behind the inner one the outer one runs again."""
    import hisa

    named = [family for family in CPU if family.isa in usable_isas()]
    for outer, inner in itertools.product(named, named):
        with outer.active():
            with inner.active():
                assert hisa.build_info()["cpu_isa"] == inner.isa
            assert hisa.build_info()["cpu_isa"] == outer.isa


def test_families_really_differ() -> None:
    """The forced families are different code: the portable one is slower than the best one."""
    import time

    named = [family for family in CPU if family.isa in usable_isas()]
    if len(named) < 2:
        pytest.skip("this machine has one CPU kernel family")
    case = random_case(0, torch.float32, M=16, N=4000, H=8, D=64, topk=8)
    seconds = []
    for family in (named[0], named[-1]):
        with family.active():
            family.flat_index(case)
            runs = []
            for _ in range(3):
                start = time.perf_counter()
                family.flat_index(case)
                runs.append(time.perf_counter() - start)
        seconds.append(min(runs))
    assert seconds[0] > 1.5 * seconds[1], seconds


def test_unknown_instruction_set() -> None:
    """An instruction set that does not exist or that this CPU lacks is refused."""
    import hisa

    usable, extension = usable_isas(), importlib.import_module("hisa._C")
    before = hisa.build_info()["cpu_isa"]
    missing = {"avx2", "avx512"} - set(usable)
    for name in ("sse9", "", "AVX2", *missing):
        with pytest.raises(ValueError, match="cpu_isa: expected"):
            extension.set_cpu_isa(name)
    assert hisa.build_info()["cpu_isa"] == before
    assert "baseline" in usable


def test_reference_agrees_within_its_own_rounding(family: Family) -> None:
    """The readable reference and the kernels give close scores on random floats."""
    case = random_case(9, torch.float32, M=4, N=200, H=4, D=64, block_topk=40, topk=200)
    ours, theirs = family.index(case), REFERENCE.index(case)
    assert torch.equal(ours.indices, theirs.indices)
    torch.testing.assert_close(Result(*ours).scores, theirs.scores, rtol=1e-5, atol=1e-4)
