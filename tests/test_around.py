"""The operators around the selection give the bits of the torch operators that they stand for.

Catches a rounding left out, a pair of channels or an angle of another head, row or entry, the wrong
end turned, a scale of a neighbour, and what lies behind the last channel.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from hisa.around import complete, fold_weights, rope_quantize
from hisa.quantize import quantize_by_torch, quantize_fp8

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# batch, rows, heads, channels, turned, the first of them
SHAPES = [
    (1, 5, 64, 128, 64, 0),
    (2, 3, 7, 128, 64, 64),
    (3, 1, 1, 16, 8, 8),
    (2, 9, 9, 144, 24, 104),
    (1, 2, 17, 256, 256, 0),
    (2, 4, 3, 256, 16, 120),
    (1, 300, 2, 48, 48, 0),
]


def rotary(name: str) -> Callable[..., tuple[Tensor, Tensor]]:
    """One of Hugging Face's own functions."""
    module: Any = importlib.import_module("transformers.models.axk2.modeling_axk2")
    function: Callable[..., tuple[Tensor, Tensor]] = getattr(module, name)
    return function


def make(
    shape: tuple[int, ...], dtype: torch.dtype, device: str, entries: int = 0, *, halves: int = 1
) -> Any:
    """Values over many magnitudes, and angles; with `halves=2` those of the halves differ."""
    batch, rows, heads, channels, turned, _ = shape
    generator = torch.Generator().manual_seed(sum(shape))
    x = torch.randn(batch, rows, heads, channels, generator=generator)
    x *= 2.0 ** torch.randint(-9, 9, x.shape, generator=generator)
    x[0, 0, 0] = 0  # the smallest scale
    freqs = torch.rand(entries or batch, rows, halves * turned // 2, generator=generator) * 6.3
    angles = freqs if halves == 2 else torch.cat([freqs, freqs], -1)
    return x.to(device, dtype), angles.cos().to(device, dtype), angles.sin().to(device, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_turns_as_the_models_do(
    device: str, shape: tuple[int, ...], dtype: torch.dtype, interleaved: bool
) -> None:
    """And quantises what it has turned as `quantize_fp8` would."""
    function = rotary("apply_rotary_pos_emb" + "_interleave" * interleaved)
    turned, first = shape[-2:]
    for entries in (0, 1):
        x, cos, sin = make(shape, dtype, device, entries, halves=1 if interleaved else 2)
        wanted = x.clone()
        part = x[..., first : first + turned]
        wanted[..., first : first + turned] = function(part, part, cos, sin, unsqueeze_dim=2)[0]
        options: dict[str, Any] = {"first": first, "interleaved": interleaved}
        y, none = rope_quantize(x, cos, sin, **options)
        assert y.dtype == dtype and none.numel() == 0
        assert torch.equal(y, wanted)
        for power_of_two in (False, True):
            y, scale = rope_quantize(
                x, cos, sin, **options, quantize=True, power_of_two=power_of_two
            )
            assert_same_fp8((y, scale), quantize_by_torch(wanted, power_of_two))


@pytest.mark.parametrize("dtype", DTYPES)
def test_quantises_as_torch_would(device: str, dtype: torch.dtype) -> None:
    """Every shape, NaN and infinity, values next to a rounding, a base that is not aligned."""
    for shape in SHAPES:
        x = make(shape, dtype, device)[0]
        x[-1, -1, -1, 3], x[0, -1, 0, 5] = float("nan"), float("-inf")
        for view in (x, x[:, 1:], x[0], x[0, 0], x[..., :16], x.transpose(0, 1)):
            for power_of_two in (False, True):
                found = quantize_fp8(view, power_of_two=power_of_two)
                assert_same_fp8(found, quantize_by_torch(view, power_of_two))
    steps = torch.arange(2048, device=device).view(16, 128) / 2  # one scale, all roundings
    steps[:, 0] = 1792
    assert_same_fp8(quantize_fp8(steps.to(dtype)), quantize_by_torch(steps.to(dtype), False))


def assert_same_fp8(found: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor]) -> None:
    """The same bytes, but for the sign of NaN."""
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype == b.dtype
        assert_same_floats(a.float(), b.float())


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_folds_as_torch_would(device: str, dtype: torch.dtype) -> None:
    """Product after product, each rounded: what is left out or in another order shows."""
    generator = torch.Generator().manual_seed(0)
    for shape in ((1, 1, 64), (2, 300, 7), (5,)):
        given = torch.randn(shape, generator=generator)
        given.view(-1)[:4] = torch.tensor([-0.0, float("inf"), float("nan"), 1e-38])
        weights = given.to(device, dtype)
        scale = torch.rand(shape, generator=generator).to(device) * 1e-3
        for factor in (64**-0.5 * 128**-0.5, 1.0, 1 / 3):
            wanted = weights.float() * factor
            assert_same_floats(fold_weights(weights, factor=factor), wanted)
            assert_same_floats(fold_weights(weights, scale, factor=factor), wanted * scale)
        turned = fold_weights(weights.mT, scale.mT) if len(shape) > 1 else None
        if turned is not None:  # not contiguous
            assert turned.is_contiguous()
            assert_same_floats(turned, (weights.float() * scale).mT.contiguous())


def assert_same_floats(a: Tensor, b: Tensor) -> None:
    """The same bits, but for which NaN it is."""
    assert a.dtype == b.dtype == torch.float32 and a.shape == b.shape
    assert torch.equal(a.isnan(), b.isnan())
    assert torch.equal(a.nan_to_num(0.0).view(torch.int32), b.nan_to_num(0.0).view(torch.int32))


def test_completes_rows_of_all_lengths(device: str) -> None:
    """Distinct positions in every slot, those that were selected in their place."""
    generator = torch.Generator().manual_seed(0)
    keys, topk, rows = 700, 300, 400
    edges = torch.randint(0, keys + 1, (rows, 2), generator=generator).sort(-1).values.int()
    edges[:4] = torch.tensor([[0, 0], [keys, keys], [0, keys], [3, 3 + topk]], dtype=torch.int32)
    indices = torch.full((rows, topk), -1, dtype=torch.int32)
    for row, (start, end) in zip(indices, edges.tolist(), strict=True):
        count = int(torch.randint(0, min(topk, end - start) + 1, (), generator=generator))
        row[:count] = torch.randperm(end - start, generator=generator)[:count].sort().values
    ks, ke = edges.to(device).unbind(1)
    given = indices.clone().to(device)
    done = complete(given, ks, ke, keys=keys)
    assert done is given
    for row, before, (start, end) in zip(done.cpu(), indices, edges.tolist(), strict=True):
        count = int((before >= 0).sum())
        assert torch.equal(row[:count], before[:count] + start)
        assert row.min() >= 0 and row.max() < keys and len(row.unique()) == topk
        outside = (row[count:] < start) | (row[count:] >= end)
        assert int(outside.sum()) == min(topk - count, keys - (end - start))


def test_windows_are_never_trusted(device: str) -> None:
    """Outside of the keys they are clamped, and empty where they end before they begin."""
    low, high = -(2**31), 2**31 - 1
    windows = [(-3, 4), (5, 3), (2, 99), (low, high), (high, low), (99, 100), (-9, -3), (0, 0)]
    given = torch.full((len(windows), 8), -1, dtype=torch.int32)
    for row, (start, end) in zip(given, windows, strict=True):
        seen = max(0, min(end, 10) - max(start, 0))
        row[: min(seen, 3)] = torch.arange(min(seen, 3))
    ks, ke = torch.tensor(windows, dtype=torch.int32, device=device).unbind(1)
    done = complete(given.clone().to(device), ks, ke, keys=10).cpu()
    for row, before, (start, _) in zip(done, given, windows, strict=True):
        count = int((before >= 0).sum())
        assert torch.equal(row[:count], before[:count] + min(max(start, 0), 10))
        assert row.min() >= 0 and row.max() < 10 and len(row.unique()) == 8


BAD: list[tuple[type[Exception], str, Callable[[], object]]] = [
    (
        TypeError,
        "x: expected .* got .*int32",
        lambda: rope_quantize(torch.zeros(1, 1, 1, 16).int()),
    ),
    (ValueError, "x: expected .B, S, H, D.", lambda: rope_quantize(torch.zeros(1, 16))),
    (ValueError, "multiple of 16", lambda: rope_quantize(torch.zeros(1, 1, 1, 24), quantize=True)),
    (ValueError, "nothing to quantize", lambda: rope_quantize(torch.zeros(1, 1, 1, 16))),
    (
        ValueError,
        "got only cos",
        lambda: rope_quantize(torch.zeros(1, 1, 2, 16), torch.zeros(1, 1, 8)),
    ),
    (TypeError, "cos: .*float32.*bfloat16", lambda: turned(torch.zeros(1, 1, 8).bfloat16())),
    (ValueError, "cos: expected .B or 1", lambda: turned(torch.zeros(3, 1, 8))),
    (ValueError, "sin: ", lambda: turned(torch.zeros(1, 1, 8), torch.zeros(1, 1, 16))),
    (ValueError, "R to be a multiple of 8", lambda: turned(torch.zeros(1, 1, 12))),
    (
        ValueError,
        "first: expected .* 0 to D - R = 8",
        lambda: turned(torch.zeros(1, 1, 8), first=16),
    ),
    (ValueError, "first: ", lambda: turned(torch.zeros(1, 1, 8), first=4)),
    (TypeError, "weights: .*floating-point .*int32", lambda: fold_weights(rows(2, 3))),
    (TypeError, "scale: .*float32", lambda: fold_weights(torch.zeros(2, 3), rows(2, 3))),
    (ValueError, "scale: ", lambda: fold_weights(torch.zeros(2, 3), torch.zeros(2, 1))),
    (TypeError, "indices: .*int32", lambda: completed(torch.zeros(2, 3))),
    (ValueError, "contiguous", lambda: completed(torch.zeros(3, 2, dtype=torch.int32).t())),
    (ValueError, "ks: ", lambda: completed(torch.zeros(3, 3, dtype=torch.int32))),
    (ValueError, "keys: expected topk = 3", lambda: completed(rows(2, 3), keys=2)),
]


def rows(*shape: int) -> Tensor:
    """Of zeros."""
    return torch.zeros(shape, dtype=torch.int32)


def turned(cos: Tensor, sin: Tensor | None = None, first: int = 0) -> object:
    """A call with x [1, 1, 2, 16]; sin is as cos."""
    sin = cos if sin is None else sin
    return rope_quantize(torch.zeros(1, 1, 2, 16), cos, sin, first=first)


def completed(indices: Tensor, keys: int = 9) -> object:
    """A call for two rows."""
    return complete(indices, rows(2), rows(2), keys=keys)


@pytest.mark.parametrize("number", range(len(BAD)))
def test_bad_calls(number: int) -> None:
    error, message, call = BAD[number]
    with pytest.raises(error, match=message):
        call()
    turned(torch.zeros(1, 1, 8), first=8)
    completed(rows(2, 3))


def test_opcheck(device: str) -> None:
    """Schemas, fake kernels and dispatch are as torch.compile wants them."""
    for dtype in DTYPES:
        x, cos, sin = make((2, 3, 4, 32, 16, 8), dtype, device)
        for quantize in (False, True):
            options = {"first": 8, "quantize": quantize}
            torch.library.opcheck(torch.ops.hisa.rope_quantize.default, (x, cos, sin), options)
        torch.library.opcheck(torch.ops.hisa.rope_quantize.default, (x,), {"quantize": True})
        weights, scale = x[..., 0], x[..., 0].float().contiguous()
        for one in (None, scale):
            fold = torch.ops.hisa.fold_weights.default
            torch.library.opcheck(fold, (weights, one), {"factor": 0.3})
    given = tuple(rows(*shape).to(device) for shape in ((3, 4), (3,), (3,)))
    torch.library.opcheck(torch.ops.hisa.complete.default, given, {"keys": 5})


def test_empty(device: str) -> None:
    for shape in ((0, 3, 4, 16), (2, 0, 4, 16), (2, 3, 0, 16)):
        y, scale = rope_quantize(torch.zeros(shape, device=device), quantize=True)
        assert y.shape == shape and scale.shape == shape[:3]
        assert fold_weights(scale, scale).shape == shape[:3]
    assert (
        complete(rows(0, 3).to(device), rows(0).to(device), rows(0).to(device), keys=3).numel() == 0
    )
