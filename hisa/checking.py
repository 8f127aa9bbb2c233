"""Looks at what the operators must not look at: windows, segments and scales, which are data."""

from __future__ import annotations

import os

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from . import _extension

OPTIONAL = (Tensor, type(None))
NUMBER = (int, torch.SymInt)
SELECTION = ("indices", "scores")  # the results of an operator that selects


def check_types(expected: type | tuple[type, ...], **arguments: object) -> None:
    """Raise for the first argument that is not an instance of `expected`, or an unusable one."""
    for name, value in arguments.items():
        if value is None and expected is OPTIONAL:
            continue
        if not isinstance(value, expected) or (expected is NUMBER and isinstance(value, bool)):
            wanted = expected[0] if isinstance(expected, tuple) else expected
            raise TypeError(f"{name}: expected {wanted.__name__}, got {type(value).__name__}")
        if expected is NUMBER:
            if isinstance(value, int) and not -(2**63) <= value < 2**63:
                raise ValueError(f"{name}: expected a number of 64 bits, got {value}")
        elif isinstance(value, Tensor) and value.layout is not torch.strided:
            raise ValueError(f"{name}: expected a strided tensor, got one of {value.layout}")


def check_index_types(
    q: object,
    k: object,
    weights: object,
    k_scale: object,
    ks: object,
    ke: object,
    cu_seqlens_k: object,
    pooled: object,
    block_size: object,
    block_topk: object,
    topk: object,
    pooling: object,
    return_scores: object,
) -> None:
    """Check what kind of thing each argument of `hisa.index` is."""
    check_types(Tensor, q=q, k=k, weights=weights)
    check_types(OPTIONAL, k_scale=k_scale, ks=ks, ke=ke, cu_seqlens_k=cu_seqlens_k)
    if pooled is not None:
        check_pair(pooled, "pool_keys returns")
    check_types(NUMBER, block_size=block_size, block_topk=block_topk, topk=topk)
    check_types(str, pooling=pooling)
    check_types(bool, return_scores=return_scores)


def check_pair(pooled: object, whose: str) -> tuple[Tensor, Tensor]:
    """Return the two tensors of `pooled`, or raise TypeError; `whose` says which are meant."""
    if not isinstance(pooled, tuple | list) or len(pooled) != 2:
        got = f"{len(pooled)} of them" if isinstance(pooled, tuple | list) else pooled
        raise TypeError(f"pooled: expected the two tensors that {whose}, got {got}")
    check_types(Tensor, pooled_k=pooled[0], pooled_scale=pooled[1])
    return pooled[0], pooled[1]


def named_results(out: object, *names: str) -> dict[str, Tensor]:
    """Return the tensors of an argument `out` under the names that the operator has for them.

    Raises:
        TypeError: it is not one tensor for one name, or a tuple of as many as there are names.
    """
    given = (out,) if len(names) == 1 else out
    if not isinstance(given, tuple | list) or len(given) != len(names):
        got = f"{len(given)} of them" if isinstance(given, tuple | list) else type(out).__name__
        raise TypeError(f"out: expected tensors ({', '.join(names)}), got {got}")
    results = dict(zip(names, given, strict=True))
    check_types(Tensor, **results)
    return results


def selection(out: object, return_scores: bool) -> dict[str, Tensor]:
    """Return the tensors that a selection is written to, under the operator's names."""
    return named_results(out, *SELECTION[: 1 + return_scores])


def check_inputs(
    q: Tensor,
    k: Tensor,
    weights: Tensor,
    k_scale: Tensor | None,
    ks: Tensor | None,
    ke: Tensor | None,
    cu_seqlens_k: Tensor | None,
    pooled: tuple[Tensor, Tensor] | None,
    block_size: int,
    block_topk: int,
    topk: int,
    pooling: str,
    return_scores: bool = False,
) -> None:
    """Raise what `hisa.index` would raise, for those that call it later and more than once.

    With HISA_CHECK=1 that is what `check` raises.
    """
    tensors = (q, k, weights, k_scale, ks, ke, cu_seqlens_k)
    sizes = (block_size, block_topk, topk, pooling)
    check_index_types(*tensors, pooled, *sizes, return_scores)
    pair = (None, None) if pooled is None else pooled
    _extension.require().check_index(*tensors, *pair, *sizes)
    if wants_check(*tensors, *pair):
        check_values(k, k_scale, ks, ke, cu_seqlens_k)


def wants_check(*tensors: Tensor | None) -> bool:
    """Whether HISA_CHECK=1 asks for `check`, and these tensors' values can be looked at."""
    if torch.compiler.is_compiling() or os.environ.get("HISA_CHECK", "0") in ("", "0"):
        return False
    return readable(*tensors)


def readable(*tensors: Tensor | None) -> bool:
    """Whether these tensors' values can be looked at: not on meta, fake, or inside of vmap."""
    return not any(
        tensor.is_meta
        or isinstance(tensor, FakeTensor)
        or torch._C._functorch.is_functorch_wrapped_tensor(tensor)
        for tensor in tensors
        if tensor is not None
    )


