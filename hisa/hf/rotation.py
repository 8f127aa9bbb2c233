"""RoPE of queries and keys: the model's own function, or one operator that gives the same bits.

The model's function is a dozen passes over the queries. `rope_quantize` is one, and can quantise on
the way. It runs where it has reproduced that very function, bit for bit, on a small example on the
same device; else the function runs. So a model whose RoPE is of another kind, or was replaced by
somebody else's kernel, keeps it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

from hisa.around import rope_quantize
from hisa.quantize import quantize_fp8

from .models import SPECS, IndexerSpec, rotary

Angles = tuple[Tensor, Tensor]  # cos, sin: each [B or 1, S, R]
Indexer: TypeAlias = Any  # an nn.Module with the attributes that models.recognise looks for
Rotary = Callable[..., tuple[Tensor, Tensor]]

SPEC_OF = {spec.model_type: spec for spec in SPECS}


def rotate(
    module: Indexer,
    spec: IndexerSpec,
    x: Tensor,
    angles: Angles,
    *,
    like: Callable[[], torch.dtype] | None = None,
    quantize: bool = False,
    power_of_two: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Turn the rotary channels of queries or keys, and quantise if that is wanted.

    Args:
        x: [B, S, H, D].
        like: the dtype of the queries, if x is keys: some models give keys the queries' dtype.
        quantize, power_of_two: as `hisa.quantize_fp8` does.

    Returns:
        [B, S, H, D], and [B, S, H] fp32 scales if quantised.
    """
    turned = module.qk_rope_head_dim
    first = module.head_dim - turned if spec.rope_last else 0
    interleaved = None
    if _fits(x, angles, first):
        interleaved = layout(spec.model_type, x.dtype, x.device)
    if interleaved is not None:
        y, scale = rope_quantize(
            x,
            *angles,
            first=first,
            interleaved=interleaved,
            quantize=quantize,
            power_of_two=power_of_two,
        )
        return y, scale if quantize else None
    y = _rotate_by_model(rotary(spec), x, angles, first, turned, like)
    return quantize_fp8(y, power_of_two=power_of_two) if quantize else (y, None)


def _rotate_by_model(
    function: Rotary,
    x: Tensor,
    angles: Angles,
    first: int,
    turned: int,
    like: Callable[[], torch.dtype] | None,
) -> Tensor:
    before, part, after = x.split((first, turned, x.shape[-1] - first - turned), dim=-1)
    # The function wants queries and keys; where only one is needed, it stands in for the other.
    if like is None:
        part = function(part, part[:, :, :1], *angles, unsqueeze_dim=2)[0]
    else:
        part = function(part.to(like()), part, *angles, unsqueeze_dim=2)[1]
    return torch.cat([before, part, after], dim=-1)


def _fits(x: Tensor, angles: Angles, first: int) -> bool:
    """Say whether the operator takes these."""
    (batch, rows, _, dim), dtype, (cos, sin) = x.shape, x.dtype, angles
    shape = cos.shape
    return (
        dtype in (torch.float32, torch.bfloat16, torch.float16)
        and dim % 16 == 0
        and dim <= 256
        and cos.dtype == sin.dtype == dtype
        and sin.shape == shape
        and len(shape) == 3
        and shape[0] in (1, batch)
        and shape[1] == rows
        and shape[2] % 8 == 0
        and first % 8 == 0
    )


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def layout(model_type: str, dtype: torch.dtype, device: torch.device) -> bool | None:
    """Return what `find_layout` does, for the function that a model has now.

    Args:
        model_type: of one of `SPECS`. A graph has no constants that are dataclasses.
    """
    return find_layout(rotary(SPEC_OF[model_type]), dtype, device)


@functools.lru_cache(maxsize=64)
def find_layout(function: Rotary, dtype: torch.dtype, device: torch.device) -> bool | None:
    """Return how a model's function pairs channels, or None if the operator cannot do the same.

    Args:
        function: takes q, k, cos, sin and unsqueeze_dim.

    Returns:
        True: neighbours, False: the two halves. The operator then gives the function's bits.
    """
    generator = torch.Generator("cpu").manual_seed(0)
    x = torch.randn(2, 3, 4, 16, generator=generator, device="cpu").to(device, dtype)
    freqs = torch.rand(2, 3, 8, generator=generator, device="cpu") * 6.3
    angles = torch.cat([freqs, freqs], dim=-1)  # as all models have them
    cos, sin = angles.cos().to(device, dtype), angles.sin().to(device, dtype)
    try:
        wanted = function(x, x[:, :, :1], cos, sin, unsqueeze_dim=2)
    except Exception:  # whatever it is, it then runs as it would without hisa
        return None
    for interleaved in (False, True):
        found = rope_quantize(x, cos, sin, interleaved=interleaved)[0]
        if torch.equal(found, wanted[0]) and torch.equal(found[:, :, :1], wanted[1]):
            return interleaved
    return None
