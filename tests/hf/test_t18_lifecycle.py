"""T18: patching, patching again, restoring, copying, storing; and with accelerate's hooks."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hisa
from hisa.hf.models import CACHE_NAMES
from tests.hf.accelerate_hooks import CountingHook, add_hook, remove_hook
from tests.hf.models import COVERING, PRUNING, build, cached, indexers, tokens

transformers: Any = pytest.importorskip("transformers")

# Those that do not deal in files, hooks or compilation.
ON_CUDA = {
    "test_context_manager_restores",
    "test_a_hundred_times",
    "test_patching_again_replaces_the_settings",
    "test_a_part_of_a_model",
    "test_a_copy_is_unpatched_and_independent",
    "test_a_patched_model_is_freed_at_once",
    "test_memory_returns_from_a_patched_model",
    "test_threads",
    "test_patching_while_the_model_runs",
}


def ids() -> Tensor:
    return tokens(1, 60)


def is_original(model: nn.Module) -> bool:
    return not any({"forward", "_old_forward"} & vars(module).keys() for module in model.modules())


@pytest.fixture
def own(deepseek: Any) -> Tensor:
    logits: Tensor = deepseek(ids()).logits
    return logits


@pytest.fixture
def pruned(deepseek: Any, own: Tensor) -> Tensor:
    with hisa.patch(deepseek, **PRUNING):
        logits: Tensor = deepseek(ids()).logits
    assert not torch.equal(logits, own), "the budget must make a difference for these tests"
    return logits


def test_context_manager_restores(deepseek: Any, own: Tensor, pruned: Tensor) -> None:
    before = [dict(vars(module)) for module in deepseek.modules()]
    handle = hisa.patch(deepseek, **PRUNING)
    with pytest.raises(RuntimeError, match="indices"), handle:
        deepseek(torch.tensor([[0.5]]))  # refused on the host, unlike a wrong id on a GPU
    assert [dict(vars(module)) for module in deepseek.modules()] == before
    assert torch.equal(deepseek(ids()).logits, own)
    handle.remove()
    assert is_original(deepseek)


def test_a_hundred_times(deepseek: Any, own: Tensor, pruned: Tensor) -> None:
    for _ in range(100):
        hisa.patch(deepseek, **PRUNING).remove()
        assert is_original(deepseek)
    handles = [hisa.patch(deepseek, **PRUNING) for _ in range(100)]
    assert torch.equal(deepseek(ids()).logits, pruned)
    for handle in handles:
        handle.remove()
    assert is_original(deepseek) and torch.equal(deepseek(ids()).logits, own)


def test_patching_again_replaces_the_settings(deepseek: Any, own: Tensor, pruned: Tensor) -> None:
    first = hisa.patch(deepseek, **PRUNING)
    with hisa.patch(deepseek, **COVERING) as second:
        assert torch.equal(deepseek(ids()).logits, own)
        first.remove()  # no longer owns anything
        assert torch.equal(deepseek(ids()).logits, own)
        deepseek(ids())
        assert {layer.calls for layer in second.status().layers} == {3}
        assert {layer.state for layer in first.status().layers} == {"removed"}
    assert is_original(deepseek)


def test_a_part_of_a_model(deepseek: Any) -> None:
    layer = deepseek.model.layers[1]
    bare = indexers(deepseek)[2]
    with hisa.patch(layer, **PRUNING) as one, hisa.patch(bare, **PRUNING) as other:
        deepseek(ids())
        assert [(s.name, s.calls) for s in one.status().layers] == [("self_attn.indexer", 1)]
        assert [(s.name, s.calls) for s in other.status().layers] == [("", 1)]
        assert "forward" not in vars(indexers(deepseek)[0])
    assert is_original(deepseek)


def test_a_removed_patch_cannot_be_entered(deepseek: Any) -> None:
    with hisa.patch(deepseek, **PRUNING) as handle:
        pass
    with pytest.raises(RuntimeError, match=r"call hisa\.patch again"), handle:
        pass


def test_shallow_copies(deepseek: Any) -> None:
    """A copy takes over the patched forward, which is the original's; patching it is its own."""
    first = indexers(deepseek)[0]
    with hisa.patch(first, **PRUNING) as original:
        twin = copy.copy(first)
        with hisa.patch(twin, **PRUNING) as other:
            deepseek(ids())
            assert [layer.state for layer in original.status().layers] == ["patched"]
            assert [layer.calls for layer in other.status().layers] == [0]
        assert "forward" not in vars(twin)
        assert "forward" in vars(first)


