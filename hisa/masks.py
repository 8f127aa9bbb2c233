"""Attention masks as windows: one contiguous range of keys per query.

A mask [B, S, T] is bool (True: attend) or additive (0: attend; -65504, the fp16 minimum, or less:
masked). Anything else, and a row that attends to more than one range, has no window: `scan` then
says why, and `hisa.patch` then uses the model's own indexer.

Rows of one batch entry that begin at the same key form a segment, and blocks tile it from that key.
So left padding does not shift the blocks, and each document of a packed sequence is tiled on its
own, exactly as if it stood alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from . import _extension
from .ops import mask_windows
from .windows import Windows


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
    known: Any = _extension.require().build_info()["mask_dtypes"]
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
