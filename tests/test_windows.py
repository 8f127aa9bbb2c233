"""`hisa.causal_windows`: query i of a segment sees its segment's first Lk - Lq + i + 1 keys."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import hisa
from tests.builders import int32

lengths = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=0, max_size=6)


def edges(sizes: list[int]) -> torch.Tensor:
    """Return cumulative lengths from 0."""
    return torch.cat([int32([0]), int32(sizes).cumsum(0)]).int()


@given(lengths)
@settings(max_examples=150, deadline=None)
def test_against_the_definition(segments: list[tuple[int, int]]) -> None:
    """Any segments: prefill, chunk, decode, empty, and more queries than keys."""
    queries, keys = [q for q, _ in segments], [k for _, k in segments]
    ks, ke = hisa.causal_windows(edges(queries), edges(keys))
    want, start = [], 0
    for lq, lk in segments:
        want += [(start, start + max(0, lk - lq + i + 1)) for i in range(lq)]
        start += lk
    assert ks.dtype == ke.dtype == torch.int32
    assert list(zip(ks.tolist(), ke.tolist(), strict=True)) == want
