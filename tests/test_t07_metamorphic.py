"""T7: changes of a call that must not change a row's answer, or change it in a known way.

No oracle is involved, so these run on random floats and compare bytes. Each relation is one
function that takes a call and says what must hold; every relation runs on packed and unpacked calls
of every dtype. Catches rows that depend on their neighbours, on their place, on padding or on the
chunking of a prompt; future tokens that leak; an ignored window, scale or ReLU.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch

from tests.builders import Rng, as_tensor, causal, exact_case, int32, random_case, shaped
from tests.case import Case, same_bytes
from tests.checker import Result
from tests.families import Family
from tests.numeric import DTYPES

FAST, LONG = 24, 2000
Relation = Callable[[Family, Case, Rng], None]


def packed_case(seed: int) -> Case:
    """Return random floats in four segments, some rows pruned and some not; dtypes take turns."""
    rng = np.random.default_rng(seed)
    m, n = 6, 240
    edges = np.array([0, *np.sort(rng.integers(0, n + 1, 3)), n])
    segment = rng.integers(0, 4, m)
    first, past = edges[segment], edges[segment + 1]
    ks = rng.integers(first, np.maximum(first + 1, (first + past) // 2))
    ke = rng.integers(np.minimum(ks, past), past + 1)
    if seed % 3 == 0:
        ks, ke, edges = np.zeros(m, np.int64), rng.integers(1, n + 1, m), np.array([0, n])
    return random_case(seed, M=m, N=n, **shaped(H=3, D=16, dtype=DTYPES[seed % 4]),
                       block_topk=4, topk=13, ks=int32(ks), ke=int32(ke), cu_seqlens_k=int32(edges),
                       pooling=("mean", "max")[seed % 2])  # fmt: skip


def assert_equal(a: Result, b: Result) -> None:
    """Assert byte equality."""
    assert same_bytes(a.indices, b.indices), (a.indices, b.indices)
    assert same_bytes(a.scores, b.scores), (a.scores, b.scores)


def pick(result: Result, rows: object) -> Result:
    """Return some rows of a result."""
    return Result(result.indices[rows], result.scores[rows])  # type: ignore[index]


def keys_outside_the_window(family: Family, case: Case, rng: Rng) -> None:
    """Keys and scales outside a row's window do not matter to it."""
    row = int(rng.integers(len(case.q)))
    outside = torch.ones(len(case.k), dtype=torch.bool)
    outside[int(case.ks[row]) : int(case.ke[row])] = False
    noise = random_case(int(rng.integers(1 << 30)), case.k.dtype, N=len(case.k), D=case.shape[3])
    k = case.k.clone().view(torch.uint8)
    k[outside] = noise.k.view(torch.uint8)[outside]
    scale = case.k_scale
    scale = None if scale is None else torch.where(outside, noise.k_scale, scale)
    changed = case.replace(k=k.view(case.k.dtype), k_scale=scale)
    for run in (family.index, family.flat_index):
        assert_equal(pick(run(changed), [row]), pick(run(case), [row]))


def row_permutation(family: Family, case: Case, rng: Rng) -> None:
    """Permuting rows permutes the answers; a row repeated is an answer repeated."""
    order = torch.from_numpy(rng.integers(0, len(case.q), 2 * len(case.q)))
    assert_equal(family.index(case.rows(order)), pick(family.index(case), order))
    assert_equal(family.flat_index(case.rows(order)), pick(family.flat_index(case), order))


def row_alone(family: Family, case: Case, rng: Rng) -> None:
    """A row alone gets what it gets in the batch."""
    whole, flat = family.index(case), family.flat_index(case)
    for row in range(len(case.q)):
        assert_equal(family.index(case.rows([row])), pick(whole, [row]))
        assert_equal(family.flat_index(case.rows([row])), pick(flat, [row]))


def big_batch(family: Family, case: Case, rng: Rng) -> None:
    """Rows among many others, of any number, get what they get in a small batch."""
    rows = torch.from_numpy(rng.integers(0, len(case.q), int(rng.integers(30, 150))))
    assert_equal(family.index(case.rows(rows)), pick(family.index(case), rows))


