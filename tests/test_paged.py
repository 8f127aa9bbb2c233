"""Paged caches: bit for bit what the same keys give one after the other.

Catches a wrong page, place or scale, tokens and slots that are read though they must not be, slots
that are written though they must not be, and rows or blocks that end one token off.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

from tests import oracle
from tests.builders import INT_MAX, INT_MIN, int32, random_case, shaped
from tests.case import same_bytes
from tests.checker import assert_same
from tests.families import REFERENCE, Family
from tests.numeric import DTYPES, FP8, short_name
from tests.paged import (
    PAGE_SIZES,
    Paged,
    exact_paged,
    fill,
    last_rows,
    paginate,
    physical,
)


def raw(tensor: torch.Tensor) -> torch.Tensor:
    """View rows as bytes."""
    return tensor.contiguous().view(torch.uint8).view(len(tensor), -1)


def assert_slots(paged: Paged, got: Paged, want: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Assert that complete blocks have the pooled keys of the packed call, and nothing changed."""
    slots = paged.slots()
    for mine, before, packed in zip(got.pooled(), paged.pooled(), want, strict=True):
        expected = raw(before).clone()
        for slot, page in slots.items():
            expected[page] = raw(packed)[slot]
        assert torch.equal(raw(mine), expected), paged.describe()


@pytest.mark.parametrize("start", range(0, 400, 25))
def test_exact_fuzz(any_family: Family, start: int) -> None:
    """400 calls on which sums are exact: pooled keys, positions, scores, places, by the oracle."""
    for seed in range(start, start + (5 if any_family is REFERENCE else 25)):
        paged = exact_paged(seed)
        pooled = paged.pool(any_family)
        assert_slots(paged, pooled, any_family.pool_keys(paged.case))
        want = oracle.index(paged.case)
        assert_same(pooled.index(any_family), want, paged.describe())
        places, _ = pooled.index(any_family, physical=True)
        assert torch.equal(places, physical(paged, torch.from_numpy(want.indices)))


def random_paged(seed: int, dtype: torch.dtype, H: int, D: int) -> Paged:
    """Return a paged call on normally distributed floats, long enough to lose blocks."""
    rng = np.random.default_rng(seed)
    size = int(rng.choice([16, 32, 64, 128]))
    page_size = int(rng.choice([p for p in PAGE_SIZES if p <= size]))
    next_n = int(rng.integers(1, 9))
    lengths = [int(n) for n in rng.integers(0, 12 * size, rng.integers(1, 4))]
    case = random_case(seed, dtype, M=len(lengths) * next_n, N=sum(lengths), H=H, D=D,
                       **last_rows(lengths, next_n), block_size=size, block_topk=4,
                       topk=int(rng.integers(1, 3 * size)),
                       pooling=str(rng.choice(["mean", "max"])))  # fmt: skip
    return paginate(rng, case, next_n, page_size)


@pytest.mark.parametrize("dtype", DTYPES, ids=short_name)
@pytest.mark.parametrize(("heads", "depth"), [(1, 16), (3, 48), (8, 128), (13, 64)])
def test_rounded_sums(family: Family, dtype: torch.dtype, heads: int, depth: int) -> None:
    """Random floats: the bytes of `index` and `pool_keys` on the packed keys."""
    for seed in range(12):
        paged = random_paged(seed, dtype, **shaped(H=heads, D=depth))
        pooled = paged.pool(family)
        assert_slots(paged, pooled, family.pool_keys(paged.case))
        for mine, packed in zip(pooled.index(family), family.index(paged.case), strict=True):
            assert same_bytes(mine, packed), paged.describe()


@pytest.mark.parametrize("dtype", [torch.bfloat16, FP8], ids=short_name)
@pytest.mark.parametrize(("page_size", "size"), [(16, 16), (16, 32), (32, 32), (64, 128)])
def test_every_length(family: Family, dtype: torch.dtype, page_size: int, size: int) -> None:
    """Every length around the edges of pages and blocks, one and three rows per sequence."""
    edges = {0, page_size, size, 2 * size, 5 * size, 5 * size + page_size}
    near = sorted({e + d for e in edges for d in (-2, -1, 0, 1, 2) if e + d >= 0})
    for next_n in (1, 3):
        paged = exact_paged(page_size + next_n, dtype=dtype, B=size, page_size=page_size,
                            next_n=next_n, lengths=near, block_topk=3, topk=size + 1,
                            **shaped(H=2, D=16))  # fmt: skip
        pooled = paged.pool(family)
        assert_slots(paged, pooled, family.pool_keys(paged.case))
        assert_same(pooled.index(family), oracle.index(paged.case))