def check(
    q: Tensor,
    k: Tensor,
    weights: Tensor,
    *,
    k_scale: Tensor | None = None,
    ks: Tensor | None = None,
    ke: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    pooled: tuple[Tensor, Tensor] | None = None,
    block_size: int = 128,
    block_topk: int = 64,
    topk: int = 2048,
    pooling: str = "mean",
    return_scores: bool = False,
) -> None:
    """Check the arguments of `hisa.index`, with the values of its windows, segments and scales.

    `index` takes these values as they are (it clamps windows and never waits for a device to see
    them). This function reads them, which synchronises with the device. With the environment
    variable HISA_CHECK=1 every call does it first, where there are values to read: not inside of
    `torch.compile` or `torch.vmap`, and not for fake tensors.

    Args: those of `hisa.index`.

    Raises:
        TypeError, ValueError: what `index` would raise.
        ValueError: a window leaves [0, N], ends before it starts, or crosses a segment's end; the
            segments do not ascend from 0 to N; a scale is negative or NaN. The message names the
            first row (or segment, or token) at fault.
    """
    check_inputs(
        q,
        k,
        weights,
        k_scale,
        ks,
        ke,
        cu_seqlens_k,
        pooled,
        block_size,
        block_topk,
        topk,
        pooling,
        return_scores,
    )
    check_values(k, k_scale, ks, ke, cu_seqlens_k)


def check_values(
    k: Tensor,
    k_scale: Tensor | None,
    ks: Tensor | None,
    ke: Tensor | None,
    cu_seqlens_k: Tensor | None,
) -> None:
    """Raise ValueError for the first bad scale, segment or window; shapes have been checked."""
    if k_scale is not None and (token := _first(~(k_scale >= 0))) is not None:
        got = float(k_scale[token])
        raise ValueError(f"k_scale: expected at least 0, got {got} at token {token}")
    n = k.shape[0]
    if cu_seqlens_k is not None:
        _check_segments(cu_seqlens_k, n)
    if ks is None and ke is None and cu_seqlens_k is None:
        return
    given = next((t for t in (ks, ke) if t is not None), None)
    rows = 1 if given is None else given.shape[0]
    start = torch.zeros(rows, dtype=torch.int64, device=k.device) if ks is None else ks.long()
    end = torch.full_like(start, n) if ke is None else ke.long()

    if (row := _first((start < 0) | (end > n) | (end < start))) is not None:
        raise ValueError(
            f"ks, ke: expected 0 <= ks <= ke <= N = {n}, "
            f"got [{int(start[row])}, {int(end[row])}) in row {row}"
        )
    if cu_seqlens_k is None:
        return
    edges = cu_seqlens_k.long()
    limit = edges[torch.searchsorted(edges, start, right=True).clamp(max=len(edges) - 1)]
    if (row := _first((end > limit) & (end > start))) is not None:
        raise ValueError(
            f"ks, ke: expected a window inside one segment of cu_seqlens_k, got "
            f"[{int(start[row])}, {int(end[row])}) in row {row}, whose segment ends at "
            f"{int(limit[row])}"
        )


def check_paged_values(pages: Tensor, dim: int, block_table: Tensor, seq_lens: Tensor) -> None:
    """Raise ValueError for the first sequence that its pages do not hold; shapes are checked."""
    page_size = pages.shape[1] // (dim + 4) if pages.dim() == 2 else pages.shape[1]
    most = block_table.shape[1] * page_size
    if (row := _first(seq_lens > most)) is not None:
        raise ValueError(
            f"seq_lens: expected at most {block_table.shape[1]} pages of {page_size} = {most} "
            f"tokens, got {int(seq_lens[row])} in sequence {row}"
        )
    used = torch.arange(block_table.shape[1], device=pages.device) * page_size < seq_lens[:, None]
    wrong = used & ((block_table < 0) | (block_table >= pages.shape[0]))
    if (row := _first(wrong.any(1))) is not None:
        entry = int(_first(wrong[row]) or 0)
        raise ValueError(
            f"block_table: expected ids in [0, {pages.shape[0]}) for the {int(seq_lens[row])} "
            f"tokens of sequence {row}, got {int(block_table[row, entry])} at entry {entry}"
        )


def _check_segments(cu_seqlens_k: Tensor, n: int) -> None:
    edges = cu_seqlens_k.long()
    if int(edges[0]) != 0 or int(edges[-1]) != n:
        raise ValueError(
            f"cu_seqlens_k: expected the first entry to be 0 and the last N = {n}, "
            f"got {int(edges[0])} and {int(edges[-1])}"
        )
    if (segment := _first(edges[1:] < edges[:-1])) is not None:
        raise ValueError(
            f"cu_seqlens_k: expected ascending entries, got {int(edges[segment])} then "
            f"{int(edges[segment + 1])} at segment {segment}"
        )


def _first(wrong: Tensor) -> int | None:
    """Return the position of the first True, None if there is none."""
    found = wrong.nonzero()
    return int(found[0]) if len(found) else None
