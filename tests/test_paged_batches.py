"""Paged batches of every size, with any number of rows per sequence: each row as if alone.

Catches a batch, or the rows of one sequence, split over blocks of threads at the wrong place, and
sequences too short for all of their rows.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.builders import random_case
from tests.case import same_bytes
from tests.families import Family
from tests.numeric import FP8
from tests.paged import last_rows, paginate

BATCHES = (1, 2, 31, 32, 33, 127, 128, 512)
B, PAGE, KEPT = 32, 16, 3
KINDS = [  # dtype, heads, channels: those that csrc/cuda/sm90 takes on an H100, and others
    (torch.bfloat16, 16, 64),
    (FP8, 64, 128),
    (torch.float32, 2, 16),
    (FP8, 3, 32),
]


def ragged(rng: np.random.Generator, batch: int) -> list[int]:
    """Return lengths at edges of pages and blocks, empty ones, and some that lose blocks."""
    edges = np.array([0, 1, PAGE, B, KEPT * B, (KEPT + 1) * B, 6 * B])
    lengths = rng.choice(edges, batch) + rng.integers(-1, 9, batch)
    return [int(n) for n in np.where(rng.random(batch) < 0.1, 0, lengths.clip(0))]


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("next_n", range(1, 9))
def test_a_batch_is_its_sequences(family: Family, batch: int, next_n: int) -> None:
    """The bytes of `index` on the packed keys; so for all pairs of sizes, each kind with some."""
    seed = 8 * batch + next_n
    rng = np.random.default_rng(seed)
    dtype, heads, depth = KINDS[(next_n + BATCHES.index(batch)) % len(KINDS)]
    lengths = ragged(rng, batch)
    lengths[-1] = 7 * B + 5  # so that the last sequence loses blocks
    case = random_case(seed, dtype, M=batch * next_n, N=sum(lengths), H=heads, D=depth,
                       **last_rows(lengths, next_n), block_size=B, block_topk=KEPT,
                       topk=50)  # fmt: skip
    pooled = paginate(rng, case, next_n, PAGE).pool(family)
    for mine, packed in zip(pooled.index(family), family.index(case), strict=True):
        assert same_bytes(mine, packed)
