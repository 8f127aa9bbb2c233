"""Paged caches in any memory that servers keep them in, and the memory that is refused.

Catches strides and alignments that are taken for granted, offsets of 32 bits, reads and writes
beyond a tensor, and slots that lie in somebody else's memory.
"""

from __future__ import annotations

import mmap

import pytest
import torch
from torch import Tensor

import hisa
from tests import oracle
from tests.builders import int32, shaped
from tests.case import same_bytes
from tests.checker import assert_same
from tests.families import CPU, Family
from tests.guard import guarded
from tests.numeric import DTYPES, FP8, short_name
from tests.paged import exact_paged, fill, small

PAGES, SIZE = 35, 16 * 36  # what `small` has


def spread(tensor: Tensor, entry: int, offset: int = 0) -> Tensor:
    """Copy a tensor into poisoned memory, entries `entry` bytes apart, from byte `offset` on."""
    raw = tensor.contiguous().view(torch.uint8).view(len(tensor), -1)
    storage = fill(torch.empty(len(tensor), entry, dtype=torch.uint8))
    storage[:, offset : offset + raw.shape[1]] = raw
    part = storage[:, offset : offset + raw.shape[1]].view(tensor.dtype)
    return part.unflatten(1, tensor.shape[1:]) if tensor.dim() > 1 else part[:, 0]


@pytest.mark.parametrize("dtype", DTYPES, ids=short_name)
def test_layouts(any_family: Family, dtype: torch.dtype) -> None:
    """DeepGEMM's view, that of vLLM, pages in a larger pool, transposed tables: the same bytes.

    Integration bugs: the layout of a cache.
    """
    paged = small(dtype, **shaped(H=2, D=32))
    pooled = paged.pool(any_family)
    want = pooled.index(any_family)
    size = paged.pages[0].numel() * paged.pages.element_size()
    layouts = [spread(paged.pages, size + 48), spread(paged.pages, 2 * size, 32)]
    if dtype == FP8:
        token = paged.case.shape[3] + 4  # bytes
        layouts += [paged.pages.view(-1, 16, token), paged.pages.view(-1, 16, 1, token)]
        layouts += [layouts[0].unflatten(1, (16, token)), layouts[1].unflatten(1, (16, 1, token))]
    ids = paged.block_table
    tables = [ids.T.contiguous().T, torch.cat([ids, ids], 1)[:, : ids.shape[1]]]
    changes = [{"pages": pages} for pages in layouts] + [{"block_table": ids} for ids in tables]
    changes.append({"seq_lens": torch.stack([paged.seq_lens] * 2, 1)[:, 0]})
    row = paged.pooled_k[0].numel() * paged.pooled_k.element_size()
    changes.append({"pooled_k": spread(paged.pooled_k, row + 16),
                    "pooled_scale": spread(paged.pooled_scale, 12, 4)})  # fmt: skip
    for change in changes:
        laid_out = paged.replace(**change).pool(any_family)
        for mine, theirs in zip(laid_out.pooled(), pooled.pooled(), strict=True):
            assert same_bytes(mine, theirs), list(change)
        for mine, theirs in zip(laid_out.index(any_family), want, strict=True):
            assert same_bytes(mine, theirs), list(change)


@pytest.mark.parametrize("dtype", [torch.bfloat16, FP8], ids=short_name)
def test_queries_and_weights_of_any_strides(family: Family, dtype: torch.dtype) -> None:
    """They are copied if they have to be."""
    paged = small(dtype, **shaped(H=2, D=32)).pool(family)
    case = paged.case
    q = case.q.view(torch.uint8).transpose(0, 1).contiguous().transpose(0, 1).view(dtype)
    odd = paged.replace(case=case.replace(q=q, weights=case.weights.T.contiguous().T))
    for mine, theirs in zip(odd.index(family), paged.index(family), strict=True):
        assert same_bytes(mine, theirs)


def test_pooled_keys_beside_their_pages(family: Family) -> None:
    """One entry holds a page, its pooled key and the scale: who copies it copies all of them."""
    if family.device != "cpu":
        pytest.skip("on the CPU, where views of memory are what is given")
    paged = small(**shaped(H=2, D=32))
    size, depth = paged.pages.shape[1], paged.case.shape[3]
    pool = fill(torch.empty(len(paged.pages), size + depth + 16, dtype=torch.uint8))
    pool[:, :size] = paged.pages
    pooled_k = pool[:, size : size + depth].view(FP8)
    pooled_scale = pool[:, size + depth : size + depth + 4].view(torch.float32)[:, 0]
    assert pooled_k.data_ptr() == pool.data_ptr() + size
    hisa.paged_pool(pool[:, :size], pooled_k, pooled_scale, new_tokens=None, **paged.where())
    assert same_bytes(pool[:, :size], paged.pages) and (pool[:, -12:] == 0xFF).all()
    want = paged.pool(family)
    for mine, theirs in zip((pooled_k, pooled_scale), want.pooled(), strict=True):
        assert same_bytes(mine, theirs)
    beside = paged.replace(pages=pool[:, :size], pooled_k=pooled_k, pooled_scale=pooled_scale)
    assert_same(beside.index(family), oracle.index(paged.case))


@pytest.mark.parametrize("after", [True, False], ids=["after", "before"])
def test_guard_pages(family: Family, after: bool) -> None:
    """Inputs and slots touch an unmapped page: a stray read or write kills the process."""
    if family.device != "cpu":
        pytest.skip("on the CPU")
    for seed in range(40):
        paged = exact_paged(seed)
        names = ("pages", "block_table", "seq_lens", "pooled_k", "pooled_scale")
        fenced = paged.replace(**{name: guarded(getattr(paged, name), after) for name in names})
        case = paged.case.replace(q=guarded(paged.case.q, after),
                                  weights=guarded(paged.case.weights, after))  # fmt: skip
        pooled_k, pooled_scale = fenced.pooled()
        hisa.paged_pool(fenced.pages, pooled_k, pooled_scale, new_tokens=None,
                        pooling=case.pooling, **fenced.where())  # fmt: skip
        assert_same(fenced.replace(case=case).index(family), oracle.index(case))