def scaled_weights(family: Family, case: Case, rng: Rng) -> None:
    """Weights times a power of two: the same tokens, the scores times that power."""
    factor = 2.0 ** int(rng.integers(-20, 20))
    for run in (family.index, family.flat_index):
        small, large = run(case), run(case.replace(weights=case.weights * factor))
        assert_equal(large, Result(small.indices, small.scores * factor))


def scaled_keys(family: Family, case: Case, rng: Rng) -> None:
    """Key scales times a power of two: the same tokens, the scores times that power."""
    factor = 2.0 ** int(rng.integers(-8, 8))
    scale = torch.ones(len(case.k)) if case.k_scale is None else case.k_scale
    small = case.replace(k_scale=scale)
    large = case.replace(k_scale=scale * factor)
    a, b = family.flat_index(small), family.flat_index(large)
    assert_equal(b, Result(a.indices, a.scores * factor))
    if case.k.dtype != torch.float16:  # a pooled key could leave the range of fp16
        a, b = family.index(small), family.index(large)
        assert_equal(b, Result(a.indices, a.scores * factor))


def head_permutation(family: Family, case: Case, rng: Rng) -> None:
    """On exact inputs the order of the heads does not matter, nor does a head of weight 0."""
    exact = exact_case(int(rng.integers(1 << 30)), budget=2e5, **shaped(H=5, D=32))
    order = torch.from_numpy(rng.permutation(exact.shape[2]))
    mixed = exact.replace(q=exact.q.float()[:, order].to(exact.q.dtype),
                          weights=exact.weights[:, order])  # fmt: skip
    a, b = family.index(exact), family.index(mixed)
    assert torch.equal(a.indices, b.indices) and torch.equal(a.scores, b.scores)
    q = torch.cat([exact.q.float(), torch.ones(len(exact.q), 1, exact.shape[3])], dim=1).to(
        exact.q.dtype
    )
    weights = torch.cat([exact.weights, torch.zeros(len(exact.q), 1)], dim=1)
    c = family.index(exact.replace(q=q, weights=weights))
    assert torch.equal(a.indices, c.indices) and torch.equal(a.scores, c.scores)


def channel_permutation(family: Family, case: Case, rng: Rng) -> None:
    """On exact inputs the order of the channels does not matter."""
    exact = exact_case(int(rng.integers(1 << 30)), budget=2e5, **shaped(H=2, D=48))
    order = torch.from_numpy(rng.permutation(exact.shape[3]))
    mixed = exact.replace(q=exact.q.float()[..., order].to(exact.q.dtype),
                          k=exact.k.float()[:, order].to(exact.k.dtype))  # fmt: skip
    a, b = family.index(exact), family.index(mixed)
    assert torch.equal(a.indices, b.indices) and torch.equal(a.scores, b.scores)


def left_padding(family: Family, case: Case, rng: Rng) -> None:
    """Keys in front, in a segment of their own, any number: indices are relative to the window."""
    pad = int(rng.integers(1, 40))
    front = random_case(int(rng.integers(1 << 30)), case.k.dtype, N=pad, D=case.shape[3])
    k = torch.cat([front.k.view(torch.uint8), case.k.view(torch.uint8)]).view(case.k.dtype)
    scale = case.k_scale
    scale = None if scale is None else torch.cat([front.k_scale, scale])
    cu = torch.cat([int32([0]), case.cu_seqlens_k + pad])
    moved = case.replace(k=k, k_scale=scale, ks=case.ks + pad, ke=case.ke + pad, cu_seqlens_k=cu)
    assert_equal(family.index(moved), family.index(case))
    assert_equal(family.flat_index(moved), family.flat_index(case))


def segment_alone(family: Family, case: Case, rng: Rng) -> None:
    """A segment on its own gives its rows what they get in the packed batch."""
    edges = case.cu_seqlens_k.tolist()
    whole = family.index(case)
    for first, past in itertools.pairwise(edges):
        mine = (case.ks >= first) & (case.ks < past)
        scale = None if case.k_scale is None else case.k_scale[first:past]
        part = case.rows(mine).replace(k=case.k[first:past], k_scale=scale, cu_seqlens_k=None)
        part = part.replace(ks=part.ks - first, ke=part.ke - first)
        assert_equal(family.index(part), pick(whole, mine))