def test_a_wrapped_indexer(deepseek: Any, pruned: Tensor) -> None:
    """What only wraps a known indexer is not one: the indexer inside is found by itself."""
    model = build("deepseek_v32", "sdpa")
    for layer in model.model.layers:
        layer.self_attn.indexer = nn.Sequential(layer.self_attn.indexer)
        layer.self_attn.indexer.forward = layer.self_attn.indexer[0].__call__
    with hisa.patch(model, **PRUNING) as handle:
        assert torch.equal(model(ids()).logits, pruned)
        assert {layer.name.rpartition(".")[2] for layer in handle.status().layers} == {"0"}


@pytest.mark.parametrize("how", ["positional", *CACHE_NAMES])
def test_the_cache_by_any_name(deepseek: Any, how: str) -> None:
    """Callers of older and of newer transformers name it differently."""
    module = indexers(deepseek)[0]
    past: Any = transformers.DynamicCache(config=deepseek.config)
    turn = torch.ones(1, 20, 8), torch.zeros(1, 20, 8)
    mask = torch.ones(20, 20).bool().tril()[None]
    arguments: list[Any] = [torch.randn(1, 20, 32), torch.randn(1, 20, 16), turn, mask, None]
    with hisa.patch(module, **COVERING):
        module(*arguments, past) if how == "positional" else module(*arguments, **{how: past})
    assert past.layers[0].indexer_keys.shape == (1, 20, 16)


def test_a_failed_patch_changes_nothing(deepseek: Any) -> None:
    indexers(deepseek)[2].forward = print
    try:
        with pytest.raises(TypeError, match="Another patch is in place"):
            hisa.patch(deepseek, **PRUNING)
        assert "forward" not in vars(indexers(deepseek)[0])
    finally:
        del indexers(deepseek)[2].forward


