"""T16: any strides, any storage offset: the answer of the contiguous copy, byte for byte.

Catches vector loads that assume alignment or contiguity, and strides taken from the wrong
dimension.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests import builders, oracle
from tests.builders import exact_case, int32
from tests.case import Case, same_bytes
from tests.checker import assert_same
from tests.families import Family
from tests.numeric import DTYPES, FP8, short_name

Layout = Callable[[Tensor], Tensor]


def raw(tensor: Tensor) -> Tensor:
    """View fp8 as bytes, for which torch has every indexing kernel."""
    return tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor


def scattered(tensor: Tensor, shape: list[int], cut: tuple[slice, ...]) -> Tensor:
    """Copy a tensor into a part of a larger, poisoned buffer, and return that part."""
    buffer = raw(torch.empty(shape, dtype=tensor.dtype))
    buffer.view(torch.uint8).fill_(0xFF)
    buffer[cut] = raw(tensor)
    return buffer[cut].view(tensor.dtype) if tensor.element_size() == 1 else buffer[cut]


def offset(elements: int) -> Layout:
    """Start `elements` elements into the storage: no alignment beyond the element's own."""

    def apply(tensor: Tensor) -> Tensor:
        inside = slice(elements, elements + tensor.numel())
        flat = scattered(tensor.reshape(-1), [tensor.numel() + 16], (inside,))
        return flat.view(tensor.shape)

    return apply


def misaligned(tensor: Tensor) -> Tensor:
    """Start one byte into the memory: not even an element is aligned."""
    memory = bytearray(1 + tensor.numel() * tensor.element_size())
    copy = torch.frombuffer(memory, dtype=torch.uint8, offset=1)
    copy.copy_(tensor.contiguous().view(-1).view(torch.uint8))
    if tensor.dtype == FP8:
        return copy.view(FP8).view(tensor.shape)
    return torch.frombuffer(memory, dtype=tensor.dtype, offset=1).view(tensor.shape)


def padded_rows(tensor: Tensor) -> Tensor:
    """Rows longer in memory than in shape, by an odd number of elements."""
    shape = [*tensor.shape[:-1], tensor.shape[-1] + 3]
    return scattered(tensor, shape, (*(slice(None),) * (tensor.dim() - 1), slice(1, -2)))


def every_second(tensor: Tensor) -> Tensor:
    """Every second row of a tensor with twice as many."""
    return scattered(tensor, [2 * tensor.shape[0], *tensor.shape[1:]], (slice(0, None, 2),))


def strided_columns(tensor: Tensor) -> Tensor:
    """A last dimension with stride 3."""
    shape = [*tensor.shape[:-1], 3 * tensor.shape[-1]]
    return scattered(tensor, shape, (*(slice(None),) * (tensor.dim() - 1), slice(1, None, 3)))


def transposed(tensor: Tensor) -> Tensor:
    """Dimensions in memory in reversed order."""
    order = list(range(tensor.dim()))[::-1]
    return raw(tensor).permute(order).contiguous().permute(order).view(tensor.dtype)


LAYOUTS: dict[str, Layout] = {
    **{f"offset {n}": offset(n) for n in range(1, 16)},
    "misaligned": misaligned,
    "padded rows": padded_rows,
    "every second row": every_second,
    "strided columns": strided_columns,
    "transposed": transposed,
}


def transposed_ok(name: str, tensor: Tensor) -> bool:
    """Say whether a layout can be made for a tensor (a transposed fp8 view of bytes always can)."""
    return name != "transposed" or tensor.dim() > 1


def cases(dtype: torch.dtype) -> Case:
    """Return an exact packed call with every optional argument."""
    heads, depth = (16, 64) if builders.shapes == "hopper" else (3, 48)
    return exact_case(5, dtype=dtype, M=7, N=137, H=heads, D=depth, B=8, block_topk=4, topk=19,
                      ks=int32([0, 1, 40, 43, 40, 130, 9]), ke=int32([40, 39, 137, 137, 110, 131,
                      9]), cu_seqlens_k=int32([0, 40, 137]), k_scale=torch.ones(137))  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=short_name)
