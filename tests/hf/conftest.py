"""Fixtures of the Hugging Face tests."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.hf.models import GENERATING, KINDS, indexers, shared_model


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
