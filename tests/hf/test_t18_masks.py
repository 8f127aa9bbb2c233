"""T18: attention masks become windows, once per model forward, or make the call fall back."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import hisa
from hisa.hf import masks
from hisa.hf.masks import WindowCache, Windows, scan
from tests.hf.models import PRUNING, build, cached, indexers, tokens

transformers: Any = pytest.importorskip("transformers")

ON_CUDA = True


def windows_of(mask: Tensor) -> Windows:
    found = scan(mask, mask.shape[0], mask.shape[1])
    assert isinstance(found, Windows)
    return found


def mask_of(ks: Tensor, ke: Tensor, keys: int) -> Tensor:
    position = torch.arange(keys)
    return (position >= ks[..., None]) & (position < ke[..., None])


def additive(mask: Tensor, masked: float, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, masked)


KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "bool": lambda mask: mask,
    "float32": lambda mask: additive(mask, torch.finfo(torch.float32).min),
    "-inf": lambda mask: additive(mask, -torch.inf),
    "-1e9": lambda mask: additive(mask, -1e9),
    "bfloat16": lambda mask: additive(mask, torch.finfo(torch.bfloat16).min, torch.bfloat16),
    "float16": lambda mask: additive(mask, torch.finfo(torch.float16).min, torch.float16),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_window_is_found(kind: str) -> None:
    keys = 9
    pairs = torch.combinations(torch.arange(keys + 1), with_replacement=True)
    ks, ke = pairs.T.reshape(2, 5, -1).int()
    found = windows_of(KINDS[kind](mask_of(ks, ke, keys)))
    empty = ks == ke
    assert torch.equal(found.ks, ks.masked_fill(empty, 0))
    assert torch.equal(found.ke, ke.masked_fill(empty, 0))
    assert found.longest == keys and found.keys == keys
    entry = torch.arange(5, dtype=torch.int32)[:, None] * keys
    assert torch.equal(found.packed_ks, found.ks + entry)
    assert torch.equal(found.packed_ke, found.ke + entry)


def test_windows_do_not_depend_on_the_masks_layout() -> None:
    ks, ke = torch.randint(0, 5, (3, 1, 7)), torch.randint(5, 20, (3, 1, 7))
    mask = mask_of(ks, ke, 20)  # [3, 1, 7, 20], as models have it
    expected = windows_of(mask[:, 0].contiguous())
    for same in (mask[:, 0], mask.transpose(2, 3).contiguous().transpose(2, 3)[:, 0]):
        assert torch.equal(windows_of(same).packed_ke, expected.packed_ke)
    one = mask[:1, 0]
    for shared in (one, one.expand(3, -1, -1)):
        found = scan(shared, 3, 7)
        assert isinstance(found, Windows)
        assert torch.equal(found.ke, windows_of(one).ke.expand(3, -1))
        assert torch.equal(found.packed_ks, found.ks + torch.tensor([[0], [20], [40]]))


@pytest.mark.parametrize("shape", [(0, 4, 6), (2, 0, 6), (2, 4, 0), (0, 0, 0)])
def test_empty_masks(shape: tuple[int, int, int]) -> None:
    found = windows_of(torch.ones(shape, dtype=torch.bool))
    assert found.longest == (shape[2] if shape[0] and shape[1] else 0)


def causal(queries: int, keys: int, start: int = 0) -> tuple[Tensor, Tensor]:
    ke = torch.arange(keys - queries + 1, keys + 1)
    return torch.full_like(ke, start), ke


def test_segments_begin_where_windows_do() -> None:
    left = mask_of(*causal(10, 10, 4), 10)  # rows 0..3 are padding, and see nothing
    left[:4] = False
    packed = torch.block_diag(*(torch.ones(n, n) for n in (3, 5, 2))).bool().tril()
    full = torch.ones(10, 10).bool().tril()
    sliding = full & ~full.tril(-4)
    found = windows_of(torch.stack([left, packed, full, sliding]))
    assert found.cu_seqlens_k.tolist() == [0, 4, 10, 13, 18, 20, 30, 40]
    assert found.cu_seqlens_k.dtype == torch.int32
    assert windows_of(torch.stack([full, full])).cu_seqlens_k.tolist() == [0, 10, 20]


@pytest.mark.parametrize("block_size", [1, 2, 4, 5, 8])
def test_pruned_rows_counts_blocks_from_the_segments_start(block_size: int) -> None:
    full = torch.ones(12, 12).bool().tril()
    kinds = [full, mask_of(*causal(12, 12, 3), 12) & full, full & ~full.tril(-7)]
    origins = [0, 3, 0]
    for entries in ([0], [1], [2], [0, 1, 2]):  # the longest windows are of 12, 9, 7 and 12 keys
        found = windows_of(torch.stack([kinds[entry] for entry in entries]))
        for block_topk in range(2, 13):
            expected = 0
            for i, row in np.ndindex(len(entries), 12):
                window = range(int(found.ks[i, row]), int(found.ke[i, row]))
                blocks = {(token - origins[entries[i]]) // block_size for token in window}
                expected += len(blocks) > block_topk
            assert found.count_pruned(block_size, block_topk)() == expected
            assert found.prunes(block_size, block_topk) == (expected > 0)


@pytest.mark.parametrize("start", [0, 3])
def test_a_single_row_is_pruned_from_its_own_start(start: int) -> None:
    """Which is decided from the mask's summary, without a tensor."""
    for length in range(17):
        ks = torch.tensor([[start]])
        found = windows_of(mask_of(ks, ks + length, 20))
        for block_size, block_topk in ((4, 2), (8, 2), (2, 5)):
            expected = -(-length // block_size) > block_topk
            assert found.count_pruned(block_size, block_topk)() == expected
            assert found.prunes(block_size, block_topk) == (expected > 0)
        assert found.reach == (start + length if length else 0)


HOLE = torch.tensor([[[True, True, False, True]]])
UNUSABLE: dict[str, tuple[Tensor | None, str]] = {
    "hole": (HOLE, "not one range"),
    "additive hole": (additive(HOLE, -torch.inf), "not one range"),
    "bias": (torch.tensor([[[0.0, -0.5, -torch.inf]]]), "neither 0 nor masked"),
    "strong bias": (torch.tensor([[[0.0, -1e4]]]), "neither 0 nor masked"),
    "nan": (torch.tensor([[[0.0, torch.nan]]]), "neither 0 nor masked"),
    "integers": (torch.ones(1, 1, 4, dtype=torch.long), "dtype torch.int64"),
    "fp8": (torch.ones(1, 1, 4).to(torch.float8_e4m3fn), "dtype torch.float8_e4m3fn"),
    "two dimensions": (torch.ones(1, 4, dtype=torch.bool), "shape [1, 4]"),
    "other batch": (torch.ones(2, 1, 4, dtype=torch.bool), "shape [2, 1, 4]"),
    "fewer keys than queries": (torch.ones(1, 3, 1, dtype=torch.bool), "shape [1, 3, 1]"),
    "meta": (torch.ones(1, 1, 4, dtype=torch.bool, device="meta"), "without data"),
    "none": (None, "no attention mask"),
}


@pytest.mark.parametrize("case", UNUSABLE)
def test_what_is_no_window_is_named(case: str) -> None:
    mask, message = UNUSABLE[case]
    found = scan(mask, 1, 1)
    assert isinstance(found, str) and message in found


def test_holes_fall_back_with_one_warning(deepseek: Any) -> None:
    """Integration bugs: a fallback that nothing tests."""
    ids = tokens(2, 60)
    mask = torch.ones(60, 60).bool().tril()
    mask[40:, 10:13] = False
    mask = mask.expand(2, 1, -1, -1)
    own = deepseek(ids, attention_mask=mask).logits
    with hisa.patch(deepseek, **PRUNING) as handle:
        with pytest.warns(UserWarning, match="not one range") as record:
            results = [deepseek(ids, attention_mask=mask).logits for _ in range(2)]
        assert torch.equal(results[0], own) and torch.equal(results[1], own)
        deepseek(ids)
        status = handle.status()
    assert len([w for w in record if "hisa" in str(w.message)]) == 1
    for layer in status.layers:
        assert layer.fallbacks == {"attention mask with a row that is not one range": 2}
        assert layer.calls == 3 and layer.rows == 120
    assert "2 x attention mask" in str(status)


@pytest.fixture
def looking(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let every look at a mask take a while, as on a GPU; returns what happens, in order."""
    begin, events = masks.begin_scan, list[str]()

    def begin_slowly(*mask: Any) -> masks.Scan:
        def wait() -> Windows | str:
            events.append("wait")
            return looked.wait()

        looked = begin(*mask)
        return masks.Scan(wait, pending=True)

    monkeypatch.setattr(masks, "begin_scan", begin_slowly)
    return events


def watched(model: Any, events: list[str]) -> Any:
    """Note in `events` when the first indexer's queries are projected."""
    projection = indexers(model)[0].wq_b
    return projection.register_forward_hook(lambda *_: events.append("project"))


def test_projects_while_the_device_looks(deepseek: Any, looking: list[str]) -> None:
    """But not before a mask is known to have windows, nor where there may be dropout."""
    ids = tokens(2, 60)
    with hisa.patch(deepseek, **PRUNING), watched(deepseek, looking):
        results = [deepseek(ids).logits for _ in range(3)]
        assert looking == ["wait", "project", "project", "wait", "project", "wait"]
        looking.clear()
        deepseek.train()
        results.append(deepseek(ids).logits)
        deepseek.eval()
        assert looking == ["wait", "project"]
    assert all(torch.equal(result, results[0]) for result in results)


def test_a_fallback_projects_once_and_caches_once(generator: Any, looking: list[str]) -> None:
    """Unless the call before it had windows; then twice, for the same result.

    Integration bugs: a fallback that nothing tests.
    """
    ids = tokens(2, 60)
    holes = torch.ones(60, 60).bool().tril()
    holes[40:, 10:13] = False
    holes = holes.expand(2, 1, -1, -1)
    own = generator(ids, attention_mask=holes).logits
    with hisa.patch(generator, **PRUNING), watched(generator, looking):
        with pytest.warns(UserWarning, match="not one range"):
            assert torch.equal(generator(ids, attention_mask=holes).logits, own)
        assert looking == ["wait", "project"]
        generator(ids)
        past: Any = transformers.DynamicCache(config=generator.config)
        looking.clear()
        assert torch.equal(
            generator(ids, attention_mask=holes, **cached(generator, past)).logits, own
        )
        assert looking == ["project", "wait", "project"]
        assert past.layers[0].indexer_keys.shape[1] == 60


def test_a_model_without_data_falls_back() -> None:
    model = build("deepseek_v32").to("meta", torch.bfloat16)
    with hisa.patch(model, **PRUNING) as handle:
        with pytest.warns(UserWarning, match="without data"):
            assert model(tokens(2, 60).to("meta")).logits.is_meta
        assert all(layer.fallbacks for layer in handle.status().layers)


def test_one_scan_per_model_forward(generator: Any) -> None:
    past: Any = transformers.DynamicCache(config=generator.config)
    with hisa.patch(generator, **PRUNING) as handle:
        for forward in range(1, 6):
            mask = torch.ones(2, 40 * forward, dtype=torch.long)
            generator(tokens(2, 40), attention_mask=mask, **cached(generator, past))
            assert handle.status().mask_scans == forward
        generator.generate(tokens(1, 40), max_new_tokens=7, do_sample=False)
        assert handle.status().mask_scans == 5 + 7


def test_a_recycled_address_is_another_mask() -> None:
    cache = WindowCache()
    addresses, ends = set(), []
    for end in range(1, 40):
        mask = torch.zeros(1, 64, 64, dtype=torch.bool)
        mask[..., :end] = True
        addresses.add(mask.data_ptr())
        for layer in range(3):
            found = cache.get(mask[:], 1, 64, layer)
            assert isinstance(found, Windows)
            ends.append(int(found.ke[0, 0]) == end)
        del mask
    assert all(ends) and cache.scans == 39
    assert len(addresses) < 39, "the allocator reused no address: nothing was tested"


def test_nothing_keeps_the_mask_alive() -> None:
    cache = WindowCache()
    mask = torch.ones(1, 4, 4, dtype=torch.bool)
    storage = weakref.ref(mask)
    cache.get(mask, 1, 4, 0)
    probe = torch.multiprocessing.reductions.StorageWeakRef(mask.untyped_storage())
    del mask
    gc.collect()
    assert storage() is None and probe.expired()


@pytest.mark.parametrize("mode", ["plain", "inference", "numpy", "data"])
def test_a_mask_changed_in_place_is_scanned_again(mode: str) -> None:
    cache = WindowCache()

    def ends() -> list[int]:
        found = [cache.get(mask[:], 1, 4, layer) for layer in range(2)]
        return [int(w.ke[0, 0]) for w in found if isinstance(w, Windows)]

    with torch.inference_mode(mode == "inference"):
        buffer = np.ones((1, 4, 8), dtype=bool)
        mask = torch.from_numpy(buffer) if mode == "numpy" else torch.ones(1, 4, 8).bool()
        assert ends() == [8, 8]
        if mode == "numpy":
            buffer[..., 5:] = False
        else:
            (mask.data if mode == "data" else mask)[..., 5:] = False
        assert ends() == [5, 5]
    assert cache.scans == 2


def test_a_change_between_two_layers_is_seen() -> None:
    cache = WindowCache()
    mask = torch.ones(1, 4, 8).bool()
    cache.get(mask[:], 1, 4, 0)
    mask[..., 5:] = False
    found = cache.get(mask[:], 1, 4, 1)
    assert isinstance(found, Windows) and found.longest == 5


def test_views_of_one_storage_are_told_apart() -> None:
    cache = WindowCache()
    both = torch.stack([torch.ones(4, 8), torch.zeros(4, 8)]).bool()
    longest = []
    for layer, mask in enumerate([both[:1], both[1:], both[:1, :, :4]]):
        found = cache.get(mask, 1, 4, layer)
        longest.append(found.longest if isinstance(found, Windows) else None)
    assert longest == [8, 0, 4]
