"""T8: guarantees 1 and 2 of SPEC.md on random floats, byte for byte, without an oracle's scores.

Catches a refine stage that scores a token differently from the flat indexer, a fast path that
differs from the slow one at the boundary budget, blocks lost or kept that should not be.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests import oracle
from tests.builders import causal, exact_case, int32, random_case, shaped
from tests.case import Case, same_bytes
from tests.checker import Result
from tests.families import Family
from tests.numeric import DTYPES, short_name
from tests.test_t07_metamorphic import packed_case


@pytest.mark.parametrize("dtype", DTYPES, ids=short_name)
@pytest.mark.parametrize(
    ("heads", "depth", "size"), [(1, 16, 8), (4, 64, 16), (7, 128, 32), (64, 128, 64)]
)
def test_equal_to_flat_when_the_budget_covers(
    family: Family, dtype: torch.dtype, heads: int, depth: int, size: int
) -> None:
    """Windows that meet at most m blocks: indices and scores are flat's, bit for bit."""
    for seed in range(3):
        case = random_case(seed, dtype, M=5, N=5 * size - 3, **shaped(H=heads, D=depth),
                           block_size=size, block_topk=5, topk=2 * size - 1,
                           ks=int32([0, 1, size - 1, 2 * size + 3, 4 * size]))  # fmt: skip
        for pooling in ("mean", "max"):
            got, want = family.index(case, pooling=pooling), family.flat_index(case)
            assert same_bytes(got.indices, want.indices) and same_bytes(got.scores, want.scores)


def test_boundary_of_the_budget(family: Family) -> None:
    """Every prefix of a prompt: equal to flat up to exactly m blocks, pruned from one more on."""
    case = causal(
        random_case(3, M=80, N=80, block_topk=4, topk=32, **shaped(dtype=torch.float32, D=16))
    )
    got, want = family.index(case), family.flat_index(case)
    covered = case.ke.numpy() <= 4 * 8
    same = (got.indices == want.indices).all(1).numpy()
    assert same[covered].all() and not same[~covered].any()
    assert same_bytes(got.scores[: covered.sum()], want.scores[: covered.sum()])


def revealed_blocks(family: Family, case: Case) -> list[np.ndarray]:
    """Return the kept blocks of each row, by asking for all their tokens."""
    every = family.index(case, topk=case.block_topk * case.block_size)
    kept = []
    for row, tokens in enumerate(every.indices.numpy()):
        seen = oracle.window(case, row)
        start = 0 if seen is None else seen.start - seen.origin
        kept.append(np.unique((tokens[tokens >= 0] + start) // case.block_size))
    return kept


@pytest.mark.parametrize("seed", range(48))
def test_flat_on_the_kept_blocks(family: Family, seed: int) -> None:
    """Always: flat's top-k restricted to the kept blocks, which include the first and the last."""
    case = packed_case(seed)
    result, flat = family.index(case), family.flat_index(case, topk=len(case.k))
    for row, kept in enumerate(revealed_blocks(family, case)):
        seen = oracle.window(case, row)
        if seen is None:
            continue
        first, last = ((t - seen.origin) // case.block_size for t in (seen.start, seen.end - 1))
        assert kept[0] == first and kept[-1] == last
        assert len(kept) == min(case.block_topk, last - first + 1)
        length = seen.end - seen.start
        scores = flat.scores[row, :length].numpy()
        block = (np.arange(length) + seen.start - seen.origin) // case.block_size
        tokens = np.flatnonzero(np.isin(block, kept))
        want = tokens[oracle.best(scores[tokens], case.topk)]
        assert result.indices[row, : len(want)].tolist() == want.tolist()
        assert result.scores[row, : len(want)].tolist() == scores[want].tolist()


@pytest.mark.parametrize("seed", range(24))
def test_kept_blocks_are_the_best_pooled_keys(family: Family, seed: int) -> None:
    """Stage 1 is the flat indexer on the pooled keys of the inner candidates."""
    if not family.cpu_order:
        pytest.skip("a family may add up pooled scores in an order of its own; T10 covers it")
    case = packed_case(seed)
    pooled, scale = family.pool_keys(case)
    for row, kept in enumerate(revealed_blocks(family, case)):
        seen = oracle.window(case, row)
        if seen is None or len(oracle.candidates(case, seen)) <= case.block_topk:
            continue
        slots = [oracle.slot_of(case, first) for first in oracle.candidates(case, seen)[1:-1]]
        inner = case.rows([row]).replace(k=pooled, k_scale=scale, ks=int32([slots[0]]),
                                         ke=int32([slots[-1] + 1]), cu_seqlens_k=None,
                                         topk=case.block_topk - 2)  # fmt: skip
        best = family.flat_index(inner).indices[0].numpy()
        assert kept[1:-1].tolist() == (best + kept[0] + 1).tolist()


def test_block_choice_does_not_depend_on_topk(family: Family) -> None:
    """Topk only trims: results for every k are flat on the same kept blocks."""
    case = packed_case(0)
    every = family.index(case, topk=32)
    for topk in range(1, 32):
        narrow = family.index(case, topk=topk)
        for row in range(len(case.q)):
            count = int((every.indices[row] >= 0).sum())
            best = oracle.best(every.scores[row, :count].numpy(), topk)
            assert narrow.indices[row, : len(best)].tolist() == every.indices[row, best].tolist()


def recall(got: Result, want: Result) -> float:
    """Return the mean share of flat's tokens that were found."""
    shares = []
    for ours, theirs in zip(got.indices.tolist(), want.indices.tolist(), strict=True):
        flat = {t for t in theirs if t >= 0}
        shares.append(len(flat & set(ours)) / max(1, len(flat)))
    return float(np.mean(shares))


def test_recall_floor_on_clustered_keys(family: Family) -> None:
    """Where neighbouring keys are alike, pruning to a quarter keeps most of flat's tokens.

    Not a contract of the op, but a drop here means that blocks are ranked by something else.
    """
    generator = torch.Generator().manual_seed(0)
    heads, depth, dtype = shaped(H=4, D=32, dtype=torch.float32).values()
    centres = torch.randn(32, depth, generator=generator).repeat_interleave(32, dim=0)
    k = centres + 0.3 * torch.randn(1024, depth, generator=generator)
    q = torch.randn(16, heads, depth, generator=generator)
    weights = torch.rand(16, heads, generator=generator)
    case = Case(
        q=q.to(dtype), k=k.to(dtype), weights=weights, block_size=16, block_topk=16, topk=64
    )
    assert recall(family.index(case), family.flat_index(case)) > 0.95
    assert recall(family.index(case, block_topk=64), family.flat_index(case)) == 1


@pytest.mark.long
def test_dense_equivalence_long(family: Family) -> None:
    """1,000 exact configurations with a budget that covers every window."""
    for seed in range(1000):
        case = exact_case(seed, block_topk=2048, cu_seqlens_k=None)
        got, want = family.index(case), family.flat_index(case)
        assert same_bytes(got.indices, want.indices) and same_bytes(got.scores, want.scores)