def test_wrapped_after_the_patch(
    deepseek: Any, own: Tensor, pruned: Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    """What cannot be taken out is switched off."""
    module = indexers(deepseek)[0]
    handle = hisa.patch(deepseek, **PRUNING)
    inner = module.forward
    module.forward = lambda *args, **kwargs: inner(*args, **kwargs)
    assert torch.equal(deepseek(ids()).logits, pruned)
    handle.remove()
    assert "wrapped after hisa.patch" in caplog.text
    assert torch.equal(deepseek(ids()).logits, own)
    del module.forward


@pytest.mark.parametrize("order", ["hook first", "patch first"])
def test_accelerate_hooks(deepseek: Any, own: Tensor, pruned: Tensor, order: str) -> None:
    hooks = [CountingHook() for _ in indexers(deepseek)]

    def hook_all() -> None:
        for module, hook in zip(indexers(deepseek), hooks, strict=True):
            add_hook(module, hook)

    if order == "hook first":
        hook_all()
    handle = hisa.patch(deepseek, **PRUNING)
    if order == "patch first":
        hook_all()
    assert torch.equal(deepseek(ids()).logits, pruned)
    assert all(hook.before == hook.after == 1 for hook in hooks)
    handle.remove()
    assert torch.equal(deepseek(ids()).logits, own)
    assert all(hook.before == hook.after == 2 for hook in hooks)
    for module in indexers(deepseek):
        assert module._old_forward.__func__ is type(module).forward
        assert module._old_forward.__self__ is module
        remove_hook(module)
        del module.forward  # accelerate leaves the bound method
    assert is_original(deepseek)


@pytest.mark.parametrize("order", ["hook first", "patch first"])
def test_a_copy_of_a_hooked_model_is_unpatched(own: Tensor, pruned: Tensor, order: str) -> None:
    model = build("deepseek_v32", "sdpa")
    if order == "patch first":
        hisa.patch(model, **PRUNING)
    for module in indexers(model):
        add_hook(module, CountingHook())
    if order == "hook first":
        hisa.patch(model, **PRUNING)
    twin = copy.deepcopy(model)
    for module in indexers(twin):
        assert module._old_forward.__self__ is module
    assert torch.equal(twin(ids()).logits, own)
    assert [module._hf_hook.before for module in indexers(model)] == [0, 0, 0]
    assert torch.equal(model(ids()).logits, pruned)


def test_hooks_come_and_go_around_a_patch(deepseek: Any, own: Tensor, pruned: Tensor) -> None:
    for module in indexers(deepseek):
        add_hook(module, CountingHook())
    handle = hisa.patch(deepseek, **COVERING)
    for module in indexers(deepseek):
        remove_hook(module)
    handle = hisa.patch(deepseek, **PRUNING)
    assert torch.equal(deepseek(ids()).logits, pruned)
    for module in indexers(deepseek):
        add_hook(module, CountingHook())
    assert torch.equal(deepseek(ids()).logits, pruned)
    for module in indexers(deepseek):
        remove_hook(module)
    handle.remove()
    assert torch.equal(deepseek(ids()).logits, own)
    for module in indexers(deepseek):
        del module.forward


def test_with_accelerate_itself(deepseek: Any, own: Tensor, pruned: Tensor) -> None:
    accelerate = pytest.importorskip("accelerate")
    model = build("deepseek_v32", "sdpa")
    accelerate.cpu_offload(model, execution_device="cpu")
    with hisa.patch(model, **PRUNING):
        assert torch.equal(model(ids()).logits, pruned)
    assert torch.equal(model(ids()).logits, own)


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_a_copy_is_unpatched_and_independent(
    deepseek: Any, own: Tensor, pruned: Tensor, way: str
) -> None:
    def duplicate(model: Any) -> Any:
        if way == "deepcopy":
            return copy.deepcopy(model)
        if way == "pickle":
            data = pickle.dumps(model)
            assert b"hisa" not in data, "a stored model must not need hisa"
            return pickle.loads(data)
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        return torch.load(buffer, weights_only=False)

    with hisa.patch(deepseek, **PRUNING) as handle:
        twin = duplicate(duplicate(deepseek))
        calls = [layer.calls for layer in handle.status().layers]
        assert torch.equal(twin(ids()).logits, own)
        assert [layer.calls for layer in handle.status().layers] == calls
        twin.model.layers[0].self_attn.indexer.wk.weight.zero_()
        assert torch.equal(deepseek(ids()).logits, pruned)
        for module in indexers(twin):
            assert module.forward.__self__ is module
    with hisa.patch(twin, **PRUNING):
        twin(ids())
    assert all(module.forward.__self__ is module for module in indexers(twin))


def test_stored_weights_are_the_models_own(deepseek: Any, tmp_path: Path) -> None:
    names = list(deepseek.state_dict())
    deepseek.save_pretrained(tmp_path / "own")
    with hisa.patch(deepseek, **PRUNING):
        assert list(deepseek.state_dict()) == names
        deepseek.load_state_dict(deepseek.state_dict())
        deepseek.save_pretrained(tmp_path / "patched")
    for file in (tmp_path / "own").iterdir():
        assert file.read_bytes() == (tmp_path / "patched" / file.name).read_bytes()


def test_a_patched_model_is_freed_at_once() -> None:
    model = build("deepseek_v32")
    handle = hisa.patch(model, **PRUNING)
    model(ids())
    parts = [weakref.ref(module) for module in indexers(model)]
    gc.collect()
    gc.disable()
    try:
        del model
        assert not any(part() for part in parts)
    finally:
        gc.enable()
    handle.remove()
    assert {layer.calls for layer in handle.status().layers} == {1}


def test_memory_returns_from_a_patched_model() -> None:
    """What is kept beside a cache goes with the cache, or with the patch; all else with the model.

    Integration bugs: memory.
    """
    model = build("deepseek_v32")

    def chat() -> tuple[Any, list[weakref.ref[Tensor]]]:
        past: Any = transformers.DynamicCache(config=model.config)
        for count in (60, 1, 1):
            model(tokens(1, count), **cached(model, past))
        kept: list[weakref.ref[Tensor]] = []
        for module in indexers(model):
            (record,) = module.forward.kept._records.values()
            kept += [weakref.ref(t) for t in (record.k, *record.pooled)]
        return past, kept

    def held() -> int:
        return torch.cuda.memory_allocated() if model.device.type == "cuda" else 0

    handle = hisa.patch(model, precision="fp8", **PRUNING)
    chat()  # whatever is made once
    gc.collect()
    before = held()
    gc.disable()
    try:
        past, kept = chat()
        assert len(kept) == 9 and all(part() is not None for part in kept)
        assert held() > before or model.device.type == "cpu"
        del past
        assert not any(part() is not None for part in kept) and held() == before
        past, kept = chat()
        handle.remove()
        assert not any(part() is not None for part in kept)
        del past
        assert held() <= before
    finally:
        gc.enable()


@pytest.mark.parametrize("kind", ["deepseek_v32", "glm_moe_dsa", "hy_v4"])
def test_a_loaded_model_is_the_stored_one(kind: str, tmp_path: Path) -> None:
    """No weight of an indexer is missing, or made up; shared layers have none, and need none.

    Integration bugs: weights of shared layers, and random ones.
    """
    model = build(kind)
    model.save_pretrained(tmp_path)
    loaded, report = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert not report["mismatched_keys"]
    results = []
    for each in (model, loaded.eval()):
        with hisa.patch(each, **PRUNING) as handle:
            results.append(each(ids()).logits)
            states = [layer.state for layer in handle.status().layers]
            assert len(indexers(each)) == states.count("patched")
            assert (kind == "deepseek_v32") == ("shared" not in states)
    assert torch.equal(*results)
    for mine, stored in zip(indexers(loaded), indexers(model), strict=True):
        assert all(map(torch.equal, mine.parameters(), stored.parameters()))


def test_a_dropped_handle_leaves_the_patch(deepseek: Any, pruned: Tensor) -> None:
    hisa.patch(deepseek, **PRUNING)
    gc.collect()
    assert torch.equal(deepseek(ids()).logits, pruned)
    hisa.patch(deepseek, **PRUNING).remove()


def test_threads(deepseek: Any) -> None:
    """Each thread has its own mask; counters add up; a patch may come and go meanwhile."""
    inputs = [tokens(1, 45 + n, n) for n in range(4)]
    with hisa.patch(deepseek, **PRUNING):
        expected = [deepseek(given).logits for given in inputs]
    wrong: list[int] = []

    def work(number: int) -> None:
        with torch.no_grad():
            for _ in range(10):
                if not torch.equal(deepseek(inputs[number]).logits, expected[number]):
                    wrong.append(number)

    with hisa.patch(deepseek, **PRUNING) as handle:
        threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        status = handle.status()
    assert not wrong
    assert {layer.calls for layer in status.layers} == {40}
    assert {layer.rows for layer in status.layers} == {10 * (45 + 46 + 47 + 48)}
    assert status.mask_scans == 40


def test_patching_while_the_model_runs(deepseek: Any) -> None:
    stop = threading.Event()
    errors: list[BaseException] = []
    given = ids()

    def work() -> None:
        try:
            while not stop.is_set():
                with torch.no_grad():
                    deepseek(given)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    for _ in range(50):
        with hisa.patch(deepseek, **PRUNING):
            pass
    stop.set()
    thread.join()
    assert not errors and is_original(deepseek)


def test_compiled_model() -> None:
    """A compiled model can be patched and restored; a growing cache breaks its graph there."""
    model = build("deepseek_v32", "sdpa", num_hidden_layers=1, mlp_layer_types=["dense"]).model
    own = model(ids()).last_hidden_state
    with hisa.patch(model, **PRUNING):
        pruned = model(ids()).last_hidden_state
    torch._dynamo.reset()
    compiled: Any = torch.compile(model, backend="eager")
    torch.testing.assert_close(compiled(ids()).last_hidden_state, own)
    with hisa.patch(model, **PRUNING) as handle:
        torch.testing.assert_close(compiled(ids()).last_hidden_state, pruned)
        assert [layer.calls for layer in handle.status().layers] == [1]
    torch.testing.assert_close(compiled(ids()).last_hidden_state, own)
    torch._dynamo.reset()