@pytest.mark.parametrize("dtype", [torch.bfloat16, FP8], ids=short_name)
@pytest.mark.parametrize(("page_size", "size"), [(16, 16), (16, 32)])
@pytest.mark.parametrize(("heads", "depth", "next_n"), [(2, 16, 1), (16, 64, 1), (16, 64, 2)])
def test_all_lengths(
    family: Family, heads: int, depth: int, next_n: int, page_size: int, size: int,
    dtype: torch.dtype,
) -> None:  # fmt: skip
    """Every length from none to three blocks and a page more, as the sequences of one call."""
    paged = exact_paged(size, dtype=dtype, B=size, page_size=page_size, next_n=next_n, H=heads,
                        D=depth, lengths=list(range(3 * size + page_size + 1)), block_topk=3,
                        topk=size + 1)  # fmt: skip
    pooled = paged.pool(family)
    assert_slots(paged, pooled, family.pool_keys(paged.case))
    assert_same(pooled.index(family), oracle.index(paged.case))


def test_only_the_new_blocks_are_pooled(any_family: Family) -> None:
    """`new_tokens`, at every distance from the end of a block: these slots, and no other."""
    for length in range(60, 68):
        paged = exact_paged(7, B=32, page_size=16, next_n=1, lengths=[length, 200], dtype=FP8)
        want = any_family.pool_keys(paged.case)
        for new_tokens in (1, 2, 3, 31, 32, 33, 64, 10**12):
            for mine, before, packed in zip(paged.pool(any_family, new_tokens=new_tokens).pooled(),
                                            paged.pooled(), want, strict=True):  # fmt: skip
                expected = raw(before).clone()
                for s, n in enumerate((length, 200)):
                    for block in range(n // 32):
                        if (block + 1) * 32 > n - new_tokens:
                            page = int(paged.block_table[s, 2 * block + 1])
                            first = int(paged.case.cu_seqlens_k[s]) + 32 * block
                            expected[page] = raw(packed)[-(-first // 32)]
                assert torch.equal(raw(mine), expected), (length, new_tokens)


@pytest.mark.parametrize("dtype", DTYPES, ids=short_name)
def test_padded_entries(any_family: Family, dtype: torch.dtype) -> None:
    """Lengths of 0 or less, ids that are none: -1 rows, no slot written, neighbours untouched.

    Integration bugs: padding of a CUDA graph.
    """
    paged = exact_paged(3, dtype=dtype, B=32, page_size=16, next_n=2, lengths=[100, 130],
                        block_topk=3, topk=40, **shaped(H=2, D=16))  # fmt: skip
    pooled = paged.pool(any_family)
    want = pooled.index(any_family)
    row = paged.block_table[1:]
    nothing, beyond = torch.full_like(row, -1), torch.full_like(row, len(paged.pages))
    entries = [(row, n) for n in (0, -1, -2, -4, INT_MIN)]
    entries += [(bad, n) for bad in (nothing, beyond) for n in (1, 130, INT_MAX, 0)]
    table = torch.cat([paged.block_table[:1], *[ids for ids, _ in entries], row])
    rows = [0, 1, *[0, 1] * len(entries), 2, 3]
    padded = pooled.replace(
        case=paged.case.rows(rows).replace(
            ks=int32([0, 0, *[0] * (2 * len(entries)), 100, 100]),
            ke=int32([99, 100, *[0] * (2 * len(entries)), 229, 230]),
        ),
        block_table=table,
        seq_lens=int32([100, *[n for _, n in entries], 130]),
    )
    got = padded.index(any_family)
    assert (got.indices[2:-2] == -1).all() and (got.scores[2:-2] == -torch.inf).all()
    for mine, theirs in zip(got, want, strict=True):
        assert same_bytes(mine[[0, 1, -2, -1]], theirs)
    for mine, theirs in zip(padded.pool(any_family).pooled(), pooled.pooled(), strict=True):
        assert same_bytes(mine, theirs)


def test_a_sequence_ends_at_a_hole(any_family: Family) -> None:
    """An id outside [0, P) cuts the sequence there, wherever its length says it ends."""
    paged = exact_paged(5, B=32, page_size=16, next_n=1, lengths=[200],
                        **shaped(dtype=torch.float32))  # fmt: skip
    pooled = paged.pool(any_family)
    for hole in range(13):
        table = paged.block_table.clone()
        table[0, hole] = (-1, len(paged.pages), INT_MIN, INT_MAX)[hole % 4]
        n = 16 * hole
        cut = paged.replace(block_table=table)
        shorter = paged.case.replace(k=paged.case.k[:n], **last_rows([n], 1))
        assert_same(pooled.replace(case=shorter, block_table=table).index(any_family),
                    oracle.index(shorter))  # fmt: skip
        for mine, before, full in zip(cut.pool(any_family).pooled(), paged.pooled(),
                                      pooled.pooled(), strict=True):  # fmt: skip
            expected = raw(before).clone()
            pages = table[0, 1:hole:2].tolist()
            expected[pages] = raw(full)[pages]
            assert torch.equal(raw(mine), expected)


@pytest.mark.parametrize("hole", [2046, 2048, 2050, 4998, 5000])
def test_a_hole_far_behind(any_family: Family, hole: int) -> None:
    """A long row of the table is looked at to its end: the last block is the one before a hole."""
    paged = exact_paged(9, B=32, page_size=16, next_n=1, lengths=[32],
                        **shaped(dtype=torch.float32))  # fmt: skip
    first, last = paged.block_table[0, :2].tolist()
    other = next(page for page in range(len(paged.pages)) if page not in (first, last))
    table = torch.full((1, 5000), other, dtype=torch.int32)  # of NaN, and few pages in all
    table[0, hole - 2 : hole] = paged.block_table[0, :2]
    table[0, hole:] = -1
    for length in (80_000, INT_MAX):
        where = {"block_table": table, "seq_lens": int32([length])}
        pooled = paged.replace(**where).pool(any_family, new_tokens=1)
        for mine, before, alone in zip(pooled.pooled(), paged.pooled(),
                                       paged.pool(any_family).pooled(), strict=True):  # fmt: skip
            expected = raw(before).clone()
            expected[last] = raw(alone)[last]
            assert torch.equal(raw(mine), expected)


def test_lengths_beyond_the_table(any_family: Family) -> None:
    """A length that the table cannot hold is cut to what it holds."""
    paged = exact_paged(6, B=32, page_size=16, next_n=2, lengths=[160], dtype=torch.bfloat16)
    paged = paged.replace(block_table=paged.block_table[:, :10])
    want = paged.pool(any_family).index(any_family)
    for length in (161, 1000, INT_MAX):
        longer = paged.replace(seq_lens=int32([length]))
        for mine, theirs in zip(longer.pool(any_family).index(any_family), want, strict=True):
            assert same_bytes(mine, theirs)


def test_what_is_never_read(any_family: Family) -> None:
    """Poison in the slots of first and last candidates, and in tokens behind a row's window."""
    for seed in range(8):
        paged = exact_paged(seed, B=32, page_size=16, next_n=3, lengths=[333, 200],
                            block_topk=3, topk=50, **shaped(H=2, D=16))  # fmt: skip
        pooled = paged.pool(any_family)
        want = pooled.index(any_family)
        for s, n in enumerate((333, 200)):
            for block in (0, (n - 1) // 32):
                page = int(paged.block_table[s, 2 * block + 1])
                if block < n // 32:
                    raw(pooled.pooled_k)[page] = 0xFF
                    raw(pooled.pooled_scale)[page] = 0xFF
        for mine, theirs in zip(pooled.index(any_family), want, strict=True):
            assert same_bytes(mine, theirs)


@pytest.mark.parametrize("next_n", [1, 4, 40])
def test_rows_do_not_see_later_tokens(any_family: Family, next_n: int) -> None:
    """Row r is the row of a shorter sequence: later keys, even NaN, are not there for it."""
    paged = exact_paged(11, B=16, page_size=16, next_n=next_n, lengths=[150],
                        block_topk=3, topk=20,
                        **shaped(H=2, D=16, dtype=torch.float32))  # fmt: skip
    whole = paged.pool(any_family).index(any_family)
    for row in range(next_n):
        n = 150 - next_n + row + 1
        case = paged.case.rows([row]).replace(
            k=fill(paged.case.k.clone()).index_copy(0, torch.arange(n), paged.case.k[:n])[:n],
            **last_rows([n], 1),
        )
        alone = paginate(np.random.default_rng(row), case, 1, 16).pool(any_family)
        for mine, theirs in zip(alone.index(any_family), whole, strict=True):
            assert same_bytes(mine[0], theirs[row])


def test_flat_within_the_budget(family: Family) -> None:
    """Where all blocks are kept, no pooled key is read and the result is that of flat."""
    for seed in range(12):
        paged = exact_paged(seed, B=32, block_topk=40, topk=64)
        for mine, flat in zip(paged.index(family), family.flat_index(paged.case), strict=True):
            assert same_bytes(mine, flat)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads(family: Family, threads: int) -> None:
    """Any number of threads, shared prefixes included: the same bytes."""
    paged = exact_paged(2, B=32, page_size=16, lengths=[400, 300, 0, 401], next_n=5, dtype=FP8)
    pooled = paged.pool(family)
    want = pooled.index(family)
    torch.set_num_threads(threads)
    for mine, theirs in zip(paged.pool(family).pooled(), pooled.pooled(), strict=True):
        assert same_bytes(mine, theirs)
    for mine, theirs in zip(pooled.index(family), want, strict=True):
        assert same_bytes(mine, theirs)


def test_subnormal_keys_count(family: Family) -> None:
    """Whatever the floating-point settings of the thread that calls."""
    if family.device != "cpu":
        pytest.skip("a setting of CPUs")
    paged = random_paged(0, torch.float32, H=1, D=16)
    tiny = paged.case.replace(k=paged.case.k * 2.0**-128)
    paged = paged.replace(case=tiny, pages=paged.pages * 2.0**-128)
    want = paged.pool(family)
    scores = want.index(family).scores
    assert (want.pooled_k != 0).any() and (scores != 0).any()
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU has no such setting")
    try:
        pooled = paged.pool(family)
        again = want.index(family).scores
    finally:
        torch.set_flush_denormal(False)
    assert same_bytes(pooled.pooled_k, want.pooled_k) and same_bytes(again, scores)


def test_empty_calls(any_family: Family) -> None:
    """No sequence, no page, a table without columns: the obvious answer."""
    paged = exact_paged(0, B=32, page_size=16, lengths=[50, 70], next_n=2,
                        **shaped(dtype=torch.float32))  # fmt: skip
    none = paged.case.rows(slice(0, 0)).replace(k=paged.case.k[:0], cu_seqlens_k=int32([0]))
    no_sequence = paged.replace(case=none, block_table=paged.block_table[:0],
                                seq_lens=paged.seq_lens[:0])  # fmt: skip
    assert len(no_sequence.pool(any_family).index(any_family).indices) == 0
    empty = paged.case.replace(k=paged.case.k[:0], ks=int32([0] * 4), ke=int32([0] * 4),
                               cu_seqlens_k=int32([0, 0, 0]))  # fmt: skip
    no_column = paged.replace(case=empty, block_table=paged.block_table[:, :0])
    no_page = paged.replace(case=empty, pages=paged.pages[:0], pooled_k=paged.pooled_k[:0],
                            pooled_scale=paged.pooled_scale[:0])  # fmt: skip
    for nothing in (no_column, no_page):
        assert (nothing.pool(any_family).index(any_family).indices == -1).all()


def test_lengths_are_those_of_the_test() -> None:
    """Positive control of the fuzz: it has empty, ragged and shared sequences, and lost blocks."""
    seen = dict.fromkeys(("empty", "ragged", "whole", "shared", "pruned"), 0)
    for seed in range(100):
        paged = exact_paged(seed)
        size = paged.case.block_size
        lengths = [b - a for a, b in pairwise(paged.case.cu_seqlens_k.tolist())]
        seen["empty"] += 0 in lengths
        seen["ragged"] += any(n % size for n in lengths)
        seen["whole"] += any(n and n % size == 0 for n in lengths)
        seen["pruned"] += any(n > paged.case.block_topk * size for n in lengths)
        used = [
            int(page)
            for s, n in enumerate(lengths)
            for page in paged.block_table[s, : -(-n // paged.page_size)]
        ]
        seen["shared"] += len(set(used)) < len(used)
    assert min(seen.values()) >= 8, seen
