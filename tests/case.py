"""One call of the indexer: its tensors and parameters."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

TENSORS = ("q", "k", "weights", "k_scale", "ks", "ke", "cu_seqlens_k")


@dataclass(frozen=True)
class Case:
    """The arguments of `hisa.index`, under its own names; the other ops take a part of them."""

    q: Tensor  # [M, H, D]
    k: Tensor  # [N, D]
    weights: Tensor  # [M, H] fp32
    # Tensors or None; Any, because most tests know which.
    k_scale: Any = None  # [N] fp32
    ks: Any = None  # [M] int32
    ke: Any = None  # [M] int32
    cu_seqlens_k: Any = None  # [S + 1] int32
    pooled: Any = None  # what pool_keys returns
    block_size: int = 8
    block_topk: int = 4
    topk: int = 16
    pooling: str = "mean"

    def replace(self, **changes: Any) -> Case:
        """Return a copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    def rows(self, which: Any) -> Case:
        """Return a copy with some rows of the batch, in the order given."""
        return self.replace(
            q=self.q[which],
            weights=self.weights[which],
            ks=None if self.ks is None else self.ks[which],
            ke=None if self.ke is None else self.ke[which],
        )

    def to(self, device: str) -> Case:
        """Return a copy on `device`."""
        fields = {name: getattr(self, name) for name in TENSORS}
        fields = {n: None if t is None else moved(t, device) for n, t in fields.items()}
        pooled = None if self.pooled is None else tuple(moved(t, device) for t in self.pooled)
        return self.replace(**fields, pooled=pooled)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """M, N, H, D."""
        return self.q.shape[0], self.k.shape[0], self.q.shape[1], self.q.shape[2]

    def index_args(self) -> dict[str, Any]:
        """Keyword arguments of `hisa.index`."""
        return {
            "k_scale": self.k_scale,
            "ks": self.ks,
            "ke": self.ke,
            "cu_seqlens_k": self.cu_seqlens_k,
            "pooled": self.pooled,
            "block_size": self.block_size,
            "block_topk": self.block_topk,
            "topk": self.topk,
            "pooling": self.pooling,
        }

    def flat_args(self) -> dict[str, Any]:
        """Keyword arguments of `hisa.flat_index`."""
        return {"k_scale": self.k_scale, "ks": self.ks, "ke": self.ke, "topk": self.topk}

    def pool_args(self) -> dict[str, Any]:
        """Keyword arguments of `hisa.pool_keys`."""
        return {
            "k_scale": self.k_scale,
            "cu_seqlens_k": self.cu_seqlens_k,
            "block_size": self.block_size,
            "pooling": self.pooling,
        }

    def describe(self) -> str:
        """Return one line with the shapes and parameters."""
        m, n, h, d = self.shape
        packed = 1 if self.cu_seqlens_k is None else len(self.cu_seqlens_k) - 1
        return (
            f"M={m} N={n} H={h} D={d} {self.q.dtype} B={self.block_size} m={self.block_topk} "
            f"k={self.topk} {self.pooling} k_scale={self.k_scale is not None} "
            f"ks={self.ks is not None} ke={self.ke is not None} segments={packed} "
            f"pooled={self.pooled is not None}"
        )


def moved(tensor: Tensor, device: str) -> Tensor:
    """Return a tensor on `device` with the strides and the storage offset that it has here."""
    if torch.device(device).type in (tensor.device.type, "meta") or tensor.device.type != "cpu":
        return tensor.to(device)
    storage = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
    empty = torch.empty(0, dtype=tensor.dtype, device=device)
    layout = (tensor.storage_offset(), tensor.shape, tensor.stride())
    return empty.set_(storage.to(device).untyped_storage(), *layout)


def same_bytes(a: Tensor, b: Tensor) -> bool:
    """Compare two tensors byte for byte, so that NaN equals the same NaN and -0.0 is not 0.0."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    a, b = a.contiguous(), b.contiguous()
    return bool(torch.equal(a.view(torch.uint8), b.view(torch.uint8))) if a.numel() else True