def test_each_argument(family: Family, dtype: torch.dtype, layout: str) -> None:
    """Each argument in each layout alone, then all of them at once."""
    case = cases(dtype)
    case = case.replace(pooled=family.pool_keys(case))
    want, flat = oracle.index(case), oracle.flat_index(case)
    names = ["q", "k", "weights", "k_scale", "ks", "ke", "cu_seqlens_k"]
    odd = {n: getattr(case, n) for n in names}
    odd = {n: LAYOUTS[layout](t) for n, t in odd.items() if transposed_ok(layout, t)}
    for name, tensor in odd.items():
        assert torch.equal(raw(tensor), raw(getattr(case, name)))
    odd["pooled"] = tuple(
        LAYOUTS[layout](t) if transposed_ok(layout, t) else t for t in case.pooled
    )
    for changes in [*({name: tensor} for name, tensor in odd.items()), odd]:
        assert_same(family.index(case, **changes), want)
        assert_same(family.flat_index(case, **changes), flat)
    pooled = family.pool_keys(case.replace(k=odd["k"], k_scale=odd.get("k_scale", case.k_scale)))
    assert same_bytes(pooled[0], case.pooled[0]) and same_bytes(pooled[1], case.pooled[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=short_name)
def test_expanded(family: Family, dtype: torch.dtype) -> None:
    """Zero strides: one query for all rows, one head for all heads, one key for all tokens."""
    case = cases(dtype)
    one_row = raw(case.q)[:1].expand(case.q.shape).view(dtype)
    one_head = raw(case.q)[:, :1].expand(case.q.shape).view(dtype)
    one_key = raw(case.k)[3:4].expand(case.k.shape).view(dtype)
    changes = [
        {"q": one_row},
        {"q": one_head},
        {"k": one_key},
        {"weights": case.weights[:1].expand(case.weights.shape)},
        {"weights": torch.ones(()).expand(case.weights.shape)},
        {"k_scale": torch.full((1,), 2.0).expand(137)},
        {"ks": int32([3]).expand(7), "ke": int32([130]).expand(7)},
    ]
    for change in changes:
        spread = case.replace(**change)
        assert_same(family.index(spread), oracle.index(spread))
        assert_same(family.flat_index(spread), oracle.flat_index(spread))


@pytest.mark.parametrize("dtype", DTYPES, ids=short_name)
def test_overlapping(family: Family, dtype: torch.dtype) -> None:
    """Inputs whose rows overlap in memory, and inputs that share memory with each other."""
    case = cases(dtype)
    memory, depth = raw(case.k).reshape(-1), case.k.shape[1]
    sliding = memory.as_strided(case.k.shape, (1, 1)).view(dtype)
    shared = memory.as_strided(case.q.shape, (depth, 16, 1)).view(dtype)
    taken_twice = memory.as_strided(case.q.shape, (depth, depth, 1)).view(dtype)
    for change in ({"k": sliding}, {"q": shared}, {"q": taken_twice}):
        overlapping = case.replace(**change)
        copied = case.replace(**{n: t.clone() for n, t in change.items()})
        assert_same(family.index(overlapping), oracle.index(copied))
        assert_same(family.flat_index(overlapping), oracle.flat_index(copied))


def test_outputs_are_fresh(family: Family) -> None:
    """Two calls never share memory, and no output shares memory with an input."""
    case = cases(torch.float32)
    a, b = family.index(case), family.index(case)
    pooled = family.pool_keys(case)
    pointers = [t.untyped_storage().data_ptr() for t in (*a, *b, *pooled, case.q, case.k)]
    assert len(set(pointers)) == len(pointers)


@pytest.mark.parametrize("n", [1, 7, 9, 15, 17, 31, 33, 63, 65, 127, 129, 255, 257])
@pytest.mark.parametrize("depth", range(16, 257, 48))
def test_odd_sizes(family: Family, n: int, depth: int) -> None:
    """Numbers of keys and heads around every vector and tile width, at odd depths."""
    for heads in (1, 3, 17):
        case = exact_case(n, N=n, D=depth, H=heads, M=3, B=8, block_topk=3, topk=11)
        assert_same(family.index(case), oracle.index(case))
        assert_same(family.flat_index(case), oracle.flat_index(case))


def test_every_head_count_and_depth(family: Family) -> None:
    """H = 1..128 and every D that is a multiple of 16 up to 256."""
    for heads in range(1, 129):
        depth = 16 * (1 + heads % 16)
        case = exact_case(heads, N=50, D=depth, H=heads, M=2, B=8, block_topk=2, topk=5)
        assert_same(family.index(case), oracle.index(case))
