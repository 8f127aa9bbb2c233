"""Attention masks as windows: one contiguous range of keys per query.

A mask [B, S, T] is bool (True: attend) or additive (0: attend; -65504, the fp16 minimum, or less:
masked). Anything else, and a row that attends to more than one range, has no window: `scan` then
says why, and `hisa.patch` then uses the model's own indexer.

Rows of one batch entry that begin at the same key form a segment, and blocks tile it from that key.
So left padding does not shift the blocks, and each document of a packed sequence is tiled on its
own, exactly as if it stood alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from . import _extension
from .around import mask_windows
from .transfer import download
from .windows import Windows, entry_origins


class Scan(NamedTuple):
    """A look at a mask that has begun."""

    wait: Callable[[], Windows | str]  # for the result; what becomes of it is decided on the host
    pending: bool  # whether the device is at it


def scan(mask: Tensor | None, batch: int, queries: int) -> Windows | str:
    """Find the window of every query, or say in a few words why there is none."""
    return begin_scan(mask, batch, queries).wait()


def begin_scan(mask: Tensor | None, batch: int, queries: int) -> Scan:
    """Do as `scan` does, but let the device look at the mask while the host goes on."""
    if mask is None:
        return Scan(lambda: "no attention mask", pending=False)
    if mask.is_meta or isinstance(mask, FakeTensor):
        return Scan(lambda: "attention mask without data", pending=False)
    if reason := misfit(mask, batch, queries):
        return Scan(lambda: reason, pending=False)
    ks, ke, summary = mask_windows(mask[:1] if mask.stride(0) == 0 else mask)
    found, keys = download(summary), mask.shape[2]

    def finish() -> Windows | str:
        unknown, broken, longest, latest = found()
        if unknown:
            return "attention mask with values that are neither 0 nor masked"
        if broken:
            return "attention mask with a row that is not one range"
        longest, reach = longest if ks.numel() else 0, min(longest + latest, keys)
        windows = _pack(ks, ke, batch, queries, keys, longest, reach, measured=True)
        if not latest:
            return windows
        starts, kept = _starts(windows)
        kept[1:] &= starts[1:] != starts[:-1]
        return replace(windows, cu_seqlens_k=torch.cat([starts[kept], windows.cu_seqlens_k[-1:]]))

    return Scan(finish, pending=mask.is_cuda)


def trace(mask: Tensor | None, batch: int, queries: int) -> Windows | str:
    """Do as `scan` does in a compiled model, where nothing depends on what the mask holds.

    Gives the same windows and blocks for a mask that `scan` finds windows in. Any other row's is
    the range from the first to the last key that it attends to. There is always the same number of
    segments, some of them empty, and no window is known to be shorter than all keys.
    """
    if mask is None:
        return "no attention mask"
    if reason := misfit(mask, batch, queries):
        return reason
    ks, ke, _ = mask_windows(mask[:1] if mask.stride(0) == 0 else mask)
    keys = mask.shape[2]
    windows = _pack(ks, ke, batch, queries, keys, longest=keys, reach=keys, measured=False)
    origins, end = windows.cu_seqlens_k[:-1], windows.cu_seqlens_k[-1:]
    if queries == 1:
        starts = torch.cat([origins[:, None], windows.packed_ks], 1).flatten()
    else:
        starts, kept = _starts(windows)
        # What is not kept becomes a copy of the start before it, and begins an empty segment.
        starts = torch.where(kept, starts, 0).cummax(0).values
    return replace(windows, cu_seqlens_k=torch.cat([starts, end]))


def misfit(mask: Tensor, batch: int, queries: int) -> str | None:
    """Say why there can be no windows in a mask, by its shape and dtype; None if there may be."""
    fits = mask.dim() == 3 and mask.shape[0] in (1, batch) and mask.shape[1] in (1, queries)
    if not fits or (mask.shape[2] == 1 and queries > 1):  # one value for all keys
        return f"attention mask of shape {list(mask.shape)}"
    if not knows(mask.dtype):
        return f"attention mask of dtype {mask.dtype}"
    if batch * mask.shape[2] >= 2**31:
        return "2**31 keys or more in one batch"
    return None


def knows(dtype: torch.dtype) -> bool:
    """Say whether masks may have this dtype. A graph takes the answer as it is: see hisa/hf."""
    return dtype in _mask_dtypes()


@functools.cache
def _mask_dtypes() -> frozenset[torch.dtype]:
    known: Any = _extension.require().build_info()["mask_dtypes"]
    return frozenset(known)


def _pack(
    ks: Tensor,
    ke: Tensor,
    batch: int,
    queries: int,
    keys: int,
    longest: int,
    reach: int,
    *,
    measured: bool,
) -> Windows:
    """Return windows [B or 1, S or 1] as those of all rows, each entry one segment."""
    if ks.shape != (batch, queries):
        ks, ke = ks.expand(batch, queries), ke.expand(batch, queries)
    origins = entry_origins(batch, keys, ks.device)
    return Windows(
        keys=keys,
        longest=longest,
        reach=reach,
        measured=measured,
        ks=ks,
        ke=ke,
        packed_ks=ks if batch == 1 else ks + origins[:-1, None],
        packed_ke=ke if batch == 1 else ke + origins[:-1, None],
        cu_seqlens_k=origins,
    )


def _starts(windows: Windows) -> tuple[Tensor, Tensor]:
    """Return where windows begin, ascending, and which of that are edges; each entry's origin is.

    NOTE: An entry whose windows overlap without sharing a start (a sliding window) cannot be cut
    and stays one segment. This is decided per entry: rows do not depend on the rest of the batch.
    A single query of such a mask looks like any other, so its blocks begin where its window does,
    and what it selects can differ from what it selects in a longer prefill.
    """
    packed_ks, packed_ke = windows.packed_ks, windows.packed_ke
    origins, end = windows.cu_seqlens_k[:-1], windows.cu_seqlens_k[-1:]
    starts = torch.cat([origins, packed_ks.flatten()]).sort().values
    # the next start behind each window's own: a window that reaches beyond it overlaps another
    following = torch.cat([starts, end])[torch.searchsorted(starts, packed_ks, right=True)]
    overlapping = (packed_ke > following).any(1)
    owner = torch.searchsorted(origins, starts, right=True) - 1  # the entry that each start is in
    return starts, (starts == origins[owner]) | ~overlapping[owner]
