"""T18: with a budget below the length, what is guaranteed all the same.

Also T4 for the patch: int32, distinct positions in [0, T), never a -1.
"""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hisa
from hisa.around import complete
from hisa.hf import indexer as under_test
from hisa.hf.indexer import Projections, make_hierarchical, select
from hisa.hf.masks import Windows, scan
from hisa.hf.models import SPECS
from hisa.hf.settings import Settings
from tests.hf.models import PRUNING, TOPK, here, indexers, tokens
from tests.hf.test_t18_golden import LENGTH, PADDING, hidden

ON_CUDA = True
HEADS, CHANNELS = 4, 16
SETTINGS = Settings(block_size=8, block_topk=3, topk=12)


class Cache:
    """The part of a Hugging Face cache that an indexer uses."""

    def __init__(self) -> None:
        self.keys = torch.empty(0)

    def update_indexer(self, keys: Tensor, layer: int) -> Tensor:
        self.keys = torch.cat([self.keys, keys], dim=1) if self.keys.numel() else keys
        return self.keys


@pytest.fixture
def projected(monkeypatch: pytest.MonkeyPatch) -> None:
    """Queries, keys and weights that are given, not projected: matmul may round by its shape."""
    monkeypatch.setattr(
        under_test,
        "project_queries",
        lambda m, s, q, *rest: (q.view(*q.shape[:2], HEADS, CHANNELS), None),
    )
    monkeypatch.setattr(under_test, "project_keys", lambda m, s, h, *rest: h[..., :CHANNELS])
    monkeypatch.setattr(under_test, "project_weights", lambda m, h, *rest: h[..., CHANNELS:])


