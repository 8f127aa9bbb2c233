"""The kernel families that the suite runs against: one entry per device and instruction set.

A test takes the fixture `family` and calls `family.index(case)`, `family.flat_index(case)` or
`family.pool_keys(case)`. The results come back on the CPU and have passed the output checker.
A new device or kernel family joins every test by one line in `FAMILIES`.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import hisa
from hisa.bounds import DOT_ROUNDOFF
from tests.case import Case
from tests.checker import Result, assert_valid_output
from tests.numeric import FP8


@dataclass(frozen=True)
class Family:
    """Where calls run, and what may be asked of the arithmetic there."""

    name: str
    device: str = "cpu"
    isa: str | None = None  # what hisa._C.set_cpu_isa takes
    parts: int = 0  # what hisa._C.set_cpu_parts takes
    hopper: bool = True  # what hisa._C.use_kernels takes
    split: bool = True  # likewise
    module: str = "hisa"  # the module that has index, flat_index and pool_keys
    cpu_order: bool = True  # sums run in the order that the CPU path documents
    dot_roundoff: float = DOT_ROUNDOFF["cpu"]  # unit roundoff of the sums inside a dot product

    @contextmanager
    def active(self) -> Iterator[Family]:
        """Make this family the one that runs; afterwards, the one that ran before."""
        before = _running[-1]
        _running.append(self)
        self._choose()
        try:
            yield self
        finally:
            _running.pop()
            before._choose()

    def _choose(self) -> None:
        extension = importlib.import_module("hisa._C")
        extension.set_cpu_isa(self.isa or "auto")
        extension.set_cpu_parts(self.parts)
        extension.use_kernels(hopper=self.hopper, split=self.split)

    @property
    def api(self) -> Any:
        """The module under test."""
        return importlib.import_module(self.module)

    def roundoff(self, case: Case) -> float:
        """Return the unit roundoff of the sums inside the dot products of a call."""
        heads, depth = case.q.shape[1:]
        taken = heads in (16, 32, 64, 128) and depth in (64, 128) and case.q.dtype == FP8
        on_hopper = self.device == "cuda" and self.hopper and hopper()
        return FP8_ROUNDOFF if taken and on_hopper else self.dot_roundoff

    def dot_limit(self, dtype: torch.dtype) -> int:
        """Return the integers up to which sums of a dot product are exact on every kernel family.

        fp8 tensor cores may keep as few as 13 bits below the largest term; all else is fp32.
        """
        return 2**13 if dtype == FP8 else 2**24

    def index(self, case: Case, **changes: Any) -> Result:
        """Run `index` with scores and check the output's form."""
        case = case.replace(**changes)
        on = case.to(self.device)
        indices, scores = self.api.index(
            on.q, on.k, on.weights, **on.index_args(), return_scores=True
        )
        return self.checked(case, indices, scores, packed=True)

    def flat_index(self, case: Case, **changes: Any) -> Result:
        """Run `flat_index` with scores and check the output's form."""
        case = case.replace(**changes)
        on = case.to(self.device)
        indices, scores = self.api.flat_index(
            on.q, on.k, on.weights, **on.flat_args(), return_scores=True
        )
        return self.checked(case, indices, scores, packed=False)

    def pool_keys(self, case: Case, **changes: Any) -> tuple[Tensor, Tensor]:
        """Run `pool_keys` and check the form of what it returns."""
        case = case.replace(**changes)
        on = case.to(self.device)
        pooled, scale = self.api.pool_keys(on.k, **on.pool_args())
        slots = -(-case.k.shape[0] // case.block_size)
        assert pooled.dtype == case.k.dtype and tuple(pooled.shape) == (slots, case.k.shape[1])
        assert scale.dtype == torch.float32 and tuple(scale.shape) == (slots,)
        assert pooled.device == on.k.device and scale.device == on.k.device
        return pooled.cpu(), scale.cpu()

    def checked(self, case: Case, indices: Tensor, scores: Tensor, packed: bool) -> Result:
        """Bring an output to the CPU and check it."""
        assert indices.device.type == self.device and scores.device.type == self.device
        result = Result(indices.cpu(), scores.cpu())
        assert_valid_output(case, result, packed)
        return result


# Hopper's sums of fp8 products, of about 14 bits, on random inputs: their errors are a seventh of
# what this allows, and that a thirtieth of the scores' spread. The worst case, 2^-12 in
# hisa/bounds.py, would allow anything.
FP8_ROUNDOFF = 2.0**-18

CPU = Family("cpu-baseline", isa="baseline")
# Rows are cut into parts, as where they are fewer than threads and long: tests have others.
CPU_PARTS = Family("cpu-parts", isa="auto", parts=3)
CUDA = Family("cuda", device="cuda", cpu_order=False, dot_roundoff=DOT_ROUNDOFF["cuda"])
# The kernels for many rows, whatever the number of rows: tests have few.
CUDA_MANY = replace(CUDA, name="cuda-many", split=False)
# What other GPUs run, on Hopper.
CUDA_PORTABLE = replace(CUDA, name="cuda-portable", hopper=False)
CUDA_PORTABLE_MANY = replace(CUDA_PORTABLE, name="cuda-portable-many", split=False)
REFERENCE = Family("reference", module="hisa.reference", cpu_order=False)

FAMILIES = (
    CPU,
    Family("cpu-avx2", isa="avx2"),
    Family("cpu-avx512", isa="avx512"),
    CPU_PARTS,
    CUDA,
    CUDA_MANY,
    CUDA_PORTABLE,
    CUDA_PORTABLE_MANY,
)


_running = [Family("best")]  # what runs, behind what ran before


def usable_isas() -> list[str]:
    """Return the CPU instruction sets that this build and machine have."""
    import hisa

    names = hisa.build_info()["cpu_isa_available"]
    assert isinstance(names, list)
    return names


def available() -> list[Family]:
    """Return the kernel families of this build that this machine can run."""
    isas = ["auto", *usable_isas()]
    return distinct(f for f in FAMILIES if (f.isa in isas if f.isa else usable_cuda()))


def distinct(families: Iterable[Family]) -> list[Family]:
    """Leave out what runs here as one before it does: the portable ones, without Hopper."""
    found: dict[Any, Family] = {}
    for f in families:
        kind = (f.module, f.device, f.isa, f.parts, f.hopper and hopper(), f.split)
        found.setdefault(kind, f)
    return list(found.values())


def usable_cuda() -> bool:
    """Return whether this build has CUDA kernels and this machine a GPU."""
    import hisa

    return bool(hisa.build_info()["cuda"]) and torch.cuda.is_available()


def hopper() -> bool:
    """Say whether this build has the kernels of csrc/cuda/sm90, and this GPU runs them."""
    built = usable_cuda() and bool(hisa.build_info()["hopper"])
    return built and torch.cuda.get_device_capability() == (9, 0)
