"""Few rows on a CPU: the keys of each are shared out among threads.

Catches a part that is left out or looked at twice, a result that depends on the number of threads,
and a call that is not shared out, or is for too little work. `cpu-parts` of tests/families.py runs
all tests that take a family with every call in parts.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import hisa
from tests import oracle
from tests.builders import causal, exact_case, random_case
from tests.case import Case, same_bytes
from tests.checker import assert_same
from tests.families import Family
from tests.numeric import DTYPES, FP8, short_name
from tests.paged import exact_paged

BEST = Family("best", isa="auto")


def workspace(threads: int, **changes: Any) -> int:
    """Return what a call takes with so many threads."""
    torch.set_num_threads(threads)
    sizes: dict[str, Any] = {"M": 1, "N": 2**17, "H": 64, "D": 128, "pooled": True}
    return hisa.plan(**(sizes | changes)).workspace_bytes


@pytest.mark.parametrize("op", ["index", "flat_index"])
def test_how_many_parts(op: str) -> None:
    """As many as there are threads for, and work: the plan has memory for each."""
    pooled = {"pooled": False} if op == "flat_index" else {}
    one = workspace(1, op=op, **pooled)
    parts = {1: 8, 2: 8, 3: 6, 4: 8, 5: 5, 8: 8}
    found = {rows: workspace(8, op=op, M=rows, **pooled) / one for rows in parts}
    assert found == parts
    for short in ({"H": 1, "D": 16, "N": 9000}, {"N": 100}):
        assert workspace(8, op=op, **pooled, **short) == workspace(1, op=op, **pooled, **short)


THREADS = """
import os, sys, torch, hisa
torch.set_num_threads(1)
op, longest = sys.argv[1], int(sys.argv[2])
q, k, w = torch.randn(1, 64, 128), torch.randn(9000, 128), torch.randn(1, 64)
pooled = {"pooled": hisa.pool_keys(k)} if op == "index" else {}
ke = torch.tensor([longest], dtype=torch.int32)
torch.set_num_threads(4)
before = len(os.listdir("/proc/self/task"))
getattr(hisa, op)(q, k, w, ke=ke, topk=100, **pooled)
print(len(os.listdir("/proc/self/task")) - before)
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts threads as Linux does")
@pytest.mark.parametrize(("longest", "helpers"), [(9000, 3), (120, 0), (100, 0), (0, 0)])
@pytest.mark.parametrize("op", ["index", "flat_index"])
def test_how_many_threads_run(op: str, longest: int, helpers: int) -> None:
    """All, where there is a part for another; none to help with a short window."""
    command = [sys.executable, "-c", THREADS, op, str(longest)]
    run = subprocess.run(command, capture_output=True, text=True, check=True,
                         env={**os.environ, "OMP_NUM_THREADS": "4"})  # fmt: skip
    assert int(run.stdout) == helpers


def everything(case: Case) -> list[torch.Tensor]:
    """Run both operators and return all outputs."""
    return [*BEST.index(case), *BEST.flat_index(case)]


def test_parts_of_blocks() -> None:
    """Two of the pooled keys, and more of the tokens."""
    sizes: dict[str, Any] = {"M": 1, "N": 20000, "H": 128, "D": 64, "topk": 300}
    case = random_case(0, torch.bfloat16, block_size=64, block_topk=40, **sizes)
    want = everything(case)
    for threads in (2, 5):
        torch.set_num_threads(threads)
        assert all(map(same_bytes, everything(case), want))


@pytest.mark.parametrize("rows", [1, 2, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=short_name)
def test_any_number_of_threads(dtype: torch.dtype, rows: int) -> None:
    """The same bits, scores included; `topk` is most of what a part has, and a little of it."""
    for topk in (13, 1500):
        sizes: dict[str, Any] = {"M": rows, "N": 9000, "H": 16, "D": 64, "topk": topk}
        case = random_case(topk + rows, dtype, block_size=128, block_topk=20, **sizes)
        case = causal(case)
        want = everything(case)
        for threads in (2, 5, 8):
            torch.set_num_threads(threads)
            assert all(map(same_bytes, everything(case), want)), case.describe()
        torch.set_num_threads(1)


def test_against_the_oracle() -> None:
    """Ties everywhere, across the edges of parts: the lowest positions win."""
    sizes: dict[str, Any] = {"M": 2, "N": 9000, "H": 16, "D": 64, "B": 64, "block_topk": 30}
    sizes |= {"topk": 700}
    case = exact_case(3, dtype=torch.bfloat16, **sizes)
    torch.set_num_threads(7)
    assert_same(BEST.index(case), oracle.index(case))
    assert_same(BEST.flat_index(case), oracle.flat_index(case))


def test_pages() -> None:
    """Keys in pages, of two sequences, and two rows of each."""
    sizes: dict[str, Any] = {"dtype": FP8, "H": 16, "D": 64, "B": 128, "page_size": 64}
    sizes |= {"lengths": [5000, 3001], "next_n": 2, "block_topk": 20, "topk": 700}
    paged = exact_paged(0, **sizes).pool(BEST)
    want = paged.index(BEST)
    torch.set_num_threads(8)
    assert all(map(same_bytes, paged.index(BEST), want))
