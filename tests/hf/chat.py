"""A cache with one layer, what is kept beside it, and what may happen to it: for test_t18_kept."""

from __future__ import annotations

import copy
import itertools
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor

from hisa.hf.kept import KeptKeys
from hisa.hf.masks import Windows, scan
from hisa.hf.settings import Settings
from hisa.keys import Keys, prepare_keys
from tests.case import same_bytes
from tests.hf.models import here

D, ROOM = 16, 160
SETTINGS = {
    "model": Settings(block_size=8, block_topk=3, topk=12),
    "max": Settings(block_size=16, block_topk=2, topk=12, pooling="max"),
    "fp8": Settings(block_size=8, block_topk=3, topk=12, precision="fp8"),
    "fp8, power of two": Settings(8, 3, 12, precision="fp8", power_of_two=True),
    "hadamard": Settings(8, 3, 12, precision="fp8", hadamard=True),
}


def make_cache(kind: str) -> Any:
    config = transformers.DeepseekV32Config(num_hidden_layers=1, mlp_layer_types=["dense"])
    if kind == "dynamic":
        return transformers.DynamicCache(config=config)
    return transformers.StaticCache(config=config, max_cache_len=ROOM)


def windows(rows: int, used: int, keys: int, starts: list[list[int]]) -> Windows:
    """The last rows of `used` tokens, where segments begin at `starts` in each entry."""
    position, mask = torch.arange(keys), torch.zeros(len(starts), rows, keys, dtype=torch.bool)
    for entry, row in itertools.product(range(len(starts)), range(rows)):
        last = used - rows + row
        begin = max((start for start in starts[entry] if start <= last), default=0)
        if starts[entry][0] <= last:
            mask[entry, row] = (position >= begin) & (position <= last)
    found = scan(mask, len(starts), rows)
    assert isinstance(found, Windows)
    return found


