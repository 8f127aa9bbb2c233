"""T18: the windows of attention masks: every dtype, value and layout, against the definition.

Catches a value taken for another, keys that are not looked at because of where a row begins or
ends, strides and offsets that are wrong, and flags that one row sets for another.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random

import pytest
import torch
from torch import Tensor

import hisa
from hisa.around import mask_windows
from tests.guard import guarded
from tests.test_t16_layout import misaligned

MASKED = -65504.0
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# The number next to the last masked one, on the side of zero, as bits.
UNKNOWN = {torch.float16: 0xFBFE, torch.bfloat16: 0xC77F, torch.float32: 0xC77FDFFF,
           torch.float64: 0xC0EFFBFFFFFFFFFF}  # fmt: skip
DTYPES = (torch.bool, *UNKNOWN)
with_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def expected(mask: Tensor) -> tuple[list[list[int]], list[list[int]], list[int]]:
    """Return the definition: ks, ke and the summary."""
    wide = mask.cpu().double()
    attended = wide != 0 if mask.dtype == torch.bool else wide == 0
    known = torch.ones_like(attended) if mask.dtype == torch.bool else attended | (wide <= MASKED)
    keys = [[row.nonzero().flatten().tolist() for row in entry] for entry in attended]
    ks = [[row[0] if row else 0 for row in entry] for entry in keys]
    ke = [[row[-1] + 1 if row else 0 for row in entry] for entry in keys]
    rows = [row for entry in keys for row in entry]
    return ks, ke, [
        int(not known.all()),
        int(any(row and row[-1] + 1 - row[0] != len(row) for row in rows)),
        max((row[-1] + 1 - row[0] for row in rows if row), default=0),
        max((row[0] for row in rows if row), default=0),
    ]  # fmt: skip


def assert_right(mask: Tensor, of: Tensor | None = None) -> None:
    """Compare with the definition, of another mask with the same values if there is one."""
    ks, ke, summary = mask_windows(mask)
    assert ks.dtype == ke.dtype == summary.dtype == torch.int32
    assert ks.device == ke.device == summary.device == mask.device
    assert ks.shape == ke.shape == mask.shape[:2]
    assert (ks.tolist(), ke.tolist(), summary.tolist()) == expected(mask if of is None else of)


def from_bits(bits: int, dtype: torch.dtype) -> Tensor:
    """Return the number that these bits stand for."""
    size = dtype.itemsize
    signed = bits - (1 << 8 * size) if bits >= 1 << (8 * size - 1) else bits
    return torch.tensor(signed, dtype=BITS[size]).view(dtype)


def values(dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Return numbers that attend, that mask, and that do neither."""
    if dtype == torch.bool:
        return [torch.tensor(True)], [torch.tensor(False)], []
    info = torch.finfo(dtype)
    masked = [-torch.inf, info.min, MASKED if dtype != torch.bfloat16 else -65536.0]
    unknown = [torch.nan, torch.inf, 1.0, -1.0, -1e4, 65504.0, info.max, info.tiny, -info.tiny]
    subnormal = [from_bits(bits, dtype) for bits in (1, 1 | 1 << (8 * dtype.itemsize - 1))]
    minus_nan = from_bits((1 << 8 * dtype.itemsize) - 1, dtype)
    return (
        [torch.tensor(x, dtype=dtype) for x in (0.0, -0.0)],
        [torch.tensor(x, dtype=dtype) for x in masked],
        [*(torch.tensor(x, dtype=dtype) for x in unknown), *subnormal, minus_nan,
         from_bits(UNKNOWN[dtype], dtype)],
    )  # fmt: skip


def filled(attended: Tensor, dtype: torch.dtype, random: Random) -> Tensor:
    """Return a mask with zeros of both signs and one masked value per row, or all of them."""
    attends, masks, _ = values(dtype)
    mask = torch.empty(attended.shape, dtype=dtype)
    for row, wanted in zip(mask.flatten(0, 1), attended.flatten(0, 1), strict=True):
        row[:] = random.choice(masks)
        row[wanted] = random.choice(attends)
        if random.random() < 0.3:
            some = torch.rand(len(row)) < 0.5
            row[some & wanted] = random.choice(attends)
            row[some & ~wanted] = random.choice(masks)
    return mask


def into(shape: tuple[int, ...], cut: tuple[slice, ...]) -> Callable[[Tensor], Tensor]:
    """Return a layout: a part of a larger buffer of ones, which neither attend nor mask."""

    def apply(mask: Tensor) -> Tensor:
        sizes = [add + size for add, size in zip(shape, mask.shape, strict=True)]
        if cut[2].step is not None:
            sizes[2] = cut[2].step * mask.shape[2]
        buffer = torch.ones(sizes, dtype=mask.dtype, device=mask.device)
        part = buffer[cut][: mask.shape[0], : mask.shape[1], : mask.shape[2]]
        return part.copy_(mask)

    return apply


