"""T18, T15: each of these faults must be noticed by the comparison that the golden tests make.

A common positive factor (a forgotten softmax_scale) is not among them: it changes no selection.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import hisa
from hisa import around
from hisa.hf import indexer as under_test
from hisa.hf import masks, rotation
from hisa.hf.models import rotary
from tests.hf.models import shared_model, tokens
from tests.hf.test_t18_golden import LENGTH, PADDING, assert_same, hidden

Mutation = Callable[[pytest.MonkeyPatch], None]


def other_rotary(patcher: pytest.MonkeyPatch) -> None:
    """Pair the channels in the other way, whatever the model's own function is called."""
    module = importlib.import_module("transformers.models.deepseek_v32.modeling_deepseek_v32")
    x = torch.arange(16.0).view(1, 2, 1, 8)  # two positions
    angle = torch.tensor([[[0.0], [1.0]]]) / torch.arange(1.0, 5.0).repeat(2)

    def dot(function: Any) -> float:
        """Of a query at one position and a key at another; the channels' order plays no part."""
        q, k = function(x, x, angle.cos(), angle.sin(), unsqueeze_dim=2)
        return float((q[:, 0] * k[:, 1]).sum())

    def other(spec: Any) -> Any:
        both = module.apply_rotary_pos_emb, module.apply_rotary_pos_emb_interleave
        (different,) = (f for f in both if abs(dot(f) - dot(rotary(spec))) > 1)
        return different

    patcher.setattr(rotation, "rotary", other)


def change_keys(change: Callable[..., Tensor]) -> Mutation:
    return lambda patcher: patcher.setattr(under_test, "project_keys", change)


def keys_without_norm(
    module: Any, spec: Any, hidden_states: Tensor, cos_sin: Any, q_resid: Tensor
) -> Tensor:
    keys = module.wk(hidden_states).unsqueeze(2)
    return rotation.rotate(module, spec, keys, cos_sin)[0].squeeze(2)


def keys_without_rotation(
    module: Any, spec: Any, hidden_states: Tensor, cos_sin: Any, q_resid: Tensor
) -> Tensor:
    keys: Tensor = module.k_norm(module.wk(hidden_states))
    return keys


def hadamard_on_queries_only(patcher: pytest.MonkeyPatch) -> None:
    project = under_test.project_queries
    matrix = torch.ones(1, 1)
    while len(matrix) < 16:
        matrix = torch.cat([torch.cat([matrix, matrix]), torch.cat([matrix, -matrix])], dim=1)
    patcher.setattr(under_test, "project_queries", lambda *a: (project(*a)[0] @ matrix / 4, None))


def other_end_rotated(patcher: pytest.MonkeyPatch) -> None:
    rotate = rotation.rotate
    patcher.setattr(
        under_test,
        "rotate",
        lambda module, spec, *rest, **options: rotate(
            module, dataclasses.replace(spec, rope_last=not spec.rope_last), *rest, **options
        ),
    )


def change_weights(change: Callable[[Tensor], Tensor]) -> Mutation:
    def mutate(patcher: pytest.MonkeyPatch) -> None:
        project = under_test.project_weights
        patcher.setattr(under_test, "project_weights", lambda *a: change(project(*a)))

    return mutate


def change_windows(change: Callable[[masks.Windows], masks.Windows]) -> Mutation:
    def mutate(patcher: pytest.MonkeyPatch) -> None:
        def begin_scan(*mask: Any) -> masks.Scan:
            changed = change(masks.scan(*mask))  # type: ignore[arg-type]
            return masks.Scan(lambda: changed, pending=False)

        patcher.setattr(masks, "begin_scan", begin_scan)

    return mutate


def no_relu(patcher: pytest.MonkeyPatch) -> None:
    def index(q: Tensor, k: Tensor, weights: Tensor, **options: Any) -> Tensor:
        # With the negated query too, relu(x) - relu(-x) is x.
        result: Tensor = original(
            torch.cat([q, -q], 1), k, torch.cat([weights, -weights], 1), **options
        )
        return result

    original: Any = hisa.index
    patcher.setattr(hisa, "index", index)


def relative_positions(patcher: pytest.MonkeyPatch) -> None:
    complete = around.complete
    patcher.setattr(
        under_test,
        "complete",
        lambda indices, ks, ke, *rest, **options: complete(
            indices, torch.zeros_like(ks), ke - ks, *rest, **options
        ),
    )


MUTATIONS: dict[str, Mutation] = {
    "RoPE flipped": other_rotary,
    "RoPE on the other end": other_end_rotated,
    "keys without norm": change_keys(keys_without_norm),
    "keys without RoPE": change_keys(keys_without_rotation),
    "Hadamard on q only": hadamard_on_queries_only,
    "no ReLU": no_relu,
    "weights negated": change_weights(torch.neg),
    "weights positive": change_weights(torch.abs),
    "heads not weighted": change_weights(torch.ones_like),
    "heads shifted": change_weights(lambda weights: weights.roll(1, -1)),
    "last token missing": change_windows(
        lambda w: dataclasses.replace(w, packed_ke=(w.packed_ke - 1).maximum(w.packed_ks))
    ),
    "no causality": change_windows(
        lambda w: dataclasses.replace(w, packed_ke=w.packed_ke * 0 + w.packed_ke.amax(1)[:, None])
    ),
    "padding not excluded": change_windows(
        lambda w: dataclasses.replace(
            w,
            packed_ks=w.packed_ks - w.ks,
            ks=w.ks * 0,
            cu_seqlens_k=torch.arange(4, dtype=torch.int32) * w.keys,
        )
    ),
    "relative positions returned": relative_positions,
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_is_noticed(kind: str, mutation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Integration bugs: RoPE, Hadamard, ReLU and head weights, norm, causality."""
    model = shared_model(kind)
    mask = PADDING["left"](LENGTH)

    def run(seed: int) -> Tensor:
        return hidden(model, tokens(3, LENGTH, seed), attention_mask=mask)[mask.bool()]

    with monkeypatch.context() as patcher:
        MUTATIONS[mutation](patcher)
        with pytest.raises(AssertionError, match="Tensor-likes are not equal"):
            assert_same(model, run)
    assert_same(model, run)
