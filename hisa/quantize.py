"""Quantisation of queries and keys to fp8, one scale per row, as DeepSeek-V3.2 does it."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _extension
from .around import rope_quantize
from .reference import FP8_MAX, MIN_SCALE
from .settings import Settings

FP8 = torch.float8_e4m3fn


def quantize_fp8(x: Tensor, *, power_of_two: bool = False) -> tuple[Tensor, Tensor]:
    """Quantise to float8_e4m3fn with one scale per row of the last dimension.

    `scale = max(amax(|x|) / 448, 1e-10)` and `x_fp8 = x / scale`, rounded to nearest even. A key's
    scale is what `hisa.index` takes as `k_scale`; a query's belongs into the weights:
    `weights * scale`.

    Args:
        x: `[..., D]` of any floating-point dtype.
        power_of_two: round the scale up to a power of two, which an exponent alone can store. The
            quantised values are then half as large at worst.

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
    if _takes(x):
        shape = x.shape
        heads = shape[-2] if len(shape) > 2 else 1
        y, scale = rope_quantize(
            x.reshape(1, -1, heads, shape[-1]), quantize=True, power_of_two=power_of_two
        )
        return y.view(shape), scale.view(shape[:-1])
    return quantize_by_torch(x, power_of_two)


def _takes(x: Tensor) -> bool:
    """Say whether the operator quantises x: in one pass, and without a gradient of the scale."""
    return (
        x.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and x.shape[-1] % 16 == 0
        and x.shape[-1] <= 256
        and x.numel() > 0
        and x.device.type in ("cpu", "cuda")
        and not (torch.is_grad_enabled() and x.requires_grad)
        and _extension.available()
    )


def quantize_by_torch(x: Tensor, power_of_two: bool) -> tuple[Tensor, Tensor]:
    """Quantise with torch's operators: for what the operator does not take, and its definition."""
    wide = x.float()
    # NOTE: a tensor, since torch multiplies by the reciprocal of a number on CUDA.
    largest = torch.full((), FP8_MAX, device=x.device)
    scale = (wide.abs().amax(-1) / largest).clamp(min=MIN_SCALE)
    if power_of_two:
        mantissa, exponent = torch.frexp(scale)  # scale = mantissa * 2 ** exponent, from 0.5 on
        rounded = torch.ldexp(torch.ones_like(scale), exponent - (mantissa == 0.5).int())
        scale = torch.where(scale.isfinite(), rounded, scale)
    return (wide / scale[..., None]).to(FP8), scale


def rotate_hadamard(x: Tensor) -> Tensor:
    """Rotate the last dimension by the normalised Hadamard matrix, in fp32.

    Applied to queries and keys alike it leaves their dot products as they are, and spreads outliers
    over all channels, so that less is lost in 8 bits.

    Args:
        x: `[..., D]` of any floating-point dtype, D a power of two.

    Returns:
        `[..., D]` float32.

    Raises:
        ValueError: D is not a power of two.
    """
    size = x.shape[-1]
    if size < 1 or size & (size - 1):
        raise ValueError(f"x: expected [..., D] with D a power of two, got {list(x.shape)}")
    matrix = torch.ones(1, 1, device=x.device)
    while len(matrix) < size:  # Sylvester's construction
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    rotated: Tensor = x.float() @ (matrix * size**-0.5)
    return rotated


def to_precision(settings: Settings, x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Bring queries or keys to the dtype that scores them, quantised if that is wanted.

    Args:
        x: `[..., D]` floating-point. What is fp8 already stays as it is.
        dtype: of `x` where it is scored, or from which it is quantised.

    Returns:
        `x`, and a scale for each vector where it was quantised: `[...]` float32.
    """
    if x.dtype == FP8:
        return x, None
    x = x.to(dtype)
    if settings.precision == "model":
        return x, None
    return quantize_fp8(
        rotate_hadamard(x) if settings.hadamard else x, power_of_two=settings.power_of_two
    )


def scoring_dtype(q_dtype: torch.dtype, k_dtype: torch.dtype) -> torch.dtype:
    """Return the one dtype in which q and k are scored; sums are fp32 in any case.

    What is fp8 already has no say.
    """
    q_dtype, k_dtype = (
        k_dtype if q_dtype == FP8 else q_dtype,
        q_dtype if k_dtype == FP8 else k_dtype,
    )
    dtype = q_dtype if q_dtype == k_dtype else torch.promote_types(q_dtype, k_dtype)
    return dtype if dtype in (torch.bfloat16, torch.float16) else torch.float32
