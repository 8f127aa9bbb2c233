"""T18: a patch that is exact: flat's selection, whatever the budget."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

import hisa
from hisa.hf.exact import LayerExact
from tests.hf.models import PRUNING, indexers, tokens

ON_CUDA = {"test_selects_what_flat_selects", "test_generate"}
ALL = {**PRUNING, "block_topk": 1000}  # nothing is pruned


@pytest.mark.parametrize("precision", ["model", "fp8"])
def test_selects_what_flat_selects(model: Any, precision: str) -> None:
    """The output is that of a budget that covers all tokens, and not that of the small one."""
    inputs = tokens(2, 90)
    with hisa.patch(model, **ALL, precision=precision):
        want = model(inputs)[0]
    with hisa.patch(model, **PRUNING, precision=precision):
        assert not torch.equal(model(inputs)[0], want)
    with hisa.patch(model, **PRUNING, precision=precision, exact=True) as handle:
        assert torch.equal(model(inputs)[0], want)
        patched = [layer for layer in handle.status().layers if layer.state == "patched"]
    assert len(patched) == len(indexers(model))
    for layer in patched:
        assert layer.escalated_rows is not None
        assert 0 < layer.escalated_rows <= layer.pruned_rows < layer.rows


def test_generate(generator: Any) -> None:
    """With a cache: the prompt in chunks, of left-padded sequences, then one token at a time."""
    prompt = tokens(2, 70)
    mask = torch.ones_like(prompt)
    mask[1, :9] = 0
    options = {"attention_mask": mask, "prefill_chunk_size": 30, "max_new_tokens": 6}
    with hisa.patch(generator, **ALL):
        want = generator.generate(prompt, **options, do_sample=False)
    with hisa.patch(generator, **PRUNING, exact=True):
        assert torch.equal(generator.generate(prompt, **options, do_sample=False), want)


def test_an_audit_finds_nothing_lost(model: Any) -> None:
    """Both together: the audit judges what the model gets."""
    with hisa.patch(model, **PRUNING, exact=True, audit=1.0) as handle:
        model(tokens(2, 90))
        report = handle.report()
    for comparison in report.layers.values():
        assert comparison.recall.eq(1).all() and comparison.recall.numel() == 180


def test_status_shows_it(model: Any) -> None:
    """A column of its own, only where it says something."""
    with hisa.patch(model, **PRUNING, exact=True) as handle:
        model(tokens(1, 90))
        assert "escalated" in str(handle.status())
    with hisa.patch(model, **PRUNING) as handle:
        model(tokens(1, 90))
        assert "escalated" not in str(handle.status())
        assert handle.status().layers[0].escalated_rows is None


def test_errors(model: Any) -> None:
    """A wrong option, and an indexer that no proof takes; nothing is patched then."""
    with pytest.raises(TypeError, match="exact: expected bool, got int"):
        hisa.patch(model, **PRUNING, exact=1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="H: expected at most 127 for a proof, which needs 1 of"):
        LayerExact(SimpleNamespace(n_heads=128, head_dim=64))
    with pytest.raises(ValueError, match="D: expected at most 240 for a proof, which needs 16 of"):
        LayerExact(SimpleNamespace(n_heads=4, head_dim=256))