def blocks(keys: int, starts: tuple[tuple[int, ...], ...], size: int, used: int) -> list[int]:
    """Return the slots of complete blocks among the used keys, counted token by token."""
    edges = [entry * keys + start for entry, some in enumerate(starts) for start in some]
    slots = []
    for first in range(0, len(starts) * keys, 1):
        begin = max(edge for edge in edges if edge <= first)
        end = min([edge for edge in edges if edge > first], default=len(starts) * keys)
        end = min(end, first - first % keys + used)
        if (first - begin) % size == 0 and first + size <= end:
            slots.append(-(-first // size))
    return slots


def assert_same_keys(got: Keys, expected: Keys, slots: list[int]) -> None:
    assert same_bytes(got.k, expected.k)
    assert (got.k_scale is None) == (expected.k_scale is None)
    if got.k_scale is not None and expected.k_scale is not None:
        assert same_bytes(got.k_scale, expected.k_scale)
    assert (got.pooled is None) == (expected.pooled is None)
    if got.pooled is not None and expected.pooled is not None:
        for a, b in zip(got.pooled, expected.pooled, strict=True):
            assert a.shape == b.shape and same_bytes(a[slots], b[slots])


class Chat:
    """A cache with one layer, what is kept beside it, and what may happen to it."""

    def __init__(self, seed: int, kind: str, settings: Settings) -> None:
        self.rng = np.random.default_rng(seed)
        self.random = torch.Generator().manual_seed(seed)
        self.kind, self.settings, self.kept = kind, settings, KeptKeys(settings)
        self.dtype = torch.bfloat16 if seed % 2 else torch.float32
        self.begin()

    def begin(self) -> None:
        """A new cache, of another batch, with other padding."""
        self.cache, self.used = make_cache(self.kind), 0
        self.pads = [int(n) for n in self.rng.choice([0, 0, 3, 8, 17], self.rng.integers(1, 4))]

    @property
    def layer(self) -> Any:
        return self.cache.layers[0]

    def states(self, count: int) -> Tensor:
        shape = (len(self.pads), count, D)
        made: Tensor = here(torch.randn(shape, generator=self.random, device="cpu"))
        return made.to(self.dtype)

    def append(self, count: int = 0) -> None:
        """A call of the patched indexer; what it prepares is what preparing all gives."""
        count = count or int(self.rng.choice([1, 1, 1, 2, 7, 8, 30]))
        if self.used + count > ROOM:
            return self.begin()
        k, prepare = self.kept.append(self.cache, 0, self.states(count))
        self.used += count
        starts = [[pad] for pad in self.pads]
        if self.rng.random() < 0.1:  # two documents, of which only the last goes on
            starts = [[pad, max(pad, self.used - 9)] for pad in self.pads]
        found = windows(count, self.used, k.shape[1], starts)
        dtype = torch.float32 if self.rng.random() < 0.1 else self.dtype
        prune = bool(self.rng.random() < 0.9)
        expected = prepare_keys(self.settings, k.clone(), dtype, found, prune=prune)
        slots = blocks(k.shape[1], found.starts(), self.settings.block_size, self.used)
        assert_same_keys(prepare(k, dtype, found, prune=prune), expected, slots)
        return None

    def other_append(self) -> None:
        """Somebody else's call: an unpatched model with the same cache."""
        if self.used < ROOM:
            self.cache.update_indexer(self.states(1), 0)
            self.used += 1

    def crop(self) -> None:
        """What the layer's own `crop` does to the indexer's keys; it needs the attention's too."""
        count = int(self.rng.integers(1, 2 + self.used // 2))
        if self.kind == "static":
            self.layer.indexer_cumulative_length.sub_(count)
        else:
            self.layer.indexer_keys = self.layer.indexer_keys[:, :-count, :]
        self.used -= count

    def rows(self, indices: list[int]) -> Tensor:
        self.pads = [self.pads[i] for i in indices]
        made: Tensor = here(torch.tensor(indices, device="cpu"))
        return made

    def reorder(self) -> None:
        order = [int(i) for i in self.rng.integers(0, len(self.pads), len(self.pads))]
        self.layer.indexer_keys = self.layer.indexer_keys.index_select(0, self.rows(order))

    def repeat(self) -> None:
        if self.kind == "dynamic" and len(self.pads) < 3:
            self.layer.indexer_keys = self.layer.indexer_keys.repeat_interleave(2, dim=0)
            self.rows([i for i in range(len(self.pads)) for _ in range(2)])

    def select(self) -> None:
        if self.kind == "dynamic" and len(self.pads) > 1:
            self.layer.indexer_keys = self.layer.indexer_keys[self.rows([len(self.pads) - 1])]

    def write(self) -> None:
        """In place, by somebody else."""
        keys = self.layer.indexer_keys
        token = int(self.rng.integers(0, max(1, self.used)))
        (keys if self.rng.random() < 0.5 else keys[:, token:])[:, :1] += 1

    def swap(self) -> None:
        """An equal tensor of another's making, with other bytes in it."""
        self.layer.indexer_keys = self.layer.indexer_keys.clone()
        self.layer.indexer_keys.data[:, : max(1, self.used // 2)] += 1

    def restore(self) -> None:
        ways: list[Callable[[Any], Any]] = [
            copy.deepcopy,
            lambda cache: pickle.loads(pickle.dumps(cache)),
        ]
        self.cache = ways[self.rng.integers(2)](self.cache)

    def restore_into_the_layer(self) -> None:
        """Go back to a state of before, as contrastive search does."""
        state = dict(vars(self.layer))
        if self.kind == "static":
            state = {n: v.clone() if isinstance(v, Tensor) else v for n, v in state.items()}
        used = self.used
        for _ in range(3):
            self.append(1)
            if self.used < used:  # it began anew
                return
        vars(self.layer).update(state)
        self.used = used

    def reset(self) -> None:
        self.begin() if self.kind == "dynamic" else self.layer.reset()
        self.used = 0

    def run(self, steps: int) -> None:
        rest = [self.other_append, self.reorder, self.repeat, self.select, self.write, self.swap]
        rest += [self.restore, self.restore_into_the_layer, self.reset, self.begin]
        often = [self.append] * 60 + [self.crop] * 10
        for _ in range(steps):
            if self.layer.indexer_keys is None or self.used < 20:
                self.append(30)
            (often + rest)[self.rng.integers(len(often) + len(rest))]()


def step(chat: Chat, count: int = 1) -> None:
    """A call like the others, with the padding that there is."""
    k, prepare = chat.kept.append(chat.cache, 0, chat.states(count))
    chat.used += count
    found = windows(count, chat.used, k.shape[1], [[pad] for pad in chat.pads])
    expected = prepare_keys(chat.settings, k.clone(), k.dtype, found, prune=True)
    slots = blocks(k.shape[1], found.starts(), chat.settings.block_size, chat.used)
    assert_same_keys(prepare(k, k.dtype, found, prune=True), expected, slots)
