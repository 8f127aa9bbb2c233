"""What a patched indexer keeps beside the caches that it finds, so that a step does little.

    append    keys to the cache; of which is known that they were there?    [B, S, D] -> [B, T, D]
    prepare   quantise the others, pool the blocks that these are in        [B, T, D] -> Keys

Its bits are those of preparing all keys again: a key is quantised by itself, and so is a block
pooled. It lasts as long as the cache's layer, and nothing refers to it but the patch.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from hisa.keys import Keys, pool, prepare_keys
from hisa.quantize import to_precision
from hisa.transfer import upload
from hisa.windows import Windows

from .evidence import State, Update, append, known_layer
from .settings import Settings

Prepare = Callable[..., Keys]  # the arguments and the result of `prepare_keys`, but its settings


class Record(NamedTuple):
    """What is kept beside one layer of a cache."""

    state: State
    dtype: torch.dtype  # in which the keys are scored, or from which they are quantised
    k: Tensor | None  # [B * T, D] as they are scored; None if the cache has them so
    k_scale: Tensor | None  # [B * T] fp32
    starts: tuple[tuple[int, ...], ...]  # of the segments that blocks tile, in each entry
    pooled: tuple[Tensor, Tensor] | None  # of all blocks; None as long as no row was pruned


class Renewal(NamedTuple):
    """How the pooled keys of an earlier call become those of a later one."""

    source: Tensor | None  # [slots] int64: where each was; None if all are where they were
    # Of the blocks to pool, if there are some: their slots [P], their keys [P * block_size], int64.
    fresh: tuple[Tensor, Tensor] | None


class KeptKeys:
    """Quantised and pooled keys of one indexer, for each cache that it is given.

    NOTE: Nothing is kept with `hadamard`: the keys are rotated in one product, in which the bits of
    a row may depend on how many there are. Nor in inference mode; see evidence.py.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._records: WeakKeyDictionary[Any, Record] = WeakKeyDictionary()
        self._lock = threading.Lock()  # guards the records and the counter
        self._reused = 0

    @property
    def reused(self) -> int:
        """In how many calls only what was new had to be quantised and pooled."""
        return self._reused

    def append(self, cache: Any, index: int, added: Tensor) -> tuple[Tensor, Prepare]:
        """Append `[B, S, D]` to a layer of a cache.

        Returns:
            All keys of the layer, `[B, T, D]`, and what prepares them as `prepare_keys` does, once.
        """
        keeps = not (self._settings.hadamard or torch.is_inference_mode_enabled())
        layer = known_layer(cache, index) if keeps else None
        with self._lock:  # from here on it is this call's own, to be changed in place
            record = None if layer is None else self._records.pop(layer, None)
        update = append(cache, index, added, layer, None if record is None else record.state)
        return update.k, partial(self._prepare, layer, record if update.known else None, update)

    def clear(self) -> None:
        """Forget all of it."""
        with self._lock:
            self._records.clear()

    def _prepare(
        self,
        layer: Any,
        record: Record | None,
        update: Update,
        k: Tensor,
        dtype: torch.dtype,
        windows: Windows,
        *,
        prune: bool,
    ) -> Keys:
        settings = self._settings
        if record is None or record.dtype != dtype:
            keys = prepare_keys(settings, k, dtype, windows, prune=prune)
        else:
            keys = renew(settings, record, update, windows, prune)
            with self._lock:
                self._reused += 1
        cached = settings.precision == "model" and k.dtype == dtype
        if update.state is not None and not (cached and keys.pooled is None):
            record = Record(
                state=update.state,
                dtype=dtype,
                k=None if cached else keys.k,
                k_scale=None if cached else keys.k_scale,
                starts=windows.starts(),
                pooled=keys.pooled,
            )
            with self._lock:
                self._records[layer] = record
        return keys if prune or keys.pooled is None else keys._replace(pooled=None)


