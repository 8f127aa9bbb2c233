"""T6: the same bytes on every run, with any number of threads, from many threads at once.

Catches races between rows, state kept across calls, and sums that are cut by the number of threads.
On CUDA also races inside a kernel: the same call again and again, eager, in a graph and on another
stream, while other work comes and goes on the device.
"""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import builders
from tests.builders import causal, exact_case, int32, random_case, shaped
from tests.case import Case, same_bytes
from tests.checker import Result
from tests.families import CUDA, Family
from tests.numeric import DTYPES, FP8, short_name


def same(a: Result, b: Result) -> bool:
    """Compare two results byte for byte."""
    return same_bytes(a.indices, b.indices) and same_bytes(a.scores, b.scores)


def workload(seed: int, dtype: torch.dtype = torch.bfloat16) -> Case:
    """Return a causal batch with ties (seed odd) or random floats (seed even)."""
    dtype = shaped(dtype=dtype)["dtype"]
    if seed % 2:
        return exact_case(seed, dtype=dtype, M=40, N=400, B=8, topk=21, block_topk=5,
                          **shaped(H=2, D=16))  # fmt: skip
    return causal(random_case(seed, dtype, M=40, N=400, block_topk=5, topk=21))


@pytest.mark.parametrize("dtype", DTYPES, ids=short_name)
def test_repeats(family: Family, dtype: torch.dtype) -> None:
    """50 calls, fresh memory in between, are byte-equal."""
    for seed in range(2):
        case = workload(seed, dtype)
        first, first_flat = family.index(case), family.flat_index(case)
        for i in range(25):
            noise = torch.full((1000 + 777 * i,), float("nan"))
            assert same(family.index(case), first)
            assert same(family.flat_index(case), first_flat)
            del noise


@pytest.mark.long
@pytest.mark.parametrize("dtype", DTYPES, ids=short_name)
def test_repeats_long(family: Family, dtype: torch.dtype) -> None:
    """1,000 calls are byte-equal."""
    for seed in range(3):
        case = workload(seed, dtype)
        first = family.index(case)
        assert all(same(family.index(case), first) for _ in range(1000))


# One row of scores at once and one in chunks, one and many heads, ties everywhere and hardly any.
SHAPES_ON_CUDA: dict[str, dict[str, Any]] = {
    "64 heads": {"M": 90, "N": 1500, "H": 64, "D": 128, "block_topk": 9, "topk": 65},
    "32 heads": {"M": 7, "N": 6000, "H": 32, "D": 128, "block_topk": 40, "topk": 300},
    "chunks": {"M": 3, "N": 40000, "H": 4, "D": 64, "block_size": 256, "block_topk": 80,
               "topk": 9000},
}  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=short_name)
@pytest.mark.parametrize("shape", ["ties", *SHAPES_ON_CUDA])
@pytest.mark.parametrize("calls", [50, pytest.param(1000, marks=pytest.mark.long)])
def test_repeats_on_cuda(calls: int, shape: str, dtype: torch.dtype) -> None:
    """50 or 1,000 calls of each of 16 shapes, each of them eager, replayed and on other streams."""
    if shape == "ties":
        repeat_on_cuda(workload(1, dtype), calls)
    else:
        repeat_on_cuda(causal(random_case(2, dtype, **SHAPES_ON_CUDA[shape])), calls)


@pytest.mark.gpu
@pytest.mark.long
@pytest.mark.parametrize("dtype", [torch.bfloat16, FP8], ids=short_name)
def test_ties_on_cuda_ten_thousand_times(dtype: torch.dtype) -> None:
    """10,000 calls with many ties: a winner must not depend on which thread came first."""
    repeat_on_cuda(workload(1, dtype), 10_000)


def repeat_on_cuda(case: Case, calls: int) -> None:
    """Compare each of many calls, in four ways to make it, with the first one's bytes."""
    on = case.to("cuda")

    def call() -> list[torch.Tensor]:
        both = CUDA.api.index(on.q, on.k, on.weights, **on.index_args(), return_scores=True)
        flat = CUDA.api.flat_index(on.q, on.k, on.weights, **on.flat_args(), return_scores=True)
        return [tensor.view(torch.int32) for tensor in (*both, *flat)]

    want = call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    ways = ["eager", "replayed", "on a stream", "on another stream"]
    wrong = torch.zeros(4, dtype=torch.int64, device="cuda")
    streams = [torch.cuda.current_stream(), torch.cuda.current_stream(),
               torch.cuda.Stream(), torch.cuda.Stream()]  # fmt: skip
    busy = torch.cuda.Stream()
    matrix = torch.randn(1024, 1024, device="cuda")
    torch.cuda.synchronize()
    for i in range(calls):
        with torch.cuda.stream(busy):  # takes a part of the device, now more and now less
            if i % 4:
                matrix @ matrix
        noise = torch.full((1 + i * 7919 % 100_000,), -777, device="cuda", dtype=torch.int32)
        for way, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                if way == 1:
                    graph.replay()
                got = captured if way == 1 else call()
                for ours, wanted in zip(got, want, strict=True):
                    wrong[way] += (ours != wanted).any()
        del noise
    torch.cuda.synchronize()
    different = {way: n for way, n in zip(ways, wrong.tolist(), strict=True) if n}
    assert not different, f"results that differ, of {4 * calls} each: {different}"