def no_future(family: Family, case: Case, rng: Rng) -> None:
    """Cutting the keys off behind the last window changes nothing, inside a block or not."""
    end = max(1, int(case.ke.max()))
    scale = None if case.k_scale is None else case.k_scale[:end]
    short = case.replace(
        k=case.k[:end], k_scale=scale, cu_seqlens_k=case.cu_seqlens_k.clamp(max=end)
    )
    assert_equal(family.index(short), family.index(case))
    assert_equal(family.flat_index(short), family.flat_index(case))


def pooled_given(family: Family, case: Case, rng: Rng) -> None:
    """Pooled keys given give the bytes of pooled keys computed."""
    assert_equal(family.index(case, pooled=family.pool_keys(case)), family.index(case))


def smaller_topk(family: Family, case: Case, rng: Rng) -> None:
    """A smaller topk selects a subset, the best of it, from the same blocks."""
    topk = int(rng.integers(1, case.topk + 1))
    for run in (family.index, family.flat_index):
        wide, narrow = run(case), run(case, topk=topk)
        for row in range(len(case.q)):
            kept = set(narrow.indices[row].tolist())
            assert kept <= set(wide.indices[row].tolist()) | {-1}
            dropped = [
                s for t, s in zip(*(x[row].tolist() for x in wide), strict=True) if t not in kept
            ]
            used = narrow.indices[row] >= 0
            if dropped and used.any():
                assert narrow.scores[row][used].min() >= max(dropped)


def unused_tail_blocks(family: Family, case: Case, rng: Rng) -> None:
    """A row does not notice a larger block_topk that its window cannot use."""
    wide = family.index(case, block_topk=31)
    assert_equal(family.index(case, block_topk=40), wide)


RELATIONS: list[Relation] = [
    keys_outside_the_window,
    row_permutation,
    row_alone,
    big_batch,
    scaled_weights,
    scaled_keys,
    head_permutation,
    channel_permutation,
    left_padding,
    segment_alone,
    no_future,
    pooled_given,
    smaller_topk,
    unused_tail_blocks,
]


@pytest.mark.parametrize("relation", RELATIONS, ids=lambda r: r.__name__)
def test_relation(family: Family, relation: Relation) -> None:
    """Each relation on a few calls of every dtype."""
    for seed in range(FAST):
        relation(family, packed_case(seed), np.random.default_rng(seed))


@pytest.mark.long
@pytest.mark.parametrize("relation", RELATIONS, ids=lambda r: r.__name__)
def test_relation_long(family: Family, relation: Relation) -> None:
    """Each relation on 2,000 calls."""
    for seed in range(FAST, LONG):
        relation(family, packed_case(seed), np.random.default_rng(seed))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_chunked_prefill_is_one_shot(family: Family, dtype: torch.dtype) -> None:
    """A prompt of 61 tokens split in two at every position, and row by row: the same bytes.

    Each chunk sees only the keys that exist by then, so a pooled key must not depend on later
    tokens.
    """
    n = 61
    case = causal(random_case(7, dtype, M=n, N=n, block_topk=3, topk=10, **shaped(H=2, D=16)))
    whole, flat = family.index(case), family.flat_index(case)

    def chunk(start: int, end: int) -> Case:
        scale = None if case.k_scale is None else case.k_scale[:end]
        return case.rows(slice(start, end)).replace(k=case.k[:end], k_scale=scale)

    for split in range(n + 1):
        for part in (slice(0, split), slice(split, n)):
            if part.start < part.stop:
                assert_equal(family.index(chunk(part.start, part.stop)), pick(whole, part))
    for token in range(n):
        decode = chunk(token, token + 1)
        assert_equal(family.index(decode), pick(whole, [token]))
        assert_equal(family.flat_index(decode), pick(flat, [token]))


def test_needle_in_an_early_chunk(family: Family) -> None:
    """The last chunk still reaches a needle that came many chunks before."""
    heads, depth, dtype = shaped(H=1, D=16, dtype=torch.float32).values()
    k = np.zeros((400, depth))
    k[96:104, 3] = 1  # one block in the middle of the past
    q = np.zeros((2, heads, depth))
    q[:, :, 3] = 1
    case = Case(q=as_tensor(q, dtype), k=as_tensor(k, dtype), weights=torch.ones(2, heads),
                block_topk=3, topk=9)  # fmt: skip
    case = causal(case)
    for row in family.index(case).indices.tolist():
        assert set(range(96, 104)) <= set(row)
