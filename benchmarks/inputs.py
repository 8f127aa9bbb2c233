"""Inputs that several cases share, and two peers: the flat indexer in plain torch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

import hisa


class Inputs(NamedTuple):
    """What an indexer is given."""

    q: Tensor  # [M, H, D]
    k: Tensor  # [N, D]
    weights: Tensor  # [M, H] fp32
    ks: Tensor  # [M] int32
    ke: Tensor  # [M] int32


def causal(rows: int, keys: int, heads: int, dim: int, dtype: str) -> Inputs:
    """Return random inputs whose queries are the last `rows` of `keys` tokens."""
    generator = torch.Generator().manual_seed(rows + keys)
    q = torch.randn(rows, heads, dim, generator=generator).to(getattr(torch, dtype))
    k = torch.randn(keys, dim, generator=generator).to(getattr(torch, dtype))
    weights = torch.randn(rows, heads, generator=generator)
    edges_q, edges_k = (torch.tensor([0, end], dtype=torch.int32) for end in (rows, keys))
    return Inputs(q, k, weights, *hisa.causal_windows(edges_q, edges_k))


def torch_flat(inputs: Inputs, topk: int, chunk: int) -> Tensor:
    """Run the flat indexer in plain torch, `chunk` rows at a time: [M, topk], -1 in unused slots.

    As one writes it, without the keys that no row of the chunk may see.
    """
    q, k, weights, ks, ke = inputs
    indices = torch.full((q.shape[0], topk), -1, dtype=torch.int32)
    for start in range(0, q.shape[0], chunk):
        part = slice(start, start + chunk)
        end = int(ke[part].max())
        dots = torch.einsum("mhd,nd->mhn", q[part].float(), k[:end].float())
        scores = (dots.relu() * weights[part, :, None]).sum(1)
        choose(scores, ks[part, None], ke[part, None], indices[part])
    return indices


def torch_flat_tuned(inputs: Inputs, topk: int, chunk: int) -> Tensor:
    """Do the same as fast as plain torch allows.

    One matrix product per chunk into a buffer that is made once, ReLU in place, the sum over heads
    as another matrix product.
    """
    q, k, weights, ks, ke = inputs
    rows, heads, _ = q.shape
    k = k.float()
    indices = torch.full((rows, topk), -1, dtype=torch.int32)
    buffer = torch.empty(chunk * heads * k.shape[0])
    for start in range(0, rows, chunk):
        part = slice(start, min(start + chunk, rows))
        count, end = part.stop - part.start, int(ke[part].max())
        dots = buffer[: count * heads * end].view(count * heads, end)
        torch.mm(q[part].float().flatten(0, 1), k[:end].T, out=dots).relu_()
        scores = torch.bmm(weights[part, None], dots.view(count, heads, end)).squeeze(1)
        choose(scores, ks[part, None], ke[part, None], indices[part])
    return indices


def choose(scores: Tensor, ks: Tensor, ke: Tensor, indices: Tensor) -> None:
    """Write the best tokens of each row's window into `indices` [R, topk], in no order."""
    tokens = torch.arange(scores.shape[1])
    scores.masked_fill_((tokens < ks) | (tokens >= ke), -torch.inf)
    best = scores.topk(min(indices.shape[1], scores.shape[1]), sorted=False)
    chosen = (best.indices - ks).masked_fill_(best.values == -torch.inf, -1)
    indices[:, : chosen.shape[1]] = chosen


def overlap(a: Tensor, b: Tensor) -> float:
    """Return the mean share of a's tokens (entries >= 0) that b has too, row by row."""
    shares = [
        torch.isin(x[x >= 0], y).float().mean() for x, y in zip(a, b, strict=True) if (x >= 0).any()
    ]
    return float(torch.stack(shares).mean())
