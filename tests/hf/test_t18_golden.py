"""T18: with a budget that covers everything, a patched model gives exactly what it gave before.

The selections are then the same sets, so all that follows is the same to the bit. On a GPU, torch's
own sums may come in any order, so that there a tolerance is left: far below what one wrong token of
the 16 makes in these models, which is checked as well.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import hisa
from tests.hf.models import (
    COVERING,
    PRUNING,
    VARIANTS,
    build,
    cached,
    here,
    indexers,
    own_result,
    shared_model,
    tokens,
)

transformers: Any = pytest.importorskip("transformers")

ON_CUDA = True
LENGTH = 57
PADDING: dict[str, Callable[[int], Tensor]] = {
    "none": lambda length: torch.ones(3, length, dtype=torch.long),
    "left": lambda length: (torch.arange(length) >= torch.tensor([[0], [9], [length - 20]])).long(),
    "right": lambda length: (torch.arange(length) < torch.tensor([[length], [30], [19]])).long(),
}


def hidden(model: Any, ids: Tensor, **arguments: Any) -> Tensor:
    base = getattr(model, "model", model)
    states: Tensor = base(input_ids=ids, **arguments).last_hidden_state
    return states


def assert_same(model: Any, run: Callable[[int], Any]) -> None:
    """Compare a run on the unpatched and on the patched model."""
    own, seed = own_result(run)
    with hisa.patch(model, **COVERING) as handle:
        patched = run(seed)
        layers = [layer for layer in handle.status().layers if layer.state == "patched"]
    assert layers and all(layer.rows and not layer.fallbacks for layer in layers)
    tolerance = 1e-4 if own.is_cuda else 0
    if own.dtype in (torch.bfloat16, torch.float16):
        tolerance *= 100
    torch.testing.assert_close(patched, own, rtol=tolerance, atol=tolerance)


@pytest.mark.gpu
def test_prefill_on_tensor_cores(kind: str) -> None:
    """In bf16, where other kernels run; and the control, that pruning is no match."""
    model = build(kind).to(torch.bfloat16)
    mask = PADDING["left"](LENGTH)

    def run(seed: int) -> Tensor:
        return hidden(model, tokens(3, LENGTH, seed), attention_mask=mask)[mask.bool()]

    assert_same(model, run)
    own = run(0)
    with hisa.patch(model, **PRUNING):
        different = (run(0) - own).abs().max() / own.abs().max()
    assert different > 0.1


@pytest.mark.parametrize(("kind", "attention"), VARIANTS)
@pytest.mark.parametrize("padding", PADDING)
def test_prefill(kind: str, attention: str, padding: str) -> None:
    """Integration bugs: padding."""
    model = shared_model(kind, attention)
    mask = PADDING[padding](LENGTH)

    def run(seed: int) -> Tensor:
        states = hidden(model, tokens(3, LENGTH, seed), attention_mask=mask)
        return states[mask.bool()]  # what a padded query gets is not defined

    assert_same(model, run)


@pytest.mark.parametrize("rows", [1, 7])
def test_few_rows_at_a_time(model: Any, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut queries into pieces that do not divide their number."""
    mask = PADDING["left"](LENGTH)
    row_bytes = 3 * 16 * 16 * 4  # batch, heads, channels, fp32
    monkeypatch.setattr("hisa.hf.indexer.CHUNK_BYTES", rows * row_bytes)
    monkeypatch.setattr("hisa.hf.indexer.CUDA_CHUNK_BYTES", rows * row_bytes)

    def run(seed: int) -> Tensor:
        return hidden(model, tokens(3, LENGTH, seed), attention_mask=mask)[mask.bool()]

    assert_same(model, run)