def random_input(batch: int, length: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    states, queries = (
        torch.randn(batch, length, width, generator=generator, device="cpu")
        for width in (CHANNELS + HEADS, HEADS * CHANNELS)
    )
    return here(states), here(queries)


def choose(
    states: Tensor, q: Tensor, mask: Tensor, past: Cache | None = None, *, begun: bool = False
) -> Tensor:
    windows = scan(mask, *q.shape[:2])
    assert isinstance(windows, Windows)
    module: Any = SimpleNamespace(
        n_heads=HEADS, head_dim=CHANNELS, layer_idx=0, index_topk=99, wq_b=nn.Identity()
    )
    chosen = make_hierarchical(SETTINGS, SETTINGS.topk or 0)
    projections = Projections(module, SPECS[0], SETTINGS, states, q, (states, states))
    if begun:
        projections.begin()
    return select(projections, chosen, windows, past)


def causal(batch: int, length: int) -> Tensor:
    return torch.ones(length, length).bool().tril().expand(batch, -1, -1)


def inside(row: Tensor, start: int, end: int) -> list[int]:
    """The selected tokens of a row's window: the only part of a selection that is used."""
    return sorted(token for token in row.tolist() if start <= token < end)


@pytest.mark.usefixtures("projected")
@pytest.mark.parametrize("rows", [1, 5, 1000])
@pytest.mark.parametrize("begun", [False, True])
def test_chunks_do_not_matter(rows: int, begun: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """One-shot prefill, prefill in pieces and token-by-token decode agree to the bit."""
    for name in ("CHUNK_BYTES", "CUDA_CHUNK_BYTES"):
        monkeypatch.setattr(under_test, name, rows * 2 * HEADS * CHANNELS * 4)
    states, q = random_input(2, 90)
    whole = choose(states, q, causal(2, 90))
    for edges in ([0, 50, 51, 90], [0, 33, 90], list(range(91))):
        past = Cache()
        for start, end in itertools.pairwise(edges):
            some = slice(start, end)
            piece = choose(states[:, some], q[:, some], causal(2, end)[:, some], past, begun=begun)
            for entry, row in itertools.product(range(2), range(start, end)):
                found = inside(piece[entry, row - start], 0, row + 1)
                assert found == inside(whole[entry, row], 0, row + 1), (edges, entry, row)


@pytest.mark.usefixtures("projected")
@pytest.mark.parametrize("pad", [1, 7, 8, 13])
def test_left_padding_and_neighbours_do_not_matter(pad: int) -> None:
    """Integration bugs: padding tokens that write NaN into the cache."""
    states, q = random_input(1, 70)
    alone = choose(states, q, causal(1, 70))
    noise, other = random_input(3, 70 + pad, seed=1)
    noise[1, :pad], other[1, :pad] = torch.nan, torch.nan
    noise[1, pad:], other[1, pad:] = states[0], q[0]
    mask = causal(3, 70 + pad).clone()
    mask[1, :, :pad] = False
    padded = choose(noise, other, mask)
    for row in range(70):
        found = inside(padded[1, pad + row] - pad, 0, row + 1)
        assert found == inside(alone[0, row], 0, row + 1)


@pytest.mark.usefixtures("projected")
def test_packed_documents_are_as_if_alone() -> None:
    lengths = [37, 5, 61]
    states, q = random_input(1, sum(lengths))
    mask = torch.block_diag(*(torch.ones(n, n) for n in lengths)).bool().tril()
    packed = choose(states, q, mask[None])
    start = 0
    for length in lengths:
        document = slice(start, start + length)
        alone = choose(states[:, document], q[:, document], causal(1, length))
        for row in range(length):
            found = inside(packed[0, start + row] - start, 0, row + 1)
            assert found == inside(alone[0, row], 0, row + 1)
        start += length


@pytest.mark.usefixtures("projected")
def test_key_in_an_earlier_chunk_is_found() -> None:
    """A needle, blocks away from both ends of the context, in a chunk that was cached before.

    Integration bugs: chunked prefill.
    """
    states, q = random_input(1, 160)
    states[..., CHANNELS:] = 1.0
    q[:, -1] = 3.0
    states[0, 60, :CHANNELS] = 50.0
    past = Cache()
    for start in range(0, 160, 40):
        rows = slice(start, start + 40)
        last = choose(states[:, rows], q[:, rows], causal(1, start + 40)[:, rows], past)
    assert 60 in last[0, -1].tolist()


def on_cpu(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(on_cpu(part) for part in value)
    return value.cpu() if isinstance(value, Tensor) else value


@pytest.mark.parametrize("padding", PADDING)
def test_model_output_contract(model: Any, padding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every row is distinct positions of the T keys, and the used ones lie in kept blocks."""
    mask = PADDING[padding](LENGTH)
    calls: list[tuple[tuple[Tensor, ...], dict[str, Any]]] = []
    results: list[Tensor] = []
    index: Any = hisa.index

    def spy(*arguments: Tensor, **options: Any) -> Tensor:
        calls.append((arguments, options))
        result: Tensor = index(*arguments, **options)
        return result

    monkeypatch.setattr(hisa, "index", spy)
    with hisa.patch(model, **PRUNING) as handle:
        hooks = [
            module.register_forward_hook(lambda *a: results.append(a[-1]))
            for module in indexers(model)
        ]
        hidden(model, tokens(3, LENGTH), attention_mask=mask)
        for hook in hooks:
            hook.remove()
        assert all(layer.pruned_rows for layer in handle.status().layers if layer.calls)

    assert len(calls) == len(results) == len(indexers(model))
    for ((q, k, weights), options), selected in zip(calls, results, strict=True):
        assert selected.shape == (3, LENGTH, TOPK) and selected.dtype == torch.int32
        assert selected.min() >= 0 and selected.max() < LENGTH
        assert (selected.sort(-1).values.diff(dim=-1) > 0).all(), "a position twice"
        if q.is_cuda:  # whose fp32 is that of the CPU, which has a test of its own (T25)
            q, k, weights = q.cpu(), k.cpu(), weights.cpu()
            options = {name: on_cpu(value) for name, value in options.items()}
            reference = index(q, k, weights, **options)
        else:
            reference = hisa.reference.index(q, k, weights, **options)
        selected = selected.cpu()
        assert isinstance(reference, Tensor)
        for row in range(3 * LENGTH):
            start, end = (int(options[side][row]) for side in ("ks", "ke"))
            packed = selected.flatten(0, 1)[row] + row // LENGTH * LENGTH
            assert set((reference[row][reference[row] >= 0] + start).tolist()) <= set(
                packed.tolist()
            )
            if end - start >= TOPK:
                assert len(inside(packed, start, end)) == TOPK


@pytest.mark.usefixtures("projected")
@pytest.mark.parametrize("topk", [1, 12, 24])
def test_every_slot_is_a_position_of_its_own(topk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that see nothing, too little, or kept blocks with fewer than topk tokens."""
    monkeypatch.setitem(globals(), "SETTINGS", Settings(block_size=8, block_topk=3, topk=topk))
    for length in (1, 12, 25, 26, 41):
        states, q = random_input(3, length)
        mask = causal(3, length).clone()
        mask[0, length // 2 :] = False
        mask[1] = False
        selected = choose(states, q, mask)
        assert selected.shape == (3, length, min(topk, length))
        assert selected.min() >= 0 and selected.max() < length
        assert (selected.sort(-1).values.diff(dim=-1) > 0).all()
        assert inside(selected[2, 0], 0, 1) == [0]


def test_complete_exhaustively() -> None:
    """Every window and every selection of up to 5 keys, in every width."""
    for keys in range(1, 6):
        for start, end in itertools.combinations_with_replacement(range(keys + 1), 2):
            for width in range(1, keys + 1):
                for count in range(min(width, end - start) + 1):
                    for chosen in itertools.combinations(range(end - start), count):
                        row = [*chosen, *[-1] * (width - count)]
                        ks, ke = (torch.tensor([x], dtype=torch.int32) for x in (start, end))
                        indices = torch.tensor([row], dtype=torch.int32)
                        filled = complete(indices, ks, ke, keys=keys)[0].tolist()
                        assert filled[:count] == [start + token for token in chosen]
                        assert len(set(filled)) == width and set(filled) <= set(range(keys))
                        fill = filled[count:]
                        outside = [token for token in fill if not start <= token < end]
                        assert len(outside) == min(len(fill), keys - (end - start))


def test_autocast(deepseek: Any) -> None:
    """Norms give fp32 there and projections bf16: q and k are brought to one dtype."""
    device = deepseek.device.type
    with hisa.patch(deepseek, **PRUNING) as handle, torch.autocast(device, dtype=torch.bfloat16):
        assert deepseek(tokens(2, 60)).logits.isfinite().all()
        assert all(layer.pruned_rows and not layer.fallbacks for layer in handle.status().layers)


def test_a_topk_of_ones_own(deepseek: Any) -> None:
    with hisa.patch(deepseek, topk=5, **PRUNING):
        shapes = []
        hook = indexers(deepseek)[0].register_forward_hook(lambda *a: shapes.append(a[-1].shape))
        deepseek(tokens(2, 40))
        deepseek(tokens(1, 3))
        hook.remove()
    assert shapes == [(2, 40, 5), (1, 3, 3)]
