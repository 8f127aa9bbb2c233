"""Quantisation of queries and keys to fp8, one scale per row."""

from __future__ import annotations

import torch
from torch import Tensor

from .reference import FP8_MAX, MIN_SCALE


def quantize_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise to float8_e4m3fn with one scale per row of the last dimension.

    `scale = max(amax(|x|) / 448, 1e-10)` and `x_fp8 = x / scale`, rounded to nearest even. A key's
    scale is what `hisa.index` takes as `k_scale`; a query's belongs into the weights:
    `weights * scale`.

    Args:
        x: `[..., D]` of any floating-point dtype.

    Returns:
        `(x_fp8, scale)`: `[..., D]` float8_e4m3fn and `[...]` float32.

    Raises:
        TypeError: x is not a floating-point tensor.
        ValueError: x has no dimension or its last one is empty.
    """
    if not isinstance(x, Tensor) or not x.is_floating_point():
        got = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"x: expected a floating-point Tensor, got {got}")
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"x: expected [..., D] with D >= 1, got {list(x.shape)}")
    wide = x.float()
    scale = (wide.abs().amax(-1) / FP8_MAX).clamp(min=MIN_SCALE)
    return (wide / scale[..., None]).to(torch.float8_e4m3fn), scale
