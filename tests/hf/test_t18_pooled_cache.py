"""T18: with what a patch keeps beside a cache, a model selects and generates what it would without.

Every run is made twice, and once keeps nothing; all selections of all layers are compared, and the
handle says in how many calls something was taken up. Contexts are longer than the budget.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import hisa
from tests.hf.models import PRUNING, build, cached, here, indexers, shared_model, tokens
from tests.hf.test_t18_golden import GENERATION, hidden

transformers: Any = pytest.importorskip("transformers")

ON_CUDA = True
KINDS = ("deepseek_v32", "glm_moe_dsa")
NEW = 12  # more than a block
OPTIONS: dict[str, dict[str, Any]] = {
    "model": {},
    "fp8": {"precision": "fp8"},
    "max": {"pooling": "max"},
    "exact": {"exact": True},
}
Run = Callable[[], Any]


def selections(model: Any, run: Run, **options: Any) -> tuple[Any, list[Tensor], int]:
    """Return what a run gives, all selections, and the number of calls that took something up."""
    found: list[Tensor] = []
    hooks = [m.register_forward_hook(lambda *a: found.append(a[-1])) for m in indexers(model)]
    try:
        with hisa.patch(model, **PRUNING, **options) as handle:
            result = run()
            layers = [layer for layer in handle.status().layers if layer.state == "patched"]
    finally:
        for hook in hooks:
            hook.remove()
    assert all(layer.pruned_rows and not layer.fallbacks for layer in layers)
    (reused,) = {layer.reused for layer in layers}
    return result, found, reused


def assert_same(model: Any, run: Run, monkeypatch: pytest.MonkeyPatch, **options: Any) -> int:
    """Run with and without what is kept, and return in how many calls a layer took it up."""
    kept = selections(model, run, **options)
    with monkeypatch.context() as patch:
        patch.setattr("hisa.hf.kept.known_layer", lambda cache, index: None)
        again = selections(model, run, **options)
    assert again[2] == 0 and len(kept[1]) == len(again[1]) > 0
    for a, b in zip(kept[1], again[1], strict=True):
        assert torch.equal(a, b)
    torch.testing.assert_close(kept[0], again[0], rtol=0, atol=0)
    return kept[2]


@pytest.fixture(params=KINDS)
def pooling(request: pytest.FixtureRequest) -> Any:
    """A model of a kind that the issue names."""
    return shared_model(request.param)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("mode", GENERATION)
def test_generate(pooling: Any, mode: str, options: str, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = 1 if mode == "prompt lookup" else 2
    mask = torch.ones(batch, 44, dtype=torch.long)
    if batch > 1:
        mask[1, :9] = 0  # left padding

    def run() -> Tensor:
        torch.manual_seed(0)
        ids = tokens(batch, 44).where(mask.bool(), torch.tensor(0))
        arguments = {"do_sample": False, "max_new_tokens": NEW, **GENERATION[mode]}
        result: Tensor = pooling.generate(ids, attention_mask=mask, **arguments)
        return result

    reused = assert_same(pooling, run, monkeypatch, **OPTIONS[options])
    if mode in ("no cache", "beam search", "sampled beams"):
        assert reused == 0  # there is nothing, or the rows are in another order in each step
    elif mode == "prompt lookup":
        assert 0 < reused < NEW
    else:
        assert reused >= NEW - 1


@pytest.mark.filterwarnings("ignore:hisa. attention mask")  # a draft may hold padding tokens
@pytest.mark.parametrize("options", OPTIONS)
def test_rejected_drafts(pooling: Any, options: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both models are patched, and their caches cropped; each call takes up what is left.

    Integration bugs: speculative rollback.
    """
    assistant = build(pooling.config.model_type)
    for parameter in assistant.parameters():
        random = torch.Generator().manual_seed(1)
        parameter.add_(0.03 * here(torch.randn(parameter.shape, generator=random, device="cpu")))

    def run() -> Tensor:
        result: Tensor = pooling.generate(
            tokens(1, 40), max_new_tokens=2 * NEW, do_sample=False, assistant_model=assistant
        )
        return result

    with hisa.patch(assistant, **PRUNING, **OPTIONS[options]) as handle:
        reused = assert_same(pooling, run, monkeypatch, **OPTIONS[options])
        drafted = [layer.reused for layer in handle.status().layers if layer.state == "patched"]
    assert reused > 3 and min(drafted) > 3


