"""The keys of a batch as `hisa.index` takes them: in the dtype that scores them, and pooled."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

import hisa

from .quantize import to_precision
from .settings import Settings
from .windows import Windows


class Keys(NamedTuple):
    """All keys of a batch, as `hisa.index` takes them."""

    k: Tensor  # [B * N, D]
    k_scale: Tensor | None  # [B * N] fp32
    pooled: tuple[Tensor, Tensor] | None


def prepare_keys(
    settings: Settings,
    k: Tensor,
    dtype: torch.dtype,
    windows: Windows,
    *,
    prune: bool,
    k_scale: Tensor | None = None,
) -> Keys:
    """Bring keys to the dtype that scores them, and pool them if any row sees more than is kept.

    Args:
        k: `[B, N, D]`.
        dtype: in which to score, or to quantise from.
        windows: of all rows.
        prune: whether any row may see more blocks than are kept.
        k_scale: `[B, N]` or `[N]` float32.
    """
    k, divisor = to_precision(settings, k.flatten(0, 1), dtype)
    if k_scale is not None:
        k_scale = k_scale.flatten()
        divisor = k_scale if divisor is None else k_scale * divisor
    keys = Keys(k, divisor, None)
    return keys._replace(pooled=pool(settings, keys, windows.cu_seqlens_k)) if prune else keys


def pool(settings: Settings, keys: Keys, cu_seqlens_k: Tensor | None) -> tuple[Tensor, Tensor]:
    """Pool keys as the settings say."""
    return hisa.pool_keys(
        keys.k,
        k_scale=keys.k_scale,
        cu_seqlens_k=cu_seqlens_k,
        block_size=settings.block_size,
        pooling=settings.pooling,
    )
