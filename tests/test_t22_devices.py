"""T22: any device, whichever one is current; several at once; never two in one call.

Catches a launch on another device than the tensors', limits of one device kept for another, a
current device that a call leaves changed, and memory of one device read on another.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

import hisa
from tests.case import TENSORS, Case
from tests.test_t14_cuda_streams import equal, make_cases, run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]
FIRST, SECOND = torch.device("cuda:0"), torch.device("cuda:1")


@pytest.fixture(autouse=True)
def _device_0() -> Iterator[None]:
    """Device 0 is current before the test, and after it."""
    torch.cuda.set_device(0)
    yield
    changed = torch.cuda.current_device() != 0
    torch.cuda.set_device(0)
    assert not changed, "a call changed the current device"


def on_cpu(tensors: list[Tensor]) -> list[Tensor]:
    """Bring results to where they can be compared."""
    return [tensor.cpu() for tensor in tensors]


def everything(case: Case) -> list[Tensor]:
    """Run every op, in all their ways."""
    pooled = hisa.pool_keys(case.k, **case.pool_args())
    with_pooled = {**case.index_args(), "pooled": pooled}
    scores = hisa.flat_index(case.q, case.k, case.weights, return_scores=True, **case.flat_args())
    return [
        *pooled, *run(case), *scores, hisa.index(case.q, case.k, case.weights, **with_pooled),
    ]  # fmt: skip


@pytest.mark.parametrize("current", [0, 1])
def test_each_device_while_either_is_current(current: int) -> None:
    """The bytes of device 0, on the tensors' device, and the current device stays."""
    wanted = [on_cpu(everything(case)) for case in make_cases("cuda:0")]
    torch.cuda.set_device(current)
    for device in (FIRST, SECOND):
        for case, want in zip(make_cases(str(device)), wanted, strict=True):
            got = everything(case)
            assert all(tensor.device == device for tensor in got)
            assert torch.cuda.current_device() == current
            assert equal(on_cpu(got), want), f"on {device}, current {current}: {case.describe()}"
    torch.cuda.set_device(0)


def test_all_devices_give_the_same() -> None:
    """Every GPU of the machine, one after the other."""
    wanted = [on_cpu(everything(case)) for case in make_cases("cuda:0")]
    for number in range(torch.cuda.device_count()):
        for case, want in zip(make_cases(f"cuda:{number}"), wanted, strict=True):
            assert equal(on_cpu(everything(case)), want), f"cuda:{number}: {case.describe()}"


@pytest.mark.parametrize(
    "calls", [50, pytest.param(1000, marks=[pytest.mark.long, pytest.mark.seconds(600)])]
)
def test_two_devices_from_two_threads(calls: int) -> None:
    """Two threads, a device each, at the same time; neither sets the current device."""
    cases = {device: make_cases(str(device)) for device in (FIRST, SECOND)}
    wanted = [on_cpu(run(case)) for case in cases[FIRST]]

    def work(device: torch.device) -> int:
        results = [run(cases[device][i % 4]) for i in range(calls)]
        torch.cuda.synchronize(device)
        return sum(not equal(on_cpu(got), wanted[i % 4]) for i, got in enumerate(results))

    with ThreadPoolExecutor(2) as pool:
        wrong = dict(zip(cases, pool.map(work, cases), strict=True))
    assert not any(wrong.values()), wrong


def test_graph_of_another_device() -> None:
    """A call captured on device 1 replays there."""
    case = make_cases("cuda:1")[0]
    with torch.cuda.device(1):
        want = run(case)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=torch.cuda.Stream(SECOND)):
            got = run(case)
        for tensor in got:
            tensor.zero_()
        graph.replay()
        torch.cuda.synchronize()
        assert equal(got, want)


def test_stream_of_another_device() -> None:
    """A call runs on the stream that is current on the tensors' device."""
    case = make_cases("cuda:1")[0]
    want = run(case)
    q = torch.zeros_like(case.q)
    torch.cuda.synchronize(SECOND)
    with torch.cuda.device(1), torch.cuda.stream(torch.cuda.Stream(SECOND)):
        torch.cuda._sleep(50_000_000)
        q.copy_(case.q)
        with torch.cuda.device(0):
            got = run(case.replace(q=q))
    torch.cuda.synchronize(SECOND)
    assert equal(got, want)


def test_plan_of_another_device() -> None:
    """`hisa.plan` looks at the device it is asked about, and leaves the current one alone."""
    for number in range(torch.cuda.device_count()):
        plan = hisa.plan(64, 90000, 32, 128, device=f"cuda:{number}", op="flat_index", topk=40000)
        assert torch.cuda.current_device() == 0
        with torch.cuda.device(number):
            assert plan == hisa.plan(64, 90000, 32, 128, device="cuda", op="flat_index", topk=40000)
        assert plan.workspace_bytes > 0 and plan.kernels["flat"].startswith("cuda/")


@pytest.mark.parametrize("name", [name for name in TENSORS if name != "k"] + ["pooled"])
def test_mixed_devices(name: str) -> None:
    """A tensor that is not where k is gets refused by its name; the next call is right."""
    case = make_cases("cuda:0")[2]  # with scales
    pooled = hisa.pool_keys(case.k, **case.pool_args())
    cu = torch.tensor([0, len(case.k)], dtype=torch.int32, device=FIRST)
    case = case.replace(pooled=pooled, cu_seqlens_k=cu)
    want = run(case)
    there = getattr(case, name)
    there = tuple(t.to(SECOND) for t in there) if name == "pooled" else there.to(SECOND)
    bad = case.replace(**{name: there})
    message = rf"{name}\w*: expected a tensor on cuda:0 .*got one on cuda:1"
    with pytest.raises(ValueError, match=message):
        hisa.index(bad.q, bad.k, bad.weights, **bad.index_args())
    assert equal(run(case), want)
