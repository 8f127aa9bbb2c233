"""T5: what must not be read is poison: NaN, 0xFF bytes, or an unmapped page.

Catches reads of keys outside the windows, of pooled keys of cut or foreign blocks, of uninitialised
workspace, and reads past the end of any input.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import hisa
from tests import builders, guard_cuda, oracle
from tests.builders import exact_case, int32, shaped
from tests.case import TENSORS, Case, same_bytes
from tests.checker import assert_same
from tests.families import Family
from tests.guard import guarded
from tests.numeric import DTYPES, FP8, short_name


def poison(tensor: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
    """Return a copy with NaN (all bits set) in the rows that `where` marks."""
    raw = tensor.clone().view(torch.uint8)
    raw[where] = 0xFF
    return raw.view(tensor.dtype)


def seen_tokens(case: Case) -> torch.Tensor:
    """Mark the tokens that some row's window holds."""
    seen = torch.zeros(case.k.shape[0], dtype=torch.bool)
    for row in range(case.q.shape[0]):
        window = oracle.window(case, row)
        if window is not None:
            seen[window.start : window.end] = True
    return seen


def read_slots(case: Case) -> torch.Tensor:
    """Mark the pooled slots that may be read: candidates that are neither first nor last."""
    read = torch.zeros(-(-case.k.shape[0] // case.block_size), dtype=torch.bool)
    for row in range(case.q.shape[0]):
        window = oracle.window(case, row)
        if window is not None:
            for first in oracle.candidates(case, window)[1:-1]:
                read[oracle.slot_of(case, first)] = True
    return read


@pytest.mark.parametrize("dtype", DTYPES, ids=short_name)
@pytest.mark.parametrize("packed", [False, True])
def test_keys_outside_all_windows(any_family: Family, dtype: torch.dtype, packed: bool) -> None:
    """NaN in every key and scale that no window holds changes nothing."""
    cu = int32([0, 37, 37, 130, 200]) if packed else None
    ks, ke = int32([40, 45, 41, 60]), int32([125, 93, 111, 61])
    for seed in range(6):
        case = exact_case(seed, dtype=dtype, N=200, M=4, B=8, block_topk=3, topk=9, ks=ks, ke=ke,
                          cu_seqlens_k=cu, k_scale=torch.ones(200),
                          **shaped(H=2, D=16))  # fmt: skip
        outside = ~seen_tokens(case)
        assert outside.sum() > 100
        poisoned = case.replace(
            k=poison(case.k, outside), k_scale=poison(case.k_scale[:, None], outside)[:, 0]
        )
        assert_same(any_family.index(poisoned), oracle.index(case))
        assert_same(any_family.flat_index(poisoned), oracle.flat_index(case))


@pytest.mark.parametrize("dtype", DTYPES, ids=short_name)
def test_pooled_slots_that_are_never_read(any_family: Family, dtype: torch.dtype) -> None:
    """Pooled keys of first and last candidates, cut blocks and other segments are not read."""
    for seed in range(6):
        case = exact_case(seed, dtype=dtype, N=205, M=5, B=8, block_topk=3, topk=24,
                          **shaped(H=2, D=16), ks=int32([3, 70, 59, 3, 58]),
                          ke=int32([54, 200, 205, 30, 58]),
                          cu_seqlens_k=int32([3, 57, 205]))  # fmt: skip
        pooled, scale = oracle.as_pooled(case)
        unread = ~read_slots(case)
        assert 3 < unread.sum() < len(unread)
        poisoned = (poison(pooled, unread), poison(scale[:, None], unread)[:, 0])
        assert_same(any_family.index(case, pooled=poisoned), oracle.index(case))


def test_pooled_keys_given_are_used(any_family: Family) -> None:
    """Positive control of the last test: slots that are read do decide."""
    case = exact_case(0, N=208, M=1, B=8, block_topk=3, topk=24, ks=None, cu_seqlens_k=None,
                      **shaped(H=1, D=16, dtype=torch.float32))  # fmt: skip
    case = case.replace(q=torch.ones(case.q.shape).to(case.q.dtype),
                        weights=torch.ones_like(case.weights))  # fmt: skip
    for slot in (1, 13, 24):
        pooled = torch.zeros(26, case.shape[3], dtype=case.k.dtype)
        pooled[slot] = 1
        result = any_family.index(case, pooled=(pooled, torch.ones(26)))
        blocks = (result.indices[0] // 8).unique().tolist()
        assert blocks == [0, slot, 25]


def test_neighbour_segment_is_poison(any_family: Family) -> None:
    """All of the neighbours' keys NaN, all scales NaN: no block straddles two documents."""
    cu = int32([0, 13, 150, 163])
    case = exact_case(4, dtype=torch.bfloat16, N=163, M=6, B=8, block_topk=3, topk=11,
                      **shaped(H=2, D=16), ks=int32([13] * 6), cu_seqlens_k=cu,
                      ke=int32([150, 149, 148, 90, 37, 14]),
                      k_scale=torch.ones(163))  # fmt: skip
    where = torch.ones(163, dtype=torch.bool)
    where[13:150] = False
    poisoned = case.replace(
        k=poison(case.k, where), k_scale=poison(case.k_scale[:, None], where)[:, 0]
    )
    assert_same(any_family.index(poisoned), oracle.index(case))


@pytest.fixture
def dirty_memory() -> Iterator[None]:
    """Make torch fill fresh memory with NaN and extreme integers."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    yield
    torch.use_deterministic_algorithms(False)


def test_fresh_memory_is_poison(family: Family, dirty_memory: None) -> None:
    """Outputs and workspace that torch fills with NaN and extreme values are fully overwritten."""
    for seed in range(60):
        case = exact_case(seed, budget=3e5)
        assert_same(family.index(case), oracle.index(case))
        assert_same(family.flat_index(case), oracle.flat_index(case))
        if case.k.dtype != FP8:
            assert np.array_equal(family.pool_keys(case)[0].float(), oracle.pool_keys(case)[0])


@pytest.mark.parametrize("after", [True, False], ids=["after", "before"])
@pytest.mark.parametrize("start", range(0, 100, 20))
def test_guard_pages(family: Family, start: int, after: bool) -> None:
    """200 calls in which every input touches an unmapped page: a stray read kills the process.

    Integration bugs: what is worth copying to find them: guard pages and NaN.
    """
    if family.device != "cpu":
        pytest.skip("on the CPU; test_guarded_memory_on_cuda is its counterpart")
    for seed in range(start, start + 20):
        case = exact_case(seed, budget=2e5)
        fields = {name: getattr(case, name) for name in TENSORS}
        fields = {n: None if t is None else guarded(t, after) for n, t in fields.items()}
        fenced = case.replace(**fields)
        assert_same(family.index(fenced), oracle.index(case))
        assert_same(family.flat_index(fenced), oracle.flat_index(case))
        pooled = family.pool_keys(fenced)
        pooled = (guarded(pooled[0], after), guarded(pooled[1], after))
        assert_same(family.index(fenced, pooled=pooled), oracle.index(case))


def run_guarded(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `tests.guard_cuda` in a process of its own: a fault ends its CUDA context."""
    arguments += ("--shapes", builders.shapes)
    folder = str(Path(hisa.__file__).parent.parent)  # the build that this process tests
    script = (
        f"import runpy, sys; sys.path.insert(0, {folder!r}); sys.argv[1:] = {list(arguments)!r}; "
        "runpy.run_module('tests.guard_cuda', run_name='__main__')"
    )
    return subprocess.run(
        [sys.executable, "-c", script],
        cwd=Path(__file__).parent.parent, capture_output=True, text=True, timeout=170,
    )  # fmt: skip


@pytest.mark.gpu
@pytest.mark.seconds(180)
@pytest.mark.parametrize("side", ["after", "before"])
@pytest.mark.parametrize("dtype", DTYPES, ids=short_name)
def test_guarded_memory_on_cuda(dtype: torch.dtype, side: str) -> None:
    """52 calls whose inputs, outputs and workspace all touch unmapped addresses, or a canary.

    The results are those of the same calls in ordinary memory, bit for bit.
    """
    run = run_guarded(side, short_name(dtype))
    lines = run.stdout.splitlines()
    done = f"after {len(lines)} calls, the last of them {lines[-1:]}\n{run.stderr}"
    assert run.returncode == 0 and lines.pop() == "done", done
    for line, case in zip(lines, guard_cuda.calls(dtype), strict=True):
        assert line.split()[0] == guard_cuda.digest(case), case.describe()


@pytest.mark.gpu
@pytest.mark.seconds(180)
@pytest.mark.parametrize("side", ["after", "before"])
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("stray-read", "illegal memory access"),
        ("stray-write", "canary overwritten"),
        ("unwritten", "fresh memory holds -777"),
    ],
)
def test_guards_on_cuda_notice(side: str, fault: str, message: str) -> None:
    """Positive control: an access beyond a tensor ends the process, on either side."""
    for dtype in DTYPES if fault == "stray-read" else DTYPES[:1]:
        run = run_guarded(side, short_name(dtype), fault)
        assert run.returncode != 0 and message in run.stderr, (dtype, run.stdout, run.stderr)


def test_inputs_are_left_alone(family: Family) -> None:
    """No op writes to its inputs."""
    for seed in range(12):
        case = exact_case(seed, budget=2e5)
        before = {name: getattr(case, name) for name in TENSORS}
        before = {name: None if t is None else t.clone() for name, t in before.items()}
        pooled = family.pool_keys(case)
        copy = (pooled[0].clone(), pooled[1].clone())
        family.index(case, pooled=pooled)
        family.flat_index(case)
        for name, saved in before.items():
            assert saved is None or same_bytes(saved, getattr(case, name)), name
        assert same_bytes(copy[0], pooled[0]) and same_bytes(copy[1], pooled[1])
