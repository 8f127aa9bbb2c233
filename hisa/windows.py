"""Windows: which tokens each query may select."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from .checking import check_types
from .transfer import download

Found = TypeVar("Found")


@dataclass(frozen=True)
class Windows:
    """The keys that each query of one call may select.

    `ks` and `ke` count within a batch entry; `packed_ks`, `packed_ke` and `cu_seqlens_k` count in
    the keys of all entries laid end to end, [B * keys], as hisa.index takes them.
    """

    keys: int  # T: keys per batch entry
    longest: int  # length of the longest window, or what it cannot exceed
    reach: int  # no window ends behind this key
    ks: Tensor  # [B, S] int32
    ke: Tensor  # [B, S] int32, equal to ks where a row is masked out entirely
    packed_ks: Tensor  # [B, S] int32
    packed_ke: Tensor  # [B, S] int32
    cu_seqlens_k: Tensor  # [segments + 1] int32
    measured: bool = False  # whether `longest` is the length of a window, not only a limit
    _found: dict[Hashable, Any] = field(default_factory=dict, repr=False)  # for all layers

    def can_prune(self, block_size: int, block_topk: int) -> bool:
        """Say whether a window is long enough for a block to be skipped, wherever it begins."""
        return self.longest > (block_topk - 1) * block_size + 1

    def prunes(self, block_size: int, block_topk: int) -> bool:
        """Say whether any row's window meets more blocks than are kept.

        Waits for the device only where that depends on where the longest window begins.
        """
        if not self.can_prune(block_size, block_topk):
            return False
        if self.measured and self.longest > block_topk * block_size:
            return True
        return self.count_pruned(block_size, block_topk)() > 0

    def count_pruned(self, block_size: int, block_topk: int) -> Callable[[], int]:
        """Begin to count the rows whose window meets more blocks than are kept.

        Returns:
            What waits for the device, and gives their number.
        """
        if not self.can_prune(block_size, block_topk):
            return lambda: 0
        if self.measured and self.ks.numel() == 1:  # blocks tile the only window from its start
            pruned = int(self.longest > block_topk * block_size)
            return lambda: pruned  # without the tensors

        def begin() -> Callable[[], int]:
            starts = self.cu_seqlens_k[:-1]
            segment = torch.searchsorted(starts, self.packed_ks, right=True) - 1
            origin = starts[segment]
            first = (self.packed_ks - origin).div(block_size, rounding_mode="floor")
            last = (self.packed_ke - 1 - origin).div(block_size, rounding_mode="floor")
            counted = download((last - first >= block_topk).sum()[None])
            return lambda: counted()[0]

        return self.once(("pruned rows", block_size, block_topk), begin)

    def starts(self) -> tuple[tuple[int, ...], ...]:
        """Say where the segments of each batch entry begin, in its own keys.

        Waits for the device, unless each entry is one segment.
        """

        def find() -> tuple[tuple[int, ...], ...]:
            entries = self.ks.shape[0]
            if self.cu_seqlens_k.shape[0] == entries + 1:  # each entry's first key begins one
                return ((0,),) * entries
            edges = self.cu_seqlens_k[:-1].tolist()
            return tuple(
                tuple(edge - entry * self.keys for edge in edges if edge // self.keys == entry)
                for entry in range(entries)
            )

        return self.once("starts", find)

    def once(self, name: Hashable, find: Callable[[], Found]) -> Found:
        """Return what `find` returns when the first layer asks for it."""
        if name not in self._found:
            self._found[name] = find()
        found: Found = self._found[name]
        return found


def entry_origins(batch: int, keys: int, device: torch.device) -> Tensor:
    """Return where the keys of each entry begin in those of all, then their number: [B + 1] int32.

    All of them fit in an int32.
    """
    if keys == 0:  # no step
        return torch.zeros(batch + 1, dtype=torch.int32, device=device)
    return torch.arange(0, batch * keys + 1, keys, dtype=torch.int32, device=device)


def causal_windows(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> tuple[Tensor, Tensor]:
    """Return the windows of causal attention over packed sequences.

    The queries of a sequence are its last ones: query i of Lq, over Lk keys, sees the first
    `Lk - Lq + i + 1` keys of its own sequence. Lq = Lk is a prefill, Lq < Lk a chunk or a decode
    step. A query that would come before its sequence's first key gets an empty window.

    Args:
        cu_seqlens_q: `[S + 1]` int32, first query of each sequence, then the number of queries M.
        cu_seqlens_k: `[S + 1]` int32, first key of each sequence, then the number of keys N.

    Returns:
        `(ks, ke)`, both `[M]` int32, on the device of `cu_seqlens_k`. Reads from the device.

    Raises:
        TypeError: not int32.
        ValueError: not one-dimensional, empty, of different lengths, on different devices, or
            queries that do not ascend from 0.
    """
    check_types(Tensor, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
    for name, edges in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        got = f"got {list(edges.shape)} {str(edges.dtype).removeprefix('torch.')}"
        if edges.dtype != torch.int32:
            raise TypeError(f"{name}: expected [S + 1] int32, {got}")
        if edges.dim() != 1 or len(edges) == 0 or len(edges) != len(cu_seqlens_k):
            raise ValueError(f"{name}: expected [S + 1] int32, the same S for both, {got}")
    if cu_seqlens_q.device != cu_seqlens_k.device:
        raise ValueError(
            f"cu_seqlens_q: expected a tensor on {cu_seqlens_k.device} as cu_seqlens_k is, "
            f"got one on {cu_seqlens_q.device}"
        )
    queries = cu_seqlens_q.diff()
    if bool((queries < 0).any()) or int(cu_seqlens_q[0]) != 0:
        raise ValueError(f"cu_seqlens_q: expected ascending entries from 0, got {cu_seqlens_q}")
    rows = int(cu_seqlens_q[-1])
    sequence = torch.repeat_interleave(queries, output_size=rows)
    position = torch.arange(rows, device=queries.device) - cu_seqlens_q[:-1][sequence]
    start = cu_seqlens_k[:-1][sequence]
    seen = (cu_seqlens_k.diff() - queries)[sequence] + position + 1
    return start, (start + seen.clamp(min=0)).to(torch.int32)


def clamp_windows(
    ks: Tensor | None,
    ke: Tensor | None,
    cu_seqlens_k: Tensor | None,
    *,
    rows: int,
    keys: int,
    device: torch.device,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return windows as `hisa.index` reads them: inside of the keys, and of one segment.

    Args:
        ks, ke, cu_seqlens_k: those of `hisa.index`, already checked, on `device`.
        rows: M.
        keys: N.

    Returns:
        `(start, end, origin)`, all `[M]` int32: row m may select tokens `[start[m], end[m])` of the
        segment that begins at `origin[m]`. Nothing is read back from the device.
    """
    none = torch.zeros(rows, dtype=torch.int32, device=device)
    start = none if ks is None else ks.clamp(0, keys)
    end = none + keys if ke is None else ke.clamp(max=keys)
    origin = none
    if cu_seqlens_k is not None:
        edges = cu_seqlens_k.contiguous()
        past = torch.searchsorted(edges, start, right=True)
        origin = edges[(past - 1).clamp(min=0)]
        end = torch.minimum(end, edges[past.clamp(max=len(edges) - 1)])
        end = torch.where(start < edges[0], start, end)
    return start, torch.maximum(start, end), origin
