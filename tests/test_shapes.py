"""`--shapes hopper`: calls that csrc/cuda/sm90 takes, wherever a test would do with any.

Catches a test that names heads and channels of its own, and so runs on the portable kernels
whatever is asked for; it should say `**shaped(H=2, D=16)`.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests import builders
from tests.builders import HOPPER_DEPTHS, HOPPER_HEADS, exact_case, random_case, shaped
from tests.case import Case
from tests.numeric import DTYPES, FP8
from tests.paged import exact_paged
from tests.test_t03_window_edges import windows_case
from tests.test_t06_determinism import workload
from tests.test_t07_metamorphic import packed_case
from tests.test_t09_non_finite import base_case
from tests.test_t12_large import integer_case
from tests.test_t16_layout import cases

BUILDERS: dict[str, Callable[[int], Case]] = {
    "exact_case": lambda seed: exact_case(seed, budget=2e5),
    "random_case": lambda seed: random_case(seed, FP8),
    "exact_paged": lambda seed: exact_paged(seed).case,
    "T3": lambda seed: windows_case([(0, 9), (3, 3)], seed=seed),
    "T6": lambda seed: workload(seed, DTYPES[seed % 4]),
    "T7, T8": packed_case,
    "T9": lambda seed: base_case(seed, DTYPES[seed % 4]),
    "T12": lambda seed: integer_case(3, 50, seed, DTYPES[seed % 4]),
    "T16": lambda seed: cases(FP8),
}
# Calls of these are about portable kernels, the order of sums, memory, or torch and not kernels.
PINNED = {
    "test_agreement.py",
    "test_cuda_dispatch.py",
    "test_simt.py",
    "test_t20_torch_contract.py",
    "test_t21_memory.py",
    "test_t25_parity.py",
}
CALLS = {"exact_case", "random_case", "exact_paged", "windows_case", "integer_case"}


@pytest.mark.parametrize("name", BUILDERS)
def test_cases(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each builder makes calls that these kernels take, of both dtypes if it draws one."""
    monkeypatch.setattr(builders, "shapes", "hopper")
    for seed in range(20):
        case = BUILDERS[name](seed)
        assert case.q.dtype in (torch.bfloat16, FP8), case.describe()
        assert case.q.shape[1] in HOPPER_HEADS and case.q.shape[2] in HOPPER_DEPTHS
    if name.startswith("exact"):
        cases = [BUILDERS[name](seed) for seed in range(20)]
        assert len({case.q.dtype for case in cases}) == 2
        assert len({case.q.shape[1:] for case in cases}) > 2


def test_small_numbers_stay_different(monkeypatch: pytest.MonkeyPatch) -> None:
    """And what fits is left as it is, as is everything by default."""
    monkeypatch.setattr(builders, "shapes", "any")
    assert shaped(H=3, D=48, dtype=torch.float16) == {"H": 3, "D": 48, "dtype": torch.float16}
    monkeypatch.setattr(builders, "shapes", "hopper")
    assert [shaped(H=h)["H"] for h in (1, 2, 3, 4, 5, 8, 9, 40)] == [
        16,
        16,
        32,
        32,
        64,
        64,
        128,
        128,
    ]
    assert [shaped(D=d)["D"] for d in (16, 32, 48, 80, 256)] == [64, 64, 128, 128, 128]
    for heads in HOPPER_HEADS:
        assert shaped(H=heads, dtype=FP8) == {"H": heads, "dtype": FP8}
    assert [shaped(dtype=dtype)["dtype"] for dtype in DTYPES] == [torch.bfloat16] * 2 + [FP8] * 2


def named_sizes(file: Path) -> Iterator[str]:
    """Find calls of builders that name numbers of heads or channels which do not fit."""
    for call in ast.walk(ast.parse(file.read_text())):
        if not isinstance(call, ast.Call) or getattr(call.func, "id", None) not in CALLS:
            continue
        for name, value in ((keyword.arg, keyword.value) for keyword in call.keywords):
            fitting = {"H": HOPPER_HEADS, "D": HOPPER_DEPTHS}.get(name or "")
            if fitting and isinstance(value, ast.Constant) and value.value not in fitting:
                yield f"{file.name}:{call.lineno}: {name}={value.value!r}"


def test_no_test_names_other_numbers() -> None:
    """Of heads or channels, unless it is about them."""
    files = [f for f in Path(__file__).parent.glob("test_*.py") if f.name not in PINNED]
    assert [found for file in files for found in named_sizes(file)] == []
    pinned = [Path(__file__).parent / name for name in PINNED]
    assert all(any(named_sizes(file)) for file in pinned)  # which also shows that it finds them