ALL = slice(None)
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda mask: mask,
    "behind one element": lambda mask: (
        mask.new_ones(mask.numel() + 1)[1:].view_as(mask).copy_(mask)
    ),
    "longer rows": into((0, 0, 5), (ALL, ALL, slice(3, None))),
    "more rows": into((1, 2, 0), (slice(1, None), slice(1, None), ALL)),
    "every third key": into((0, 0, 0), (ALL, ALL, slice(1, None, 3))),
    "queries and keys swapped": lambda mask: mask.mT.contiguous().mT,
    "entries inside": lambda mask: mask.movedim(0, 2).contiguous().movedim(2, 0),
}


def fuzzed(seed: int, dtype: torch.dtype) -> Tensor:
    """Return a mask of ranges, some of them empty, full or at an edge, in some with a fault."""
    random = Random(seed)
    torch.manual_seed(seed)
    keys = random.choice([random.randrange(1, 70), 63, 64, 65, 129, random.randrange(200, 3000)])
    shape = (random.randrange(1, 4), random.randrange(1, 7))
    ranges = [(0, 0), (0, keys), (0, 1), (keys - 1, keys)]
    for _ in range(6):
        first = random.randrange(keys)
        ranges.append((first, random.randrange(first, keys) + 1))
    chosen = random.choices(ranges, k=shape[0] * shape[1])
    start, end = torch.tensor(chosen).view(*shape, 2).unbind(2)
    position = torch.arange(keys)
    mask = filled((position >= start[..., None]) & (position < end[..., None]), dtype, random)
    fault = random.choice(values(dtype)[random.randrange(3)] or [None])
    if fault is not None and random.random() < 0.5:
        mask[random.randrange(shape[0]), random.randrange(shape[1]), random.randrange(keys)] = fault
    return mask


@with_dtypes
@pytest.mark.parametrize("layout", LAYOUTS)
def test_fuzz(device: str, dtype: torch.dtype, layout: str) -> None:
    """Random ranges and faults, in every layout."""
    for seed in range(40):
        mask = fuzzed(seed, dtype).to(device)
        assert_right(LAYOUTS[layout](mask), mask)


@with_dtypes
@pytest.mark.parametrize("offset", [0, 1, 7])
def test_every_key_counts(device: str, dtype: torch.dtype, offset: int) -> None:
    """Each key in turn is where a range begins, ends, has a hole, or a value that is unknown."""
    keys = 203
    one = torch.eye(keys, dtype=torch.bool)
    attended = torch.stack([one, ~one, one.cumsum(1).bool(), one.cumsum(1) == 0])
    attends, masks, unknown = (kind[-1:] for kind in values(dtype))
    buffer = torch.ones(attended.numel() + offset, dtype=dtype, device=device)
    mask = buffer[offset:].view(attended.shape)
    mask.copy_(torch.where(attended, attends[0], masks[0]))
    assert_right(mask)
    for value in unknown:
        for key in range(keys):
            mask[:] = masks[0]
            mask[0, 0, key] = value
            assert mask_windows(mask)[2].tolist() == [1, 0, 0, 0]


@with_dtypes
def test_what_each_value_means(device: str, dtype: torch.dtype) -> None:
    """One value at a time, alone and throughout a row."""
    attends, masks, unknown = values(dtype)
    for keys in (1, 64, 1000):
        for kind, summary in (
            (attends, [0, 0, keys, 0]),
            (masks, [0] * 4),
            (unknown, [1, 0, 0, 0]),
        ):
            for value in kind:
                mask = value.to(device).expand(2, 3, keys).contiguous()
                assert mask_windows(mask)[2].tolist() == summary, value
                assert_right(mask)


@with_dtypes
def test_expanded(device: str, dtype: torch.dtype) -> None:
    """Any dimension may have a stride of 0."""
    random = Random(0)
    for dim in range(3):
        shape = [3, 4, 200]
        shape[dim] = 1
        mask = filled(torch.rand(shape) < 0.9, dtype, random).to(device)
        sizes = [-1, -1, -1]
        sizes[dim] = 70
        assert_right(mask.expand(sizes))
        assert_right(mask[:1, :1, :1].expand(2, 3, 4))


@pytest.mark.parametrize("shape", [(0, 4, 6), (2, 0, 6), (2, 4, 0), (0, 0, 0), (1, 1, 1)])
def test_empty(device: str, shape: tuple[int, int, int]) -> None:
    """No entries, no rows or no keys."""
    assert_right(torch.zeros(shape, dtype=torch.bool, device=device))


@pytest.mark.parametrize(("entries", "rows"), [(1, 70001), (70001, 1), (300, 301)])
def test_many_rows(device: str, entries: int, rows: int) -> None:
    """More rows, and more entries, than one dimension of a grid may have."""
    ends = torch.arange(entries * rows, device=device).view(entries, rows) % 6
    position = torch.arange(5, device=device)
    ks, ke, summary = mask_windows((position < ends[..., None]) & (position >= 1))
    assert torch.equal(ks, ((ends > 1) * 1).int())
    assert torch.equal(ke, (ends * (ends > 1)).int())
    assert summary.tolist() == [0, 0, 4, 1]


