"""The patched forward of an indexer: what the model's own returns, selected hierarchically.

    keys      project, norm, RoPE, append to the cache      [B, S, hidden]  -> [B, T, D]
    queries   project, RoPE, quantise, a few rows at a time [B, r, q_lora]  -> [B, r, H, D]
    select    a HierarchicalIndexer, for the whole batch    [B * r, H, D]   -> [B * r, k] relative
    complete  absolute positions, unused slots filled       [B * r, k]      -> [B * r, k] absolute

Memory beyond the inputs and the result is bounded by CHUNK_BYTES, not by S or T.
"""

from __future__ import annotations

import functools
from dataclasses import asdict
from typing import Any, cast

import torch
from torch import Tensor

from hisa.around import complete, fold_weights
from hisa.keys import prepare_keys
from hisa.module import (
    CHUNK_BYTES,
    CUDA_CHUNK_BYTES,
    HierarchicalIndexer,
    Index,
    Some,
    pick,
    rows_per_chunk,
)
from hisa.quantize import scoring_dtype
from hisa.settings import Settings
from hisa.windows import Windows

from .kept import KeptKeys, Prepare
from .models import IndexerSpec
from .rotation import Angles, Indexer, rotate


class Projections:
    """The keys, queries and weights of one call, projected when they are asked for.

    Or before, with `begin`: none of them depends on the windows, which take a while to be known.
    """

    def __init__(
        self,
        module: Indexer,
        spec: IndexerSpec,
        settings: Settings,
        hidden_states: Tensor,
        q_resid: Tensor,
        angles: Angles,
    ) -> None:
        self.module = module
        self.q_dtype = q_resid.dtype
        self.batch, self.length = hidden_states.shape[:2]
        self._spec = spec
        self._settings = settings
        self._inputs = hidden_states, q_resid, angles
        self._keys: Tensor | None = None
        self._begun: tuple[Some, tuple[Tensor, Tensor]] | None = None
        dtype = scoring_dtype(q_resid.dtype, hidden_states.dtype)
        row_bytes = self.batch * module.n_heads * module.head_dim * dtype.itemsize
        chunk_bytes = CUDA_CHUNK_BYTES if hidden_states.is_cuda else CHUNK_BYTES
        self.step = rows_per_chunk(row_bytes, chunk_bytes)  # rows to project together

    def begin(self) -> None:
        """Project the keys and the first rows now."""
        rows = None if self.step >= self.length else slice(0, self.step)
        self._begun = rows, self._project(rows)  # what takes longest comes first
        self._keys = self._project_keys()

    def keys(self) -> Tensor:
        """Return the keys of all rows, [B, S, D]."""
        return self._project_keys() if self._keys is None else self._keys

    def rows(self, rows: Some) -> tuple[Tensor, Tensor]:
        """Return the queries and the weights of some rows, [B, r, H, D] and [B, r, H]."""
        begun, self._begun = self._begun, None
        return begun[1] if begun is not None and begun[0] == rows else self._project(rows)

    def _project_keys(self) -> Tensor:
        hidden_states, q_resid, angles = self._inputs
        return project_keys(self.module, self._spec, hidden_states, angles, q_resid)

    def _project(self, rows: Some) -> tuple[Tensor, Tensor]:
        hidden_states, q_resid, (cos, sin) = self._inputs
        angles = pick(cos, rows), pick(sin, rows)
        queries, scale = project_queries(
            self.module, self._spec, pick(q_resid, rows), angles, self._settings
        )
        return queries, project_weights(self.module, pick(hidden_states, rows), scale)


def select(
    projections: Projections,
    hierarchical: HierarchicalIndexer,
    windows: Windows,
    cache: Any | None,
    index: Index | None = None,
    kept: KeptKeys | None = None,
) -> Tensor:
    """Return the selected positions of every query, [B, S, min(topk, T)] int32.

    An `index` runs in place of `hisa.index`. `kept` is from earlier calls of the same indexer;
    without it, all keys are prepared.

    Entries of a row are distinct and in [0, T). Those of them that lie outside the row's window, or
    that hisa.index did not select, fill slots for which there was nothing to select.
    """
    settings, layer = hierarchical.settings, projections.module.layer_idx
    k = projections.keys()
    prepare: Prepare = functools.partial(prepare_keys, settings)
    if kept is not None and cache is not None:
        k, prepare = kept.append(cache, layer, k)
    elif cache is not None:
        k = cache.update_indexer(k, layer)
    if k.shape[:2] != (projections.batch, windows.keys):
        raise ValueError(
            f"attention_mask: expected one column for each of the {k.shape[1]} keys, "
            f"got {windows.keys}"
        )

    def finish(indices: Tensor, rows: Some) -> Tensor:
        ks, ke = pick(windows.ks, rows).flatten(), pick(windows.ke, rows).flatten()
        return complete(indices, ks, ke, keys=windows.keys)

    def prunes() -> bool:  # asked when the first rows are projected, since it may wait
        if torch.compiler.is_compiling():  # which there is none for in a graph
            return windows.can_prune(settings.block_size, settings.block_topk)
        return windows.prunes(settings.block_size, settings.block_topk)

    return hierarchical.select_rows(
        projections.rows,
        k,
        windows,
        step=projections.step,
        finish=finish,
        prepare=lambda k, dtype: prepare(k, dtype, windows, prune=prunes()),
        dtype=scoring_dtype(projections.q_dtype, k.dtype),
        topk=min(hierarchical.topk, windows.keys),
        index=index,
    )


@functools.lru_cache(maxsize=32)
def make_hierarchical(settings: Settings, topk: int) -> HierarchicalIndexer:
    """Return what selects in all layers with these settings."""
    return HierarchicalIndexer(**{**asdict(settings), "topk": topk})


def project_keys(
    module: Indexer,
    spec: IndexerSpec,
    hidden_states: Tensor,
    cos_sin: Angles,
    q_resid: Tensor,
) -> Tensor:
    """Project, norm and rotate the keys of all rows, [B, S, D]: the bits that the model caches."""
    k = module.wk(hidden_states)
    if spec.key_norm_in_weight_dtype:
        k = module.k_norm(k.to(module.k_norm.weight.dtype)).to(hidden_states.dtype)
    else:
        k = module.k_norm(k)

    def q_dtype() -> torch.dtype:
        return cast(Tensor, module.wq_b(q_resid[:1, :1])).dtype

    return rotate(module, spec, k.unsqueeze(2), cos_sin, like=q_dtype)[0].squeeze(2)


def project_queries(
    module: Indexer,
    spec: IndexerSpec,
    q_resid: Tensor,
    cos_sin: Angles,
    settings: Settings | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Project and rotate the queries of a few rows, [B, r, H, D].

    Where `settings` have them quantised next, they are, and their scales come too: [B, r, H] fp32.
    """
    q = module.wq_b(q_resid).view(*q_resid.shape[:2], module.n_heads, module.head_dim)
    if settings is None or settings.precision != "fp8" or settings.hadamard:
        return rotate(module, spec, q, cos_sin)
    return rotate(module, spec, q, cos_sin, quantize=True, power_of_two=settings.power_of_two)


def project_weights(module: Indexer, hidden_states: Tensor, scale: Tensor | None = None) -> Tensor:
    """Return the weight of each head, every scale folded in, [B, r, H] fp32.

    Args:
        scale: of the queries, [B, r, H] fp32.
    """
    projection = module.weights_proj
    weights = projection(hidden_states.to(projection.weight.dtype))
    return fold_weights(weights, scale, factor=module.n_heads**-0.5 * module.softmax_scale)
