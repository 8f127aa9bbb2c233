"""`hisa.capture`: what is recorded is what the indexers score.

Catches keys without what the cache holds, queries of other rows than their windows, a decode step
kept in place of the prefill, a buffer that the model goes on writing into, and a model that is not
left as it was.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hisa
from hisa.hf import Captured
from tests.hf.models import PRUNING, TOPK, build, cached, indexers, own_result, tokens

pytest.importorskip("safetensors")

ON_CUDA = {
    "test_flat_selects_from_it_what_the_model_does",
    "test_it_fits_compare_and_recommend",
    "test_rows_are_some_of_all",
    "test_the_largest_call_is_kept_with_the_keys_of_the_cache",
    "test_generate_with_a_static_cache",
    "test_a_patched_model_is_captured_and_left_as_it_was",
}
ARGUMENTS = {"q", "k", "weights", "ks", "ke", "cu_seqlens_k"}


class Selections:
    """Notes what the indexers return, a list of calls for each."""

    def __init__(self, model: nn.Module) -> None:
        self.calls: dict[str, list[Tensor]] = {}
        for name, module in model.named_modules():
            if module in indexers(model):
                self.calls[name] = []
                module.register_forward_hook(lambda m, a, out, to=self.calls[name]: to.append(out))


def load(path: Path) -> dict[str, Any]:
    return dict(hisa.load_capture(path))


def as_sets(positions: Tensor) -> list[set[int]]:
    return [set(row) - {-1} for row in positions.flatten(0, -2).tolist()]


def flat(tensors: Captured, keys: int) -> list[set[int]]:
    """Return what flat selects, as positions in each batch entry's own keys."""
    ks, ke = tensors["ks"], tensors["ke"]
    found = hisa.flat_index(tensors["q"], tensors["k"], tensors["weights"], ks=ks, ke=ke, topk=TOPK)
    return as_sets(torch.where(found < 0, -1, found + ks[:, None] % keys))


def seen(selected: list[set[int]], tensors: Captured, keys: int) -> list[set[int]]:
    """Leave out what the model selects outside of a window, for want of anything inside."""
    ranges = zip((tensors["ks"] % keys).tolist(), (tensors["ke"] - tensors["ks"]).tolist(),
                 selected, strict=True)  # fmt: skip
    return [row & set(range(start, start + length)) for start, length, row in ranges]


def test_flat_selects_from_it_what_the_model_does(kind: str, tmp_path: Path) -> None:
    """Of every model, with a batch that is padded on the left."""
    model = build(kind)
    mask = torch.ones(2, 40, dtype=torch.int64)
    mask[1, :7] = 0
    noted = Selections(model)
    _, seed = own_result(lambda seed: model(tokens(2, 40, seed), attention_mask=mask))
    with hisa.capture(model, tmp_path / "file"):
        model(tokens(2, 40, seed), attention_mask=mask)
    captured = hisa.load_capture(tmp_path / "file")
    assert list(captured) == list(noted.calls) and len(captured) >= 2
    for name, calls in noted.calls.items():
        assert set(captured[name]) == ARGUMENTS
        assert captured[name]["q"].device == captured[name]["k"].device == torch.device("cpu")
        own = seen(as_sets(calls[-1]), captured[name], 40)
        assert own == flat(captured[name], 40) and max(map(len, own)) == TOPK


def test_it_fits_compare_and_recommend(deepseek: Any, tmp_path: Path) -> None:
    """Its names are those of the arguments."""
    with hisa.capture(deepseek, str(tmp_path / "file"), layers=[1], rows=20):
        deepseek(tokens(1, 100))
    ((name, tensors),) = hisa.load_capture(tmp_path / "file").items()
    assert name == "model.layers.1.self_attn.indexer"
    options: dict[str, Any] = {"block_size": 8, "block_topk": [4, 16], "topk": 16}
    found = hisa.compare(**tensors, **options)
    assert found.recall.shape == (2, 20) and found.recall[0].min() < found.recall[1].min() == 1
    assert found.context.tolist() == list(range(5, 101, 5))
    assert hisa.recommend(**tensors, **options, target=1, pooling="mean").pick is not None


def test_rows_are_some_of_all(deepseek: Any, tmp_path: Path) -> None:
    """Every second query of both batch entries, with its own weights and window; keys in full."""
    for name, rows in (("some", 30), ("all", None), ("more", 1000)):
        with hisa.capture(deepseek, tmp_path / name, rows=rows):
            deepseek(tokens(2, 30))
    some, whole, more = (load(tmp_path / name) for name in ("some", "all", "more"))
    for layer, tensors in whole.items():
        for name, tensor in tensors.items():
            assert torch.equal(more[layer][name], tensor)
            per_row = name in ("q", "weights", "ks", "ke")
            torch.testing.assert_close(some[layer][name], tensor[1::2] if per_row else tensor)