@pytest.mark.parametrize(("kind", "attention"), VARIANTS)
def test_packed_sequences(kind: str, attention: str) -> None:
    """Integration bugs: packed documents."""
    model = shared_model(kind, attention)
    lengths = [3, 40, 1, 33]
    positions = torch.cat([torch.arange(length) for length in lengths])[None]

    def run(seed: int) -> Tensor:
        ids = tokens(1, sum(lengths), seed)
        return hidden(model, ids, position_ids=positions, use_cache=False)

    assert_same(model, run)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("padding", ["none", "left"])
def test_chunked_prefill_and_decode(model: Any, cache: str, padding: str) -> None:
    """Integration bugs: chunked prefill, static caches."""
    mask = PADDING[padding](LENGTH)

    def run(seed: int) -> Tensor:
        ids = tokens(3, LENGTH, seed)
        config = model.config
        past = (
            transformers.DynamicCache(config=config)
            if cache == "dynamic"
            else transformers.StaticCache(config=config, max_cache_len=LENGTH + 12)
        )
        edges = [0, 20, 21, 45, *range(50, LENGTH + 1)]
        states = []
        for start, end in itertools.pairwise(edges):
            positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, start:end]
            chunk = {"position_ids": positions, "attention_mask": mask[:, :end]}
            states.append(hidden(model, ids[:, start:end], **cached(model, past), **chunk))
        return torch.cat(states, dim=1)[mask.bool()]

    assert_same(model, run)


GENERATION: dict[str, dict[str, Any]] = {
    "greedy": {},
    "no cache": {"use_cache": False},
    "static cache": {"cache_implementation": "static", "disable_compile": True},
    "beam search": {"num_beams": 3},
    "sampling": {"do_sample": True, "temperature": 0.7},
    "sampled beams": {"do_sample": True, "num_beams": 2},
    "chunked prefill": {"prefill_chunk_size": 16},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
}


@pytest.mark.parametrize("mode", GENERATION)
def test_generate(generator: Any, mode: str) -> None:
    """Integration bugs: generation modes, reordered beams among them."""
    batch = 1 if mode == "prompt lookup" else 2
    mask = torch.ones(batch, 44, dtype=torch.long)
    if batch > 1:
        mask[1, :9] = 0  # left padding

    def run(seed: int) -> Tensor:
        torch.manual_seed(seed)
        ids = tokens(batch, 44, seed).where(mask.bool(), torch.tensor(0))
        options = {"do_sample": False, "max_new_tokens": 8, **GENERATION[mode]}
        result: Tensor = generator.generate(ids, attention_mask=mask, **options)
        return result

    assert_same(generator, run)


@pytest.mark.parametrize("cache", ["implementation", "given"])
def test_offloaded_cache(generator: Any, cache: str) -> None:
    """Layers that are on the CPU between their turns; pruned, as with a cache that is not moved.

    Integration bugs: generation modes.
    """
    if generator.device.type == "cpu":
        pytest.skip("transformers offloads from accelerators only")
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}

    def run(seed: int, offloads: bool = True) -> Tensor:
        past: dict[str, Any] = {}
        if cache == "given":
            made = transformers.DynamicCache(config=generator.config, offloading=offloads)
            past = cached(generator, made)
        elif offloads:
            past = {"cache_implementation": "offloaded"}
        result: Tensor = generator.generate(tokens(1, 44, seed), **options, **past)
        return result

    try:
        run(0)
    except RuntimeError as error:
        pytest.skip(f"this version of transformers cannot do it itself: {error}")
    assert_same(generator, run)
    with hisa.patch(generator, **PRUNING):
        assert torch.equal(run(0), run(0, offloads=False))


def test_a_dynamic_cache_that_is_reset(generator: Any) -> None:
    """It begins anew, with a prompt of another length."""

    def run(seed: int) -> Tensor:
        past = transformers.DynamicCache(config=generator.config)
        states = []
        for length in (LENGTH, 40):
            past.reset()
            if past.get_seq_length():
                pytest.skip("in this transformers the tokens stay, as zeros")
            ids = tokens(2, length, seed + length)
            states += [hidden(generator, ids[:, :-3], **cached(generator, past))]
            states += [hidden(generator, ids[:, n, None], **cached(generator, past))
                       for n in (-3, -2, -1)]  # fmt: skip
        return torch.cat(states, dim=1)

    assert_same(generator, run)


