"""Fixtures and options shared by the whole suite."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from types import FrameType

import pytest
import torch

from tests import builders
from tests.families import CUDA, FAMILIES, REFERENCE, Family, available, distinct, usable_cuda

TEST_SECONDS = 60


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options that narrow a run down to one failure."""
    parser.addoption("--families", default="", help="comma-separated kernel families to run")
    parser.addoption("--shapes", default="any", choices=builders.SHAPES, help="of random calls")
    parser.addoption("--fuzz-seed", type=int, help="run only this seed of the T1 fuzz")


def pytest_configure(config: pytest.Config) -> None:
    """Register the marker that this file reads, and hand on an option."""
    builders.shapes = config.getoption("shapes")
    config.addinivalue_line("markers", "seconds(n): time limit of one test, 60 by default")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Parametrise `family` over the kernel families, `any_family` over the reference too.

    `cuda_family` takes those of a GPU, `device` the devices of all. What runs on a GPU has the mark
    `gpu`.
    """
    wanted = set(filter(None, metafunc.config.getoption("families").split(",")))
    named = distinct(f for f in (*FAMILIES, REFERENCE) if f.name in wanted)
    for fixture in {"family", "any_family"} & set(metafunc.fixturenames):
        chosen = named or available() + ([REFERENCE] if fixture == "any_family" else [])
        parameters = [pytest.param(f, id=f.name, marks=marks_of(f.device)) for f in chosen]
        metafunc.parametrize(fixture, parameters, indirect=True)
    if "cuda_family" in metafunc.fixturenames:
        chosen = [f for f in named or available() if f.device == "cuda"] or [CUDA]
        parameters = [pytest.param(f, id=f.name, marks=marks_of(f.device)) for f in chosen]
        metafunc.parametrize("cuda_family", parameters, indirect=True)
    if "device" in metafunc.fixturenames:
        devices = dict.fromkeys(f.device for f in named or available())
        metafunc.parametrize("device", [pytest.param(d, marks=marks_of(d)) for d in devices])


def marks_of(device: str) -> list[pytest.MarkDecorator]:
    """Return the marks of tests on a device."""
    return [pytest.mark.gpu] if device == "cuda" else []


@pytest.fixture
def family(request: pytest.FixtureRequest) -> Iterator[Family]:
    """One kernel family, active for the length of the test."""
    with request.param.active():
        yield request.param


any_family = cuda_family = family


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none, or where hisa was built without CUDA."""
    if builders.shapes == "hopper":  # which has kernels for two of the dtypes
        skip = pytest.mark.skip(reason="fp32 and fp16, which the kernels for Hopper do not take")
        for item in items:
            if dtype_of(item) in builders.HOPPER_DTYPES:
                item.add_marker(skip)
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    if gpu and not usable_cuda():
        for item in gpu:
            item.add_marker(pytest.mark.skip(reason="needs a GPU and a build with CUDA"))


def dtype_of(item: pytest.Item) -> torch.dtype | None:
    """Return the dtype that a test is parametrised with."""
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    dtype: torch.dtype | None = parameters.get("dtype")
    return dtype


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Run on one thread, so that parallel workers do not fight; tests of threads set their own."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def watchdog(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a test that runs too long (T24), and kill the process if a kernel never returns."""
    marker = request.node.get_closest_marker("seconds")
    seconds = marker.args[0] if marker else TEST_SECONDS
    if request.node.get_closest_marker("long") or not hasattr(signal, "SIGALRM"):
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # a second alarm ends the process
        signal.alarm(30)
        pytest.fail(f"ran longer than {seconds} s", pytrace=True)

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


os.environ.pop("HISA_CHECK", None)  # the suite turns it on where it means to
