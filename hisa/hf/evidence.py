"""Which of the keys in a cache are still those that an earlier call left there. In doubt, none.

A cache layer of transformers has the keys of all tokens, [B, T, D]:

    DynamicIndexedLayer   appending makes a new tensor of the old one and the new keys; `crop` makes
                          a view of its first tokens, and everything else makes another tensor
    StaticIndexedLayer    appending writes to one tensor, behind the tokens that the layer counts

So what an earlier call left is there if the layer has the very tensor of then, or a view of its
first tokens, and nothing was written to it since, which torch counts. Keys that were reordered,
repeated, selected, offloaded, reset, copied or restored are another tensor or have been written to.
Nothing but its keys tells which beam an entry came from: comparing these reads all of them, as
pooling them again does, and would need the old ones to be held.

NOTE: torch does not count what is written through `.data` or by NumPy. In inference mode it counts
nothing, so tensors made in that mode are never believed.
"""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

from torch import Tensor

CACHE, DYNAMIC, STATIC = (
    ("transformers.cache_utils", f"{name}.update_indexer")
    for name in ("Cache", "DynamicIndexedLayer", "StaticIndexedLayer")
)


class Seen(NamedTuple):
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
        base = tensor._base
        root = tensor if base is None else base
        view = (tensor.data_ptr(), tensor.stride(), tensor.dtype, tensor.device)
        return cls(weakref.ref(root), root._version, view, tensor.shape)

    def became(self, now: Seen, *, writes: int = 0) -> bool:
        """Say whether what is seen now is that tensor, written to so many times since."""
        return self.shape == now.shape and self._is_of(now, writes)

    def tokens(self, keys: object) -> int:
        """Return how many tokens keys have that are the first tokens of what was seen, else 0."""
        now = Seen.of(keys)
        if now is None or len(now.shape) != 3 or now.shape[1] > self.shape[1]:
            return 0
        same = now.shape[::2] == self.shape[::2] and self._is_of(now, 0)
        return now.shape[1] if same else 0

    def _is_of(self, now: Seen, writes: int) -> bool:
        return (
            now.root() is self.root()
            and now.version == self.version + writes
            and now.view == self.view
        )


class State(NamedTuple):
    """The keys of a layer, as a call left them."""

    keys: Seen  # [B, T, D]
    counter: Seen | None = None  # of a static layer: the tensor that counts its tokens
    used: int = 0  # what it says


class Update(NamedTuple):
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
    kind: Any = type(layer)
    by_identity = kind.__eq__ is object.__eq__
    return layer if by_identity and _function(layer) in (DYNAMIC, STATIC) else None


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
    k: Tensor = cache.update_indexer(added, index)
    seen = Seen.of(k) if k is layer.indexer_keys else None
    if seen is None:
        return Update(k, None)
    tokens = 0 if state is None else state.keys.tokens(old)  # that nothing wrote to since
    batch, keys, dim = seen.shape
    known = tokens > 0 and old.shape == (batch, keys - added.shape[1], dim)
    return Update(k, State(seen), known, tokens, keys)


def _append_static(
    cache: Any, index: int, added: Tensor, layer: Any, state: State | None
) -> Update:
    k: Tensor = cache.update_indexer(added, index)
    counter = layer.indexer_cumulative_length
    seen, counted = Seen.of(k), Seen.of(counter)
    if k is not layer.indexer_keys or seen is None or counted is None:
        return Update(k, None)
    if state is not None and state.counter is not None and state.counter.became(counted, writes=1):
        last = state.used + added.shape[1]
    else:
        last = int(counter)  # waits for the device
    known = state is not None and state.keys.became(seen, writes=1)
    return Update(k, State(seen, counted, last), known, last - added.shape[1], last)


def _function(owner: Any) -> tuple[str, str] | None:
    """Return where the method `update_indexer` is defined; None if it is no method of a class."""
    function = getattr(getattr(owner, "update_indexer", None), "__func__", None)
    return None if function is None else (function.__module__, function.__qualname__)
