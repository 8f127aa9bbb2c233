"""The form of a selection: what must hold whatever the scores are."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from hisa.checking import OPTIONAL, check_types
from hisa.windows import clamp_windows

CHUNK_BYTES = 256 * 2**20  # of what is computed for the rows at hand
SLOT_BYTES = 48  # of that for each selected token
LAST = torch.iinfo(torch.int64).max  # sorts behind every token


def assert_valid_indices(
    indices: Tensor,
    *,
    keys: int,
    topk: int,
    ks: Tensor | None = None,
    ke: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    block_size: int | None = None,
    block_topk: int | None = None,
    scores: Tensor | None = None,
) -> None:
    """Assert that a selection has the form of what `hisa.index` or `hisa.flat_index` returns.

    In each row: tokens relative to `ks[m]`, ascending, each one once, all in the window; then -1.
    As many of them as flat selects, `min(topk, window)`; with `block_size` and `block_topk` as many
    as `hisa.index` does, from at most `block_topk` blocks. (All blocks but the first and the last
    are complete, so the number does not depend on which are kept.)

    Args:
        indices: `[M, topk]` int32.
        keys: N, the number of keys.
        topk: the width.
        ks, ke: `[M]` int32, the windows, as for `hisa.index`.
        cu_seqlens_k: `[S + 1]` int32, the packed sequences, as for `hisa.index`. Leave it out where
            windows may cross from one into the next, as those of `hisa.flat_index` may.
        block_size, block_topk: those of the call of `hisa.index`, both or neither.
        scores: `[M, topk]` float32, the tokens' scores; unused slots hold -inf.

    Raises:
        AssertionError: the form is wrong; names the first row at fault and what is wrong there.
        TypeError, ValueError: an argument other than `indices` and `scores` makes no sense.

    Reads from the device. Memory: 256 MiB at most beside the arguments.
    """
    __tracebackhide__ = True
    check_types(Tensor, indices=indices)
    check_types(OPTIONAL, ks=ks, ke=ke, cu_seqlens_k=cu_seqlens_k, scores=scores)
    if (block_size is None) != (block_topk is None):
        raise ValueError("block_size, block_topk: expected both or neither, got one of them")
    rows = next((len(t) for t in (ks, ke) if t is not None), indices.shape[0])
    start, end, origin = _windows(ks, ke, cu_seqlens_k, rows, keys, indices.device)
    _assert_tensor("indices", indices, (rows, topk), torch.int32)
    if scores is not None:
        _assert_tensor("scores", scores, (rows, topk), torch.float32)
        scores = scores.to(indices.device)
    length, shift = end - start, start - origin
    count = length
    if block_size is not None and block_topk is not None:
        blocks = (shift + length - 1) // block_size - shift // block_size + 1
        dropped = torch.where(length > 0, blocks - block_topk, 0).clamp(min=0)
        count = length - dropped * block_size
    count = count.clamp(max=topk)

    for at in row_chunks(rows, SLOT_BYTES * topk):
        fault = _fault(indices[at], length[at], count[at], None if scores is None else scores[at])
        if fault is None and block_size is not None and block_topk is not None:
            fault = _block_fault(indices[at], shift[at], block_size, block_topk)
        if fault is not None:
            row = at.start + fault[0]
            window = f"[{int(start[row])}, {int(end[row])})"
            raise AssertionError(f"row {row}, window {window}: {fault[1]}")


def to_selection(
    tokens: Tensor, *, keys: int, ks: Tensor | None = None, ke: Tensor | None = None
) -> Tensor:
    """Bring tokens as other indexers return them into the form of `hisa.index`.

    `torch.topk` over masked scores gives absolute positions, best first, and fills short rows up
    with masked ones. What lies outside of a row's window is therefore dropped, so this hides an
    indexer that takes such tokens for selected ones. A token that comes twice stays twice.

    Args:
        tokens: `[M, topk]` of any integer dtype: positions in the keys, in any order; negative
            where a slot is unused.
        keys: N, the number of keys.
        ks, ke: `[M]` int32, the windows, as for `hisa.index`.

    Returns:
        `[M, topk]` int32: relative to `ks[m]`, ascending, then -1.

    Raises:
        TypeError, ValueError: `tokens` are not integers, or not a matrix.
    """
    check_types(Tensor, tokens=tokens)
    if tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
        raise TypeError(f"tokens: expected [M, topk] of integers, got {tokens.dtype}")
    if tokens.dim() != 2:
        raise ValueError(f"tokens: expected [M, topk] of integers, got {list(tokens.shape)}")
    start, end, _ = _windows(ks, ke, None, len(tokens), keys, tokens.device)
    inside = (tokens >= start[:, None]) & (tokens < end[:, None])
    relative = torch.where(inside, tokens.long() - start[:, None], LAST).sort(dim=1).values
    return torch.where(relative == LAST, -1, relative).int()


def row_chunks(rows: int, row_bytes: int) -> Iterator[slice]:
    """Cut rows into chunks that take at most CHUNK_BYTES, or are one row."""
    size = max(1, CHUNK_BYTES // max(1, row_bytes))
    return (slice(first, min(rows, first + size)) for first in range(0, rows, size))


def first_true(wrong: Tensor) -> int | None:
    """Return the position of the first True, None if there is none."""
    return int(wrong.int().argmax()) if len(wrong) and bool(wrong.any()) else None


def _windows(
    ks: Tensor | None,
    ke: Tensor | None,
    cu_seqlens_k: Tensor | None,
    rows: int,
    keys: int,
    device: torch.device,
) -> tuple[Tensor, Tensor, Tensor]:
    """Check windows, bring them to `device` and clamp them: start, end, origin."""
    moved = []
    for name, given in (("ks", ks), ("ke", ke), ("cu_seqlens_k", cu_seqlens_k)):
        if given is not None and given.dtype != torch.int32:
            raise TypeError(f"{name}: expected int32, got {given.dtype}")
        size = "S + 1" if name == "cu_seqlens_k" else str(rows)
        if given is not None and (given.dim() != 1 or size not in ("S + 1", str(len(given)))):
            raise ValueError(f"{name}: expected [{size}] int32, got {list(given.shape)}")
        moved.append(None if given is None else given.to(device))
    return clamp_windows(*moved, rows=rows, keys=keys, device=device)


def _assert_tensor(name: str, got: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> None:
    __tracebackhide__ = True
    if tuple(got.shape) != shape or got.dtype != dtype:
        wanted, given = (str(d).removeprefix("torch.") for d in (dtype, got.dtype))
        raise AssertionError(
            f"{name}: expected {list(shape)} {wanted}, got {list(got.shape)} {given}"
        )


def _fault(
    indices: Tensor, length: Tensor, count: Tensor, scores: Tensor | None
) -> tuple[int, str] | None:
    """Return the first row whose slots are wrong, and what is wrong there."""
    used = torch.arange(indices.shape[1], device=indices.device) < count[:, None]
    before = torch.nn.functional.pad(indices[:, :-1], (1, 0), value=-1)
    faults = {
        "expected a token in each of the first {count} slots": used & (indices < 0),
        "outside of the window": used & (indices >= length[:, None]),
        "expected ascending tokens, each one once": used & (indices <= before),
        "expected -1 from slot {count} on": ~used & (indices != -1),
    }
    if scores is not None:
        faults["expected the score -inf from slot {count} on"] = ~used & (scores != -torch.inf)
    row = first_true(torch.stack([wrong.any(1) for wrong in faults.values()]).any(0))
    if row is None:
        return None
    what, slots = next((what, wrong[row]) for what, wrong in faults.items() if wrong[row].any())
    slot = int(slots.int().argmax())
    got = f"slot {slot} holds {int(indices[row, slot])}"
    if "ascending" in what:
        got += f" after {int(before[row, slot])}"
    if scores is not None and "score" in what:
        got += f" with the score {float(scores[row, slot]):g}"
    return row, f"{got}, {what.format(count=int(count[row]))}"


def _block_fault(
    indices: Tensor, shift: Tensor, block_size: int, block_topk: int
) -> tuple[int, str] | None:
    """Return the first row with tokens of too many blocks; its window starts `shift` into one."""
    block = (indices + shift[:, None]) // block_size
    before = torch.nn.functional.pad(block[:, :-1], (1, 0), value=-1)
    kept = ((block != before) & (indices >= 0)).sum(1)
    row = first_true(kept > block_topk)
    if row is None:
        return None
    return row, f"tokens of {int(kept[row])} blocks, expected at most {block_topk}"
