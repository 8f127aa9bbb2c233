"""T14: any stream, several streams and threads at once.

Catches state that calls share, and a launch on another stream than the current one.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

import hisa
from tests.builders import causal, random_case
from tests.case import Case, same_bytes

pytestmark = pytest.mark.gpu


def make_cases(device: str = "cuda") -> list[Case]:
    """Several calls of different sizes and kernels."""
    shapes = [(40, 700, 8, 64), (7, 5000, 32, 128), (90, 300, 64, 128), (3, 20000, 4, 64)]
    dtypes = [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float32]
    return [
        causal(random_case(i, dtype, M=m, N=n, H=h, D=d, block_topk=5, topk=33)).to(device)
        for i, ((m, n, h, d), dtype) in enumerate(zip(shapes, dtypes, strict=True))
    ]


def run(case: Case) -> list[Tensor]:
    """Run both selections."""
    return [
        hisa.index(case.q, case.k, case.weights, **case.index_args()),
        hisa.flat_index(case.q, case.k, case.weights, **case.flat_args()),
    ]


def equal(ours: list[Tensor], wanted: list[Tensor]) -> bool:
    """Compare byte for byte."""
    return all(same_bytes(a, b) for a, b in zip(ours, wanted, strict=True))


@pytest.mark.parametrize(
    "calls", [50, pytest.param(1000, marks=[pytest.mark.long, pytest.mark.seconds(600)])]
)
def test_streams(calls: int) -> None:
    """Four streams at once, beside one that keeps the device busy."""
    cases = make_cases()
    wanted = [run(case) for case in cases]
    busy = torch.cuda.Stream()
    matrix = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    streams = [torch.cuda.Stream() for _ in cases]
    torch.cuda.synchronize()
    got: list[list[list[Tensor]]] = [[] for _ in cases]
    for i in range(calls):
        with torch.cuda.stream(busy):
            matrix @ matrix
        for stream, case, results in zip(streams, cases, got, strict=True):
            with torch.cuda.stream(stream):
                if i % 3 == 0:
                    torch.cuda._sleep(20000)
                results.append(run(case))
    torch.cuda.synchronize()
    for results, want in zip(got, wanted, strict=True):
        assert all(equal(result, want) for result in results)


def test_waits_for_its_own_stream() -> None:
    """A call runs after what was put on the current stream before it."""
    case = make_cases()[0]
    want = run(case)
    q = torch.zeros_like(case.q)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(50_000_000)
        q.copy_(case.q)
        got = run(case.replace(q=q))
    torch.cuda.synchronize()
    assert equal(got, want)


@pytest.mark.parametrize(
    "calls", [20, pytest.param(200, marks=[pytest.mark.long, pytest.mark.seconds(600)])]
)
def test_threads(calls: int) -> None:
    """Sixteen threads, each with a stream of its own."""
    cases = make_cases()
    wanted = [run(case) for case in cases]
    torch.cuda.synchronize()

    def work(thread: int) -> bool:
        with torch.cuda.stream(torch.cuda.Stream()):
            results = [run(cases[(thread + i) % 4]) for i in range(calls)]
            torch.cuda.current_stream().synchronize()
        return all(equal(r, wanted[(thread + i) % 4]) for i, r in enumerate(results))

    with ThreadPoolExecutor(16) as pool:
        assert all(pool.map(work, range(16)))


def test_memory_handed_on() -> None:
    """An output that was freed while a side stream still reads it is not overwritten."""
    case = make_cases()[0]
    want = run(case)[0]
    side = torch.cuda.Stream()
    for _ in range(20):
        indices = run(case)[0]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            torch.cuda._sleep(2_000_000)
            copy = indices.clone()
        indices.record_stream(side)
        del indices
        run(make_cases()[0])
        torch.cuda.synchronize()
        assert same_bytes(copy, want)
