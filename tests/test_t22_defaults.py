"""T22: what torch makes by default, and where, does not matter.

Catches tensors made without a dtype or a device, under `torch.set_default_device` or
`torch.set_default_dtype`: not where the inputs are, or of a dtype that no operator takes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

import hisa
from hisa import testing
from tests.numeric import DTYPES, FP8, short_name

SIZES: dict[str, Any] = {"block_size": 8, "block_topk": 4, "topk": 16}
SEQUENCES = [(9, 90), (20, 200)]


def inputs(dtype: torch.dtype) -> dict[str, Any]:
    """Two packed sequences."""
    return dict(testing.packed_inputs(1, SEQUENCES, H=4, D=16, dtype=dtype))


def recommended(given: dict[str, Any]) -> list[Any]:
    """What `recommend` finds, but for the times."""
    found = hisa.recommend(**given, **SIZES, target=0.5, progress=False)
    return [str(found)[:40], found.pick is None, *(c.recall for c in found.candidates)]


def judged(given: dict[str, Any]) -> Any:
    """What the checks for users' tests take, and say."""
    flat = {name: value for name, value in given.items() if name != "cu_seqlens_k"}
    indices, scores = hisa.flat_index(**flat, topk=16, return_scores=True)
    testing.assert_matches_flat(indices, scores=scores, **given)
    windows = {"ks": given["ks"], "ke": given["ke"], "cu_seqlens_k": given["cu_seqlens_k"]}
    testing.assert_valid_indices(hisa.index(**given, **SIZES), keys=290, **windows, **SIZES)
    return testing.to_selection(indices, keys=290, ks=given["ks"], ke=given["ke"])


CALLS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "index": lambda given: hisa.index(**given, **SIZES, return_scores=True),
    "compare": lambda given: hisa.compare(**given, **SIZES, progress=False),
    "explain": lambda given: hisa.explain(**given, **SIZES, row=28),
    "recommend": recommended,
    "certify": lambda given: hisa.certify(**given, **SIZES),
    "exact_index": lambda given: hisa.exact_index(**given, **SIZES),
    "testing": judged,
}
BUILDERS: dict[str, Callable[[torch.dtype], Any]] = {
    "packed": inputs,
    "random": lambda dtype: testing.random_inputs(2, M=5, N=40, H=2, D=16, dtype=dtype),
    "exact": lambda dtype: testing.exact_inputs(2, M=5, N=40, H=2, D=16, dtype=dtype),
    "needle": lambda dtype: testing.needle_inputs(20, block_size=8, N=40, D=16, dtype=dtype),
}


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Change torch's default dtype for a while."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


DEFAULTS: dict[str, Callable[[], Any]] = {
    "device": lambda: torch.device("meta"),  # for any other: what is made there cannot be read
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
}


def assert_same(got: Any, want: Any) -> None:
    """Equal to the bit, dtypes and devices included."""
    assert type(got) is type(want)
    if isinstance(want, Tensor):
        assert got.dtype == want.dtype and got.device == want.device
        assert torch.equal(got.contiguous().view(torch.uint8), want.contiguous().view(torch.uint8))
    elif dataclasses.is_dataclass(want) and not isinstance(want, type):
        assert_same(vars(got), vars(want))
    elif isinstance(want, dict):
        assert list(got) == list(want)
        assert_same(list(got.values()), list(want.values()))
    elif isinstance(want, list | tuple):
        assert len(got) == len(want)
        for pair in zip(got, want, strict=True):
            assert_same(*pair)
    else:
        assert got == want or str(got) == str(want)  # NaN


@pytest.mark.parametrize("default", DEFAULTS)
@pytest.mark.parametrize("dtype", [torch.float32, FP8], ids=short_name)
@pytest.mark.parametrize("name", CALLS)
def test_instruments(name: str, dtype: torch.dtype, default: str) -> None:
    """With tensors on the CPU, whatever the defaults."""
    want = CALLS[name](inputs(dtype))
    with DEFAULTS[default]():
        assert_same(CALLS[name](inputs(dtype)), want)


@pytest.mark.parametrize("default", DEFAULTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=short_name)
@pytest.mark.parametrize("name", BUILDERS)
def test_inputs(name: str, dtype: torch.dtype, default: str) -> None:
    """A seed means the same inputs, on the CPU unless another device is asked for."""
    want = BUILDERS[name](dtype)
    with DEFAULTS[default]():
        assert_same(BUILDERS[name](dtype), want)