def test_assisted_decoding(generator: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A draft model proposes tokens, some are rejected, and both caches are cropped.

    Integration bugs: assisted decoding.
    """
    rejected: list[int] = []
    drafting = transformers.generation.candidate_generator.AssistedCandidateGenerator
    real = drafting.update_candidate_strategy

    def note(self: Any, ids: Tensor, scores: Tensor, matches: int) -> None:
        rejected.append(len(scores[0]) - 1 - int(matches))
        real(self, ids, scores, matches)

    monkeypatch.setattr(drafting, "update_candidate_strategy", note)
    assistant = build(generator.config.model_type.removesuffix("_text"))
    for parameter in assistant.parameters():
        generated = torch.Generator().manual_seed(1)
        parameter.add_(0.03 * here(torch.randn(parameter.shape, generator=generated, device="cpu")))

    def run(seed: int) -> Tensor:
        rejected.clear()
        result: Tensor = generator.generate(
            tokens(1, 40, seed), max_new_tokens=10, do_sample=False, assistant_model=assistant
        )
        return result

    with hisa.patch(assistant, **COVERING):
        assert_same(generator, run)
    assert max(rejected) > 0


def test_continued_chat(generator: Any) -> None:
    """The cache of one turn is the start of the next."""

    def run(seed: int) -> Tensor:
        past = transformers.DynamicCache(config=generator.config)
        ids = tokens(1, 30, seed)
        for turn in range(2):
            options = {"max_new_tokens": 4, "do_sample": False, **cached(generator, past)}
            ids = generator.generate(ids, **options)
            ids = torch.cat([ids, tokens(1, 9, seed + turn)], dim=1)
        return ids

    assert_same(generator, run)


@pytest.mark.parametrize(
    ("dtype", "autocast"),
    [
        (torch.float32, False),
        (torch.bfloat16, False),
        (torch.float16, False),
        (torch.float32, True),
        (torch.bfloat16, True),  # models in fp16 do not run under bf16 autocast
    ],
)
def test_cached_keys_are_the_models_own(kind: str, dtype: torch.dtype, autocast: bool) -> None:
    """To the bit, so that a model can be patched or restored in the middle of a chat.

    In 16 bits this also shows whether the keys are normed in the dtype that the model uses.
    """
    model = build(kind).to(dtype)
    for indexer in indexers(model):
        indexer.weights_proj.float()  # as in a loaded checkpoint
        if kind in ("hy_v4", "hy_v4_vl"):
            indexer.k_norm.float()

    def keys() -> Tensor:
        past: Any = transformers.DynamicCache(config=model.config)
        with torch.autocast(model.device.type, torch.bfloat16, enabled=autocast):
            hidden(model, tokens(2, 40), **cached(model, past))
        kept: Tensor = past.layers[0].indexer_keys
        return kept

    own = keys()
    with hisa.patch(model, **COVERING):
        patched = keys()
    assert own.dtype == patched.dtype  # dots3_note rotates in fp32, the others do not
    assert torch.equal(own, patched)


@pytest.mark.parametrize(("kind", "attention"), VARIANTS)
def test_inference_mode_and_autograd(kind: str, attention: str) -> None:
    """Integration bugs: training."""
    model = shared_model(kind, attention)
    assert_same(model, torch.inference_mode()(lambda seed: hidden(model, tokens(2, 40, seed))))

    def gradient(seed: int) -> Tensor:
        with torch.enable_grad():
            ids = tokens(1, 40, seed)
            model.zero_grad()
            hidden(model, ids, use_cache=False).square().mean().backward()
        grad: Tensor = getattr(model, "model", model).embed_tokens.weight.grad
        model.zero_grad()
        return grad

    assert_same(model, gradient)
