"""Which of the keys in a cache are still those that an earlier call left there. In doubt, none.

A cache layer of transformers has the keys of all tokens, [B, T, D]:

    DynamicIndexedLayer   appending makes a new tensor of the old one and the new keys; `crop` makes
                          a view of its first tokens, and everything else makes another tensor
    StaticIndexedLayer    appending writes to one tensor, behind the tokens that the layer counts

So what an earlier call left is there if the layer has the very tensor of then, or a view of its
first tokens, and nothing was written to it since, which torch counts. Keys that were reordered,
repeated, selected, offloaded, reset, copied or restored are another tensor or have been written to.

NOTE: torch does not count what is written through `.data` or by NumPy. In inference mode it counts
nothing, so tensors made in that mode are never believed.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

from torch import Tensor

CACHE, DYNAMIC, STATIC = (
    ("transformers.cache_utils", f"{name}.update_indexer")
    for name in ("Cache", "DynamicIndexedLayer", "StaticIndexedLayer")
)


@dataclass(frozen=True)
class Seen:
    """A tensor as it was. Does not keep it alive."""

    root: weakref.ref[Tensor]  # it, or what it is a view of
    version: int
    view: tuple[object, ...]
    shape: tuple[int, ...]

    @classmethod
    def of(cls, tensor: object) -> Seen | None:
        """Look at a tensor; None if it is none, or if what is written to it is not counted."""
        if type(tensor) is not Tensor or tensor.is_inference():
            return None
        root = tensor if tensor._base is None else tensor._base
        view = (tensor.data_ptr(), tensor.stride(), tensor.dtype, tensor.device)
        return cls(weakref.ref(root), root._version, view, tuple(tensor.shape))

    def is_still(self, tensor: object, *, writes: int = 0) -> bool:
        """Say whether this is that tensor, written to so many times since."""
        return self._is_of(Seen.of(tensor), writes, self.shape)

    def tokens(self, keys: object) -> int:
        """Return how many tokens keys have that are the first tokens of what was seen, else 0."""
        if type(keys) is not Tensor or keys.dim() != 3 or keys.shape[1] > self.shape[1]:
            return 0
        count = keys.shape[1]
        shape = (self.shape[0], count, self.shape[2])
        return count if self._is_of(Seen.of(keys), 0, shape) else 0

    def _is_of(self, now: Seen | None, writes: int, shape: tuple[int, ...]) -> bool:
        return (
            now is not None
            and now.root() is self.root()
            and now.version == self.version + writes
            and (now.view, now.shape) == (self.view, shape)
        )


@dataclass(frozen=True)
class State:
    """The keys of a layer, as a call left them."""

    keys: Seen  # [B, T, D]
    counter: Seen | None = None  # of a static layer: the tensor that counts its tokens
    count: int = 0  # what it says


@dataclass(frozen=True)
class Update:
    """What a call did to the keys of a layer."""

    k: Tensor  # [B, T, D], all keys
    state: State | None  # None if a later call could not tell whether it still holds
    known: bool = False  # whether keys are those of an earlier state: all but [first, last) of T
    first: int = 0
    last: int = 0


def known_layer(cache: Any, index: int) -> Any | None:
    """Return the layer that `cache.update_indexer` appends to, if it is known how it does."""
    layers = getattr(cache, "layers", None)
    if _function(cache) != CACHE or not isinstance(layers, list) or index >= len(layers):
        return None
    layer = layers[index]
    compared = any("__eq__" in vars(cls) for cls in type(layer).__mro__[:-1])  # not by identity
    return None if compared or _function(layer) not in (DYNAMIC, STATIC) else layer


def append(cache: Any, index: int, added: Tensor, layer: Any | None, state: State | None) -> Update:
    """Append keys to a cache.

    Args:
        index: number of the layer.
        added: `[B, S, D]`.
        layer: what `known_layer` returns.
        state: in which an earlier call left it, if there is one.
    """
    if layer is None:
        return Update(cache.update_indexer(added, index), None)
    how = _append_static if _function(layer) == STATIC else _append_dynamic
    return how(cache, index, added, layer, state)


def _append_dynamic(
    cache: Any, index: int, added: Tensor, layer: Any, state: State | None
) -> Update:
    old = layer.indexer_keys
    tokens = 0 if state is None else state.keys.tokens(old)
    k: Tensor = cache.update_indexer(added, index)
    seen = Seen.of(k) if k is layer.indexer_keys else None
    if seen is None:
        return Update(k, None)
    known = (
        state is not None
        and tokens > 0
        and state.keys.tokens(old) == tokens  # still
        and seen.shape == (old.shape[0], tokens + added.shape[1], old.shape[2])
    )
    return Update(k, State(seen), known, tokens, k.shape[1])


def _append_static(
    cache: Any, index: int, added: Tensor, layer: Any, state: State | None
) -> Update:
    k: Tensor = cache.update_indexer(added, index)
    counter = layer.indexer_cumulative_length
    seen, counted = Seen.of(k), Seen.of(counter)
    if k is not layer.indexer_keys or seen is None or counted is None:
        return Update(k, None)
    if (
        state is not None
        and state.counter is not None
        and state.counter.is_still(counter, writes=1)
    ):
        last = state.count + added.shape[1]
    else:
        last = int(counter)  # waits for the device
    known = state is not None and state.keys.is_still(k, writes=1)
    return Update(k, State(seen, counted, last), known, last - added.shape[1], last)


def _function(owner: Any) -> tuple[str, str] | None:
    """Return where the method `update_indexer` is defined; None if it is no method of a class."""
    function = getattr(getattr(owner, "update_indexer", None), "__func__", None)
    return None if function is None else (function.__module__, function.__qualname__)