def test_a_chat_of_many_turns(pooling: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache of one turn begins the next; in between, the last tokens are taken back."""

    def run() -> Tensor:
        past = transformers.DynamicCache(config=pooling.config)
        ids = tokens(1, 40)
        for turn in range(3):
            options = {"max_new_tokens": 5, "do_sample": False, **cached(pooling, past)}
            ids = pooling.generate(ids, **options)
            past.crop(-3)
            ids = torch.cat([ids[:, :-2], tokens(1, 7, turn)], dim=1)
        return ids

    assert assert_same(pooling, run, monkeypatch) == 3 * 5 - 1


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_what_befalls_a_cache(pooling: Any, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps in between which rows are repeated and selected, keys written to, caches exchanged.

    Integration bugs: a pooled cache that is stale.
    """

    def run() -> Tensor:
        config, rows, length = pooling.config, 2, 50
        past: Any = (
            transformers.DynamicCache(config=config)
            if kind == "dynamic"
            else transformers.StaticCache(config=config, max_cache_len=90)
        )
        states = []

        def step(count: int = 1) -> None:
            nonlocal length
            ids = tokens(rows, count, length)
            position = torch.arange(length - 50, length - 50 + count)[None]
            states.append(
                hidden(pooling, ids, position_ids=position, **cached(pooling, past))[:, -1]
            )
            length += count

        for count in (50, 1, 1):
            step(count)
        past.reorder_cache(torch.tensor([1, 0]))
        step()
        past = copy.deepcopy(past)
        step()
        past.layers[0].indexer_keys[:, 4].mul_(-1)
        step()
        if kind == "dynamic":
            past.batch_repeat_interleave(2)
            rows = 4
            step()
            past.batch_select_indices(torch.tensor([3, 0, 1]))
            rows = 3
            step()
            past.layers[1].offload()
            past.layers[1].prefetch()
            step()
        else:
            past.reset()
            length = 50
            step(45)
        step(9)
        step()
        return torch.cat(states)

    def counted() -> Tensor:
        with hisa.patch(pooling, **PRUNING) as handle:
            result = run()
            reused.append([x.reused for x in handle.status().layers if x.state == "patched"])
        return result

    reused: list[list[int]] = []
    first = counted()
    with monkeypatch.context() as patch:
        patch.setattr("hisa.hf.kept.known_layer", lambda cache, index: None)
        assert torch.equal(counted(), first)
    taken, nothing = reused
    assert not any(nothing)
    # What was written to layer 0 is no matter to the others. Offloading layer 1 moves it, on a GPU.
    moved = kind == "dynamic" and pooling.device.type == "cuda"
    assert taken[0] == taken[1] - (not moved) > 3


def test_two_models_and_one_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each sees what the other appended, and takes nothing up of its own."""
    first, second = build("deepseek_v32"), build("deepseek_v32", index_topk=8)
    for parameter in second.parameters():
        parameter.mul_(0.9)

    def run() -> Tensor:
        past = transformers.DynamicCache(config=first.config)
        states = [hidden(first, tokens(1, 50), **cached(first, past))]
        for turn in range(10):
            model = second if turn % 2 else first
            states.append(hidden(model, tokens(1, 3, turn), **cached(model, past)))
        return torch.cat(states, dim=1)

    with hisa.patch(second, **PRUNING) as handle:
        assert assert_same(first, run, monkeypatch) == 1  # its own prefill
        assert {layer.reused for layer in handle.status().layers} == {0}


def test_patched_in_the_middle_of_a_chat(pooling: Any) -> None:
    """A cache that an unpatched model filled, and one that goes on without the patch."""

    def run(patched: bool) -> tuple[list[Tensor], list[int]]:
        past = transformers.DynamicCache(config=pooling.config)
        states, reused = [hidden(pooling, tokens(1, 60), **cached(pooling, past))], []
        for turn in range(3):
            with hisa.patch(pooling, **PRUNING) as handle:
                for seed in range(3):
                    if not patched:  # begin anew in each call
                        handle.remove()
                        handle = hisa.patch(pooling, **PRUNING)
                    states.append(hidden(pooling, tokens(1, 1, seed), **cached(pooling, past)))
                reused.append(handle.status().layers[0].reused)
                handle.remove()
            states.append(hidden(pooling, tokens(1, 1, turn), **cached(pooling, past)))
        return states, reused

    kept, again = run(True), run(False)
    assert kept[1] == [2, 2, 2] and again[1] == [0, 0, 0]
    assert all(torch.equal(a, b) for a, b in zip(kept[0], again[0], strict=True))


def test_nothing_is_stored_with_the_model(pooling: Any) -> None:
    names = list(pooling.state_dict())
    past = transformers.DynamicCache(config=pooling.config)
    with hisa.patch(pooling, **PRUNING) as handle:
        for count in (50, 1):
            hidden(pooling, tokens(1, count), **cached(pooling, past))
        assert handle.status().layers[0].reused == 1
        assert list(pooling.state_dict()) == names
        assert all("hisa" not in str(type(v)) for x in past.layers for v in vars(x).values())
        kept = indexers(pooling)[0].forward.kept
        assert len(kept._records) == 1
    assert len(kept._records) == 0
