"""The patched forward of an indexer: what the model's own returns, selected hierarchically.

    keys      project, norm, RoPE, append to the cache      [B, S, hidden]  -> [B, T, D]
    queries   project, RoPE, a few rows at a time           [B, r, q_lora]  -> [B, r, H, D]
    select    a HierarchicalIndexer, for the whole batch    [B * r, H, D]   -> [B * r, k] relative
    complete  absolute positions, unused slots filled       [B * r, k]      -> [B * r, k] absolute

Memory beyond the inputs and the result is bounded by CHUNK_BYTES, not by S or T.
"""

from __future__ import annotations

import functools
from dataclasses import asdict
from typing import Any, TypeAlias

import torch
from torch import Tensor

from hisa.module import CHUNK_BYTES, CUDA_CHUNK_BYTES, HierarchicalIndexer, Index, rows_per_chunk
from hisa.quantize import scoring_dtype
from hisa.windows import Windows

from .models import IndexerSpec, rotary
from .settings import Settings

PositionEmbeddings = tuple[Tensor, Tensor]  # cos, sin: each [B or 1, S, R]
Indexer: TypeAlias = Any  # an nn.Module with the attributes that models.recognise looks for


def select(
    module: Indexer,
    spec: IndexerSpec,
    settings: Settings,
    windows: Windows,
    hidden_states: Tensor,
    q_resid: Tensor,
    position_embeddings: PositionEmbeddings,
    cache: Any | None,
    index: Index | None = None,
) -> Tensor:
    """Return the selected positions of every query, [B, S, min(topk, T)] int32.

    An `index` runs in place of `hisa.index`.

    Entries of a row are distinct and in [0, T). Those of them that lie outside the row's window, or
    that hisa.index did not select, fill slots for which there was nothing to select.
    """
    batch = hidden_states.shape[0]
    q_dtype = module.wq_b(q_resid[:1, :1]).dtype  # the rotation of the keys may depend on it
    k = project_keys(module, spec, hidden_states, position_embeddings, q_dtype)
    if cache is not None:
        k = cache.update_indexer(k, module.layer_idx)
    if k.shape[:2] != (batch, windows.keys):
        raise ValueError(
            f"attention_mask: expected one column for each of the {k.shape[1]} keys, "
            f"got {windows.keys}"
        )
    topk = settings.topk or module.index_topk
    width = min(topk, windows.keys)
    # A pruned row keeps block_topk - 2 whole blocks and at least one token each of the first and of
    # the last: no fewer than it has slots, with any but extreme settings.
    exhaustive = width <= (settings.block_topk - 2) * settings.block_size + 1 + 1

    def project(rows: slice) -> tuple[Tensor, Tensor]:
        cos_sin = (position_embeddings[0][:, rows], position_embeddings[1][:, rows])
        queries = project_queries(module, spec, q_resid[:, rows], cos_sin)
        return queries, project_weights(module, hidden_states[:, rows])

    def finish(indices: Tensor, rows: slice) -> Tensor:
        ks, ke = windows.ks[:, rows].reshape(-1, 1), windows.ke[:, rows].reshape(-1, 1)
        return complete(indices, ks, ke, windows.keys, exhaustive=exhaustive)

    dtype = scoring_dtype(q_resid.dtype, k.dtype)
    row_bytes = batch * module.n_heads * module.head_dim * dtype.itemsize
    return hierarchical(settings, topk).select_rows(
        project,
        k,
        windows,
        step=rows_per_chunk(row_bytes, CUDA_CHUNK_BYTES if k.is_cuda else CHUNK_BYTES),
        finish=finish,
        prune=windows.pruned_rows(settings.block_size, settings.block_topk) > 0,
        dtype=dtype,
        topk=width,
        index=index,
    )


@functools.lru_cache(maxsize=32)
def hierarchical(settings: Settings, topk: int) -> HierarchicalIndexer:
    """Return the indexer that selects for all layers with these settings."""
    return HierarchicalIndexer(**{**asdict(settings), "topk": topk})


