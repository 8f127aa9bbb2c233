"""T21: memory is what `hisa.plan` says, whatever the lengths, and none of it stays behind.

Catches an [M, N] or [M, H, N] tensor anywhere, a workspace that grows with M or N, and leaks.
"""

from __future__ import annotations

import gc
import itertools
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import hisa
from tests.builders import random_case, shaped
from tests.families import CUDA_MANY, CUDA_PORTABLE, CUDA_PORTABLE_MANY, Family
from tests.numeric import DTYPES, short_name

SLACK = 12 * 2**20  # allocator and page rounding, thread stacks
MEASURE = """
import sys, torch, hisa
op, m, n, h, d = sys.argv[1], *map(int, sys.argv[2:])
torch.set_num_threads(2)
dtype = torch.bfloat16
q, k = torch.ones(m, h, d, dtype=dtype), torch.ones(n, d, dtype=dtype)
weights, call = torch.ones(m, h), getattr(hisa, op)
few = dict(topk=256) if op == "flat_index" else dict(topk=256, block_topk=8)
call(q[:64], k[:4096], weights[:64], return_scores=True, **few)
# The peak so far may hide ours: start from what is resident now.
resident = int(open("/proc/self/statm").read().split()[1]) * 4096
open("/proc/self/clear_refs", "w").write("5")
status = lambda: int(next(l for l in open("/proc/self/status") if "VmHWM" in l).split()[1]) * 1024
call(q, k, weights, return_scores=True, **few)
print(status() - resident)
"""
CALLS = [
    ("index", 3000, 30000, 4, 64),  # [M, N] would be 360 MB, [M, H, N] four times that
    ("flat_index", 400, 200000, 2, 32),  # 320 MB
    ("index", 20, 400000, 2, 64),
    ("flat_index", 1, 200000, 64, 64),  # in parts
]


@pytest.mark.parametrize("call", CALLS, ids=str)
def test_peak_is_the_stated_formula(family: Family, call: tuple[str, int, int, int, int]) -> None:
    """Peak memory of a big call <= outputs + the plan's workspace + a small constant."""
    if family.device != "cpu" or not Path("/proc/self/clear_refs").exists():
        pytest.skip("measured through Linux's /proc on the CPU; CUDA has a test of its own")
    if family.isa == "baseline" or family.parts:
        pytest.skip("the process that is measured runs the best kernels, with parts of its own")
    op, m, n, h, d = call
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, op, *map(str, (m, n, h, d))],
        capture_output=True, text=True, cwd=Path(__file__).parent.parent, timeout=50,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    torch.set_num_threads(2)
    plan = hisa.plan(m, n, h, d, op=op, topk=256, block_topk=8, return_scores=True)
    allowed = plan.output_bytes + plan.workspace_bytes + SLACK
    assert plan.output_bytes == m * 256 * 8
    assert allowed < m * n * 4 / 3 or m < 100
    assert int(run.stdout) <= allowed, f"{int(run.stdout) / 2**20:.1f} MiB\n{plan}"


MEASURE_PAGED = """
import torch, hisa
torch.set_num_threads(2)
n, d, count = 2**18, 128, 2**12
pages = torch.ones(count, 64, d)
pooled = torch.ones(count, d), torch.ones(count)
table = dict(block_table=torch.arange(count, dtype=torch.int32)[None].repeat(2, 1))
q, weights = torch.ones(8, 4, d), torch.ones(8, 4)
def call(n):
    lengths = dict(seq_lens=torch.tensor([n, n], dtype=torch.int32))
    hisa.paged_pool(pages, *pooled, new_tokens=None, **table, **lengths)
    few = dict(topk=256, block_topk=8, next_n=4, return_scores=True)
    hisa.paged_index(q, pages, weights, pooled=pooled, **few, **table, **lengths)
call(4096)
resident = int(open("/proc/self/statm").read().split()[1]) * 4096
open("/proc/self/clear_refs", "w").write("5")
status = lambda: int(next(l for l in open("/proc/self/status") if "VmHWM" in l).split()[1]) * 1024
call(n)
print(status() - resident)
"""