def renew(
    settings: Settings, record: Record, update: Update, windows: Windows, prune: bool
) -> Keys:
    """Prepare keys of which all but [first, last) of each entry are those of a record."""
    k_scale, pooled = None, record.pooled
    if record.k is None:
        k = update.k.flatten(0, 1)
    else:
        new, scale = to_precision(settings, update.k[:, update.first : update.last], record.dtype)
        k = _splice(record.k, new, update)
        if record.k_scale is not None and scale is not None:
            k_scale = _splice(record.k_scale, scale, update)
    if pooled is None or record.starts != windows.starts():
        keys = Keys(k, k_scale, None)
        return keys._replace(pooled=pool(settings, keys, windows.cu_seqlens_k)) if prune else keys

    had, size = record.state.keys.shape[1], settings.block_size
    renewal = windows.once(
        ("renewal", had, update.first, update.last, size, k.device),
        lambda: plan_renewal(windows, had, update.first, update.last, size, k.device),
    )
    if renewal.source is not None:
        pooled = pooled[0][renewal.source], pooled[1][renewal.source]
    if renewal.fresh is not None:
        slots, tokens = renewal.fresh
        scale = None if k_scale is None else k_scale[tokens]
        fresh = pool(settings, Keys(k[tokens], scale, None), None)
        for to, made in zip(pooled, fresh, strict=True):
            to[slots] = made
    return Keys(k, k_scale, pooled)


def plan_renewal(
    windows: Windows, had: int, first: int, last: int, block_size: int, device: torch.device
) -> Renewal:
    """Say where the pooled keys of T keys per entry are among those of `had`, and which are new.

    Args:
        first, last: which of the T keys of each entry are new.

    Block b of a segment that begins at token t of all entries has the slot `ceil(t / B) + b`. A
    block that the last of the new keys does not complete is pooled with the one that does, unless
    a window goes beyond these keys: until then it is the last one of every window that meets it.
    """

    def slot(token: int) -> int:  # of the first block that begins there or behind
        return -(-token // block_size)

    keys, starts = windows.keys, windows.starts()
    slots, had_slots = slot(len(starts) * keys), slot(len(starts) * had)
    # In a static cache nothing moves, and the blocks behind the new keys stay too.
    moved = slots != had_slots or (len(starts) > 1 and had != keys)
    source = torch.zeros(slots, dtype=torch.int64, device="cpu") if moved else None
    fresh, tokens = [], []
    for entry, begins in enumerate(starts):
        for start, end in pairwise((*begins, keys)):
            before, now = slot(entry * had + start), slot(entry * keys + start)
            length = end - start
            low = min(max(0, first - start), length) // block_size
            past = min(max(0, last - start), length)
            high = past // block_size
            if windows.reach > last:
                high = min(length // block_size, slot(past))
            if source is not None:
                source[now : now + low] = torch.arange(before, before + low, device="cpu")
            fresh += [now + block for block in range(low, high)]
            tokens += [entry * keys + start + block * block_size for block in range(low, high)]
    where = None if source is None else upload(source, device)
    if not fresh:
        return Renewal(where, None)
    first_tokens = torch.tensor(tokens, dtype=torch.int64, device="cpu")[:, None]
    return Renewal(
        where,
        (
            upload(torch.tensor(fresh, dtype=torch.int64, device="cpu"), device),
            upload((first_tokens + torch.arange(block_size, device="cpu")).flatten(), device),
        ),
    )


def _splice(kept: Tensor, new: Tensor, update: Update) -> Tensor:
    """Put what is new of each entry, [B, S, ...], into what is kept of all, [B * T, ...]."""
    entries = kept.view(update.k.shape[0], -1, *new.shape[2:])
    if entries.shape[1] == update.k.shape[1]:
        entries[:, update.first : update.last] = new
        return kept
    return torch.cat([entries[:, : update.first], new], dim=1).flatten(0, 1)
