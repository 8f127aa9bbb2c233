"""T2 where rows are pruned: tokens of the blocks kept, and few blocks.

The rows of test_t02_adversarial_rows, brought to the selectors that only pruned calls have on
Hopper: of one row in registers, in shared memory and in chunks; of a pair of rows; of blocks by one
warp; and those of the kernel for few rows. The blocks between those kept have better tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import pytest
import torch

from tests import oracle
from tests.adversarial import BUILDERS, narrow, realise
from tests.builders import int32
from tests.case import Case
from tests.checker import Result
from tests.families import CPU, CUDA, CUDA_MANY, Family, hopper
from tests.numeric import F32, FP8
from tests.test_t02_adversarial_rows import block_case

BF16 = torch.bfloat16
KERNELS = ((FP8, 16, 64), (BF16, 64, 128), (FP8, 64, 128), (BF16, 16, 64), (FP8, 32, 128),
           (BF16, 32, 64), (FP8, 128, 128))  # fmt: skip
PAIR_KERNELS = ((FP8, 16, 64), (FP8, 32, 128), (BF16, 16, 64), (BF16, 64, 128), (FP8, 64, 128),
                (BF16, 32, 64), (BF16, 16, 128))  # fmt: skip
# Block size, blocks kept, topk: almost all tokens; up to 2048 of them, up to 8192, more, and more
# than there is room for at once.
LAYOUTS = ((64, 5, 310), (64, 30, 300), (64, 100, 700), (128, 96, 2048), (128, 240, 2048))
PAIR_LAYOUTS = ((64, 30, 300), (64, 60, 999), (128, 20, 2048))
# Blocks, and those kept: up to 512 and 1024, which one warp selects, more, and many more.
BLOCKS = ((400, 64), (400, 3), (1000, 64), (1000, 999), (3000, 64), (20_000, 128))

needs_hopper = pytest.mark.skipif(
    not hopper(), reason="needs compute capability 9.0, and kernels for it"
)


@pytest.fixture(params=[CUDA, CUDA_MANY], ids=lambda family: family.name)
def either(request: pytest.FixtureRequest) -> Iterator[Family]:
    """The kernel for few rows, and those for many."""
    with request.param.active():
        yield request.param


def kept_case(wanted: F32, size: int, kept: int, topk: int, rows: int, *kernel: Any) -> Case:
    """Return a call whose rows keep every second block, and score its tokens as `wanted`.

    The pooled keys say so; tokens of the other blocks have a score of 3e38. Odd rows do not see the
    last token.
    """
    made = realise(wanted, *kernel)
    blocks, depth = 2 * kept - 1, made["k"].shape[1]
    k, scale = torch.zeros(blocks, size, depth), torch.full((blocks, size), 3e38)
    k[::2], scale[::2] = made["k"].float().view(kept, size, -1), made["k_scale"].view(kept, size)
    k[1::2, :, 0] = 1
    pooled_k, pooled_scale = torch.zeros(blocks, depth), torch.ones(blocks)
    pooled_k[::2, 0], pooled_scale[1::2] = 1, 0
    return Case(
        q=made["q"].expand(rows, -1, -1).contiguous(),
        k=k.flatten(0, 1).to(kernel[0]),
        weights=made["weights"].expand(rows, -1).contiguous(),
        k_scale=scale.flatten(),
        ke=int32(blocks * size - np.arange(rows) % 2),
        pooled=(pooled_k.to(kernel[0]), pooled_scale),
        block_size=size,
        block_topk=kept,
        topk=topk,
    )


class Runs(Protocol):
    """What has the operator under test."""

    def index(self, case: Case) -> Result: ...


def check_tokens(
    family: Runs, name: str, layout: tuple[int, int, int], rows: int, *kernel: Any
) -> None:
    """Compare all rows of a call with what they were made for."""
    size, kept, topk = layout
    wanted = BUILDERS[name](size * kept, topk, np.random.default_rng(10))
    got = family.index(kept_case(wanted, size, kept, topk, rows, *kernel))
    for parity in range(min(rows, 2)):
        best = oracle.best(wanted[: len(wanted) - parity], topk)
        tokens = best // size * 2 * size + best % size
        indices, scores = (t[parity::2].numpy() for t in got)
        assert (indices == tokens).all(), (layout, kernel)
        assert np.array_equal(scores, np.broadcast_to(wanted[best], scores.shape), equal_nan=True)


def check_blocks(family: Runs, name: str, blocks: int, kept: int, *kernel: Any) -> None:
    """Compare the blocks that three rows keep with what they were made for."""
    wanted = BUILDERS[name](blocks, kept, np.random.default_rng(11))
    got = family.index(block_case(wanted, kept, *kernel).rows([0, 0, 0])).indices
    inner = oracle.best(wanted[1:-1], kept - 2) + 1
    want = np.concatenate([[0], inner, [blocks - 1]])
    assert (got.numpy().reshape(3, kept, 8)[:, :, 0] // 8 == want).all(), (blocks, kept, kernel)


def turn(name: str, i: int, kernels: tuple[Any, ...]) -> Any:
    """Return a kernel: those there are take turns."""
    return kernels[(list(BUILDERS).index(name) + i) % len(kernels)]


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("name", BUILDERS)
def test_tokens_of_some_blocks(either: Family, name: str) -> None:
    """Of three rows, each by itself."""
    for i, layout in enumerate(LAYOUTS):
        check_tokens(either, name, layout, 3, *turn(name, i, KERNELS))


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("name", BUILDERS)
def test_tokens_of_pairs_of_rows(either: Family, name: str) -> None:
    """Of so many rows that they go by pairs, all with the same blocks."""
    few = torch.cuda.get_device_properties("cuda").multi_processor_count
    rows = 6 * few + 37 if either is CUDA else few + 8  # three pairs for each; one
    for i, layout in enumerate(PAIR_LAYOUTS):
        check_tokens(either, name, layout, rows, *turn(name, i, PAIR_KERNELS))


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("name", BUILDERS)
def test_some_blocks(either: Family, name: str) -> None:
    """Of three rows, which share the warps that select."""
    for i, (blocks, kept) in enumerate(BLOCKS):
        check_blocks(either, name, blocks, kept, *turn(name, i, KERNELS))


@pytest.mark.parametrize("name", ["normal", "plateau 50%", "some nan", "signed zeros"])
def test_rows_are_what_we_asked_for(name: str) -> None:
    """The tricks themselves, on the CPU: each is pruned, and right."""
    with CPU.active():
        for i, layout in enumerate((*LAYOUTS[:3], *PAIR_LAYOUTS)):
            check_tokens(CPU, name, layout, 3, *turn(name, i, KERNELS[::3]))
        check_blocks(CPU, name, 400, 64, *KERNELS[0])
    wanted = BUILDERS[name](960, 300, np.random.default_rng(0))
    case = kept_case(wanted, 32, 30, 300, 1, BF16, 16, 64)
    assert oracle.index(narrow(case), oracle.ieee_score).kept == [list(range(0, 59 * 32, 64))]
