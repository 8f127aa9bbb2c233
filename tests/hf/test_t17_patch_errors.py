"""T17: what a patch refuses, before it changes anything; each beside a call that is accepted."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hisa
from hisa.hf import models as known
from tests.hf.models import PRUNING, TOPK, build, indexers, python_module, tokens

BAD_OPTIONS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "block_size 100": ({"block_size": 100}, ValueError, r"one of \[8, 16, 32, .*\], got 100"),
    "block_size 0": ({"block_size": 0}, ValueError, "block_size: expected one of"),
    "block_size float": ({"block_size": 128.0}, TypeError, "block_size: expected an int"),
    "block_topk 1": ({"block_topk": 1}, ValueError, "block_topk: expected at least 2"),
    "block_topk text": ({"block_topk": "64"}, TypeError, "block_topk: expected an int, got '64'"),
    "block_topk bool": ({"block_topk": True}, TypeError, "block_topk: expected an int, got True"),
    "topk 0": ({"topk": 0}, ValueError, "topk: expected at least 1, got 0"),
    "topk too large": (
        {"topk": 33, "block_size": 8, "block_topk": 4},
        ValueError,
        r"topk: expected at most block_topk \* block_size = 4 \* 8 = 32, got 33\. Raise .* least 5",
    ),
    "index_topk too large": (
        {"block_size": 8, "block_topk": 2, "topk": None},
        ValueError,
        "index_topk of DeepseekV32Indexer: expected at most",
    ),
    "pooling": ({"pooling": "median"}, ValueError, "pooling: expected 'mean' or 'max', got"),
    "precision": ({"precision": "fp4"}, ValueError, "precision: expected 'model' or 'fp8', got"),
    "hadamard": ({"hadamard": True}, ValueError, 'hadamard: expected precision="fp8" with it'),
    "power_of_two": (
        {"precision": "fp8", "power_of_two": 1},
        TypeError,
        "power_of_two: expected a bool, got 1",
    ),
    "unknown": ({"blocks": 3}, TypeError, "unexpected keyword argument 'blocks'"),
}


@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_bad_options(deepseek: Any, case: str) -> None:
    options, error, message = BAD_OPTIONS[case]
    if case == "index_topk too large":
        indexers(deepseek)[1].index_topk = 17
    try:
        with pytest.raises(error, match=message):
            hisa.patch(deepseek, **options)
    finally:
        indexers(deepseek)[1].index_topk = TOPK
    assert not any("forward" in vars(module) for module in deepseek.modules())
    with hisa.patch(deepseek, **PRUNING):
        deepseek(tokens(1, 40))


@pytest.mark.parametrize("options", [{"pooling": "max"}, {"topk": 1}, {"block_size": 256}])
def test_good_options(deepseek: Any, options: dict[str, Any]) -> None:
    with hisa.patch(deepseek, **options):
        deepseek(tokens(1, 40))


@pytest.mark.parametrize("model", [None, "a name", [nn.Linear(1, 1)], torch.zeros(1)])
def test_not_a_module(model: Any) -> None:
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got"):
        hisa.patch(model)


def test_nothing_to_patch() -> None:
    with pytest.warns(UserWarning, match=r"contains no indexer.*deepseek_v32 \(Deepseek"):
        handle = hisa.patch(nn.Sequential(nn.Linear(4, 4)))
    assert handle.status().layers == ()
    handle.remove()


class OtherIndexer(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


class Scorer(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


@pytest.mark.parametrize(
    ("name", "module"), [("anything", OtherIndexer()), ("indexer", Scorer()), ("", OtherIndexer())]
)
def test_unknown_indexers(deepseek: Any, name: str, module: nn.Module) -> None:
    holder = module
    if name:
        holder = nn.ModuleDict({"known": deepseek, name: module})
    with pytest.raises(TypeError, match=r"does not know\. Supported: deepseek_v32.*dots3_note"):
        hisa.patch(holder)
    assert not any("forward" in vars(indexer) for indexer in indexers(deepseek))


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("deepseek_v4", "DeepseekV4Indexer"),
        ("glm5_next", "Glm5NextTextIndexer"),
        ("qwen4_exp", "Qwen4ExpTextQSAIndexer"),
        ("minimax_m3_vl", "MiniMaxM3VLIndexer"),
        ("mistral_large4", "MistralLarge4TextIndexer"),
    ],
)
def test_other_indexers_of_transformers(kind: str, name: str) -> None:
    """They select something else, or from something else."""
    modelling = python_module(kind)
    if not hasattr(modelling, name):
        pytest.skip(f"this transformers has no {name}")
    module = getattr(modelling, name).__new__(getattr(modelling, name))
    nn.Module.__init__(module)
    with pytest.raises(TypeError, match=f"{name}, an indexer that hisa.patch does not know"):
        hisa.patch(module)


def subclass(kind: str, body: dict[str, Any]) -> Any:
    spec = next(spec for spec in known.SPECS if spec.model_type == kind)
    base = getattr(importlib.import_module(spec.module_name), spec.class_name)
    return type("Custom", (base,), body)


def test_a_subclass_is_known_by_the_forward_it_inherits() -> None:
    model = build("deepseek_v32")
    for module in indexers(model):
        module.__class__ = subclass("deepseek_v32", {})
    with hisa.patch(model, **PRUNING) as handle:
        assert len(handle.status().layers) == 3
    for layer in model.model.layers:
        layer.self_attn.indexer.__class__ = subclass("deepseek_v32", {"forward": lambda self, x: x})
    with pytest.raises(TypeError, match="Custom, an indexer that"):
        hisa.patch(model, **PRUNING)


def test_another_signature_or_layout(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after a change in transformers."""
    model = build(kind)
    first = indexers(model)[0]
    with monkeypatch.context() as patcher:
        patcher.setattr(
            type(first), "forward", lambda self, hidden_states, q_resid, use_cache=False: None
        )
        with pytest.raises(TypeError, match=r"takes \(hidden_states, q_resid, use_cache\)"):
            hisa.patch(model, **PRUNING)
    with monkeypatch.context() as patcher:
        spec = known.recognise("", first)
        patcher.delattr(python_module(kind), spec.rotary)
        with pytest.raises(TypeError, match=f"without {spec.rotary}, which"):
            hisa.patch(model, **PRUNING)
    weights = first.wk
    del first.wk
    with pytest.raises(TypeError, match="without wk, which"):
        hisa.patch(model, **PRUNING)
    first.wk = weights
    hisa.patch(model, **PRUNING).remove()


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"index_n_heads": 129}, "1 to 128 heads"), ({"index_head_dim": 24}, "multiple of 16")],
)
def test_shapes_that_hisa_has_no_kernel_for(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"DeepseekV32Indexer: .*{message}"):
        hisa.patch(build("deepseek_v32", **changes), **PRUNING)


def test_a_mask_of_another_length(deepseek: Any) -> None:
    first = indexers(deepseek)[0]
    states, resid, turn = torch.randn(1, 4, 32), torch.randn(1, 4, 16), torch.randn(1, 4, 8)
    with hisa.patch(deepseek, **PRUNING):
        first(states, resid, (turn, turn), torch.ones(1, 4, 4).bool(), None)
        with pytest.raises(ValueError, match=r"attention_mask: expected one column for each of"):
            first(states, resid, (turn, turn), torch.ones(1, 4, 5).bool(), None)


def test_the_extension_is_asked_for_when_patching(
    deepseek: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hisa._extension._module", None)
    monkeypatch.setattr("hisa._extension._reason", ImportError("not there"))
    with pytest.raises(RuntimeError, match="Build it"):
        hisa.patch(deepseek, **PRUNING)
