"""T18: what a patch keeps beside a cache has the bytes of preparing all keys again.

The caches are transformers' own; what is done to them, in any order, is what transformers and its
users do, and what nobody should. Catches keys taken for those of an earlier call when they are not,
blocks that are not pooled again, or are at the wrong place, and memory that outlives a cache.
"""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import hisa
from hisa.keys import prepare_keys

transformers: Any = pytest.importorskip("transformers")

from tests.hf.chat import SETTINGS, Chat, assert_same_keys, blocks, step, windows  # noqa: E402

ON_CUDA = True


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("seeds", [2, pytest.param(40, marks=pytest.mark.long)])
def test_random_histories(kind: str, settings: str, seeds: int) -> None:
    for seed in range(seeds):
        chat = Chat(seed, kind, SETTINGS[settings])
        chat.run(250)
        assert (chat.kept.reused > 50) == (settings != "hadamard")


@pytest.fixture(params=["dynamic", "static"])
def chat(request: pytest.FixtureRequest) -> Chat:
    """One in which the next step takes up what is kept."""
    chat = Chat(0, request.param, SETTINGS["fp8"])
    chat.pads, chat.dtype = [0, 3], torch.float32
    for count in (60, 1, 1):
        step(chat, count)
    assert chat.kept.reused == 2
    return chat


def test_a_crop_keeps_what_is_left(chat: Chat) -> None:
    for count in (5, 1, 20):
        chat.used -= count
        if chat.kind == "static":
            chat.layer.indexer_cumulative_length.sub_(count)
        else:
            chat.layer.indexer_keys = chat.layer.indexer_keys[:, :-count, :]
        before = chat.kept.reused
        step(chat, 3)
        assert chat.kept.reused == before + 1