def project_keys(
    module: Indexer,
    spec: IndexerSpec,
    hidden_states: Tensor,
    cos_sin: PositionEmbeddings,
    q_dtype: torch.dtype,
) -> Tensor:
    """Project, norm and rotate the keys of all rows, [B, S, D]: the bits that the model caches."""
    k = module.wk(hidden_states)
    if spec.key_norm_in_weight_dtype:
        k = module.k_norm(k.to(module.k_norm.weight.dtype)).to(hidden_states.dtype)
    else:
        k = module.k_norm(k)
    k = k.unsqueeze(2)
    return rotate(module, spec, k.to(q_dtype), k, cos_sin)[1].squeeze(2)


def project_queries(
    module: Indexer, spec: IndexerSpec, q_resid: Tensor, cos_sin: PositionEmbeddings
) -> Tensor:
    """Project and rotate the queries of a few rows, [B, r, H, D]."""
    q = module.wq_b(q_resid).view(*q_resid.shape[:2], module.n_heads, module.head_dim)
    return rotate(module, spec, q, q[:, :, :1], cos_sin)[0]


def project_weights(module: Indexer, hidden_states: Tensor) -> Tensor:
    """Return the weight of each head, every scale folded in, [B, r, H] fp32."""
    projection = module.weights_proj
    weights: Tensor = projection(hidden_states.to(projection.weight.dtype)).float()
    scale: float = module.n_heads**-0.5 * module.softmax_scale
    return weights * scale


def rotate(
    module: Indexer, spec: IndexerSpec, q: Tensor, k: Tensor, cos_sin: PositionEmbeddings
) -> tuple[Tensor, Tensor]:
    """Apply the model's own RoPE to the rotary channels of q [B, S, H, D] and k [B, S, 1, D].

    The model's function wants both; where only one is needed, it stands in for the other.
    """
    turned, kept = module.qk_rope_head_dim, module.head_dim - module.qk_rope_head_dim
    order = (kept, turned) if spec.rope_last else (turned, kept)
    q_parts, k_parts = list(q.split(order, dim=-1)), list(k.split(order, dim=-1))
    at = int(spec.rope_last)
    q_parts[at], k_parts[at] = rotary(spec)(q_parts[at], k_parts[at], *cos_sin, unsqueeze_dim=2)
    return torch.cat(q_parts, dim=-1), torch.cat(k_parts, dim=-1)


def complete(indices: Tensor, ks: Tensor, ke: Tensor, keys: int, *, exhaustive: bool) -> Tensor:
    """Turn hisa's relative indices into distinct absolute positions in every slot.

    The callers scatter into a mask, where a -1 would hit a real key. An unused slot gets a position
    outside the row's window, which is masked anyway; when those run out, an unselected one inside.

    Args:
        indices: [R, k] int32, k <= keys: relative to ks, ascending, then -1.
        ks, ke: [R, 1] int32, the rows' windows.
        keys: T. Positions are in [0, T).
        exhaustive: Whether each row has min(k, ke - ks) indices. Then k <= keys implies that the
            positions outside its window suffice.

    Returns:
        [R, k] int32. Every entry of a row is distinct.
    """
    column = torch.arange(indices.shape[1], dtype=torch.int32, device=indices.device)
    taken = indices >= 0
    nth = column - taken.sum(-1, keepdim=True, dtype=torch.int32)  # 0, 1, ... in unused slots
    window = ke - ks
    filler = torch.where(nth < ks, nth, nth + window)
    if not exhaustive:
        # Before selected token i lie `indices[i] - i` unselected ones. So the n-th unselected token
        # is token n + the number of selected tokens that have no more than n before them.
        n = nth - (keys - window)
        before = torch.where(taken, indices - column, torch.iinfo(torch.int32).max)
        inside = ks + n + torch.searchsorted(before, n, right=True, out_int32=True)
        filler = torch.where(n < 0, filler, inside)
    return torch.where(taken, indices + ks, filler)
