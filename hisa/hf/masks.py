"""Attention masks as windows: one contiguous range of keys per query, found once per model forward.

A mask [B, S, T] is bool (True: attend) or additive (0: attend; -65504, the fp16 minimum, or less:
masked). Anything else, and a row that attends to more than one range, has no window: `scan` then
says why, and the caller uses the model's own indexer.

Rows of one batch entry that begin at the same key form a segment, and blocks tile it from that key.
So left padding does not shift the blocks, and each document of a packed sequence is tiled on its
own, exactly as if it stood alone.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.multiprocessing.reductions import StorageWeakRef

import hisa
from hisa.ops import mask_windows


@dataclass(frozen=True)
class Windows:
    """The keys that each query of one model forward may select.

    `ks` and `ke` count within a batch entry; `packed_ks`, `packed_ke` and `cu_seqlens_k` count in
    the keys of all entries laid end to end, [B * keys], as hisa.index takes them.
    """

    keys: int  # T: keys per batch entry
    longest: int  # length of the longest window
    ks: Tensor  # [B, S] int32
    ke: Tensor  # [B, S] int32, equal to ks where a row is masked out entirely
    packed_ks: Tensor  # [B, S] int32
    packed_ke: Tensor  # [B, S] int32
    cu_seqlens_k: Tensor  # [segments + 1] int32
    _pruned: dict[tuple[int, int], int] = field(default_factory=dict, repr=False)

    def pruned_rows(self, block_size: int, block_topk: int) -> int:
        """Count the rows whose window meets more blocks than are kept."""
        if self.longest <= (block_topk - 1) * block_size + 1:  # too short, wherever it begins
            return 0
        key = (block_size, block_topk)
        if key not in self._pruned:
            starts = self.cu_seqlens_k[:-1]
            segment = torch.searchsorted(starts, self.packed_ks, right=True) - 1
            origin = starts[segment]
            first = (self.packed_ks - origin).div(block_size, rounding_mode="floor")
            last = (self.packed_ke - 1 - origin).div(block_size, rounding_mode="floor")
            self._pruned[key] = int((last - first >= block_topk).sum())
        return self._pruned[key]


def scan(mask: Tensor | None, batch: int, queries: int) -> Windows | str:
    """Find the window of every query, or say in a few words why there is none.

    Waits for the device: what becomes of the mask is decided on the host.
    """
    if mask is None:
        return "no attention mask"
    if mask.is_meta or isinstance(mask, FakeTensor):
        return "attention mask without data"
    fits = mask.dim() == 3 and mask.shape[0] in (1, batch) and mask.shape[1] in (1, queries)
    if not fits or (mask.shape[2] == 1 and queries > 1):  # one value for all keys
        return f"attention mask of shape {list(mask.shape)}"
    known: Any = hisa.build_info()["mask_dtypes"]
    if mask.dtype not in known:
        return f"attention mask of dtype {mask.dtype}"
    keys = mask.shape[2]
    if batch * keys >= 2**31:
        return "2**31 keys or more in one batch"
    if mask.stride(0) == 0:
        mask = mask[:1]  # one entry expanded over the batch
    ks, ke, summary = mask_windows(mask)
    unknown, broken, longest, latest = summary.tolist()
    if unknown:
        return "attention mask with values that are neither 0 nor masked"
    if broken:
        return "attention mask with a row that is not one range"
    ks, ke = ks.expand(batch, queries), ke.expand(batch, queries)
    origins = torch.arange(batch + 1, device=ks.device, dtype=torch.int32) * keys
    packed_ks, packed_ke = ks + origins[:-1, None], ke + origins[:-1, None]
    return Windows(
        keys=keys,
        longest=longest if ks.numel() else 0,
        ks=ks,
        ke=ke,
        packed_ks=packed_ks,
        packed_ke=packed_ke,
        cu_seqlens_k=_segments(origins, packed_ks, packed_ke) if latest else origins,
    )


def _segments(origins: Tensor, packed_ks: Tensor, packed_ke: Tensor) -> Tensor:
    """Cut each entry at the distinct starts of its windows; `origins` ends with all keys.

    NOTE: An entry whose windows overlap without sharing a start (a sliding window) cannot be cut
    and stays one segment. This is decided per entry: rows do not depend on the rest of the batch.
    A single query of such a mask looks like any other, so its blocks begin where its window does,
    and what it selects can differ from what it selects in a longer prefill.
    """
    origins, end = origins[:-1], origins[-1:]
    starts = torch.cat([origins, packed_ks.flatten()]).sort().values
    # the next start behind each window's own: a window that reaches beyond it overlaps another
    following = torch.cat([starts, end])[torch.searchsorted(starts, packed_ks, right=True)]
    overlapping = (packed_ke > following).any(1)
    owner = torch.searchsorted(origins, starts, right=True) - 1  # the entry that each start is in
    kept = (starts == origins[owner]) | ~overlapping[owner]
    kept[1:] &= starts[1:] != starts[:-1]
    return torch.cat([starts[kept], end])


@dataclass
class _Scanned:
    """A scan's result and the identity of the mask it came from. Does not keep the mask alive."""

    storage: StorageWeakRef
    view: tuple[object, ...]
    result: Windows | str
    served: set[int]  # layers

    def fits(self, mask: Tensor, view: tuple[object, ...], layer: int) -> bool:
        return (
            layer not in self.served
            and not self.storage.expired()
            and self.storage == StorageWeakRef(mask.untyped_storage())
            and self.view == view
        )


class WindowCache:
    """Scans a mask once for all layers of a model forward.

    Layers get fresh views of one mask, so a scan is found again by the mask's storage. A weak
    reference is held to it, during which its address cannot be given to another. A change in place
    is seen by the tensor's version. As further protection, for what has no version (tensors made in
    inference mode, memory shared with NumPy), a scan serves each layer once: when a layer comes
    back, a new forward has begun and the mask is scanned again.

    One scan is remembered per thread, so threads that share a model do not wait for each other.
    """

    def __init__(self) -> None:
        self._local = threading.local()
        self._lock = threading.Lock()
        self._scans = 0

    @property
    def scans(self) -> int:
        """How many masks were scanned."""
        return self._scans

    def get(self, mask: Tensor | None, batch: int, queries: int, layer: int) -> Windows | str:
        """Return the windows of `mask`, or why there are none, for layer number `layer`."""
        if mask is None or isinstance(mask, FakeTensor):
            return self._scan(mask, batch, queries)
        last: _Scanned | None = getattr(self._local, "last", None)
        view = (batch, queries, *_view(mask))
        if last is not None and last.fits(mask, view, layer):
            last.served.add(layer)
            return last.result
        result = self._scan(mask, batch, queries)
        storage = StorageWeakRef(mask.untyped_storage())
        self._local.last = _Scanned(storage, view, result, {layer})
        return result

    def _scan(self, mask: Tensor | None, batch: int, queries: int) -> Windows | str:
        with self._lock:
            self._scans += 1
        return scan(mask, batch, queries)


def _view(mask: Tensor) -> tuple[object, ...]:
    version = None if mask.is_inference() else mask._version
    return (mask.dtype, mask.shape, mask.stride(), mask.storage_offset(), mask.device, version)