def test_only_blocks_with_new_tokens_are_pooled(
    chat: Chat, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The completed ones; in a static cache, where all are complete, each that was written to."""
    calls: list[int] = []
    real = hisa.pool_keys

    def pool_keys(k: Tensor, **options: Any) -> Any:
        calls.append(len(k))
        return real(k, **options)

    monkeypatch.setattr(hisa, "pool_keys", pool_keys)
    expected = []
    for _ in range(20):
        k, prepare = chat.kept.append(chat.cache, 0, chat.states(1))
        chat.used += 1
        found = windows(1, chat.used, k.shape[1], [[pad] for pad in chat.pads])
        prepare(k, k.dtype, found, prune=True)
        done = sum((chat.used - pad) % 8 == 0 for pad in chat.pads)
        expected += [8 * (2 if chat.kind == "static" else done)]
    assert calls == [count for count in expected if count]
    assert sum(expected) == (320 if chat.kind == "static" else 8 * 5)


def tampered(function: Callable[[Any], Any]) -> Callable[[Chat], None]:
    return lambda chat: setattr(chat.layer, "indexer_keys", function(chat.layer.indexer_keys))


def wrap_layer(chat: Chat) -> None:
    update = chat.layer.update_indexer
    chat.layer.update_indexer = lambda keys: update(keys).mul_(2)


def wrap_cache(chat: Chat) -> None:
    class Evicting(type(chat.cache)):  # type: ignore[misc]
        def update_indexer(self, keys: Tensor, index: int) -> Tensor:
            self.layers[index].indexer_keys = self.layers[index].indexer_keys.flip(1)
            found: Tensor = super().update_indexer(keys, index)
            return found

    chat.cache.__class__ = Evicting


def other_layer_class(chat: Chat) -> None:
    class Doubling(type(chat.layer)):  # type: ignore[misc]
        def update_indexer(self, keys: Tensor) -> Tensor:
            found: Tensor = super().update_indexer(keys)
            return found.mul_(2)

    chat.layer.__class__ = Doubling


def first_entry_alone(chat: Chat) -> None:
    chat.pads = chat.pads[:1]
    chat.layer.indexer_keys = chat.layer.indexer_keys[:1]


def race(act: Callable[[Chat], Any]) -> Callable[[Chat], None]:
    """What another thread does while we append, after we have looked at the cache."""

    class Layers(list[Any]):
        looks = 0

        def __getitem__(self, index: Any) -> Any:
            self.looks += 1
            if self.looks == 2:
                act(self.chat)
            return super().__getitem__(index)

        chat: Chat

    def begin(chat: Chat) -> None:
        chat.cache.layers = Layers(chat.cache.layers)
        chat.cache.layers.chat = chat

    return begin


DOUBTS: dict[str, Callable[[Chat], object]] = {
    "written to": lambda chat: chat.layer.indexer_keys[:, 3].add_(1),
    "written to through a view": lambda chat: chat.layer.indexer_keys[:, 9:].zero_(),
    "zeroed": lambda chat: chat.layer.indexer_keys.zero_(),
    "copied": tampered(lambda keys: keys.clone()),
    "reordered": tampered(lambda keys: keys.index_select(0, torch.tensor([1, 0]))),
    "flipped": tampered(lambda keys: keys.flip(1)),
    "storage exchanged": lambda chat: setattr(
        chat.layer.indexer_keys, "data", chat.layer.indexer_keys.flip(1)
    ),
    "first entry alone": first_entry_alone,
    "other thread appends": race(lambda chat: chat.other_append()),
    "other thread writes": race(lambda chat: chat.layer.indexer_keys.add_(1)),
    "other model": lambda chat: chat.other_append(),
    "deepcopy": lambda chat: setattr(chat, "cache", copy.deepcopy(chat.cache)),
    "pickle": lambda chat: setattr(chat, "cache", pickle.loads(pickle.dumps(chat.cache))),
    "layer that does more": wrap_layer,
    "cache of a class of its own": wrap_cache,
    "layer of a class of its own": other_layer_class,
}


@pytest.mark.parametrize("doubt", DOUBTS)
def test_in_doubt_all_keys_are_prepared_again(chat: Chat, doubt: str) -> None:
    """Integration bugs: sinks and eviction, by a cache of a class of its own."""
    DOUBTS[doubt](chat)
    step(chat)
    assert chat.kept.reused == 2
    if not doubt.startswith(("layer", "cache")):  # of which nothing is believed ever
        step(chat)
        assert chat.kept.reused == 3


def test_inference_mode(chat: Chat) -> None:
    """In which torch counts no changes: nothing is taken up, nor kept for later."""
    with torch.inference_mode():
        step(chat)
        chat.layer.indexer_keys[:, 3] += 1
        step(chat)
    step(chat)
    assert chat.kept.reused == 2
    step(chat)
    assert chat.kept.reused == 3
    if chat.kind == "dynamic":  # torch does not write to such a tensor outside of that mode
        with torch.inference_mode():
            chat.layer.indexer_keys = chat.layer.indexer_keys.clone()
        step(chat)
        assert chat.kept.reused == 3


def test_nothing_is_kept_for_a_layer_that_equals_others(chat: Chat) -> None:
    """Else one layer would find what is kept beside another."""
    kind = type(chat.layer)
    alike: dict[str, Any] = {"__eq__": lambda *both: True, "__hash__": lambda layer: 0}
    step(chat)
    reused = chat.kept.reused
    chat.layer.__class__ = type("Alike", (kind,), alike)
    step(chat)
    step(chat)
    assert chat.kept.reused == reused > 0


def test_quantised_keys_are_kept_before_any_row_is_pruned(chat: Chat) -> None:
    chat.begin()
    chat.pads = [0]
    for count in (9, 1, 1):
        k, prepare = chat.kept.append(chat.cache, 0, chat.states(count))
        chat.used += count
        prepare(k, k.dtype, windows(count, chat.used, k.shape[1], [[0]]), prune=False)
    assert chat.kept.reused == 4
    step(chat)
    assert chat.kept.reused == 5


def test_a_window_beyond_the_keys_of_a_static_cache() -> None:
    """Its zeros count as keys then, so that a block of some of them is no longer the last one."""
    chat = Chat(0, "static", SETTINGS["model"])
    chat.pads = [0]
    for count, seen in ((60, 60), (1, 61), (1, 100), (1, 100), (1, 64), (1, 100)):
        k, prepare = chat.kept.append(chat.cache, 0, chat.states(count))
        found = windows(count, seen, k.shape[1], [[0]])
        expected = prepare_keys(chat.settings, k.clone(), k.dtype, found, prune=True)
        slots = blocks(k.shape[1], found.starts(), chat.settings.block_size, seen)
        assert_same_keys(prepare(k, k.dtype, found, prune=True), expected, slots)
    assert chat.kept.reused == 5


def test_layers_that_share_windows_but_not_a_past() -> None:
    """What is found out about windows for one layer is not taken for another of other settings."""
    chats = [Chat(0, "dynamic", SETTINGS[name]) for name in ("model", "max")]
    for used, count in ((60, 60), (72, 12), (90, 18)):
        found = windows(count, used, used, [[0], [3]])
        for chat in chats:
            chat.pads = [0, 3]
            k, prepare = chat.kept.append(chat.cache, 0, chat.states(count))
            expected = prepare_keys(chat.settings, k.clone(), k.dtype, found, prune=True)
            slots = blocks(used, found.starts(), chat.settings.block_size, used)
            assert_same_keys(prepare(k, k.dtype, found, prune=True), expected, slots)
    assert [chat.kept.reused for chat in chats] == [2, 2]


def test_a_call_that_fails_leaves_nothing_behind(
    chat: Chat, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any, **options: Any) -> Any:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(hisa, "pool_keys", fail)
        with pytest.raises(MemoryError):
            step(chat, 8)
    step(chat)
    assert chat.kept.reused == 2


def test_memory_returns_with_the_cache(chat: Chat) -> None:
    """What is kept lives as long as the layer, and keeps no tensor of the cache alive."""
    (record,) = chat.kept._records.values()
    assert record.k is not None and record.pooled is not None
    parts = [weakref.ref(t) for t in (record.k, record.k_scale, *record.pooled, chat.layer)]
    keys = weakref.ref(chat.layer.indexer_keys)
    del record
    gc.collect()
    gc.disable()
    try:
        chat.layer.indexer_keys = None
        assert keys() is None
        del chat.cache
        assert not any(part() for part in parts)
    finally:
        gc.enable()
    assert len(chat.kept._records) == 0
