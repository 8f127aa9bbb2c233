"""Inputs that several cases share, and a peer: the flat indexer in plain torch."""

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

    As fast as plain torch allows: one matrix product per chunk into a buffer that is made once,
    without the keys that no row of the chunk may see, and without sorting the selection.
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
        tokens = torch.arange(end)
        scores.masked_fill_((tokens < ks[part, None]) | (tokens >= ke[part, None]), -torch.inf)
        best = scores.topk(min(topk, end), sorted=False)
        chosen = (best.indices - ks[part, None]).masked_fill_(best.values == -torch.inf, -1)
        indices[part, : chosen.shape[1]] = chosen
    return indices


def overlap(a: Tensor, b: Tensor) -> float:
    """Return the mean share of a's tokens (entries >= 0) that b has too, row by row."""
    shares = [
        torch.isin(x[x >= 0], y).float().mean() for x, y in zip(a, b, strict=True) if (x >= 0).any()
    ]
    return float(torch.stack(shares).mean())
