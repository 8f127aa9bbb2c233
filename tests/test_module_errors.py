"""Calls of `HierarchicalIndexer` that cannot be answered: each says which argument, and why."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from tests.builders import int32
from tests.test_module import SIZES, Indexer, projections, scores, states

Q, K, W = scores(2, 5, 9)
WRONG: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "not callable": (
        lambda: Indexer(nn.Linear(2, 2), 3),  # type: ignore[arg-type]
        TypeError,
        "project_keys: expected a callable, got int",
    ),
    "topk none": (
        lambda: Indexer(topk=None),  # type: ignore[arg-type]
        TypeError,
        "topk: expected an int, got None",
    ),
    "topk": (lambda: Indexer(topk=99999), ValueError, "topk: expected at most block_topk * block"),
    "precision": (
        lambda: Indexer(precision="int8"),
        ValueError,
        "precision: expected 'model' or 'fp8', got 'int8'",
    ),
    "no projections": (
        lambda: Indexer(**SIZES)(Q),
        TypeError,
        "project_keys: expected a callable when the indexer is made, got None",
    ),
    "no inputs": (lambda: Indexer(*projections())(), TypeError, "inputs: expected at least one"),
    "input is a list": (
        lambda: Indexer(*projections())([1]),
        TypeError,
        "inputs[0]: expected Tensor, got list",
    ),
    "inputs of other lengths": (
        lambda: Indexer(*projections())(states(2, 5), states(2, 4), keys=K),
        ValueError,
        "inputs[1]: expected [B, S, ...] with S = 5, as inputs[0] has, got [2, 4, 24]",
    ),
    "inputs of another batch": (
        lambda: Indexer(*projections())(states(3, 5), keys=K),
        ValueError,
        "inputs[0]: expected [B, S, ...] with B = 2, got [3, 5, 24]",
    ),
    "packed inputs, batched keys": (
        lambda: Indexer(*projections())(torch.zeros(5), keys=K),
        ValueError,
        "inputs[0]: expected [B, S, ...], got [5]",
    ),
    "projected queries": (
        lambda: Indexer(nn.Identity(), nn.Identity(), nn.Identity())(states(2, 5)),
        ValueError,
        "project_queries: expected [B, S, H, D] float32 with B = 2, S = 5, D = 24, got [2, 5, 24]",
    ),
    "projected weights": (
        lambda: Indexer(*projections()[:2], lambda x: x)(states(5)),
        ValueError,
        "project_weights: expected [M, H] float32 with M = 5, H = 4, got [5, 24] float32",
    ),
    "k": (
        lambda: Indexer().select(Q, K[None], W),
        ValueError,
        "k: expected [B, N, D] or [N, D], got [1, 2, 9, 16]",
    ),
    "keys": (
        lambda: Indexer(*projections())(states(2, 5), keys=K[0, 0]),
        ValueError,
        "keys: expected [B, N, D] or [N, D], got [16]",
    ),
    "q of another batch": (
        lambda: Indexer().select(Q[:1], K, W[:1]),
        ValueError,
        "q: expected [B, S, H, D] float32 with B = 2, D = 16, got [1, 5, 4, 16] float32",
    ),
    "weights": (
        lambda: Indexer().select(Q, K, W[:, :4]),
        ValueError,
        "weights: expected [B, S, H] float32 with B = 2, S = 5, H = 4, got [2, 4, 4] float32",
    ),
    "k_scale": (
        lambda: Indexer().select(Q, K, W, k_scale=K[..., 0].double()),
        TypeError,
        "k_scale: expected [B, N] float32 with B = 2, N = 9, got [2, 9] float64",
    ),
    "ks": (
        lambda: Indexer().select(Q, K, W, ks=int32([0] * 5)),
        ValueError,
        "ks: expected [B, S] int32 with B = 2, S = 5, got [5] int32",
    ),
    "ke": (
        lambda: Indexer().select(Q, K, W, ke=torch.zeros(2, 5)),
        TypeError,
        "ke: expected [B, S] int32 with B = 2, S = 5, got [2, 5] float32",
    ),
    "packed ke": (
        lambda: Indexer().select(Q[0], K[0], W[0], ke=int32([1])),
        ValueError,
        "ke: expected [M] int32 with M = 5, got [1] int32",
    ),
    "ke on another device": (
        lambda: Indexer().select(Q, K, W, ke=torch.zeros(2, 5, dtype=torch.int32, device="meta")),
        ValueError,
        "ke: expected a tensor on cpu, got one on meta",
    ),
    "causal": (
        lambda: Indexer().select(Q, K, W, causal=1),  # type: ignore[arg-type]
        TypeError,
        "causal: expected bool, got int",
    ),
    "left padding": (
        lambda: Indexer().select(Q, K, W, left_padding=int32([1])),
        ValueError,
        "left_padding: expected [B] int32 with B = 2, got [1] int32",
    ),
    "segments of a batch": (
        lambda: Indexer().select(Q, K, W, cu_seqlens_k=int32([0, 9])),
        ValueError,
        "cu_seqlens_k: expected keys [N, D] with it, got [B, N, D]",
    ),
    "padding of packed keys": (
        lambda: Indexer().select(Q[0], K[0], W[0], left_padding=int32([0])),
        ValueError,
        "left_padding: expected keys [B, N, D] with it, got [N, D]",
    ),
    "whose queries": (
        lambda: Indexer().select(Q[0], K[0], W[0], cu_seqlens_k=int32([0, 4, 9])),
        ValueError,
        "ks, ke: expected both where cu_seqlens_k comes with fewer or more queries than keys",
    ),
    "a mask and windows": (
        lambda: Indexer().select(
            Q, K, W, attention_mask=torch.ones(2, 5, 9).bool(), left_padding=int32([0, 0])
        ),
        ValueError,
        "attention_mask: expected no left_padding with it, got both",
    ),
    "two ranges": (
        lambda: Indexer().select(Q, K, W, attention_mask=(torch.arange(9) % 3 > 0)[None, None]),
        ValueError,
        "one range of keys per query, got attention mask with a row that is not one range",
    ),
    "a mask of another length": (
        lambda: Indexer().select(Q, K, W, attention_mask=torch.ones(2, 5, 8).bool()),
        ValueError,
        "attention_mask: expected one column for each of the 9 keys, got 8",
    ),
    "too many keys": (
        lambda: Indexer().select(
            Q[:, :0], torch.zeros(2, 1, 16).expand(2, 2**30, 16), W[:, :0], causal=False
        ),
        ValueError,
        "k: expected fewer than 2**31 keys in one batch, got 2 * 1073741824",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_bad_calls(case: str) -> None:
    call, error, message = WRONG[case]
    with pytest.raises(error, match=re.escape(message)):
        call()
