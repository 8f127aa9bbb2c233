"""Inputs for an indexer: random ones, exact ones with many ties, and a needle.

All are dictionaries of arguments, as `hisa.index` takes them: `hisa.index(**inputs, topk=64)`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, TypedDict

import torch
from torch import Tensor

from hisa.windows import causal_windows

FP8 = torch.float8_e4m3fn
Device = torch.device | str
CPU: dict[str, Any] = {"device": "cpu", "dtype": torch.float32}  # whatever torch's defaults are


class Inputs(TypedDict):
    """Arguments of `hisa.index` and of `hisa.flat_index`."""

    q: Tensor  # [M, H, D]
    k: Tensor  # [N, D]
    weights: Tensor  # [M, H] float32
    k_scale: Tensor | None  # [N] float32, with fp8 keys
    ks: Tensor  # [M] int32
    ke: Tensor  # [M] int32


class PackedInputs(Inputs):
    """Arguments of `hisa.index`."""

    cu_seqlens_k: Tensor  # [S + 1] int32


def random_inputs(
    seed: int,
    *,
    M: int = 64,
    N: int = 1000,
    H: int = 16,
    D: int = 128,
    dtype: torch.dtype = torch.float32,
    device: Device = "cpu",
    causal: bool = True,
) -> Inputs:
    """Return normally distributed inputs: sums are rounded, and hardly any two scores are equal.

    Args:
        seed: the same seed and sizes give the same inputs on every device.
        M, N, H, D: numbers of rows, keys, heads and channels.
        dtype: of q and k. With float8_e4m3fn there are key scales, from 0.5 to 1.5.
        causal: the rows are the last M of N tokens, and each sees what comes before it and itself;
            a row that would come before token 0 sees none. Otherwise each sees all keys.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    q = torch.randn(M, H, D, generator=generator, **CPU).to(dtype)
    k = torch.randn(N, D, generator=generator, **CPU).to(dtype)
    weights = torch.randn(M, H, generator=generator, **CPU)
    scale = torch.rand(N, generator=generator, **CPU) + 0.5 if dtype == FP8 else None
    return _inputs(q, k, weights, scale, device, causal)


def packed_inputs(
    seed: int,
    sequences: Sequence[tuple[int, int]],
    *,
    H: int = 16,
    D: int = 128,
    dtype: torch.dtype = torch.float32,
    device: Device = "cpu",
) -> PackedInputs:
    """Return random inputs of several packed sequences, each causal.

    Args:
        seed, H, D, dtype: as for `random_inputs`.
        sequences: `(queries, keys)` of each sequence; its queries are its last tokens. `(5, 5)` is
            a prefill, `(1, 300)` a decode step, `(0, 7)` has keys that no row sees.
    """
    queries, keys = (
        torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device="cpu")
        for lengths in zip(*sequences, strict=True)
    )
    inputs = random_inputs(seed, M=int(queries[-1]), N=int(keys[-1]), H=H, D=D, dtype=dtype,
                           device=device, causal=False)  # fmt: skip
    ks, ke = causal_windows(queries, keys)
    return {**inputs, "ks": ks.to(device), "ke": ke.to(device), "cu_seqlens_k": keys.to(device)}


def exact_inputs(
    seed: int,
    *,
    M: int = 64,
    N: int = 1000,
    H: int = 16,
    D: int = 128,
    dtype: torch.dtype = torch.float32,
    device: Device = "cpu",
    causal: bool = True,
) -> Inputs:
    """Return inputs whose scores are exact in float32 in any order of the sums, with many ties.

    All flat indexers must select the same tokens here, the lower ones among equals: compare with
    `torch.equal`. Queries, keys and weights are integers from -2 to 2, there are few different
    keys, and key scales, with fp8, are 0.5, 1 or 2. Pooled keys are not exact, so this says nothing
    of a hierarchical indexer beyond its budget.

    Args: as for `random_inputs`; D up to 1024 and `H * D` up to 2**20.

    Raises:
        ValueError: H or D are too large for exact sums.
    """
    # The terms of a dot product are at most 4: below 2^13, which all tensor cores add up exactly.
    if D > 2**10 or H * D > 2**20:
        raise ValueError(f"H, D: expected D <= 1024 and H * D <= 2**20, got {H} and {D}")
    generator = torch.Generator("cpu").manual_seed(seed)

    def integers(low: int, past: int, *shape: int) -> Tensor:
        return torch.randint(low, past, shape, generator=generator, device="cpu")

    k = integers(-2, 3, 1 + N // 8, D)[integers(0, 1 + N // 8, N)]
    scale = torch.exp2(integers(-1, 2, N).float()) if dtype == FP8 else None
    q, weights = integers(-2, 3, M, H, D).float(), integers(-2, 3, M, H).float()
    return _inputs(q.to(dtype), k.float().to(dtype), weights, scale, device, causal)


def needle_inputs(
    token: int,
    *,
    block_size: int = 128,
    M: int = 1,
    N: int = 1024,
    H: int = 4,
    D: int = 32,
    dtype: torch.dtype = torch.float32,
    device: Device = "cpu",
) -> Inputs:
    """Return inputs with one token far above all others, in a block that is far below all others.

    Flat selects the token first, and so does a hierarchical indexer whose budget covers the
    window. With a smaller budget and `pooling="mean"` it is lost, for the mean of its block is the
    lowest: a test that finds it has not pruned. Every row sees all keys.

    Args:
        token: where the needle is; its block must be complete, and neither the first nor the last.
        block_size: tokens per block, at least 8.
        M, N, H, D, dtype, device: as for `random_inputs`. The scores are exact.

    Raises:
        ValueError: `token` is in the first or the last block, or nowhere.
    """
    first = token // block_size * block_size
    if block_size < 8 or not 0 < first < N - block_size:
        raise ValueError(
            f"token: expected one between the first and the last of N = {N} tokens' blocks of at "
            f"least 8, got {token} with block_size {block_size}"
        )
    q, k = torch.zeros(M, H, D, **CPU), torch.zeros(N, D, **CPU)
    q[:, :, 0] = 1
    k[:, 0] = 1 + torch.arange(N, **CPU) % 8 / 8
    k[first : first + block_size, 0] = -8
    k[token, 0] = 20
    return _inputs(q.to(dtype), k.to(dtype), torch.ones(M, H, **CPU), None, device, causal=False)


def _inputs(
    q: Tensor, k: Tensor, weights: Tensor, scale: Tensor | None, device: Device, causal: bool
) -> Inputs:
    edges_q, edges_k = (torch.tensor([0, len(t)], dtype=torch.int32, device="cpu") for t in (q, k))
    ks, ke = causal_windows(edges_q, edges_k)
    if not causal:
        ke = torch.full_like(ke, len(k))
    return {
        "q": q.to(device),
        "k": k.to(device),
        "weights": weights.to(device),
        "k_scale": None if scale is None else scale.to(device),
        "ks": ks.to(device),
        "ke": ke.to(device),
    }
