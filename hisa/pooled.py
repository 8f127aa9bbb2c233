"""`PooledKeys`: the keys of sequences that grow, and the pooled keys of their complete blocks.

    keys      a slot of C tokens for each segment    [S, C, D]        written once per token
    pooled    a slot of C / B blocks                 [S, C / B, D]    written once per block
    lengths   on the host                            one per segment

A block that a window cuts is kept whatever its pooled key (see `hisa.reference.coarse`), so only
complete blocks need one: it is written when the block's last token arrives, and rolling back
forgets it by the length alone. There is nothing else to keep, to undo or to wait for. C is a
multiple of B, so that block j of segment s has the slot `s * C / B + j`, where `hisa.index` looks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, overload

import torch
from torch import Tensor

import hisa

from .checking import NUMBER, OPTIONAL, check_types, selection
from .contract import check_result, check_shape
from .storage import Segments, Storage


class PooledKeys:
    """Keep the keys of growing sequences, and pool each block once, when it is complete.

    For generation, where `hisa.index` alone would pool all keys again in every step:

        store = hisa.PooledKeys(batch, 128, dtype=torch.bfloat16, device="cuda")
        store.append(k)                    # [batch, prompt, D], then [batch, 1, D] a step
        indices = store.index(q, weights)  # for the last tokens, q [batch, n, H, D]

    The bits are those of `hisa.index` on the keys of each sequence alone, however they were
    appended, rolled back and copied.

    A sequence is a *segment*, and has a number; at first there are 0 to `segments - 1`. Methods act
    on all of them in ascending order, or on those that their argument `segments` lists. If that is
    one number, tensors lack the leading dimension S.

    Args:
        segments: how many sequences to begin with, all empty.
        dim: D, a multiple of 16 up to 256.
        dtype: of the keys: float32, bfloat16, float16 or float8_e4m3fn.
        device: where they are kept; torch's default device if absent.
        scaled: whether keys come with scales; by default if they are float8_e4m3fn.
        block_size: tokens per block: 8, 16, 32, 64, 128 or 256.
        pooling: "mean" or "max".
        capacity: tokens of each segment for which there is memory. Then no tensor here ever moves,
            as CUDA graphs need it, and more tokens or more segments than that raise. Absent, memory
            doubles when it is full.

    Raises:
        TypeError: an argument has the wrong type, or a dtype is not accepted.
        ValueError: a number, a device or `pooling` is not accepted.

    Lengths are known on the host, so that nothing here waits for the device. An object serves one
    thread at a time. Memory, for each token of the capacity: a key, 4 bytes if it is scaled, and
    `1 / block_size` of a pooled key and 4 bytes.
    """

    def __init__(
        self,
        segments: int,
        dim: int,
        *,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | None = None,
        scaled: bool | None = None,
        block_size: int = 128,
        pooling: str = "mean",
        capacity: int | None = None,
    ) -> None:
        numbers = {"segments": segments, "dim": dim}
        numbers |= {} if capacity is None else {"capacity": capacity}
        check_types(NUMBER, **numbers)
        for name, number in numbers.items():
            if number < 0:
                raise ValueError(f"{name}: expected at least 0, got {number}")
        check_types((torch.dtype,), dtype=dtype)
        check_types((bool, type(None)), scaled=scaled)
        self._none = torch.empty(0, dim, dtype=dtype, device=device)
        hisa.pool_keys(self._none, block_size=block_size, pooling=pooling)  # checks the rest
        self.block_size = block_size
        self.pooling = pooling
        self._scaled = dtype == torch.float8_e4m3fn if scaled is None else scaled
        self._storage = Storage(segments, capacity, self._none, self._scaled, block_size)

    @property
    def segments(self) -> tuple[int, ...]:
        """The numbers of all segments, ascending."""
        return tuple(self._storage.segments)

    @property
    def lengths(self) -> tuple[int, ...]:
        """How many tokens each of `segments` has."""
        return tuple(self._storage.segments.values())

    @property
    def capacity(self) -> int:
        """C: for how many tokens of a segment there is memory, a multiple of `block_size`."""
        return self._storage.slots.k.shape[1]

    @property
    def keys(self) -> Tensor:
        """The keys, `[S * C, D]`: segment s begins at `s * C`. What no window holds is garbage."""
        return self._storage.slots.k.flatten(0, 1)

    @property
    def k_scale(self) -> Tensor | None:
        """The scales of `keys`, `[S * C]` float32, or None."""
        scale = self._storage.slots.k_scale
        return None if scale is None else scale.flatten()

    @property
    def cu_seqlens_k(self) -> Tensor:
        """`[S + 1]` int32: 0, C, 2 * C and so on."""
        return self._storage.slots.edges

    @property
    def pooled(self) -> tuple[Tensor, Tensor]:
        """The pooled keys, `[S * C / B, D]`, and their scales, `[S * C / B]` float32."""
        slots = self._storage.slots
        return slots.pooled_k.flatten(0, 1), slots.pooled_scale.flatten()

    @torch.no_grad()
    def append(
        self, k: Tensor, k_scale: Tensor | None = None, *, segments: Segments = None
    ) -> None:
        """Append tokens, and pool the blocks that they complete.

        Args:
            k: `[S, n, D]`, as many for each segment, or `[n, D]` for one, of the store's dtype.
            k_scale: `[S, n]` or `[n]` float32, at least 0, if the store is `scaled`.
            segments: which; all by default.

        Raises:
            TypeError: not a tensor, or of another dtype.
            ValueError: a shape or device is not accepted, a segment does not exist or is named
                twice, there are scales where none are kept, or there is no room.
        """
        lengths, sizes = self._named(segments)
        lead, device = "S " if "S" in sizes else "", self._none.device
        check_shape("k", k, lead + "n D", sizes, device, self._none.dtype)
        check_types(Tensor if self._scaled else OPTIONAL, k_scale=k_scale)
        if k_scale is not None:
            if not self._scaled:
                raise ValueError("k_scale: expected none for a store that is not scaled, got one")
            check_shape("k_scale", k_scale, lead + "n", sizes, device, torch.float32)
        storage, added = self._storage, sizes["n"]
        storage.reserve(len(storage.lengths), added + max(lengths.values(), default=0))

        ends = storage.upload([s * self.capacity + n for s, n in lengths.items()], torch.int64)
        tokens = (ends[:, None] + torch.arange(added, device=device)).flatten()
        self.keys[tokens] = k.flatten(0, -2)
        if self.k_scale is not None and k_scale is not None:
            self.k_scale[tokens] = k_scale.flatten()
        for segment, length in lengths.items():
            self._pool(segment, length, length + added)
        for segment, length in lengths.items():
            storage.lengths[segment] = length + added

    def truncate(self, lengths: int | Sequence[int], *, segments: Segments = None) -> None:
        """Roll back: forget all but the first tokens.

        Args:
            lengths: how many to keep, the same of each segment or one number for each.
            segments: which; all by default.

        Raises:
            TypeError: not a number.
            ValueError: negative, more than a segment has, another number of them than of segments,
                or a segment does not exist.
        """
        had, _ = self._named(segments)
        kept = [lengths] * len(had) if isinstance(lengths, int) else list(lengths)
        if len(kept) != len(had):
            raise ValueError(f"lengths: expected {len(had)} of them, got {len(kept)}")
        for segment, length in zip(had, kept, strict=True):
            check_types(NUMBER, lengths=length)
            if not 0 <= length <= had[segment]:
                raise ValueError(
                    f"lengths: expected 0 to {had[segment]} for segment {segment}, got {length}"
                )
        for segment, length in zip(had, kept, strict=True):
            self._storage.lengths[segment] = length

    def add(self) -> int:
        """Begin an empty segment, and return its number: the lowest that is not in use.

        Raises:
            ValueError: there is no room.
        """
        return self._storage.begin()

    def fork(self, segment: int) -> int:
        """Copy a segment, and return the copy's number: the lowest that is not in use.

        Raises:
            TypeError: not a number.
            ValueError: the segment does not exist, or there is no room.
        """
        storage = self._storage
        length, copy = storage.find(segment, "segment"), storage.begin()
        storage.lengths[copy] = length
        storage.fill(copy, storage.held(segment))
        return copy

    def free(self, segment: int) -> None:
        """Forget a segment. Its number and its memory go to the next one that begins.

        Raises:
            TypeError: not a number.
            ValueError: the segment does not exist.
        """
        self._storage.find(segment, "segment")
        self._storage.lengths[segment] = None

    def reset(self) -> None:
        """Empty every segment. The memory is kept."""
        self.truncate(0)

    def reorder(self, indices: Sequence[int] | Tensor) -> None:
        """Select and repeat segments, as beam search does.

        Segment i becomes what segment `indices[i]` was, and there are `len(indices)` then. A tensor
        is read from its device.

        Raises:
            TypeError: not numbers.
            ValueError: a segment does not exist, or there is no room.
        """
        storage = self._storage
        sources = indices.tolist() if isinstance(indices, Tensor) else list(indices)
        lengths = [storage.find(source, "indices") for source in sources]
        storage.reserve(len(sources), 0)
        moved = {  # copied before any of it is overwritten
            to: [view.clone() for view in storage.held(source)]
            for to, source in enumerate(sources)
            if to != source
        }
        storage.lengths[:] = [*lengths, *[None] * (len(storage.lengths) - len(lengths))]
        for to, held in moved.items():
            storage.fill(to, held)

    def windows(self, queries: int, *, segments: Segments = None) -> tuple[Tensor, Tensor]:
        """Return the windows of the last tokens of each segment: each sees those up to its own.

        A query that would come before its segment's first token gets an empty window.

        Args:
            queries: n, of each segment.
            segments: which; all by default.

        Returns:
            `(ks, ke)`, both `[S * n]` int32.

        Raises:
            TypeError: not a number.
            ValueError: negative, or a segment does not exist.
        """
        check_types(NUMBER, queries=queries)
        if queries < 0:
            raise ValueError(f"queries: expected at least 0, got {queries}")
        lengths, upload = self._named(segments)[0], self._storage.upload
        start = upload([s * self.capacity for s in lengths], torch.int32)[:, None]
        length = upload(list(lengths.values()), torch.int32)[:, None]
        row = torch.arange(1 - queries, 1, dtype=torch.int32, device=start.device)
        end = start + (length + row).clamp(min=0)
        return start.expand_as(end).flatten(), end.flatten()

    @overload
    def index(
        self,
        q: Tensor,
        weights: Tensor,
        *,
        block_topk: int = ...,
        topk: int = ...,
        segments: Segments = ...,
        return_scores: Literal[False] = ...,
        out: Tensor | None = ...,
    ) -> Tensor: ...

    @overload
    def index(
        self,
        q: Tensor,
        weights: Tensor,
        *,
        block_topk: int = ...,
        topk: int = ...,
        segments: Segments = ...,
        return_scores: bool,
        out: Tensor | tuple[Tensor, Tensor] | None = ...,
    ) -> Tensor | tuple[Tensor, Tensor]: ...

    def index(
        self,
        q: Tensor,
        weights: Tensor,
        *,
        block_topk: int = 64,
        topk: int = 2048,
        segments: Segments = None,
        return_scores: bool = False,
        out: Tensor | tuple[Tensor, Tensor] | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Select for the last tokens of each segment: `hisa.index` with all that it needs.

        Args:
            q: `[S, n, H, D]`, or `[n, H, D]` for one segment: queries of its last n tokens, each of
                which sees the tokens up to its own.
            weights: `[S, n, H]` or `[n, H]` float32.
            block_topk, topk, return_scores, out: as for `hisa.index`.
            segments: which; all by default.

        Returns:
            `[S, n, topk]` or `[n, topk]` int32: positions in the segment, ascending, then -1; with
            `return_scores` also the scores.

        Raises:
            TypeError, ValueError: as `hisa.index` does; or a segment does not exist.
        """
        lengths, sizes = self._named(segments)
        lead, device = "S " if "S" in sizes else "", self._none.device
        check_shape("q", q, lead + "n H D", sizes, device, self._none.dtype)
        check_shape("weights", weights, lead + "n H", sizes, device, torch.float32)
        ks, ke = self.windows(sizes["n"], segments=list(lengths))
        shape = (*q.shape[:-2], topk)
        found = hisa.index(
            q.flatten(0, -3),
            self.keys,
            weights.flatten(0, -2),
            k_scale=self.k_scale,
            ks=ks,
            ke=ke,
            cu_seqlens_k=self.cu_seqlens_k,
            pooled=self,
            block_size=self.block_size,
            block_topk=block_topk,
            topk=topk,
            return_scores=return_scores,
            out=None if out is None else self._rows(out, shape, return_scores),
        )
        if out is not None:
            return out
        if isinstance(found, Tensor):
            return found.view(shape)
        return found[0].view(shape), found[1].view(shape)

    def _named(self, segments: Segments) -> tuple[dict[int, int], dict[str, int]]:
        """Return the lengths of the segments, and the sizes that tensors for them have: S and D."""
        lengths, sizes = self._storage.find_all(segments), {"D": self._none.shape[1]}
        return lengths, sizes if isinstance(segments, int) else {"S": len(lengths), **sizes}

    def _rows(
        self, out: Tensor | tuple[Tensor, Tensor], shape: tuple[int, ...], return_scores: bool
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Return the tensors of `out` as `hisa.index` takes them, `[S * n, topk]`."""
        results, dtypes = selection(out, return_scores), (torch.int32, torch.float32)
        for (name, result), dtype in zip(results.items(), dtypes, strict=False):
            check_result(name, result, shape, dtype, self._none.device)
        rows = [result.flatten(0, -2) for result in results.values()]
        return (rows[0], rows[1]) if return_scores else rows[0]

    def _pool(self, segment: int, length: int, end: int) -> None:
        """Pool the blocks that tokens `length` to `end` of a segment complete."""
        first, last = length // self.block_size, end // self.block_size
        if first == last:
            return
        slots, tokens = self._storage.slots, slice(first * self.block_size, last * self.block_size)
        hisa.pool_keys(
            slots.k[segment, tokens],
            k_scale=None if slots.k_scale is None else slots.k_scale[segment, tokens],
            block_size=self.block_size,
            pooling=self.pooling,
            out=(slots.pooled_k[segment, first:last], slots.pooled_scale[segment, first:last]),
        )


def kept_pair(
    store: PooledKeys,
    k: Tensor,
    k_scale: Tensor | None,
    cu_seqlens_k: Tensor | None,
    block_size: int,
) -> tuple[Tensor, Tensor]:
    """Return the pooled keys of a store that `hisa.index` is given with these arguments.

    Raises:
        ValueError: they are not the store's own.
    """
    own = {"k": (k, store.keys), "k_scale": (k_scale, store.k_scale)}
    if cu_seqlens_k is not None:  # else windows end where they say, and blocks are the same
        own["cu_seqlens_k"] = (cu_seqlens_k, store.cu_seqlens_k)
    for name, (given, kept) in own.items():
        same = given is kept or (
            isinstance(given, Tensor) and kept is not None and given.is_set_to(kept)
        )
        if not same:
            raise ValueError(f"{name}: expected that of the PooledKeys given as pooled")
    if block_size != store.block_size:
        raise ValueError(f"block_size: expected {store.block_size} as in pooled, got {block_size}")
    return store.pooled
