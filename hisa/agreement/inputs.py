"""Checks of what a call of `hisa.index` is given."""

from __future__ import annotations

from torch import Tensor

from hisa import _extension
from hisa.checking import check_index_types


def check_inputs(
    q: Tensor,
    k: Tensor,
    weights: Tensor,
    k_scale: Tensor | None,
    ks: Tensor | None,
    ke: Tensor | None,
    cu_seqlens_k: Tensor | None,
    block_size: int,
    block_topk: int,
    topk: int,
    pooling: str,
) -> None:
    """Raise what `hisa.index` would raise."""
    tensors = (q, k, weights, k_scale, ks, ke, cu_seqlens_k)
    sizes = (block_size, block_topk, topk, pooling)
    check_index_types(*tensors, None, *sizes, False)
    _extension.require().check_index(*tensors, None, None, *sizes)