@pytest.mark.parametrize("rows", [1, 2, 3, 7, 40, 129])
def test_number_of_threads(family: Family, rows: int) -> None:
    """1, 2, 3 and 8 threads give the same bytes, with more and with fewer rows than threads."""
    case = causal(
        random_case(rows, **shaped(dtype=torch.float32), M=rows, N=600, block_topk=5, topk=21)
    )
    results, pooled = [], []
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        results += [(family.index(case), family.flat_index(case))]
        pooled += [family.pool_keys(case, pooling="mean")]
    for index, flat in results[1:]:
        assert same(index, results[0][0]) and same(flat, results[0][1])
    assert all(same_bytes(p[0], pooled[0][0]) for p in pooled)


def test_python_threads(family: Family) -> None:
    """8 Python threads, different calls at once: each gets its own answer."""
    cases = [workload(seed, DTYPES[seed % 4]) for seed in range(8)]
    want = [family.index(case) for case in cases]
    with ThreadPoolExecutor(8) as pool:
        got = list(pool.map(family.index, cases * 12))
    assert all(same(result, want[i % 8]) for i, result in enumerate(got))


def test_call_order(family: Family) -> None:
    """A call does not depend on the calls before it: small after big, other dtype, other blocks."""
    cases = [
        workload(seed, DTYPES[seed % 4]).replace(block_size=8 << (seed % 3)) for seed in range(6)
    ]
    want = [family.index(case) for case in cases]
    for step in (1, 5, 2, 3):
        for i in range(len(cases)):
            assert same(family.index(cases[i * step % 6]), want[i * step % 6])


FLUSHING = """
import torch, hisa
from tests.families import FAMILIES
family = next(f for f in FAMILIES if f.name == {name!r})
torch.set_num_threads(2)
q = torch.zeros(64, 1, 16)
q[:, :, 0] = 1
k = torch.zeros(64, 16)
k[:, 0] = torch.arange(64) + 1
w = torch.full((64, 1), 2.0**-147)
small = torch.randn(4096, 16) * 2.0**-128
with family.active():
    want = hisa.flat_index(q, k, w, topk=8), hisa.pool_keys(small, block_size=8)[0]
    torch.set_flush_denormal(True)  # on this thread only
    for _ in range(100):
        assert torch.equal(hisa.flat_index(q, k, w, topk=8), want[0])
        assert torch.equal(hisa.pool_keys(small, block_size=8)[0].view(torch.int32),
                           want[1].view(torch.int32))
assert (torch.tensor([2.0**-140]) * 2.0**-5).item() == 0, "the caller's setting is left alone"
print("right")
"""


def test_flush_to_zero_on_some_threads(family: Family) -> None:
    """Subnormals count, whatever the floating-point settings of the threads that run the rows."""
    run = subprocess.run(
        [sys.executable, "-c", FLUSHING.format(name=family.name)],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
    )
    assert run.stdout == "right\n", run.stderr


SCRIPT = """
import hashlib, torch, hisa
from tests import builders
builders.shapes = {shapes!r}
from tests.test_t06_determinism import workload
from tests.families import FAMILIES
family = next(f for f in FAMILIES if f.name == {name!r})
digest = hashlib.sha256()
with family.active():
    for seed in range(4):
        result = family.index(workload(seed))
        digest.update(result.indices.numpy().tobytes() + result.scores.numpy().tobytes())
print(digest.hexdigest())
"""


def test_other_processes(family: Family) -> None:
    """Two fresh processes print the same hash as each other."""
    script = SCRIPT.format(name=family.name, shapes=builders.shapes)
    root = Path(__file__).parent.parent
    runs = [
        subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True)
        for _ in range(2)
    ]
    assert all(run.returncode == 0 for run in runs), runs[0].stderr
    assert runs[0].stdout == runs[1].stdout and len(runs[0].stdout) == 65


def test_return_scores_changes_nothing(family: Family) -> None:
    """The indices are the same bytes with and without scores."""
    for seed, dtype in enumerate(DTYPES):
        on = workload(seed, dtype).to(family.device)
        with_scores = family.api.index(
            on.q, on.k, on.weights, **on.index_args(), return_scores=True
        )
        without = family.api.index(on.q, on.k, on.weights, **on.index_args())
        assert isinstance(without, torch.Tensor) and same_bytes(with_scores[0], without)
        with_scores = family.api.flat_index(
            on.q, on.k, on.weights, **on.flat_args(), return_scores=True
        )
        without = family.api.flat_index(on.q, on.k, on.weights, **on.flat_args())
        assert isinstance(without, torch.Tensor) and same_bytes(with_scores[0], without)


def test_optional_arguments_have_their_defaults(family: Family) -> None:
    """No k_scale is a scale of 1, no windows are [0, N), no segments are one segment."""
    case = random_case(0, **shaped(dtype=torch.bfloat16), block_topk=5, topk=21)
    m, n = case.shape[:2]
    spelled = case.replace(k_scale=torch.ones(n), ks=int32([0] * m), ke=int32([n] * m),
                           cu_seqlens_k=int32([0, n]))  # fmt: skip
    assert same(family.index(case), family.index(spelled))
    assert same(family.flat_index(case), family.flat_index(spelled))
    assert case.k.dtype != FP8
