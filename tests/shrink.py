"""Make a failing call smaller, and save it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator

import torch

from tests.case import TENSORS, Case


def shrink(case: Case, fails: Callable[[Case], bool], tries: int = 60) -> Case:
    """Return a smaller call that still fails: fewer rows, heads and channels, a simpler form."""
    for _ in range(tries):
        for smaller in simpler(case):
            if fails(smaller):
                case = smaller
                break
        else:
            break
    return case


def simpler(case: Case) -> Iterator[Case]:
    """Yield calls that are a little simpler than `case`."""
    m, n, h, d = case.shape
    if m > 1:
        for part in (slice(0, m // 2), slice(m // 2, m)):
            yield case.rows(part)
    if h > 1:
        for part in (slice(0, h // 2), slice(h // 2, h)):
            yield case.replace(q=case.q[:, part], weights=case.weights[:, part])
    if d > 16:
        keep = 16 * (d // 32)
        yield case.replace(q=case.q[..., :keep].contiguous(), k=case.k[:, :keep].contiguous())
    if case.k_scale is not None:
        yield case.replace(k_scale=None)
    if case.cu_seqlens_k is not None:
        yield case.replace(cu_seqlens_k=None)
    if case.pooled is not None:
        yield case.replace(pooled=None)
    if case.topk > 1:
        yield case.replace(topk=case.topk // 2)
    if n > 1 and case.cu_seqlens_k is None and case.pooled is None:
        scale = None if case.k_scale is None else case.k_scale[: n // 2]
        yield case.replace(k=case.k[: n // 2], k_scale=scale)


def save(case: Case, name: str) -> str:
    """Write a call to a temporary file and return its path; `load` reads it."""
    fields = {field: getattr(case, field) for field in (*TENSORS, "pooled")}
    for field in ("block_size", "block_topk", "topk", "pooling"):
        fields[field] = getattr(case, field)
    with tempfile.NamedTemporaryFile(prefix=f"hisa-{name}-", suffix=".pt", delete=False) as file:
        torch.save(fields, file)
    return file.name


def load(path: str) -> Case:
    """Read a call that `save` wrote."""
    return Case(**torch.load(path))
