"""T13: calls captured in a CUDA graph, replayed on new data, give the bytes of eager calls.

Catches synchronisation and host reads, memory that a replay no longer owns, and lengths that are
fixed at capture.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

import hisa
from hisa.around import mask_windows
from tests.builders import shaped
from tests.case import same_bytes
from tests.numeric import DTYPES, short_name

pytestmark = pytest.mark.gpu
M, N = 24, 3000
H, D = shaped(H=8, D=64).values()
OPTIONS: dict[str, Any] = {"block_size": 32, "block_topk": 6, "topk": 50}


class Inputs:
    """Inputs at fixed addresses, refilled for every replay."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.q = torch.zeros(M, H, D, device="cuda", dtype=dtype)
        self.k = torch.zeros(N, D, device="cuda", dtype=dtype)
        self.weights = torch.zeros(M, H, device="cuda")
        self.ks = torch.zeros(M, device="cuda", dtype=torch.int32)
        self.ke = torch.zeros(M, device="cuda", dtype=torch.int32)
        self.mask = torch.zeros(1, M, N, device="cuda", dtype=torch.bool)

    def refill(self, seed: int) -> None:
        """New numbers, and windows that are empty, negative, beyond the end, shrinking, growing."""
        random = torch.Generator("cuda").manual_seed(seed)
        for tensor in (self.q, self.k, self.weights):
            values = torch.randn(tensor.shape, device="cuda", generator=random)
            tensor.copy_(values.to(tensor.dtype))
        longest = (N, 0, N // 2, 300, N + 99)[seed % 5]
        self.ke.random_(-4, longest + 1, generator=random)
        self.ks.random_(-4, 100, generator=random)
        position = torch.arange(N, device="cuda")
        self.mask.copy_((position >= self.ks[:, None]) & (position < self.ke[:, None]))

    def call(self) -> list[Tensor]:
        """Run every op."""
        windows: dict[str, Any] = {"ks": self.ks, "ke": self.ke}
        pooled = hisa.pool_keys(self.k, block_size=32)
        return [
            *pooled,
            *hisa.index(self.q, self.k, self.weights, return_scores=True, **windows, **OPTIONS),
            hisa.index(self.q, self.k, self.weights, pooled=pooled, **windows, **OPTIONS),
            *hisa.flat_index(self.q, self.k, self.weights, topk=50, return_scores=True, **windows),
            hisa.flat_index(self.q, self.k, self.weights, topk=2900, **windows),
            *mask_windows(self.mask),
        ]


@contextmanager
def no_synchronisation() -> Iterator[None]:
    """Raise if the host waits for the device."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", DTYPES, ids=short_name)
@pytest.mark.parametrize(
    "replays", [100, pytest.param(1000, marks=[pytest.mark.long, pytest.mark.seconds(600)])]
)
def test_replays(dtype: torch.dtype, replays: int) -> None:
    """Replays with new data between other allocations are byte-equal to eager calls."""
    inputs = Inputs(dtype)
    inputs.refill(0)
    inputs.call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = inputs.call()
    noise = []
    for seed in range(replays):
        inputs.refill(seed)
        noise.append(torch.full((1 + seed * 7919 % 100000,), -777, device="cuda"))
        noise = noise[-seed % 5 - 1 :]
        graph.replay()
        replayed = [output.clone() for output in outputs]
        for ours, eager in zip(replayed, inputs.call(), strict=True):
            assert same_bytes(ours, eager), seed


@pytest.mark.parametrize("dtype", DTYPES, ids=short_name)
def test_no_synchronisation(dtype: torch.dtype) -> None:
    """No op waits for the device, whatever it does."""
    inputs = Inputs(dtype)
    inputs.refill(1)
    inputs.call()
    with no_synchronisation():
        inputs.call()
