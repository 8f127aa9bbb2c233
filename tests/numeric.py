"""Number formats in NumPy: decoding, rounding, and an exact fp32 fused multiply-add.

Written from the formats' definitions and independent of torch's casts and of the C++ code, so that
the oracles share no rounding code with what they check.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

F32 = NDArray[np.float32]

FP8 = torch.float8_e4m3fn
DTYPES = (torch.float32, torch.bfloat16, torch.float16, FP8)


def short_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype as it appears in test ids."""
    return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", FP8: "fp8"}[dtype]


def e4m3_value(byte: int) -> float:
    """Decode one float8_e4m3fn byte: sign, 4 bits of exponent (bias 7), 3 of mantissa, no inf."""
    sign = -1.0 if byte & 0x80 else 1.0
    exponent, mantissa = (byte >> 3) & 0xF, byte & 0x7
    if exponent == 15 and mantissa == 7:
        return float("nan")
    if exponent == 0:
        return sign * mantissa * 2.0**-9
    return sign * (8 + mantissa) * 2.0 ** (exponent - 10)


E4M3 = np.array([e4m3_value(byte) for byte in range(256)], dtype=np.float32)


def decode(tensor: Tensor) -> F32:
    """Return a tensor's values as fp32 without using torch's conversions."""
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == FP8:
        values: F32 = E4M3[tensor.view(torch.uint8).numpy()]
        return values
    if tensor.dtype == torch.bfloat16:
        bits = tensor.view(torch.int16).numpy().astype(np.uint16).astype(np.uint32) << np.uint32(16)
        return bits.view(np.float32)
    with np.errstate(invalid="ignore"):
        return tensor.numpy().astype(np.float32)


def round_bf16(x: F32) -> F32:
    """Round fp32 to bfloat16 (nearest, ties to even), returned as fp32."""
    x = np.ascontiguousarray(x, dtype=np.float32)
    bits = x.view(np.uint32).astype(np.uint64)
    up = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    rounded = up.astype(np.uint32).view(np.float32)
    return np.where(np.isnan(x), np.float32(np.nan), rounded)


def round_e4m3(x: F32) -> F32:
    """Round fp32 to float8_e4m3fn (nearest, ties to even) for |x| <= 448 or NaN, as fp32."""
    magnitude = np.abs(x.astype(np.float64))
    exponent = np.floor(np.log2(np.maximum(np.nan_to_num(magnitude), 2.0**-6)))
    step = 2.0 ** (exponent - 3)
    with np.errstate(invalid="ignore"):
        rounded = np.copysign(np.rint(magnitude / step) * step, x)  # rint: ties to even
        too_big = np.abs(rounded) > 448
    return np.where(too_big, np.nan, rounded).astype(np.float32)


def round_to(dtype: torch.dtype, x: F32) -> F32:
    """Round fp32 values to `dtype`, returned as fp32."""
    with np.errstate(over="ignore", invalid="ignore"):
        if dtype == FP8:
            return round_e4m3(x)
        if dtype == torch.bfloat16:
            return round_bf16(x)
        if dtype == torch.float16:
            return x.astype(np.float16).astype(np.float32)
        return x.astype(np.float32)


def fma(a: F32, b: F32, c: F32) -> F32:
    """Return a * b + c rounded once to fp32, exactly as IEEE 754 defines it.

    The product of two fp32 numbers is exact in fp64. The fp64 sum is corrected to round-to-odd with
    its exact error (two-sum), which makes the second rounding, to fp32, right in every case.
    """
    with np.errstate(all="ignore"):
        product = np.multiply(a, b, dtype=np.float64)
        c64 = np.asarray(c, dtype=np.float64)
        total = product + c64
        part = total - product
        error = (product - (total - part)) + (c64 - part)
        even = (total.view(np.int64) & 1) == 0
        fix = np.isfinite(total) & np.isfinite(error) & (error != 0) & even
        odd = np.where(fix, np.nextafter(total, np.copysign(np.inf, error)), total)
        return odd.astype(np.float32)
