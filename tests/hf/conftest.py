"""Fixtures of the Hugging Face tests.

Tests run on the CPU. On a GPU too, in modules that say `ON_CUDA = True`, or that name tests in it:
there, what a test makes without naming a device is made on the GPU.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch

from tests.conftest import marks_of
from tests.families import available
from tests.hf.models import GENERATING, KINDS, indexers, shared_model


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Have the tests of ON_CUDA run on every device that there is."""
    on_cuda = getattr(metafunc.module, "ON_CUDA", False)
    wanted = on_cuda if isinstance(on_cuda, bool) else metafunc.function.__name__ in on_cuda
    devices = dict.fromkeys(family.device for family in available())
    if wanted and len(devices) > 1:
        parameters = [pytest.param(d, marks=marks_of(d)) for d in devices]
        metafunc.parametrize("_default_device", parameters, indirect=True)


@pytest.fixture(autouse=True)
def _default_device(request: pytest.FixtureRequest) -> Iterator[None]:
    """Where tensors are made."""
    with torch.device(request.param) if hasattr(request, "param") else nullcontext():
        yield


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """No gradients, and none of the expected warnings; tests of warnings record their own."""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="hisa: block_topk")
        yield


def _checked(kind: str, attention: str) -> Iterator[Any]:
    model = shared_model(kind, attention)
    yield model
    assert not any("forward" in vars(indexer) for indexer in indexers(model)), "left patched"


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    """Each supported model type."""
    return str(request.param)


@pytest.fixture
def model(kind: str) -> Iterator[Any]:
    """A tiny model of each supported type."""
    yield from _checked(kind, "eager")


@pytest.fixture(params=GENERATING)
def generator(request: pytest.FixtureRequest) -> Iterator[Any]:
    """A tiny model of each supported type that has `generate`."""
    yield from _checked(request.param, "eager")


@pytest.fixture
def deepseek() -> Iterator[Any]:
    """A tiny DeepSeek-V3.2, for what does not depend on the model."""
    yield from _checked("deepseek_v32", "sdpa")
