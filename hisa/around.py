"""Operators around the selection, for `hisa.patch` and `HierarchicalIndexer`, each with its fake.

They do in one pass over memory what a handful of torch's operators would, bit for bit. Not part of
the package's face.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _extension
from .checking import check_types, named_results
from .contract import check_mask, check_result
from .fakes import fake_kernel

FP8 = torch.float8_e4m3fn


def mask_windows(
    mask: Tensor, *, out: tuple[Tensor, Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Find the range of keys that each row of an attention mask attends to, in one pass over it.

    Args:
        mask: `[B, S, T]` with any strides: bool (True: attend), or additive in float16, bfloat16,
            float32 or float64 (0: attend; -65504, the float16 minimum, or less: masked).
        out: `(ks, ke, summary)` to write to, instead of new tensors: see `index`.

    Returns:
        `(ks, ke, summary)`: `[B, S]` int32, the first key of each row and one past its last; both 0
        where it attends to none. `summary`, `[4]` int32, is the maximum over all rows of: whether a
        value neither attends nor masks, as NaN does; whether the keys attended to are not one
        range; `ke - ks`; `ks`.

    Raises:
        TypeError: the mask's dtype is not accepted.
        ValueError: its shape or `out` is not accepted.

    Cost: the mask is read once; nothing is allocated beside the results, and nothing waits for the
    device.
    """
    _extension.require()
    check_types(Tensor, mask=mask)
    if out is not None:
        torch.ops.hisa.mask_windows.out(mask, **named_results(out, "ks", "ke", "summary"))
        return out
    windows: tuple[Tensor, Tensor, Tensor] = torch.ops.hisa.mask_windows.default(mask)
    return windows


@fake_kernel("mask_windows", ("ks", "ke", "summary"))
def _(mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    check_mask(mask)
    ks, ke = (mask.new_empty(mask.shape[:2], dtype=torch.int32) for _ in range(2))
    return ks, ke, mask.new_empty(4, dtype=torch.int32)


def rope_quantize(
    x: Tensor,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    *,
    first: int = 0,
    interleaved: bool = False,
    quantize: bool = False,
    power_of_two: bool = False,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Turn channels of every head by RoPE, quantise the heads to fp8, or both.

    Args:
        x: `[B, S, H, D]` float32, bfloat16 or float16; D a multiple of 16 up to 256.
        cos, sin: `[B or 1, S, R]` of x's dtype, R a multiple of 8; or neither, and nothing turns.
        first: the first of the R channels that are turned; a multiple of 8.
        interleaved: channel 2i turns with 2i + 1, by angle i, and the even channels come out before
            the odd ones; otherwise channel i turns with i + R / 2, each by the angle of its own.
            Products and sums are rounded one by one, as in Hugging Face's models.
        quantize: to float8_e4m3fn, one scale per head, as `hisa.quantize_fp8` does.
        power_of_two: round the scales up to powers of two.
        out: `(y, scale)` to write to, instead of new tensors: see `hisa.index`. A head of y begins
            at a multiple of 16 bytes.

    Returns:
        `(y, scale)`: `[B, S, H, D]` of x's dtype or float8_e4m3fn, and `[B, S, H]` float32, or
        empty where nothing is quantised.

    Raises:
        TypeError: a dtype is not accepted.
        ValueError: a shape, device or `out` is not accepted, or there is nothing to do.
    """
    _extension.require()
    call = {"first": first, "interleaved": interleaved, "power_of_two": power_of_two}
    if out is not None:
        results = named_results(out, "y", "scale")
        if not quantize:
            check_result("scale", results.pop("scale"), (0,), torch.float32, x.device)
        torch.ops.hisa.rope_quantize.out(x, cos, sin, **call, **results)
        return out
    done: tuple[Tensor, Tensor] = torch.ops.hisa.rope_quantize.default(
        x, cos, sin, **call, quantize=quantize
    )
    return done


@fake_kernel("rope_quantize", ("y", "scale"), "quantize")
def _(
    x: Tensor,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    *,
    first: int = 0,
    interleaved: bool = False,
    quantize: bool = False,
    power_of_two: bool = False,
) -> tuple[Tensor, Tensor]:
    y = torch.empty_like(
        x, dtype=FP8 if quantize else x.dtype, memory_format=torch.contiguous_format
    )
    return y, x.new_empty(x.shape[:3] if quantize else (0,), dtype=torch.float32)


def fold_weights(weights: Tensor, scale: Tensor | None = None, *, factor: float = 1.0) -> Tensor:
    """Fold scales into the weights of heads: `weights.float() * factor * scale`, in one pass.

    Args:
        weights: `[...]` floating-point.
        scale: `[...]` float32; absent means 1.

    Returns:
        `[...]` float32.

    Raises:
        TypeError, ValueError: a dtype, shape or device is not accepted.
    """
    _extension.require()
    folded: Tensor = torch.ops.hisa.fold_weights.default(weights, scale, factor=factor)
    return folded


@fake_kernel("fold_weights")
def _(weights: Tensor, scale: Tensor | None = None, *, factor: float = 1.0) -> Tensor:
    return torch.empty_like(
        weights, dtype=torch.float32, memory_format=torch.contiguous_format, requires_grad=False
    )


def complete(indices: Tensor, ks: Tensor, ke: Tensor, *, keys: int) -> Tensor:
    """Turn relative indices into distinct absolute positions in every slot, in place.

    Models scatter into a mask, where a -1 would hit a real key. An unused slot gets a position
    outside the row's window, which is masked anyway; when those run out, an unselected one inside.

    Args:
        indices: `[M, k]` int32, k <= keys: relative to ks, ascending, then -1. Contiguous; changed.
        ks, ke: `[M]` int32, the rows' windows.
        keys: positions are in [0, keys).

    Returns:
        `indices`. Every entry of a row is distinct.

    Raises:
        TypeError, ValueError: a dtype, shape or device is not accepted.
    """
    _extension.require()
    torch.ops.hisa.complete.default(indices, ks, ke, keys=keys)
    return indices


@fake_kernel("complete")
def _(indices: Tensor, ks: Tensor, ke: Tensor, *, keys: int) -> None:
    return None