@with_dtypes
@pytest.mark.parametrize(("rows", "keys"), [(3, 200003), (1100, 9001)])
def test_long_rows(device: str, dtype: torch.dtype, rows: int, keys: int) -> None:
    """Rows that take a block of threads several rounds, few of them and many."""
    attends, masks, unknown = values(dtype)
    mask = masks[0].to(device).repeat(1, rows, keys)
    ks = (torch.arange(rows, dtype=torch.int32) * 7 + 3) % (keys // 3)
    ke = keys - ks // 2
    for row in range(rows):
        mask[0, row, ks[row] : ke[row]] = attends[0]
    found = mask_windows(mask)
    assert torch.equal(found[0].cpu(), ks[None]) and torch.equal(found[1].cpu(), ke[None])
    assert found[2].tolist() == [0, 0, int((ke - ks).max()), int(ks.max())]
    mask[0, rows - 1, keys // 2] = masks[0]
    assert mask_windows(mask)[2][:2].tolist() == [0, 1]
    if unknown:
        mask[0, 1, keys - 1] = unknown[0]
        assert mask_windows(mask)[2][:2].tolist() == [1, 1]


def test_far_apart(device: str) -> None:
    """Distances that do not fit in 32 bits. Memory that is not touched costs nothing on the CPU."""
    memory = torch.empty(2**31 + 64, dtype=torch.bool, device=device)
    far = [((2, 1, 64), (2**31, 0, 1)), ((1, 2, 64), (0, 2**31, 1)), ((1, 2, 3), (0, 1, 2**30))]
    for shape, strides in far:
        mask = memory.as_strided(shape, strides)
        mask.zero_()
        mask[-1, -1, -1] = True
        assert_right(mask)


@pytest.mark.gpu
@pytest.mark.long
def test_more_rows_than_32_bits_count() -> None:
    """The grid has no room for them; every row is found all the same. Takes 18 GB."""
    rows = 2**31 + 77
    ks, ke, summary = mask_windows(
        torch.ones(1, 1, 1, dtype=torch.bool, device="cuda").expand(1, rows, 1)
    )
    assert ks.shape == (1, rows) and not ks.any() and bool((ke == 1).all())
    assert summary.tolist() == [0, 0, 1, 0]


@pytest.mark.parametrize("dtype", UNKNOWN, ids=str)
def test_memory_that_is_not_aligned(dtype: torch.dtype) -> None:
    """Not even to its own elements, as a file's content may be."""
    mask = fuzzed(3, dtype)
    assert_right(misaligned(mask), mask)


@pytest.mark.parametrize("after", [False, True])
@with_dtypes
def test_nothing_else_is_read(dtype: torch.dtype, after: bool) -> None:
    """A page that nobody may touch lies right before or behind the mask."""
    for seed in range(40):
        mask = fuzzed(seed, dtype)
        assert_right(guarded(mask, after), mask)


def test_threads_share_the_rows() -> None:
    """What any row of any thread finds is in the summary."""
    torch.set_num_threads(3)
    for row in (0, 700, 1499):
        mask = torch.zeros(2, 750, 300)
        mask[row // 750, row % 750, 7] = torch.nan
        mask[row // 750, row % 750, 9] = -torch.inf
        assert mask_windows(mask)[2].tolist() == [1, 1, 300, 0]


def test_subnormals_are_not_zero() -> None:
    """Whatever the thread makes of them."""
    tiny = torch.full((1, 2, 100), 1e-40)
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU does not flush")
    try:
        assert mask_windows(tiny)[2].tolist() == [1, 0, 0, 0]
    finally:
        torch.set_flush_denormal(False)


@pytest.mark.gpu
def test_memory() -> None:
    """Nothing is allocated beside the results."""
    mask = torch.ones(2, 1000, 5000, device="cuda").mT
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    mask_windows(mask)
    assert torch.cuda.max_memory_allocated() - before <= 2 * (2 * 5000 * 4) + 4096


@pytest.mark.parametrize("where", ["cpu", "meta", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_bad_masks(where: str) -> None:
    """Wrong dtypes and shapes are named."""
    for dtype in (torch.int32, torch.uint8, torch.float8_e4m3fn, torch.complex64):
        with pytest.raises(TypeError, match=r"mask: expected .*bool.* got"):
            mask_windows(torch.empty(1, 2, 3, dtype=dtype, device=where))
    for shape in ((), (3,), (2, 3), (1, 1, 2, 3)):
        with pytest.raises(ValueError, match=r"mask: expected \[B, S, T\], got"):
            mask_windows(torch.empty(shape, device=where))


def test_is_not_a_tensor() -> None:
    with pytest.raises(TypeError, match="mask: expected Tensor, got list"):
        mask_windows([[[True]]])  # type: ignore[arg-type]


def test_the_accepted_dtypes_are_known() -> None:
    """So that whoever adds one adds it here."""
    assert set(hisa.build_info()["mask_dtypes"]) == set(DTYPES)  # type: ignore[call-overload]
