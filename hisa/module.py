"""`HierarchicalIndexer`: HISA around the projections of any token-level indexer.

    keys      in one dtype, quantised if that is wanted, pooled    [B, N, D]     -> [B * N, D]
    queries   project and quantise, a few rows at a time           [B, r, ...]   -> [B * r, H, D]
    index     hisa.index over the whole batch, packed              [B * r, H, D] -> [B * r, k]
    finish    from relative to the positions that a caller wants   [B * r, k]    -> [B * r, k]

`select_rows` is these steps. `hisa.patch` runs it with the projections of the models that it knows,
`forward` with the callables that a user gives, `select` with tensors. Memory beyond the inputs, the
keys and the result is bounded by CHUNK_BYTES, not by the number of queries.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict

import torch
from torch import Tensor, nn

import hisa

from . import _extension
from .checking import OPTIONAL, check_types
from .contract import check_keys, check_shape
from .keys import Keys, prepare_keys
from .layouts import call_windows, count_rows
from .quantize import scoring_dtype, to_precision
from .settings import Settings
from .windows import Windows

# Of projected queries handled together; weights are read once per chunk, and a GPU wants many rows.
CHUNK_BYTES, CUDA_CHUNK_BYTES = 16 << 20, 256 << 20

Projection = Callable[..., Tensor]
Some = slice | None  # of a call's rows; None: all of them, as in decoding
Rows = Callable[[Some], tuple[Tensor, Tensor]]  # rows -> q [B, r, H, D], weights [B, r, H]
Finish = Callable[[Tensor, Some], Tensor]  # indices [B * r, k], rows -> what is returned for them
Index = Callable[..., Tensor]  # the arguments and the result of `hisa.index`
Prepare = Callable[[Tensor, torch.dtype], Keys]  # keys [B, N, D], and in which dtype to score them


class HierarchicalIndexer(nn.Module):
    """Selects tokens hierarchically for an indexer that is given as three projections.

    For any indexer whose score of query m and key n is
    `sum_h weights[m, h] * relu(q[m, h] . k[n])`. All scales, and a softmax scale, belong into the
    weights. Write it as three callables of the same inputs (hidden states, and whatever else the
    projections need, such as positions), or hand projected tensors to `select`.

        self.select = hisa.HierarchicalIndexer(self.queries, self.keys, self.weights, topk=512)
        indices = self.select(hidden)  # [B, S, 512] int32, causal

    A callable that is an `nn.Module` becomes a submodule: its parameters move, and are saved, with
    this one. A module that is registered elsewhere too would be saved twice; give a method that
    calls it. A bound method is copied and pickled along with its object, a lambda is not.

    Batched inputs are `[B, S, ...]` with keys `[B, N, D]`, packed ones `[M, ...]` with keys
    `[N, D]`; the keys' number of dimensions says which. Every window and every result counts tokens
    along the keys' dimension N, so that `k[b][indices[b, s]]` (batched) and `k[indices[m]]`
    (packed) are the keys that were selected. `hisa.index` counts from `ks` instead.

    Args:
        project_queries: `(*inputs) -> [B, S, H, D]` or `[M, H, D]`.
        project_keys: `(*inputs) -> [B, S, D]` or `[M, D]`. Not needed where every call has `keys`.
        project_weights: `(*inputs) -> [B, S, H]` or `[M, H]`, any sign.
        block_size: tokens per block: 8, 16, 32, 64, 128 or 256.
        block_topk: blocks kept per query, at least 2.
        topk: tokens selected per query, 1 to `block_topk * block_size`.
        pooling: "mean" or "max".
        precision: in which dtype queries and keys are scored: "model", theirs, or "fp8", one scale
            per token and head.
        power_of_two: with "fp8", round each scale up to a power of two.
        hadamard: with "fp8", rotate queries and keys by a Hadamard matrix first. D is then a power
            of two.

    Raises:
        TypeError: a projection is not callable, or a setting has the wrong type.
        ValueError: a setting is not supported.
        RuntimeError: hisa's extension is not built; says what to run.
    """

    project_queries: Projection | None
    project_keys: Projection | None
    project_weights: Projection | None

    def __init__(
        self,
        project_queries: Projection | None = None,
        project_keys: Projection | None = None,
        project_weights: Projection | None = None,
        *,
        block_size: int = 128,
        block_topk: int = 64,
        topk: int = 2048,
        pooling: str = "mean",
        precision: str = "model",
        power_of_two: bool = False,
        hadamard: bool = False,
    ) -> None:
        super().__init__()
        names = ("project_queries", "project_keys", "project_weights")
        given = (project_queries, project_keys, project_weights)
        for name, projection in zip(names, given, strict=True):
            if projection is not None and not callable(projection):
                raise TypeError(f"{name}: expected a callable, got {type(projection).__name__}")
            setattr(self, name, projection)
        if type(topk) is not int:
            raise TypeError(f"topk: expected an int, got {topk!r}")
        self.topk = topk
        self.settings = Settings(
            block_size, block_topk, topk, pooling, precision, power_of_two, hadamard
        )
        self._most_heads = int(_extension.require().build_info()["max_heads"])

    @torch.no_grad()
    def forward(
        self,
        *inputs: Tensor,
        keys: Tensor | None = None,
        k_scale: Tensor | None = None,
        ks: Tensor | None = None,
        ke: Tensor | None = None,
        causal: bool = True,
        left_padding: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cu_seqlens_k: Tensor | None = None,
    ) -> Tensor:
        """Project queries and weights, a few rows at a time, and select.

        To decode, or to prefill in chunks, keep the keys: append
        `indexer.project_keys(*inputs)` of the new tokens to yours, and pass all of them as `keys`.

        Args:
            inputs: `[B, S, ...]` or `[M, ...]`, what the projections take. Each is cut into rows.
                Of batched inputs but the first, B may be 1.
            keys: `[B, N, D]` or `[N, D]`, all keys so far, those of the inputs included. Absent
                means `project_keys(*inputs)`.
            k_scale, ks, ke, causal, left_padding, attention_mask, cu_seqlens_k: as for `select`.

        Returns:
            `[B, S, topk]` or `[M, topk]` int32, as from `select`.

        Raises:
            TypeError, ValueError: as `select` does; an input or what a projection returns does not
                have the shape that the others ask for; a projection is missing.
        """
        if not inputs:
            raise TypeError("inputs: expected at least one Tensor, got none")
        check_types(Tensor, **{f"inputs[{i}]": given for i, given in enumerate(inputs)})
        k = self._projection("project_keys")(*inputs) if keys is None else keys
        queries, weights = self._projection("project_queries"), self._projection("project_weights")
        sizes = check_keys("project_keys" if keys is None else "keys", k)
        batched = "B" in sizes
        length = count_rows(inputs, sizes)

        def project(rows: Some) -> tuple[Tensor, Tensor]:
            some = [pick(x, rows, batched=batched) for x in inputs]
            known = {**sizes, "S" if batched else "M": some[0].shape[int(batched)]}
            q, w = queries(*some), weights(*some)
            check_shape("project_queries", q, "B S H D" if batched else "M H D", known, k.device)
            check_shape("project_weights", w, "B S H" if batched else "M H", known, k.device)
            return (q, w) if batched else (q[None], w[None])

        row_bytes = sizes.get("B", 1) * self._most_heads * sizes["D"] * max(2, k.dtype.itemsize)
        windows = call_windows(
            sizes, length, k.device, ks, ke, causal, left_padding, attention_mask, cu_seqlens_k
        )
        return self._select(project, k, k_scale, windows, sizes, row_bytes)

    @torch.no_grad()
    def select(
        self,
        q: Tensor,
        k: Tensor,
        weights: Tensor,
        *,
        k_scale: Tensor | None = None,
        ks: Tensor | None = None,
        ke: Tensor | None = None,
        causal: bool = True,
        left_padding: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cu_seqlens_k: Tensor | None = None,
    ) -> Tensor:
        """Select for queries, keys and weights that are there already.

        All positions, given and returned, are in [0, N): in a batch entry's own keys, or in the
        packed keys of all sequences.

        Args:
            q: `[B, S, H, D]` or `[M, H, D]`, floating-point. Scored in bfloat16 or float16 if that
                holds both q and k, otherwise in float32; or as `precision` says. Where q and k are
                float8_e4m3fn already, in that, with the scales of q folded into the weights.
            k: `[B, N, D]` or `[N, D]`.
            weights: `[B, S, H]` or `[M, H]`, floating-point.
            k_scale: `[B, N]` or `[N]` float32, at least 0. A key is `k * k_scale`. With
                `precision="fp8"` k may be what `hisa.quantize_fp8` made of (rotated) keys.
            ks, ke: `[B, S]` or `[M]` int32: a query may select tokens [ks, ke), clamped to [0, N].
                An absent `ks` is the first token of the query's sequence.
            causal: what an absent `ke` is. True: the queries of a sequence are its last ones, and
                each sees the tokens up to its own. False: it sees all of the sequence.
            left_padding: `[B]` int32, for batched inputs: where each sequence begins. Blocks tile
                it from there, so the result does not depend on the padding. Without it, and with
                `ks` alone, they tile all N keys from the first.
            attention_mask: `[B, S, N]` (or 1 for B and S) bool, True: attend, or additive, 0:
                attend; for batched inputs and in place of all other windows. Each query has to
                attend to one range of keys. Reading it waits for the device, in each layer, and
                breaks the graph of `torch.compile`; the other arguments do neither.
            cu_seqlens_k: `[S + 1]` int32, for packed inputs: the first token of each sequence, then
                N. If there are fewer queries than keys (a decode step), `ks` and `ke` are needed
                with it: see `hisa.causal_windows`.

        Returns:
            `[B, S, topk]` or `[M, topk]` int32: positions in ascending order, then -1. The width is
            always `topk`. No gradient flows through it.

        Raises:
            TypeError: something is not a tensor, or a dtype is not accepted.
            ValueError: a shape or device is not accepted, arguments exclude each other, or a query
                attends to more than one range. The values of windows are not looked at.
        """
        sizes = check_keys("k", k)
        batched = "B" in sizes
        check_shape("q", q, "B S H D" if batched else "M H D", sizes, k.device)
        check_shape("weights", weights, "B S H" if batched else "M H", sizes, k.device)
        length = sizes["S" if batched else "M"]
        windows = call_windows(
            sizes, length, k.device, ks, ke, causal, left_padding, attention_mask, cu_seqlens_k
        )
        if not batched:
            q, weights = q[None], weights[None]
        row_bytes = q[:, :1].numel() * q.dtype.itemsize

        def project(rows: Some) -> tuple[Tensor, Tensor]:
            return pick(q, rows), pick(weights, rows)

        return self._select(project, k, k_scale, windows, sizes, row_bytes)

    def select_rows(
        self,
        project: Rows,
        k: Tensor,
        windows: Windows,
        *,
        step: int,
        finish: Finish,
        prepare: Prepare,
        dtype: torch.dtype | None = None,
        topk: int | None = None,
        index: Index | None = None,
    ) -> Tensor:
        """Select `step` rows of every batch entry at a time: what all ways to select share.

        Args:
            project: gives the queries `[B, r, H, D]` and weights `[B, r, H]` of some rows.
            k: `[B, N, D]`.
            windows: of all rows.
            step: how many rows to project together.
            finish: makes of indices `[B * r, topk]` relative to `packed_ks`, and the rows they are
                of, what is returned for them.
            prepare: makes of the keys what all rows are scored with.
            dtype: in which to score, or to quantise from; absent, what holds queries and keys.
            topk: instead of the indexer's own.
            index: runs in place of `hisa.index`.

        Returns:
            `[B, S, topk]` int32.
        """
        (batch, length), width = windows.ks.shape, self.topk if topk is None else topk
        if batch * length * width == 0:
            return torch.empty(batch, length, width, dtype=torch.int32, device=k.device)
        settings, keys = self.settings, None

        def select(rows: Some) -> Tensor:
            nonlocal dtype, keys
            queries, weights = project(rows)
            dtype = dtype or scoring_dtype(queries.dtype, k.dtype)
            keys = keys or prepare(k, dtype)  # the first queries say in which dtype
            q, q_scale = to_precision(settings, queries.flatten(0, 1), dtype)
            weights = weights.flatten(0, 1).float()
            indices = (index or hisa.index)(
                q,
                keys.k,
                weights if q_scale is None else weights * q_scale,
                k_scale=keys.k_scale,
                ks=pick(windows.packed_ks, rows).flatten(),
                ke=pick(windows.packed_ke, rows).flatten(),
                cu_seqlens_k=windows.cu_seqlens_k,
                pooled=keys.pooled,
                block_size=settings.block_size,
                block_topk=settings.block_topk,
                topk=width,
                pooling=settings.pooling,
            )
            return finish(indices, rows).view(batch, -1, width)

        if step >= length:
            return select(None)
        selected = torch.empty(batch, length, width, dtype=torch.int32, device=k.device)
        for start in range(0, length, step):
            rows = slice(start, start + step)
            selected[:, rows] = select(rows)
        return selected

    def extra_repr(self) -> str:
        """Return the settings."""
        return ", ".join(f"{name}={value!r}" for name, value in asdict(self.settings).items())

    def _projection(self, name: str) -> Projection:
        projection: Projection | None = getattr(self, name)
        if projection is None:
            raise TypeError(f"{name}: expected a callable when the indexer is made, got None")
        return projection

    def _select(
        self,
        project: Rows,
        k: Tensor,
        k_scale: Tensor | None,
        windows: Windows,
        sizes: dict[str, int],
        row_bytes: int,
    ) -> Tensor:
        """Select positions, for batched or packed inputs; `project` gives a batch in any case."""
        batched = "B" in sizes
        check_types(OPTIONAL, k_scale=k_scale)
        if k_scale is not None:
            letters = "B N" if batched else "N"
            check_shape("k_scale", k_scale, letters, sizes, k.device, torch.float32)

        def positions(indices: Tensor, rows: Some) -> Tensor:
            start = pick(windows.ks, rows).reshape(-1, 1).clamp(min=0)  # as hisa.index reads it
            return torch.where(indices >= 0, indices + start, -1)

        settings = self.settings
        prune = windows.can_prune(settings.block_size, settings.block_topk)
        selected = self.select_rows(
            project,
            k if batched else k[None],
            windows,
            step=rows_per_chunk(row_bytes, CUDA_CHUNK_BYTES if k.is_cuda else CHUNK_BYTES),
            finish=positions,
            prepare=lambda k, dtype: prepare_keys(
                settings, k, dtype, windows, prune=prune, k_scale=k_scale
            ),
        )
        return selected if batched else selected[0]


def pick(x: Tensor, rows: Some, *, batched: bool = True) -> Tensor:
    """Return some rows of `[B, S, ...]`, or of packed `[M, ...]`; for all of them, x itself."""
    if rows is None:
        return x
    return x[:, rows] if batched else x[rows]


def rows_per_chunk(row_bytes: int, chunk_bytes: int) -> int:
    """Return how many rows of every batch entry fit in a chunk; at least 1."""
    return max(1, chunk_bytes // max(1, row_bytes))