def test_the_largest_call_is_kept_with_the_keys_of_the_cache(
    generator: Any, tmp_path: Path
) -> None:
    """Two equal chunks and a decode step: the second chunk, over the keys of both."""
    from transformers import DynamicCache

    prompt = tokens(2, 41)
    past = cached(generator, DynamicCache(config=generator.config))
    with hisa.capture(generator, tmp_path / "chunks"):
        for at in (slice(0, 20), slice(20, 40), slice(40, 41)):
            generator(prompt[:, at], use_cache=True, **past)
    with hisa.capture(generator, tmp_path / "whole"):
        generator(prompt[:, :40], use_cache=False)
    chunks, whole = (load(tmp_path / name) for name in ("chunks", "whole"))
    for layer, tensors in whole.items():
        second = torch.arange(80).view(2, 2, 20)[:, 1].flatten().cpu()  # of both entries
        assert torch.equal(chunks[layer]["ke"], tensors["ke"][second])
        assert torch.equal(chunks[layer]["cu_seqlens_k"], tensors["cu_seqlens_k"])
        first = layer == next(iter(whole))  # later layers depend on what was selected before
        if first:
            torch.testing.assert_close(chunks[layer]["q"], tensors["q"][second])
            torch.testing.assert_close(chunks[layer]["k"], tensors["k"])


def test_generate_with_a_static_cache(deepseek: Any, tmp_path: Path) -> None:
    """The keys are those of the prefill's time, not what is written behind them later."""
    options: dict[str, Any] = {
        "do_sample": False,
        "cache_implementation": "static",
        "disable_compile": True,  # which transformers does by itself on a GPU
    }
    with hisa.capture(deepseek, tmp_path / "file"):
        deepseek.generate(tokens(1, 30), max_new_tokens=4, **options)
    for tensors in hisa.load_capture(tmp_path / "file").values():
        assert tensors["ke"].tolist() == list(range(1, 31))
        assert tensors["k"][:30].ne(0).any(1).all() and tensors["k"][30:].eq(0).all()


def test_a_patched_model_is_captured_and_left_as_it_was(deepseek: Any, tmp_path: Path) -> None:
    """The same tensors where the selections before are the same; results do not change."""
    ids = tokens(1, 60)
    with hisa.capture(deepseek, tmp_path / "own"):
        deepseek(ids)
    with hisa.patch(deepseek, **PRUNING) as handle:
        want = deepseek(ids).logits
        with hisa.capture(deepseek, tmp_path / "patched"):
            got = deepseek(ids).logits
        assert all(layer.fallbacks == {} for layer in handle.status().layers)
    assert torch.equal(got, want)
    own, patched = (load(tmp_path / name) for name in ("own", "patched"))
    first = next(iter(own))
    assert all(torch.equal(own[first][name], patched[first][name]) for name in ARGUMENTS)
    for module in indexers(deepseek):
        assert not module._forward_hooks and not module._forward_pre_hooks


def test_an_exception_writes_nothing(deepseek: Any, tmp_path: Path) -> None:
    """The user's own exception comes through, and the hooks are gone."""
    with (
        pytest.raises(IndexError),
        hisa.capture(deepseek, tmp_path / "file"),
    ):
        indexers(deepseek)[len(deepseek(tokens(1, 20)).logits[0])]
    assert not (tmp_path / "file").exists()
    assert not any(module._forward_hooks for module in indexers(deepseek))


def test_layers_without_a_call_are_named(deepseek: Any, tmp_path: Path) -> None:
    """With why, after the others are written."""
    indexer = indexers(deepseek)[1]
    with (
        pytest.raises(RuntimeError, match=r"nothing was captured of .*layers\.0.*did not run"),
        hisa.capture(deepseek, tmp_path / "file"),
    ):
        pass
    assert hisa.load_capture(tmp_path / "file") == {}
    mask = torch.ones(1, 1, 20, 20, dtype=torch.bool).tril()
    mask[..., 10, 5] = False
    with (
        pytest.raises(RuntimeError, match="a row that is not one range"),
        hisa.capture(deepseek, tmp_path / "file", layers=[indexer.layer_idx]),
    ):
        deepseek(tokens(1, 20), attention_mask=mask)


@pytest.mark.parametrize(("options", "error", "message"), [
    ({"layers": [0, 7]}, ValueError, r"layers: expected some of \[0, 1, 2\], got 7"),
    ({"rows": 0}, ValueError, "rows: expected at least 1, got 0"),
    ({"rows": 2.0}, TypeError, r"rows: expected an int, got 2\.0"),
    ({"model": "name"}, TypeError, r"model: expected a torch\.nn\.Module, got str"),
    ({"model": nn.Linear(1, 1)}, ValueError, "model: expected one with an indexer. Supported: dee"),
])  # fmt: skip
def test_bad_calls(
    deepseek: Any, tmp_path: Path, options: Any, error: type[Exception], message: str
) -> None:
    """Named when the block begins."""
    with (
        pytest.raises(error, match=message),
        hisa.capture(**{"model": deepseek, "path": tmp_path / "file", **options}),
    ):
        pass


def test_safetensors_is_imported_when_it_is_used(
    deepseek: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And named, with how to get it, if it is not there."""
    code = "import sys, hisa; hisa.capture; print('safetensors' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with (
        pytest.raises(ImportError, match="safetensors is not installed; `pip install hisa-ind"),
        hisa.capture(deepseek, tmp_path / "file"),
    ):
        pass
    with pytest.raises(ImportError, match="safetensors is not installed"):
        hisa.load_capture(tmp_path / "file")
