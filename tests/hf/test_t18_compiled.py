"""T18: a patched model compiles as a whole with a static cache, and selects what it does otherwise.

Steps run in one graph while the context grows by several blocks; what they select is compared with
a patched model that is not compiled and prepares all keys anew in each step. Catches graph breaks,
compiling again as the context grows, data that a graph keeps as a constant, keys of an earlier step
and what is kept beside a cache in which a graph has written since.
"""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

import hisa
from hisa.hf.masks import Windows, scan, trace
from tests.hf.models import (
    PRUNING,
    TOPK,
    build,
    cached,
    here,
    indexers,
    shared_model,
    tokens,
)
from tests.hf.test_t18_golden import hidden
from tests.hf.test_t18_masks import causal, mask_of

transformers: Any = pytest.importorskip("transformers")

ON_CUDA = True
BATCH, PROMPT, STEPS, ROOM = 2, 44, 30, 80  # almost four blocks of 8 in one graph
OPTIONS: dict[str, dict[str, Any]] = {
    "max": {"pooling": "max"},
    "fp8": {"precision": "fp8", "power_of_two": True},
    "hadamard": {"precision": "fp8", "hadamard": True},
    "fewer tokens": {"topk": 9},
}


@pytest.fixture(autouse=True)
def _nothing_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def recomputing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls that are not compiled keep nothing either."""
    monkeypatch.setattr("hisa.hf.kept.known_layer", lambda cache, index: None)


class Steps:
    """A prompt, then steps of one token; and what all indexers select for the last token."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.past: Any = transformers.StaticCache(config=model.config, max_cache_len=ROOM)
        self.mask = torch.ones(BATCH, ROOM, dtype=torch.long)
        self.mask[1, :9] = 0  # so that blocks of the entries lie differently
        self.positions = (self.mask.cumsum(-1) - 1).clamp(min=0)
        self.used = 0
        self.states: list[Tensor] = []
        self.selected: list[Tensor] = []
        self.run(PROMPT)

    def run(self, count: int = 1, call: Callable[..., Any] | None = None) -> None:
        """Append random tokens."""
        rows = slice(self.used, self.used + count)
        found = (self.model if call is None else call)(
            input_ids=tokens(BATCH, count, self.used),
            attention_mask=self.mask,
            position_ids=self.positions[:, rows],
            **cached(self.model, self.past),
        )
        self.used += count
        self.states.append(found[0][:, -1])
        self.selected.append(self.model.selected.sort(-1).values)

    def crop(self, count: int) -> None:
        """Forget the last tokens, where static caches of this transformers can."""
        if all(hasattr(layer, "crop") for layer in self.past.layers):
            self.past.crop(-count)
            self.used -= count


def compiled_steps(steps: Steps, count: int = STEPS, **options: Any) -> None:
    """Run steps in one graph; anything else raises."""
    options = {"fullgraph": True, "backend": "aot_eager", **options}
    call: Any = torch.compile(steps.model, **options)
    first = graphs(steps.model)
    for _ in range(first):
        steps.run(1, call)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(count - first):
            steps.run(1, call)


def graphs(model: Any) -> int:
    """Return how many graphs the model has, unpatched too.

    StaticSlidingWindowLayer.update of transformers asks on the host whether it is full, so a model
    with such a layer is compiled again in the second step.
    """
    return 2 if model.config.model_type.startswith("dots3_note") else 1