def misaligned(count: int, entry: int, offset: int, size: int) -> Tensor:
    """Return entries of `size` bytes, `entry` bytes apart, from byte `offset` on."""
    return torch.zeros(count * entry + 64, dtype=torch.uint8)[offset:].as_strided(
        (count, size), (entry, 1), offset
    )


def untouched(size: int) -> Tensor:
    """Return bytes that take no memory until they are written."""
    flags = (
        mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000
    )  # MAP_NORESERVE, which mmap has no name for
    return torch.frombuffer(mmap.mmap(-1, size, flags=flags), dtype=torch.uint8)


BAD: list[tuple[str, Tensor, str]] = [
    ("pages", misaligned(PAGES, SIZE + 8, 0, SIZE), "pages: .*multiples of 16 bytes"),
    ("pages", misaligned(PAGES, SIZE + 16, 4, SIZE), "pages: .*4 modulo 16"),
    ("pages", misaligned(PAGES, SIZE - 16, 0, SIZE), "pages: .*overlap"),
    ("pages", misaligned(PAGES, 2 * SIZE, 0, 2 * SIZE)[:, ::2], "pages: .*dense"),
    ("pooled_k", misaligned(PAGES, 40, 0, 32).view(FP8), "pooled_k: .*multiples of 16 bytes"),
    ("pooled_k", misaligned(PAGES, 0, 0, 32).view(FP8), "pooled_k: .*overlap"),
    ("pooled_scale", torch.zeros(1).expand(PAGES), "pooled_scale: .*overlap"),
]


@pytest.mark.parametrize(("name", "tensor", "message"), BAD, ids=[bad[2] for bad in BAD])
def test_bad_layouts(name: str, tensor: Tensor, message: str) -> None:
    """Pages and slots are never copied, so those that kernels cannot read are refused."""
    paged = small().replace(**{name: tensor})
    with pytest.raises(ValueError, match=message):
        hisa.paged_pool(paged.pages, *paged.pooled(), **paged.where())
    with pytest.raises(ValueError, match=message):
        paged.index(CPU)


def test_slots_in_memory_of_others() -> None:
    """Slots that lie in pages, and scales that lie in pooled keys, are refused."""
    paged = small()
    pages, pooled_k = paged.pages, paged.pooled_k
    inside = pages.view(-1)[: PAGES * 32].view(PAGES, 32).view(FP8)
    over = pages[:, 16:48].view(FP8)
    last = pages.view(torch.float32)[:, -1]
    for slots, message in [
        ((inside, paged.pooled_scale), "pooled_k: .*pages"),
        ((over, paged.pooled_scale), "pooled_k: .*pages"),
        ((pooled_k, last), "pooled_scale: .*pages"),
        ((pooled_k, pooled_k.view(torch.float32)[:, 0]), "pooled_scale: .*pooled_k"),
    ]:
        with pytest.raises(ValueError, match=message):
            hisa.paged_pool(pages, *slots, **paged.where())
    scales = paged.pooled_scale.view(torch.int32)
    for name, inside in (("block_table", scales[:34].view(2, 17)), ("seq_lens", scales[33:])):
        with pytest.raises(ValueError, match=f"pooled_scale: .*{name}"):
            hisa.paged_pool(pages, *paged.pooled(), **{**paged.where(), name: inside})


def test_places_beyond_int32() -> None:
    """More tokens than int32 can count are refused where places are asked for, and only there."""
    count, depth = 2**27, 16
    paged = small(D=depth, lengths=[64, 40])
    pages = untouched(count * paged.pages.shape[1]).view(count, -1)
    far = int32([[3, 1, count - 1, 0], [count - 2, 5, 2, 2]])
    for mine, theirs in zip(far.tolist(), paged.block_table.tolist(), strict=True):
        for page, theirs_page in zip(mine[:3], theirs, strict=False):
            pages[page] = paged.pages[theirs_page]
    pages[0] = paged.pages[paged.block_table[0, 3]]
    huge = paged.replace(
        pages=pages, block_table=far, pooled_k=untouched(count * depth).view(FP8).view(count, -1),
        pooled_scale=untouched(count * 4).view(torch.float32),
    )  # fmt: skip
    assert_same(huge.index(CPU), oracle.index(paged.case))
    with pytest.raises(ValueError, match=r"physical: .*2147483647.*134217728 pages of 16"):
        huge.index(CPU, physical=True)
    wide = paged.replace(block_table=int32([[0], [0]]).expand(2, 2**27))
    with pytest.raises(ValueError, match="block_table: expected at most 2147483647 tokens"):
        wide.index(CPU)


@pytest.mark.parametrize("name", ["pages", "pooled_k", "pooled_scale"])
def test_strides_beyond_32_bits(family: Family, name: str) -> None:
    """Pages, or slots, that lie 2^28 bytes apart: the last offsets exceed 2^32 bytes."""
    if family.device != "cpu":
        pytest.skip("takes no memory on the CPU")
    paged = small()
    tensor = getattr(paged, name)
    room = untouched(PAGES * 2**28).view(tensor.dtype)
    strides = (2**28 // tensor.element_size(), *tensor.stride()[1:])
    far = paged.replace(**{name: room.as_strided(tensor.shape, strides).copy_(tensor)})
    hisa.paged_pool(far.pages, *far.pooled(), new_tokens=None, **paged.where())
    assert_same(far.index(family), oracle.index(paged.case))
