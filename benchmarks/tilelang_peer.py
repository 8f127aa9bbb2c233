"""The authors' own HISA as a peer: TileLang's `examples/dsa_hisa`, which is not part of this tree.

Its `hisa_indexer` runs the whole pipeline: it pools the keys, scores and selects blocks, scores
their tokens, selects among them with torch.topk. TileLang compiles its four kernels anew for every
shape, a few seconds each, at the first call.

Two things differ from `hisa.index` by design, so that near the threshold it keeps other blocks: it
rounds dequantised keys to fp8 before it takes their mean, and block scores to bf16 before it
compares them.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import cast

import torch
from torch import Tensor

FILE = "hisa.py"  # of the example, the one with the pipeline


def obstacle(folder: Path | None) -> str:
    """Return why the peer cannot run; an empty string if it can."""
    if folder is None:
        return "needs --tilelang PATH"
    if importlib.util.find_spec("tilelang") is None:
        return "tilelang is not installed"
    return ""


def build(
    folder: Path | None,
    *,
    q: Tensor,
    k: Tensor,
    weights: Tensor,
    k_scale: Tensor,
    ke: Tensor,
    topk: int,
    block_size: int = 128,
    block_topk: int = 64,
) -> Callable[[], Tensor]:
    """Return one call of the pipeline, with the arguments of `hisa.index`: [M, topk], unsorted.

    Raises:
        ValueError: the peer cannot run; `obstacle` says so beforehand.
    """
    if folder is None:
        raise ValueError(obstacle(folder))
    indexer = load(folder).hisa_indexer
    ks = torch.zeros_like(ke)
    sizes = {"k_block_size": block_size, "block_topk": block_topk, "topk_tokens": topk}
    return lambda: cast(Tensor, indexer(q, k, k_scale, weights, ks, ke, **sizes))


@cache
def load(folder: Path) -> ModuleType:
    """Import the example's pipeline under another name than ours, which it shares."""
    spec = importlib.util.spec_from_file_location("tilelang_dsa_hisa", folder / FILE)
    assert spec is not None and spec.loader is not None  # it has them for every .py file
    module = importlib.util.module_from_spec(spec)
    sys.path.append(str(folder))  # for its neighbours; at the end, so that `hisa` stays ours
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(folder))
    return module