def test_a_paged_call_gathers_nothing() -> None:
    """Two sequences of 128 MiB of keys: what `hisa.plan` says, and no keys in one piece."""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("measured through Linux's /proc")
    run = subprocess.run(
        [sys.executable, "-c", MEASURE_PAGED],
        capture_output=True, text=True, cwd=Path(__file__).parent.parent, timeout=50,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    torch.set_num_threads(2)
    plan = hisa.plan(8, 2**18, 4, 128, dtype=torch.float32, topk=256, block_topk=8, pooled=True)
    assert int(run.stdout) <= plan.workspace_bytes + SLACK < 2**25


def test_workspace_does_not_grow_with_rows_or_keys() -> None:
    """The stated workspace depends on neither M nor N, apart from the pooled keys of `index`."""

    def workspace(**changes: Any) -> int:
        sizes: dict[str, Any] = {"M": 4096, "N": 8192, "H": 64, "D": 128}
        return hisa.plan(**(sizes | changes)).workspace_bytes

    assert workspace(M=10**6) == workspace()
    assert workspace(op="flat_index", N=2**31 - 1, M=10**6) == workspace(op="flat_index")
    assert workspace(N=2**30, pooled=True) == workspace(pooled=True)
    pooled_keys = (10**7 - 8192) // 128 * (128 * 2 + 4)
    assert workspace(N=10**7) - workspace() <= pooled_keys + 2**16
    assert workspace() < 64 * 2**20


def test_operations_at_the_limits() -> None:
    """The count of operations is exact where it leaves 64 bits, and no stage goes missing."""
    plan = hisa.plan(10**6, 2**31 - 1, 64, 128, op="flat_index")
    assert plan.operations == {"flat": 10**6 * (2**31 - 1) * 64 * 128}
    assert plan.kernels.keys() == plan.operations.keys()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("block_topk", [2, 3, 7])
def test_operations_are_counted_row_by_row(causal: bool, block_topk: int) -> None:
    """The sums in closed form are those of the rows, at every edge of blocks and windows."""
    size, topk, dim = 8, 4, 16
    for rows, keys in itertools.product((0, 1, 5, 40), (0, 1, 7, 8, 9, 23, 24, 25, 61)):
        windows = [min(max(keys - rows + m + 1, 0), keys) for m in range(rows)]
        pools = -(-keys // size) > block_topk  # else no window can meet too many blocks
        want: dict[str, int] = {"pool": keys if pools else 0, "coarse": 0, "refine": 0}
        for window in windows if causal else [keys] * rows:
            blocks = -(-window // size)
            want["coarse"] += max(blocks - 2, 0) if 2 < block_topk < blocks else 0
            want["refine"] += min(window, block_topk * size)
        plan = hisa.plan(
            rows, keys, 1, dim, block_size=size, block_topk=block_topk, topk=topk, causal=causal
        )
        assert plan.operations == {stage: n * dim for stage, n in want.items() if n}, (rows, keys)


def resident() -> int:
    """Resident memory of this process in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="Linux only")
def test_no_growth_over_many_calls(family: Family) -> None:
    """Thousands of calls of many lengths, failed ones among them, leave no memory behind."""
    case = random_case(0, M=3, N=300, **shaped(H=1, D=16, dtype=torch.float32))
    case = case.to(family.device)

    def burst(calls: int) -> None:
        for i in range(calls):
            n = 1 + i % 100
            hisa.index(case.q, case.k[:n], case.weights, block_size=8, block_topk=3, topk=16)
            hisa.flat_index(case.q, case.k[:n], case.weights, topk=16)
            with pytest.raises(ValueError, match="topk"):
                hisa.index(case.q, case.k, case.weights, topk=0)

    def held() -> int:
        return torch.cuda.memory_allocated() if family.device == "cuda" else 0

    burst(500)
    before, on_device = resident(), held()
    burst(2000)
    assert resident() - before < 4 * 2**20
    assert held() == on_device


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs RLIMIT_AS")
def test_out_of_memory_is_an_exception() -> None:
    """A call that cannot get its output raises, and the next call is right."""
    script = """
import resource, torch, hisa
q, k, w = torch.ones(40000, 1, 16), torch.ones(64, 16), torch.ones(40000, 1)
want = hisa.index(q[:4], k, w[:4], topk=8)
used = int(open("/proc/self/statm").read().split()[0]) * 4096
resource.setrlimit(resource.RLIMIT_AS, (used + 2**28, used + 2**28))
try:
    hisa.index(q, k, w, topk=8192)
    raise SystemExit("no error")
except RuntimeError as error:
    assert "allocate" in str(error), error
assert torch.equal(hisa.index(q[:4], k, w[:4], topk=8), want)
print("right")
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True,
                         cwd=Path(__file__).parent.parent)  # fmt: skip
    assert run.stdout == "right\n", run.stderr


CUDA_CALLS = [
    # op, M, N, H, D, topk, block_topk, pooled
    ("index", 3000, 30000, 4, 64, 256, 8, False),
    ("index", 3000, 30000, 4, 64, 256, 8, True),
    ("index", 2000, 400000, 32, 128, 2048, 64, False),
    ("flat_index", 4000, 200000, 32, 128, 2048, 0, False),  # [M, N] would be 3.2 GB
    ("flat_index", 3000, 100000, 2, 64, 40000, 0, False),  # in a workspace
]
ROUNDING = 512  # bytes: to a multiple of this torch rounds what it hands out


def cuda_call(call: tuple[str, int, int, int, int, int, int, bool], dtype: torch.dtype) -> Any:
    """Return a function that makes a call of ones, and its plan.

    Rows of q lie on top of each other, but where the plan's kernels would have them copied.
    """
    op, m, n, h, d, topk, block_topk, given = call
    k = torch.ones(n, d, device="cuda").to(dtype)
    sizes: dict[str, Any] = {"topk": topk, "return_scores": True}
    options: dict[str, Any] = {}
    if op == "index":
        sizes["block_topk"] = block_topk
        options["pooled"] = hisa.pool_keys(k) if given else None
    weights = torch.ones(m, h, device="cuda")
    plan = hisa.plan(m, n, h, d, dtype=dtype, device="cuda", op=op, pooled=given, **sizes)
    q = torch.ones(1, h, d, device="cuda").to(dtype).expand(m, h, d)
    if "wgmma" in "".join(plan.kernels.values()):
        q = q.contiguous()
    return lambda: getattr(hisa, op)(q, k, weights, **options, **sizes), plan


@pytest.fixture(autouse=True)
def no_garbage() -> None:
    """Free what earlier tests left in cycles now, and not while memory is measured."""
    gc.collect()


def requested(when: str = "current") -> int:
    """Bytes of CUDA memory that torch was asked for: what it takes may be a MiB more a tensor."""
    return int(torch.cuda.memory_stats()[f"requested_bytes.all.{when}"])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=short_name)
@pytest.mark.parametrize("call", CUDA_CALLS, ids=str)
def test_peak_on_cuda_is_the_stated_formula(
    call: tuple[str, int, int, int, int, int, int, bool], dtype: torch.dtype
) -> None:
    """To the byte, but for torch's rounding of five tensors: pooled keys, scales, scratch, two."""
    run, plan = cuda_call(call, dtype)
    run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = requested()
    got = run()
    assert got[0].shape == got[1].shape
    planned = plan.output_bytes + plan.workspace_bytes
    beyond = requested("peak") - before - planned
    assert 0 <= beyond <= 5 * ROUNDING, f"{beyond} bytes more than planned: {plan}"
    del got
    assert requested() == before


@pytest.mark.gpu
def test_workspace_on_cuda_does_not_grow() -> None:
    """500 calls of rising lengths: the peak of each is the first one's, beside the pooled keys.

    `index` on the kernels for many rows; what those for few collect is stated, see below.
    """
    q, weights = torch.ones(8, 4, 64, device="cuda"), torch.ones(8, 4, device="cuda")
    keys = torch.ones(500 * 240, 64, device="cuda")
    before, peaks = torch.cuda.memory_allocated(), set()
    for i in range(1, 501):
        torch.cuda.reset_peak_memory_stats()
        hisa.flat_index(q, keys[: i * 240], weights, topk=64)
        peaks.add(torch.cuda.max_memory_allocated() - before)
        assert torch.cuda.memory_allocated() == before
    assert len(peaks) == 1, peaks
    for i in range(1, 501):
        torch.cuda.reset_peak_memory_stats()
        with CUDA_MANY.active():
            hisa.index(q, keys[: i * 240], weights, block_topk=8, topk=64)
        peak = torch.cuda.max_memory_allocated() - before
        pooled = -(-i * 240 // 128) * (64 + 1) * 4
        assert peak <= max(peaks) + pooled + 2 * ROUNDING, i


@pytest.mark.gpu
def test_what_few_rows_collect_is_the_plans() -> None:
    """Rising lengths, pruned from 1025 keys on: each call takes what its plan says, and no more."""
    weights = torch.ones(8, 4, device="cuda")
    for dtype in (torch.float32, torch.bfloat16):
        q, keys = torch.ones(8, 4, 64, device="cuda").to(dtype), torch.ones(60000, 64).to(dtype)
        keys = keys.cuda()
        for n in [*range(1, 2000, 97), *range(2000, 60001, 2900)]:
            sizes: dict[str, Any] = {"block_topk": 8, "topk": 64}
            for family in (CUDA_PORTABLE, CUDA_PORTABLE_MANY):
                with family.active():
                    plan = hisa.plan(8, n, 4, 64, dtype=dtype, device="cuda", **sizes)
                    before = requested()
                    torch.cuda.reset_peak_memory_stats()
                    hisa.index(q, keys[:n], weights, **sizes)
                    beyond = requested("peak") - before
                planned = plan.output_bytes + plan.workspace_bytes
                assert 0 <= beyond - planned <= 5 * ROUNDING, (n, family.name)


@pytest.mark.gpu
def test_scores_of_few_rows_are_bounded() -> None:
    """Candidates' are collected where that takes up to 32 MiB; those of all keys never are."""
    with CUDA_PORTABLE.active():
        for m, n in itertools.product((1, 8, 10**6), (100, 10**4, 10**6, 2**23, 2**31 - 1)):
            flat = hisa.plan(m, n, 32, 128, device="cuda", topk=64, op="flat_index")
            assert flat.workspace_bytes == 0
            plan = hisa.plan(m, n, 32, 128, device="cuda", topk=64, block_size=64, block_topk=20,
                             pooled=True)  # fmt: skip
            blocks = -(-n // 64)
            collected = m * 4 * (max(-(-blocks // 4) * 4, 20 * 64) + 20 + 64)
            few = m <= 8 and blocks > 20 and collected <= 2**25
            assert plan.workspace_bytes == (collected if few else 0), (m, n)


@pytest.mark.gpu
@pytest.mark.long
@pytest.mark.seconds(600)
def test_no_growth_over_many_calls_on_cuda() -> None:
    """100,000 calls of each op leave the device's memory as it was, freed and reserved."""
    case = random_case(0, torch.bfloat16, M=3, N=300, H=4, D=64).to("cuda")

    def burst(calls: int) -> tuple[int, int]:
        for i in range(calls):
            k = case.k[: 1 + i % 300]
            hisa.index(case.q, k, case.weights, block_size=8, block_topk=3, topk=16)
            hisa.flat_index(case.q, k, case.weights, topk=16)
            hisa.pool_keys(k, block_size=8)
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated(), torch.cuda.memory_reserved()

    before = burst(1000)
    assert burst(100_000) == before


@pytest.mark.long
@pytest.mark.seconds(600)
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="Linux only")
def test_no_growth_over_100_000_steps(device: str) -> None:
    """A server's step: keys appended, pooled in pages and in a `PooledKeys`, rows selected.

    Sequences grow over pages and blocks and are cut back, as drafts are. Nothing stays behind: no
    byte on a GPU, and on a CPU less than ten for each step, as nothing else is as exact there.

    Integration bugs: memory.
    """
    sizes: dict[str, Any] = {"dtype": torch.bfloat16, "device": device}
    pages = torch.ones(24, 16, 64, **sizes)
    pooled = torch.zeros(24, 64, **sizes), torch.zeros(24, device=device)
    lengths = torch.zeros(2, dtype=torch.int32, device=device)
    table = torch.arange(24, dtype=torch.int32, device=device).view(2, 12)
    where: dict[str, Any] = {"block_table": table, "seq_lens": lengths, "block_size": 32}
    q, weights = torch.ones(2, 16, 64, **sizes), torch.ones(2, 16, device=device)
    store = hisa.PooledKeys(2, 64, block_size=32, capacity=192, **sizes)
    few: dict[str, Any] = {"block_topk": 3, "topk": 50}

    def burst(steps: int) -> tuple[int, int]:
        for i in range(steps):
            if i % 180 == 0:
                store.truncate(i // 180 % 5)
                lengths.fill_(i // 180 % 5)
            store.append(pages[:2, :1])
            lengths.add_(1)
            hisa.paged_pool(pages, *pooled, **where)
            hisa.paged_index(q, pages, weights, pooled=pooled, **few, **where)
            store.index(q[:, None], weights[:, None], **few)
        gc.collect()
        if device == "cpu":
            return resident(), 0
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated(), torch.cuda.memory_reserved()

    before = burst(3000)
    after = burst(100_000)
    if device == "cpu":
        assert after[0] - before[0] < 2**20
    else:
        assert after == before


@pytest.mark.gpu
def test_out_of_memory_on_cuda() -> None:
    """A call whose output, or workspace, does not fit raises; what follows is right."""
    case = random_case(0, torch.bfloat16, M=3, N=3000, H=4, D=64, topk=16).to("cuda")
    want = hisa.flat_index(case.q, case.k, case.weights, topk=16)
    before = torch.cuda.memory_allocated()
    many = case.q[:1].expand(2**20, 4, 64)
    weights = case.weights[:1].expand(2**20, 4)
    with pytest.raises(torch.OutOfMemoryError):  # 4 TiB
        hisa.flat_index(many, case.k, weights, topk=2**20)
    assert torch.cuda.memory_allocated() == before
    assert torch.equal(hisa.flat_index(case.q, case.k, case.weights, topk=16), want)
