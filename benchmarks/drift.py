"""Inputs on a GPU whose queries drift from row to row, and how many blocks neighbours then share.

Neighbouring tokens of a text ask for much the same blocks; independent random queries do not. Here
every channel of the queries, and every head's weight, is a walk

    x[t] = decay * x[t - 1] + sqrt(1 - decay^2) * noise[t]

of unit variance, independent of all others. Keys are independent random numbers: which blocks are
kept has no structure but the queries'. `decay` says how slowly the queries drift: so that a row and
the next have, on average, three quarters of their 64 kept blocks in common or more. The more blocks
there are to choose from, the slower that is. A decay of 0 makes independent queries.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import hisa

DIM = 128
BLOCK_SIZE, BLOCK_TOPK = 128, 64
PART = 256  # rows of a walk that are made at a time
SCORE_FLOATS = 1 << 28  # of dot products at a time, when neighbours are compared


def decay_of(queries: str, keys: int) -> float:
    """Return how queries drift: "random" are independent, "text" drift slower for more keys.

    At the end of 32K keys neighbours share 84% of their blocks, of 64K 80%, 128K 77%, 1M 76%.
    """
    if queries == "random":
        return 0.0
    if queries == "text":
        return 0.98 if keys <= 131072 else 0.99
    raise ValueError(f'queries: expected "random" or "text", got {queries!r}')


def make_inputs(
    rows: int, keys: int, heads: int, queries: str, dtype: str, device: str = "cuda"
) -> dict[str, Any]:
    """Return what `hisa.index` takes, the queries being the last of the keys.

    With the dtype "fp8", q and k are quantised by row; else they are bfloat16, without key scales.
    Queries are made in parts, so that little more memory is needed than what is returned.
    """
    decay = decay_of(queries, keys)
    random = torch.Generator(device).manual_seed(rows + keys + heads)
    normal = torch.randn(keys, DIM, device=device, generator=random, dtype=torch.bfloat16)
    weights = torch.cat(list(walk(rows, heads, decay, random)))
    ke = torch.arange(keys - rows + 1, keys + 1, device=device, dtype=torch.int32)
    fp8 = dtype == "fp8"
    kind = torch.float8_e4m3fn if fp8 else torch.bfloat16
    q = torch.empty(rows, heads, DIM, device=device, dtype=kind)
    done = 0
    for part in walk(rows, heads * DIM, decay, random):
        at = slice(done, done := done + len(part))
        rounded = part.view(-1, heads, DIM).bfloat16()
        if fp8:
            q[at], scale = hisa.quantize_fp8(rounded)
            weights[at] *= scale
        else:
            q[at] = rounded
    if not fp8:
        return {"q": q, "k": normal, "weights": weights, "ke": ke}
    k, k_scale = hisa.quantize_fp8(normal)
    return {"q": q, "k": k, "weights": weights, "k_scale": k_scale, "ke": ke}


def walk(rows: int, width: int, decay: float, random: torch.Generator) -> Iterator[Tensor]:
    """Yield the next rows of `width` walks: [PART or fewer, width] fp32.

    A part is one matrix product: the noise, weighted by powers of the decay, and what is left of
    the last row before it.
    """
    ages = torch.arange(PART, device=random.device)
    ages = ages[:, None] - ages  # [PART, PART], of each noise at each row
    fresh = (1 - decay**2) ** 0.5 * torch.pow(decay, ages.clamp(min=0).float()).tril()
    faded = torch.pow(decay, ages[:, :1] + 1.0)
    last = torch.randn(1, width, device=random.device, generator=random)
    for start in range(0, rows, PART):
        count = min(PART, rows - start)
        noise = torch.randn(count, width, device=random.device, generator=random)
        part = torch.addcmul(fresh[:count, :count] @ noise, faded[:count], last)
        last = part[-1:]
        yield part


def shared_blocks(inputs: dict[str, Any], pairs: int = 256) -> float:
    """Return the mean share of its kept blocks that a row has in common with the next row."""
    rows = len(inputs["q"])
    at = torch.linspace(0, rows - 2, min(pairs, rows - 1)).long().unique().to(inputs["q"].device)
    kept, next_kept = kept_blocks(inputs, at), kept_blocks(inputs, at + 1)
    return float(((kept & next_kept).sum(1) / kept.sum(1)).mean())


def kept_blocks(inputs: dict[str, Any], rows: Tensor) -> Tensor:
    """Return which blocks these rows keep: [R, N / 128], by the scores of the pooled keys."""
    pooled, pooled_scale = hisa.pool_keys(
        inputs["k"], k_scale=inputs.get("k_scale"), block_size=BLOCK_SIZE
    )
    keys = (pooled.float() * pooled_scale[:, None]).T  # [D, blocks]
    blocks = torch.arange(keys.shape[1], device=keys.device)
    kept = torch.zeros(len(rows), len(blocks), device=keys.device, dtype=torch.bool)
    step = max(1, SCORE_FLOATS // (inputs["q"].shape[1] * len(blocks)))
    for start in range(0, len(rows), step):
        part = rows[start : start + step]
        q = inputs["q"].view(torch.uint8)[part].view(inputs["q"].dtype)  # not all gather fp8
        dots = (q.float() @ keys).relu_()  # [R, H, blocks]
        scores = (inputs["weights"][part, None] @ dots).squeeze(1)
        last = (inputs["ke"][part, None] - 1) // BLOCK_SIZE
        scores.masked_fill_((blocks == 0) | (blocks == last), torch.inf)
        scores.masked_fill_(blocks > last, -torch.inf)
        best = scores.topk(min(BLOCK_TOPK, len(blocks)))
        kept[start : start + step].scatter_(1, best.indices, best.values > -torch.inf)
    return kept
