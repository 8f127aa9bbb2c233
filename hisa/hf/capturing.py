"""`hisa.capture`: record what a model's indexers score, for `hisa.compare` and `hisa.recommend`.

A hook before each indexer's forward listens to the cache, which completes the keys; a hook after it
projects some of the queries again and copies both to the CPU. The forward itself, patched or not,
stays as it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, TypedDict, cast

import torch
from torch import Tensor, nn

from hisa._version import __version__
from hisa.quantize import scoring_dtype

from .indexer import project_keys, project_queries, project_weights
from .masks import WindowCache, Windows
from .models import CACHE_NAMES, PARAMETERS, IndexerSpec, looks_like_indexer, recognise, supported


class Captured(TypedDict):
    """What one indexer scored: arguments of `hisa.index`."""

    q: Tensor  # [M, H, D]
    k: Tensor  # [N, D]
    weights: Tensor  # [M, H] float32
    ks: Tensor  # [M] int32
    ke: Tensor  # [M] int32
    cu_seqlens_k: Tensor  # [S + 1] int32


@contextmanager
def capture(
    model: nn.Module,
    path: str | Path,
    *,
    layers: Sequence[int] | None = None,
    rows: int | None = None,
) -> Iterator[None]:
    """Record what the model's indexers score while it runs, and write it to a safetensors file.

        with hisa.capture(model, "captured.safetensors", layers=[0, 30], rows=1024):
            model(**inputs)
        for name, tensors in hisa.load_capture("captured.safetensors").items():
            print(name, hisa.compare(**tensors))

    Of each layer one call is kept: the one with the most queries, the last of these. So of
    `generate` it is the prefill, and of a prompt in equal chunks the chunk with the longest
    context. The file is written at the end of the block, unless an exception ends it.

    A tensor is named by its indexer and argument, such as "model.layers.3.self_attn.indexer.q".
    There are the arguments of `hisa.index`, on the CPU, all batch entries packed: q `[M, H, D]`, k
    `[N, D]`, weights `[M, H]`, ks and ke `[M]`, cu_seqlens_k `[S + 1]`. They are what `hisa.patch`
    scores with `precision="model"`; these models have no key scales. Patched models may be captured
    too; compiled ones should not be.

    Args:
        model: as for `hisa.patch`.
        path: the file, which is replaced.
        layers: numbers of the layers, as the model counts them; all that have an indexer by
            default.
        rows: how many queries of a call to keep, evenly spaced up to the last one; all by default.

    Raises:
        ImportError: safetensors is not installed; says how to get it.
        TypeError: `model` is not a module, or contains an indexer that is not known.
        ValueError: there is no indexer, or none in one of the layers, or `rows` is below 1.
        RuntimeError: at the end, if a layer has no call to keep: it never ran, or no mask was one
            range of keys per query. The others are written first.

    Cost: another projection of the recorded queries and of the keys. Memory: what is recorded, on
    the CPU; `rows * H * D` and `N * D` values for each layer.
    """
    safetensors = _safetensors()
    recorders = _recorders(model, layers, rows)
    with ExitStack() as hooks:
        for recorder in recorders:
            module = recorder.module
            hooks.enter_context(module.register_forward_pre_hook(recorder.before, with_kwargs=True))
            hooks.enter_context(module.register_forward_hook(recorder.after, with_kwargs=True))
        yield
    found = {f"{r.name}.{name}": t for r in recorders for name, t in r.kept.items()}
    safetensors.save_file(found, path, metadata={"format": "pt", "hisa": __version__})
    missing = [f"{r.name} ({r.reason})" for r in recorders if not r.kept]
    if missing:
        raise RuntimeError(f"nothing was captured of {', '.join(missing)}")


def load_capture(path: str | Path) -> dict[str, Captured]:
    """Return what `hisa.capture` wrote: for each indexer, by name, arguments of `hisa.index`.

    Raises:
        ImportError: safetensors is not installed; says how to get it.
    """
    captured: dict[str, dict[str, Tensor]] = {}
    for name, tensor in _safetensors().load_file(path).items():
        indexer, _, argument = name.rpartition(".")
        captured.setdefault(indexer, {})[argument] = tensor
    return cast(dict[str, Captured], captured)


class _Listener:
    """Stands in for a cache during one call of an indexer, and remembers the keys it returns."""

    def __init__(self, cache: Any) -> None:
        self._cache = cache
        self.keys: Tensor | None = None

    def update_indexer(self, *args: Any, **kwargs: Any) -> Tensor:
        keys: Tensor = self._cache.update_indexer(*args, **kwargs)
        self.keys = keys
        return keys

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)


class _Recorder:
    """The hooks of one indexer, and what they keep."""

    def __init__(
        self, name: str, module: Any, spec: IndexerSpec, windows: WindowCache, rows: int | None
    ) -> None:
        self.name = name or "indexer"
        self.module = module
        self.kept: dict[str, Tensor] = {}
        self.reason = "it did not run"
        self._spec = spec
        self._windows = windows
        self._rows = rows
        self._queries = 0  # of the call that is kept

    def before(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Put a listener in the cache's place."""
        args, last = args[: len(PARAMETERS)], args[len(PARAMETERS) :]
        listened = [None if cache is None else _Listener(cache) for cache in last]
        for name in CACHE_NAMES:
            if kwargs.get(name) is not None:
                kwargs = {**kwargs, name: _Listener(kwargs[name])}
        return (*args, *listened), kwargs

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    @torch.no_grad()
    def after(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        """Record the call that has just been made, if it is one to keep."""
        given = dict(zip((*PARAMETERS, "cache"), args, strict=False)) | kwargs
        hidden, cos_sin = given["hidden_states"], given["position_embeddings"]
        batch, queries = hidden.shape[:2]
        if batch * queries < self._queries:
            return
        windows = self._windows.get(given["attention_mask"], batch, queries, self.module.layer_idx)
        if isinstance(windows, str):
            self.reason = windows
            return
        q_resid, at = given["q_resid"], self._chosen(batch * queries, hidden.device)
        cos_sin = tuple(t.expand(batch, -1, -1).flatten(0, 1)[at][None] for t in cos_sin)
        q = project_queries(module, self._spec, q_resid.flatten(0, 1)[at][None], cos_sin)[0][0]
        listeners = [v for v in given.values() if isinstance(v, _Listener)]
        k = listeners[0].keys if listeners else None
        if k is None:
            cos_sin = given["position_embeddings"]
            k = project_keys(module, self._spec, hidden, cos_sin, q_resid)
        self._keep(q, k, project_weights(module, hidden.flatten(0, 1)[at]), windows, at)
        self._queries = batch * queries

    def _chosen(self, queries: int, device: torch.device) -> Tensor:
        """Return which queries to record, evenly spaced, the last one among them."""
        rows = queries if self._rows is None else min(self._rows, queries)
        return (torch.arange(1, rows + 1, device=device) * queries).div(
            max(rows, 1), rounding_mode="floor"
        ) - 1

    def _keep(self, q: Tensor, k: Tensor, weights: Tensor, windows: Windows, at: Tensor) -> None:
        dtype = scoring_dtype(q.dtype, k.dtype)
        recorded = {
            "q": q.to(dtype),
            "k": k.flatten(0, 1).to(dtype),
            "weights": weights,
            "ks": windows.packed_ks.flatten()[at],
            "ke": windows.packed_ke.flatten()[at],
            "cu_seqlens_k": windows.cu_seqlens_k,
        }
        # NOTE: copies, for a static cache goes on writing into the keys that it returned.
        self.kept = {
            name: t.detach().to("cpu", copy=True).contiguous() for name, t in recorded.items()
        }


def _recorders(model: nn.Module, layers: Sequence[int] | None, rows: int | None) -> list[_Recorder]:
    """Return a recorder for each indexer of the layers."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if rows is not None and type(rows) is not int:
        raise TypeError(f"rows: expected an int, got {rows!r}")
    if rows is not None and rows < 1:
        raise ValueError(f"rows: expected at least 1, got {rows}")
    found: list[tuple[str, Any]] = [
        (name, m) for name, m in model.named_modules() if looks_like_indexer(name, m)
    ]
    if not found:
        raise ValueError(f"model: expected one with an indexer. Supported: {supported()}")
    specs = [recognise(name, module) for name, module in found]
    known = [module.layer_idx for _, module in found]
    for layer in layers or ():
        if layer not in known:
            raise ValueError(f"layers: expected some of {known}, got {layer}")
    windows = WindowCache()
    return [
        _Recorder(name, module, spec, windows, rows)
        for (name, module), spec in zip(found, specs, strict=True)
        if layers is None or module.layer_idx in layers
    ]


def _safetensors() -> ModuleType:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError(
            "safetensors is not installed; `pip install hisa-indexer[hf]` brings it"
        ) from error
    return safetensors.torch