def assert_same(found: Steps, wanted: Steps) -> None:
    assert len(found.states) == len(wanted.states) > 1
    for a, b in zip(found.selected, wanted.selected, strict=True):
        assert torch.equal(a, b)
    tolerance = 1e-4 if found.states[0].is_cuda else 0
    for a, b in zip(found.states, wanted.states, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@contextmanager
def patched(model: Any, **options: Any) -> Iterator[Any]:
    """Patch, and have the model write what its indexers select where `Steps` reads it."""
    with hisa.patch(model, **{**PRUNING, **options}) as handle:
        width = min(TOPK, handle.settings.topk or TOPK)
        model.selected = torch.zeros(len(indexers(model)), BATCH, width, dtype=torch.int32)

        def record(number: int) -> Callable[..., None]:
            def hook(module: Any, arguments: Any, output: Tensor) -> None:
                model.selected[number].copy_(output[:, -1])

            return hook

        hooks = [m.register_forward_hook(record(i)) for i, m in enumerate(indexers(model))]
        try:
            yield handle
        finally:
            for hook in hooks:
                hook.remove()
            del model.selected


def plain_steps(model: Any, handle: Any) -> Steps:
    """Run the same steps without compiling; they have blocks to choose from."""
    steps = Steps(model)
    for _ in range(STEPS):
        steps.run()
    layers = [layer for layer in handle.status().layers if layer.state == "patched"]
    assert all(x.pruned_rows > BATCH * STEPS and not (x.fallbacks or x.reused) for x in layers)
    return steps


@pytest.mark.usefixtures("recomputing")
def test_steps_in_one_graph(model: Any) -> None:
    with patched(model) as handle:
        wanted = plain_steps(model, handle)
        found = Steps(model)
        compiled_steps(found)
        assert_same(found, wanted)


@pytest.mark.usefixtures("recomputing")
@pytest.mark.parametrize("options", OPTIONS)
def test_options(options: str) -> None:
    model = shared_model("deepseek_v32", "sdpa")
    with patched(model, **OPTIONS[options]) as handle:
        wanted = plain_steps(model, handle)
        found = Steps(model)
        compiled_steps(found)
        assert_same(found, wanted)


@pytest.mark.usefixtures("recomputing")
def test_inductor() -> None:
    """It rounds in its own way: states are near, and the wrong token is not."""
    model = build("glm_moe_dsa", num_hidden_layers=1, mlp_layer_types=["dense"],
                  indexer_types=["full"])  # fmt: skip
    with patched(model) as handle:
        wanted = plain_steps(model, handle)
        found = Steps(model)
        compiled_steps(found, backend="inductor")
        for a, b in zip(found.states, wanted.states, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def test_generate(generator: Any) -> None:
    """The compiled static cache that transformers offers, as its users turn it on."""
    compiling = transformers.CompileConfig(fullgraph=True, backend="aot_eager", mode=None)
    compiling._compile_all_devices = True  # transformers compiles on a GPU alone otherwise
    mask = torch.ones(BATCH, PROMPT, dtype=torch.long)
    mask[1, :9] = 0
    options = {"attention_mask": mask, "max_new_tokens": STEPS, "do_sample": False}
    ids = tokens(BATCH, PROMPT).where(mask.bool(), torch.tensor(0))
    with hisa.patch(generator, **PRUNING) as handle:
        wanted = generator.generate(ids, **options)
        before = handle.status().layers[0]
        torch._dynamo.utils.counters.clear()
        found = generator.generate(
            ids, **options, cache_implementation="static", compile_config=compiling
        )
        (after, *_) = handle.status().layers
    assert torch.equal(found, wanted)
    assert before.pruned_rows > BATCH * STEPS
    assert after.calls == before.calls + 1  # the prompt alone was not in a graph
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs(generator)
    assert not torch._dynamo.utils.counters["graph_break"]


def test_calls_in_turns(deepseek: Any) -> None:
    """A graph writes to a cache beside which keys are kept; the next call does not take them up."""
    with patched(deepseek):
        wanted, found = (Steps(deepseek) for _ in range(2))
        compiled: Any = torch.compile(deepseek, fullgraph=True, backend="aot_eager")
        for steps, call in ((wanted, None), (found, compiled)):
            for number in range(STEPS):
                steps.run(1, call if number % 12 < 9 else None)
        for steps in (wanted, found):
            steps.crop(5)
            steps.run()
        assert_same(found, wanted)


def test_what_happens_to_a_cache_between_steps(deepseek: Any) -> None:
    """Rows in another order, fewer tokens, other keys: a graph sees them all."""
    with patched(deepseek):
        found, wanted = Steps(deepseek), Steps(deepseek)
        call: Any = torch.compile(deepseek, fullgraph=True, backend="aot_eager")
        for steps, this in ((wanted, None), (found, call)):
            random = torch.Generator().manual_seed(0)
            for _ in range(3):
                steps.run(1, this)
                steps.past.layers[0].indexer_keys[:, 12].neg_()
                steps.run(1, this)
                steps.past.reorder_cache(here(torch.tensor([1, 0], device="cpu")))
                steps.run(1, this)
                steps.crop(2)
                steps.run(1, this)
                steps.past.layers[1].indexer_keys[:, :30].copy_(
                    here(torch.randn(BATCH, 30, 16, generator=random, device="cpu"))
                )
        assert_same(found, wanted)


def test_without_a_cache() -> None:
    """Prompts of growing length, packed sequences among them."""
    model = build("deepseek_v32", "sdpa", num_hidden_layers=1, mlp_layer_types=["dense"]).model
    lengths = [3, 40, 1, 20]
    packed = torch.cat([torch.arange(length) for length in lengths])[None]
    with hisa.patch(model, **PRUNING):
        call: Any = torch.compile(model, fullgraph=True, backend="aot_eager")
        for length in (60, 71):
            given = {"input_ids": tokens(1, length), "use_cache": False}
            assert torch.equal(call(**given)[0], model(**given)[0])
        given = {"input_ids": tokens(1, 64), "position_ids": packed, "use_cache": False}
        assert torch.equal(call(**given)[0], model(**given)[0])


@pytest.mark.parametrize("options", [{"audit": 0.5}, {"exact": True}])
def test_what_needs_the_host_breaks_the_graph(deepseek: Any, options: dict[str, Any]) -> None:
    ids = tokens(1, 60)
    with hisa.patch(deepseek, **PRUNING, **options) as handle:
        wanted = hidden(deepseek, ids, use_cache=False)
        call: Any = torch.compile(deepseek.model, backend="eager")
        assert torch.equal(call(ids, use_cache=False)[0], wanted)
        assert handle.status().layers[0].calls == 2


def test_no_warning_about_a_budget_that_is_not_known(deepseek: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("default", message="(?!hisa).*")
        with patched(deepseek, block_topk=6):  # 48 tokens: more than the prompt
            steps = Steps(deepseek)
            compiled_steps(steps, 2)


def test_nothing_is_left_behind(deepseek: Any) -> None:
    names = list(deepseek.state_dict())
    with patched(deepseek):
        steps = Steps(deepseek)
        compiled_steps(steps, 3)
        assert list(deepseek.state_dict()) == names
        keys = weakref.ref(steps.past.layers[0].indexer_keys)
        steps.past.reset()
        del steps
        torch._dynamo.reset()  # whose guards hold the cache
        gc.collect()
        assert keys() is None
        assert not any(len(m.forward.kept._records) for m in indexers(deepseek))


FULL = torch.ones(20, 20, device="cpu").bool().tril()
MASKS: dict[str, Tensor] = {
    "causal": FULL,
    "packed": torch.block_diag(*(torch.ones(n, n, device="cpu") for n in (3, 9, 8))).bool().tril(),
    "left": FULL & (torch.arange(20, device="cpu") >= 5),
    "sliding": FULL & ~FULL.tril(-4),
    "empty": torch.zeros(20, 20, device="cpu").bool(),
}


@pytest.mark.parametrize("rows", [1, 2, 20])
@pytest.mark.parametrize("kinds", [*((kind,) for kind in MASKS), tuple(MASKS)])
def test_windows_are_those_that_are_scanned(kinds: tuple[str, ...], rows: int) -> None:
    mask = here(torch.stack([MASKS[kind][-rows:] for kind in kinds]))
    wanted, found = (find(mask, len(kinds), rows) for find in (scan, trace))
    assert isinstance(wanted, Windows) and isinstance(found, Windows)
    for name in ("ks", "ke", "packed_ks", "packed_ke"):
        assert torch.equal(getattr(found, name), getattr(wanted, name))
    assert torch.equal(found.cu_seqlens_k.unique(), wanted.cu_seqlens_k)
    assert (found.cu_seqlens_k.diff() >= 0).all()
    assert len(found.cu_seqlens_k) == len(kinds) * (rows + 1) + 1


def test_a_mask_that_is_no_range_is_taken_for_one() -> None:
    """From the first to the last key of a row, since a graph cannot leave it to the model."""
    mask = mask_of(*causal(4, 20), 20)[None].clone()
    mask[..., 2:9] = mask[..., 17:19] = False
    assert isinstance(scan(mask, 1, 4), str)
    found = trace(mask, 1, 4)
    assert isinstance(found, Windows)
    assert found.ks.tolist() == [[0] * 4] and found.ke.tolist() == [[17, 17, 17, 20]]


@pytest.mark.parametrize(
    "mask", [None, torch.ones(1, 4, device="cpu"), torch.ones(1, 1, 4, device="cpu").long()]
)
def test_what_can_have_no_windows_is_named(mask: Tensor | None) -> None:
    assert isinstance(trace(mask, 1, 1), str)
    assert trace(mask, 1, 1) == scan(mask, 1, 1)
