"""T17: bad calls of `PooledKeys` say which argument and what was expected, and change nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import hisa

FP32, D, H = torch.float32, 16, 2
K, Q, W = torch.zeros(2, 3, D), torch.zeros(2, 3, H, D), torch.zeros(2, 3, H)
BAD: dict[str, tuple[Any, type[Exception], str]] = {
    "segments": (lambda s: hisa.PooledKeys(-1, D), ValueError, "segments: expected at least 0"),
    "segments float": (lambda s: hisa.PooledKeys(2.0, D), TypeError, "segments: expected int"),  # type: ignore[arg-type]
    "dim": (lambda s: hisa.PooledKeys(2, 24), ValueError, "expected D to be a multiple of 16"),
    "dim negative": (lambda s: hisa.PooledKeys(2, -16), ValueError, "dim: expected at least 0"),
    "dtype": (lambda s: hisa.PooledKeys(2, D, dtype=torch.int8), TypeError, "k: expected"),
    "dtype name": (lambda s: hisa.PooledKeys(2, D, dtype="bf16"), TypeError, "dtype: expected"),  # type: ignore[arg-type]
    "scaled": (lambda s: hisa.PooledKeys(2, D, scaled=1), TypeError, "scaled: expected bool"),  # type: ignore[arg-type]
    "block_size": (lambda s: hisa.PooledKeys(2, D, block_size=9), ValueError, "block_size: expect"),
    "pooling": (lambda s: hisa.PooledKeys(2, D, pooling="sum"), ValueError, "pooling: expected"),
    "capacity": (lambda s: hisa.PooledKeys(2, D, capacity=-1), ValueError, "capacity: expected at"),
    "capacity bool": (lambda s: hisa.PooledKeys(2, D, capacity=True), TypeError, "capacity: expec"),
    "too much": (
        lambda s: hisa.PooledKeys(2, D, device="meta", capacity=2**30),
        ValueError,
        r"capacity: expected at most 2147483647 tokens in all segments, got 2 \* 1073741824",
    ),
    "k rank": (lambda s: s.append(K[0]), ValueError, r"k: expected \[S, n, D\] .*got \[3, 16\]"),
    "k of one": (lambda s: s.append(K, segments=0), ValueError, r"k: expected \[n, D\]"),
    "k count": (lambda s: s.append(K, segments=[1]), ValueError, r"k: .* with S = 1, D = 16, got"),
    "k dim": (lambda s: s.append(K[..., :8]), ValueError, "k: .* D = 16, got"),
    "k dtype": (lambda s: s.append(K.half()), TypeError, "k: .*float32.* got .*float16"),
    "k device": (lambda s: s.append(K.to("meta")), ValueError, "k: expected a tensor on cpu"),
    "k list": (lambda s: s.append([1]), TypeError, "k: expected Tensor, got list"),
    "k_scale": (lambda s: s.append(K, K[..., 0]), ValueError, "k_scale: expected none"),
    "k_scale list": (lambda s: s.append(K, [1]), TypeError, "k_scale: expected Tensor"),
    "k_scale absent": (lambda s: scaled().append(K), TypeError, "k_scale: expected Tensor, got No"),
    "k_scale shape": (lambda s: scaled().append(K, K), ValueError, r"k_scale: expected \[S, n\]"),
    "unknown": (lambda s: s.append(K, segments=[0, 2]), ValueError, r"segments: .*\[0, 1\], got 2"),
    "negative": (lambda s: s.append(K[0], segments=-1), ValueError, "segments: .* got -1"),
    "freed": (lambda s: (s.free(1), s.append(K[0], segments=1)), ValueError, r"s: .*\[0\], got 1"),
    "twice": (lambda s: s.append(K, segments=[1, 1]), ValueError, "segments: expected each of th"),
    "bool": (lambda s: s.append(K[0], segments=True), TypeError, "segments: expected int"),
    "lengths": (lambda s: s.truncate(5), ValueError, "lengths: expected 0 to 4 for segment 0, g"),
    "lengths negative": (lambda s: s.truncate([0, -1]), ValueError, "lengths: .*segment 1, got -1"),
    "lengths count": (lambda s: s.truncate([1]), ValueError, "lengths: expected 2 of them, got 1"),
    "lengths float": (lambda s: s.truncate([1.0, 1]), TypeError, "lengths: expected int"),
    "fork": (lambda s: s.fork(2), ValueError, "segment: expected one of"),
    "fork list": (lambda s: s.fork([0]), TypeError, "segment: expected int, got list"),
    "free": (lambda s: s.free(7), ValueError, "segment: expected one of"),
    "reorder": (lambda s: s.reorder([0, 9]), ValueError, "indices: expected one of"),
    "reorder float": (lambda s: s.reorder(torch.zeros(2)), TypeError, "indices: expected int"),
    "queries": (lambda s: s.windows(-1), ValueError, "queries: expected at least 0, got -1"),
    "queries float": (lambda s: s.windows(1.5), TypeError, "queries: expected int, got float"),
    "q": (lambda s: s.index(Q[0], W), ValueError, r"q: expected \[S, n, H, D\]"),
    "q of one": (lambda s: s.index(Q, W, segments=1), ValueError, r"q: expected \[n, H, D\]"),
    "q dtype": (lambda s: s.index(Q.half(), W), TypeError, "q: .*float32"),
    "weights": (lambda s: s.index(Q, W[:, :2]), ValueError, "weights: .* n = 3, H = 2, got"),
    "weights dtype": (lambda s: s.index(Q, W.half()), TypeError, "weights: .*float32"),
    "topk": (lambda s: s.index(Q, W, topk=10**5), ValueError, "topk: expected at most block_topk"),
}


def scaled() -> hisa.PooledKeys:
    return hisa.PooledKeys(2, D, dtype=FP32, block_size=8, scaled=True)


@pytest.mark.parametrize("name", BAD)
def test_bad_calls(name: str) -> None:
    """A bad call says what was expected, and changes nothing."""
    bad, error, message = BAD[name]
    store = hisa.PooledKeys(2, D, dtype=FP32, block_size=8)
    store.append(torch.ones(2, 4, D))
    with pytest.raises(error, match=message):
        bad(store)
    if name != "freed":
        assert store.lengths == (4, 4)
        store.append(K)
        assert store.lengths == (7, 7) and store.index(Q, W, topk=9).shape == (2, 3, 9)
