"""T19: `PooledKeys` after any history holds the bytes, and selects the tokens, of a fresh start.

A plain model, one tensor of keys per segment, goes through the same operations. Whatever a segment
does not hold is poison (all bits set) after each of them. Catches pooled keys that are stale,
missing, of the wrong place or pooled too early, copies that share memory, and reads of free memory.
"""

from __future__ import annotations

import copy
import itertools
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import hisa
from tests.builders import shaped
from tests.case import same_bytes
from tests.numeric import FP8, short_name

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
H, D = shaped(H=2, D=16).values()
KINDS = [  # dtype, scaled, B, pooling, capacity in blocks
    (BF16, False, 8, "mean", None),
    (BF16, True, 16, "max", 20),
    (FP32, False, 8, "max", 20),
    (FP32, True, 32, "mean", None),
    (FP16, False, 64, "mean", None),
    (FP8, True, 8, "mean", None),
    (FP8, True, 32, "max", 20),
    (FP8, False, 16, "mean", 20),
    (BF16, False, 128, "mean", None),
    (FP8, True, 128, "mean", None),
]
MOST_BLOCKS, SLOTS = 20, 5


class History:
    """A store, the plain model of it, and operations on both."""

    def __init__(
        self,
        seed: int,
        device: str,
        dtype: torch.dtype,
        scaled: bool,
        block_size: int,
        pooling: str,
        blocks: int | None,
    ) -> None:
        self.rng = np.random.default_rng(seed)
        self.random = torch.Generator().manual_seed(seed)
        self.device, self.dtype, self.scaled = device, dtype, scaled
        self.block_size = block_size
        self.options: dict[str, Any] = {"block_size": block_size, "pooling": pooling}
        capacity = None if blocks is None else blocks * block_size
        self.store = hisa.PooledKeys(
            SLOTS, D, dtype=dtype, device=device, scaled=scaled, capacity=capacity, **self.options
        )
        none = (self.keys(0), self.scales(0))
        self.model: dict[int, tuple[Tensor, Tensor | None]] = dict.fromkeys(range(SLOTS), none)

    def keys(self, *shape: int) -> Tensor:
        return torch.randn(*shape, D, generator=self.random).to(self.dtype).to(self.device)

    def scales(self, *shape: int) -> Tensor | None:
        scale = torch.rand(*shape, generator=self.random) + 0.5
        return scale.to(self.device) if self.scaled else None

    def some(self) -> list[int]:
        """Return some segments in any order, often all of them."""
        count = self.rng.integers(0, len(self.model) + 1)
        return [int(s) for s in self.rng.permutation(list(self.model))[:count]]

    def append(self) -> None:
        size = self.block_size
        way = self.rng.integers(4)
        named: Any = [None, self.some(), self.some()[:1], self.some()][way]
        chosen = list(self.model) if named is None else named
        room = MOST_BLOCKS * size - max((len(self.model[s][0]) for s in chosen), default=0)
        added = min(
            int(self.rng.choice([1, 1, 2, size, int(self.rng.integers(0, 3 * size))])), room
        )
        k, scale = self.keys(len(chosen), added), self.scales(len(chosen), added)
        if way == 2 and chosen:
            self.store.append(k[0], None if scale is None else scale[0], segments=chosen[0])
        else:
            self.store.append(k, scale, segments=named)
        for i, segment in enumerate(chosen):
            had_k, had_scale = self.model[segment]
            both = None if scale is None or had_scale is None else torch.cat([had_scale, scale[i]])
            self.model[segment] = torch.cat([had_k, k[i]]), both

    def truncate(self) -> None:
        chosen = self.some()
        lengths = [len(self.model[s][0]) for s in chosen]
        kept = [int(self.rng.choice([n, n // 2, max(0, n - 3)])) for n in lengths]
        self.store.truncate(kept, segments=chosen)
        for segment, length in zip(chosen, kept, strict=True):
            k, scale = self.model[segment]
            self.model[segment] = k[:length], None if scale is None else scale[:length]

    def reorder(self) -> None:
        count = int(self.rng.integers(1, SLOTS + 1))
        sources = [int(s) for s in self.rng.choice(list(self.model), count)] if self.model else []
        self.store.reorder(torch.tensor(sources) if self.rng.random() < 0.5 else sources)
        self.model = {i: self.model[source] for i, source in enumerate(sources)}

    def fork(self) -> None:
        if self.model and len(self.model) < SLOTS:
            segment = int(self.rng.choice(list(self.model)))
            self.take(self.store.fork(segment), self.model[segment])

    def add(self) -> None:
        if len(self.model) < SLOTS:
            self.take(self.store.add(), (self.keys(0), self.scales(0)))

    def take(self, number: int, held: tuple[Tensor, Tensor | None]) -> None:
        assert number == min(set(range(SLOTS)) - set(self.model))
        self.model = dict(sorted({**self.model, number: held}.items()))

    def free(self) -> None:
        for segment in self.some()[:1]:
            self.store.free(segment)
            del self.model[segment]

    def index(self) -> None:
        """Select for the last rows of some segments: each as for its keys alone."""
        named = None if self.rng.random() < 0.5 else self.some()
        chosen = list(self.model) if named is None else named
        rows, size = int(self.rng.choice([1, 1, 3])), self.block_size
        q = self.keys(len(chosen), rows, H)
        weights = torch.randn(len(chosen), rows, H, generator=self.random).to(self.device)
        options: dict[str, Any] = {"block_topk": 3, "topk": 2 * size, "return_scores": True}
        indices, scores = self.store.index(q, weights, segments=named, **options)
        for i, segment in enumerate(chosen):
            k, scale = self.model[segment]
            ends = torch.arange(len(k) - rows + 1, len(k) + 1).clamp(min=0)
            alone = {"k_scale": scale, "ke": ends.int().to(self.device), **self.options, **options}
            expected = hisa.index(q[i], k, weights[i], **alone)
            assert torch.equal(indices[i], expected[0]) and same_bytes(scores[i], expected[1])

    def check(self) -> None:
        """Compare all bytes with keys pooled from scratch, and poison the others."""
        store, capacity = self.store, self.store.capacity
        assert store.segments == tuple(self.model)
        assert store.lengths == tuple(len(k) for k, _ in self.model.values())
        per_token = [t for t in (store.keys, store.k_scale) if t is not None]
        unused = [torch.ones(len(t), dtype=torch.bool) for t in (*per_token, *store.pooled)]
        for segment, (k, scale) in self.model.items():
            blocks = len(k) // self.block_size
            tokens = slice(segment * capacity, segment * capacity + len(k))
            first = segment * capacity // self.block_size
            complete = slice(first, first + blocks)
            assert same_bytes(store.keys[tokens], k)
            if store.k_scale is not None and scale is not None:
                assert same_bytes(store.k_scale[tokens], scale)
            pooled = hisa.pool_keys(k, k_scale=scale, **self.options)
            for kept, fresh in zip(store.pooled, pooled, strict=True):
                assert same_bytes(kept[complete], fresh[:blocks])
            held = [tokens] * len(per_token) + [complete, complete]
            for mask, rows in zip(unused, held, strict=True):
                mask[rows] = False
        for tensor, mask in zip((*per_token, *store.pooled), unused, strict=True):
            row_bytes = tensor.stride(0) * tensor.element_size()
            tensor.view(torch.uint8).view(-1, row_bytes)[mask.to(self.device)] = 0xFF

    def run(self, steps: int) -> None:
        operations = [self.append] * 8 + [self.truncate] * 2 + [self.index] * 5
        operations += [self.reorder, self.fork, self.free, self.add, self.add]
        for _ in range(steps):
            operations[self.rng.integers(len(operations))]()
            self.check()
        assert len(self.store.keys) == SLOTS * self.store.capacity  # nothing leaked


@pytest.mark.parametrize("steps", [1000, pytest.param(30_000, marks=pytest.mark.long)])
@pytest.mark.parametrize(
    "kind", KINDS, ids=lambda k: f"{short_name(k[0])}-scaled{k[1]:d}-B{k[2]}-{k[3]}-C{k[4]}"
)
def test_random_operations(device: str, kind: tuple[Any, ...], steps: int) -> None:
    """10,000 operations in all; each leaves equal bytes, poison around them is never read."""
    if device == "cuda":  # where each takes 10 ms, most of them for being checked
        steps = min(steps, 10_000)
    History(KINDS.index(kind), device, *kind).run(steps)


def call(device: str, dtype: torch.dtype, n: int) -> dict[str, Tensor]:
    """Return keys, queries and weights of all n tokens of two sequences."""
    random = torch.Generator().manual_seed(0)
    k, q = (torch.randn(2, n, *s, D, generator=random).to(dtype) for s in ((), (H,)))
    tensors = {"k": k, "q": q, "weights": torch.randn(2, n, H, generator=random)}
    return {name: t.to(device) for name, t in tensors.items()}


@pytest.mark.parametrize("dtype", [FP32, BF16, FP8], ids=short_name)
def test_every_split_is_one_shot(device: str, dtype: torch.dtype) -> None:
    """Token by token, and in two chunks of any sizes, each row is what one call gives it."""
    n = 45
    options: dict[str, Any] = {"block_topk": 3, "topk": 11}
    given = call(device, dtype, n)

    def select(*edges: int) -> tuple[Tensor, list[Tensor]]:
        store = hisa.PooledKeys(2, D, dtype=dtype, device=device, scaled=False, block_size=8)
        chunks = [slice(a, b) for a, b in itertools.pairwise((0, *edges, n))]
        found = []
        for part in chunks:
            store.append(given["k"][:, part])
            found.append(store.index(given["q"][:, part], given["weights"][:, part], **options))
        held = [store._storage.held(s) for s in store.segments]
        return torch.cat(found, dim=1), [t for views in held for t in views]

    whole, held = select()
    assert whole.shape == (2, n, 11) and (whole[:, -1] >= 0).all()
    for entry in range(2):
        ke = torch.arange(1, n + 1, dtype=torch.int32, device=device)
        rows = (given[name][entry] for name in ("q", "k", "weights"))
        assert torch.equal(whole[entry], hisa.index(*rows, ke=ke, block_size=8, **options))
    for edges in (*((at,) for at in range(n + 1)), range(1, n)):
        found, kept = select(*edges)
        assert torch.equal(found, whole)
        assert all(same_bytes(a, b) for a, b in zip(kept, held, strict=True))


def test_a_rejected_draft_leaves_no_trace(device: str) -> None:
    """Tokens that complete blocks and are rolled back are as if they had never been there.

    Integration bugs: speculative rollback.
    """
    given, draft = call(device, BF16, 61), call(device, BF16, 40)
    plain, drafted = (
        hisa.PooledKeys(2, D, device=device, block_size=8, capacity=128) for _ in range(2)
    )
    for at in range(0, 61, 5):
        part = slice(at, at + 5)
        drafted.append(draft["k"][:, : 3 * (at % 7)] * 5)
        drafted.truncate(min(at, 61))
        for store in (plain, drafted):
            store.append(given["k"][:, part])
        rows = (given["q"][:, part], given["weights"][:, part])
        selected = [s.index(*rows, block_topk=3, topk=20) for s in (drafted, plain)]
        assert torch.equal(*selected)
    for segment in range(2):
        both = (s._storage.held(segment) for s in (plain, drafted))
        assert all(same_bytes(a, b) for a, b in zip(*both, strict=True))


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Note how many keys each call of `hisa.pool_keys` pools."""
    calls: list[int] = []
    real = hisa.pool_keys

    def pool(k: Tensor, **options: Any) -> Any:
        calls.append(len(k))
        return real(k, **options)

    with monkeypatch.context() as patch:
        patch.setattr(hisa, "pool_keys", pool)
        yield calls


def test_pooled_keys_are_written_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the keys of a block are pooled, when its last token comes; else nothing is written."""
    store = hisa.PooledKeys(3, D, dtype=FP32, block_size=16, capacity=400)
    with counted(monkeypatch) as calls:
        for length in range(1, 200):
            versions = [t._version for t in store.pooled]
            store.append(torch.randn(3, 1, D))
            store.index(torch.randn(3, 1, H, D), torch.randn(3, 1, H), block_topk=2, topk=9)
            assert len(calls) == 3 * (length // 16) and set(calls) <= {16}
            if length % 16:
                assert [t._version for t in store.pooled] == versions
        store.truncate(160)
        store.append(torch.randn(3, 15, D))  # a part of a block that is there again
        store.reorder([2, 0, 1])
        store.free(1)
        store.fork(0)
        assert len(calls) == 3 * 12
        store.append(torch.randn(33, D), segments=2)  # 175 + 33: blocks 10, 11 and 12 together
        assert calls[36:] == [48]


def test_capacity_fixes_addresses_and_raises_beyond(device: str) -> None:
    store = hisa.PooledKeys(2, D, device=device, scaled=True, block_size=16, capacity=90)
    assert store.capacity == 96
    scale = torch.ones(2, 90, device=device)

    def addresses() -> list[int]:
        tensors = (store.keys, store.k_scale, store.cu_seqlens_k, *store.pooled)
        return [t.data_ptr() for t in tensors if t is not None]

    before = addresses()
    store.append(call(device, BF16, 90)["k"], scale)
    store.reorder([1, 0])
    store.truncate([50, 96 - 6])
    store.free(0)
    assert store.fork(1) == 0 and store.lengths == (90, 90)
    for bad in (store.add, lambda: store.fork(1), lambda: store.reorder([0, 0, 1])):
        with pytest.raises(ValueError, match="capacity: expected at most 2 segments of 96 tokens"):
            bad()
    with pytest.raises(ValueError, match="capacity: expected at most 2 segments of 96"):
        store.append(call(device, BF16, 7)["k"], scale[:, :7])
    store.append(call(device, BF16, 6)["k"], scale[:, :6])
    store.reset()
    assert addresses() == before and store.lengths == (0, 0)


def test_memory_grows_by_doubling_and_slots_are_reused() -> None:
    store = hisa.PooledKeys(1, D, block_size=8)
    none = store.index(torch.ones(1, 1, H, D).bfloat16(), torch.ones(1, 1, H), topk=9)
    assert store.capacity == 0 and none.eq(-1).all()
    sizes = set()
    for _ in range(100):
        store.append(torch.ones(1, 1, D).bfloat16())
        sizes.add(store.capacity)
    assert sizes == {8, 16, 32, 64, 128}
    for _ in range(50):
        forks = [store.fork(0) for _ in range(3)]
        assert forks == [1, 2, 3] and len(store.keys) == 4 * 128
        for fork in forks:
            store.free(fork)
    assert store.segments == (0,)


def test_modes_and_copies() -> None:
    """Inference mode leaves a store that works outside of it; copies have memory of their own."""
    with torch.inference_mode():
        store = hisa.PooledKeys(1, D, dtype=FP32, block_size=8, capacity=40)
        store.append(torch.ones(1, 20, D))
    store.append(torch.ones(1, 20, D, requires_grad=True))
    assert not store.keys.requires_grad
    for twin in (copy.deepcopy(store), pickle.loads(pickle.dumps(store))):
        twin.truncate(0)
        twin.append(torch.zeros(1, 40, D))
        assert twin.lengths == store.lengths == (40,)
        assert store.pooled[0][:5].eq(1).all() and twin.pooled[0][:5].eq(0).all()


def test_windows(device: str) -> None:
    """Causal ones; empty, and not reversed, for a query before the first token."""
    store = hisa.PooledKeys(3, D, dtype=FP32, device=device, block_size=8, capacity=16)
    store.append(torch.ones(2, D, device=device), segments=0)
    store.append(torch.ones(16, D, device=device), segments=2)
    ks, ke = store.windows(3)
    assert ks.dtype == ke.dtype == torch.int32
    assert ks.tolist() == [0] * 3 + [16] * 3 + [32] * 3
    assert ke.tolist() == [0, 1, 2] + [16] * 3 + [46, 47, 48]
    ks, ke = store.windows(1, segments=[2, 0])
    assert ks.tolist() == [32, 0] and ke.tolist() == [48, 2]
    assert [len(t) for t in store.windows(0)] == [0, 0]


def test_index_takes_the_store_itself(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`hisa.index(..., pooled=store)` is `store.index`, and refuses keys of others."""
    given = call(device, BF16, 100)
    store = hisa.PooledKeys(2, D, device=device, scaled=True, block_size=8)
    store.append(given["k"], given["weights"][..., 0].abs())
    q, weights = given["q"][:, -2:], given["weights"][:, -2:]
    sizes: dict[str, Any] = {"block_topk": 4, "topk": 30}
    ks, ke = store.windows(2)
    arguments: dict[str, Any] = {
        "k": store.keys,
        "k_scale": store.k_scale,
        "ks": ks,
        "ke": ke,
        "pooled": store,
        "block_size": 8,
        **sizes,
    }
    rows: dict[str, Any] = {"q": q.flatten(0, 1), "weights": weights.flatten(0, 1)}
    expected = store.index(q, weights, **sizes).flatten(0, 1)
    with counted(monkeypatch) as calls:
        assert torch.equal(hisa.index(**rows, **arguments), expected)
        edges = {"cu_seqlens_k": store.cu_seqlens_k}
        assert torch.equal(hisa.index(**rows, **{**arguments, **edges}), expected)
        pair = {"pooled": store.pooled}
        assert torch.equal(hisa.index(**rows, **{**arguments, **pair}), expected)
    assert calls == []
    wrong: dict[str, Any] = {
        "k": store.keys.clone(),
        "k_scale": None,
        "cu_seqlens_k": store.cu_seqlens_k.clone(),
        "block_size": 16,
    }
    for name, value in wrong.items():
        with pytest.raises(ValueError, match=f"^{name}: expected"):
            hisa.index(**rows, **{**arguments, name: value})
    monkeypatch.setenv("HISA_CHECK", "1")  # looks at all scales, those of no token too
    assert torch.equal(store.index(q, weights, **sizes).flatten(0, 1), expected)


@pytest.mark.gpu
def test_nothing_waits_for_the_device() -> None:
    given = call("cuda", BF16, 40)
    store = hisa.PooledKeys(2, D, device="cuda", block_size=8)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for at in range(0, 40, 4):
            part = slice(at, at + 4)
            store.append(given["k"][:, part])
            store.index(given["q"][:, part], given["weights"][:, part], block_topk=3, topk=20)
            store.truncate(at + 3)
            store.append(given["k"][:, at + 3 : at + 4])
    finally:
        torch.cuda.set_sync_debug_mode("default")
