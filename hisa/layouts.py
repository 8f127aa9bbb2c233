"""Batched and packed calls of `HierarchicalIndexer`: what their arguments say the windows are.

    batched   inputs [B, S, ...], keys [B, N, D], windows [B, S], counted in each sequence
    packed    inputs [M, ...], keys [N, D], windows [M], counted in all keys: a batch of one

Nothing here waits for the device, but for an attention mask.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .checking import OPTIONAL, check_types
from .contract import check_shape
from .masks import scan
from .windows import Windows, entry_origins


def count_rows(inputs: tuple[Tensor, ...], sizes: dict[str, int]) -> int:
    """Return the number of rows, which has to be that of all inputs."""
    at = int("B" in sizes)
    shape, letter = ("[B, S, ...]", "S") if at else ("[M, ...]", "M")
    for i, given in enumerate(inputs):
        batches = {sizes["B"], 1 if i else sizes["B"]} if at else set()
        wanted = f"inputs[{i}]: expected {shape}"
        if given.dim() <= at:
            raise ValueError(f"{wanted}, got {list(given.shape)}")
        if at and given.shape[0] not in batches:
            raise ValueError(f"{wanted} with B = {sizes['B']}, got {list(given.shape)}")
        if given.shape[at] != inputs[0].shape[at]:
            raise ValueError(
                f"{wanted} with {letter} = {inputs[0].shape[at]}, as inputs[0] has, "
                f"got {list(given.shape)}"
            )
    return inputs[0].shape[at]


def call_windows(
    sizes: dict[str, int],
    rows: int,
    device: torch.device,
    ks: Tensor | None,
    ke: Tensor | None,
    causal: bool,
    left_padding: Tensor | None,
    attention_mask: Tensor | None,
    cu_seqlens_k: Tensor | None,
) -> Windows:
    """Return the windows of the rows, from whichever arguments say what they are."""
    check_types(bool, causal=causal)
    packed = {"cu_seqlens_k": cu_seqlens_k}
    batched = {"left_padding": left_padding, "attention_mask": attention_mask}
    check_types(OPTIONAL, ks=ks, ke=ke, **packed, **batched)
    batch = sizes.get("B")
    for name, value in (batched if batch is None else packed).items():
        if value is not None:
            wanted, got = ("[B, N, D]", "[N, D]") if batch is None else ("[N, D]", "[B, N, D]")
            raise ValueError(f"{name}: expected keys {wanted} with it, got {got}")
    keys = sizes["N"]
    if batch is None:
        return packed_windows(rows, keys, device, ks, ke, causal, cu_seqlens_k)
    if attention_mask is None:
        return batched_windows(batch, rows, keys, device, ks, ke, causal, left_padding)
    for name, value in {"ks": ks, "ke": ke, "left_padding": left_padding}.items():
        if value is not None:
            raise ValueError(f"attention_mask: expected no {name} with it, got both")
    found = scan(attention_mask, batch, rows)
    if isinstance(found, str):
        raise ValueError(
            f"attention_mask: expected [B, S, N] and one range of keys per query, got {found}"
        )
    if found.keys != keys:
        raise ValueError(
            f"attention_mask: expected one column for each of the {keys} keys, got {found.keys}"
        )
    return found


def batched_windows(
    batch: int,
    rows: int,
    keys: int,
    device: torch.device,
    ks: Tensor | None,
    ke: Tensor | None,
    causal: bool,
    left_padding: Tensor | None,
) -> Windows:
    """Return the windows of S queries in each of B sequences of N keys, without a wait.

    Args: those of `hisa.HierarchicalIndexer.select`; ks, ke [B, S], left_padding [B].

    Raises:
        TypeError: not int32.
        ValueError: another shape, or 2**31 keys or more in the batch.
    """
    if batch * keys >= 2**31:
        raise ValueError(f"k: expected fewer than 2**31 keys in one batch, got {batch} * {keys}")
    sizes = {"B": batch, "S": rows}
    origins = entry_origins(batch, keys, device)
    edges, start = origins, torch.zeros_like(origins[:-1, None])
    if left_padding is not None:
        check_shape("left_padding", left_padding, "B", sizes, device, torch.int32)
        start = left_padding.clamp(0, keys)[:, None]
        # what is padding is a segment of its own
        edges = torch.cat([torch.stack([origins[:-1], origins[:-1] + start[:, 0]], 1).flatten(),
                           origins[-1:]])  # fmt: skip
    if ks is not None:
        check_shape("ks", ks, "B S", sizes, device, torch.int32)
        start = torch.maximum(start, ks).clamp(max=keys)
    if ke is None:
        end = _own_ends(rows, keys, device, causal)
    else:
        check_shape("ke", ke, "B S", sizes, device, torch.int32)
        end = ke.clamp(max=keys)
    start = start.expand(batch, rows)
    end = torch.maximum(start, end)
    return Windows(
        keys=keys,
        longest=keys,
        reach=keys,
        ks=start,
        ke=end,
        packed_ks=start + origins[:-1, None],
        packed_ke=end + origins[:-1, None],
        cu_seqlens_k=edges,
    )


def packed_windows(
    rows: int,
    keys: int,
    device: torch.device,
    ks: Tensor | None,
    ke: Tensor | None,
    causal: bool,
    cu_seqlens_k: Tensor | None,
) -> Windows:
    """Return the windows of M queries over N packed keys, as those of a batch of one.

    Args: those of `hisa.HierarchicalIndexer.select`; ks, ke [M], cu_seqlens_k [S + 1].

    Raises:
        TypeError: not int32.
        ValueError: another shape, or it is not said to which sequence a query belongs.
    """
    for name, value in (("ks", ks), ("ke", ke)):
        if value is not None:
            check_shape(name, value, "M", {"M": rows}, device, torch.int32)
    if cu_seqlens_k is None:
        cu_seqlens_k = entry_origins(1, keys, device)
        ks = torch.zeros(rows, dtype=torch.int32, device=device) if ks is None else ks
        ke = _own_ends(rows, keys, device, causal).expand(rows) if ke is None else ke
    else:
        check_shape("cu_seqlens_k", cu_seqlens_k, "E", {}, device, torch.int32)
        if ks is None or ke is None:
            if rows != keys:
                raise ValueError(
                    f"ks, ke: expected both where cu_seqlens_k comes with fewer or more queries "
                    f"than keys (see hisa.causal_windows), got {rows} queries and {keys} keys"
                )
            row = torch.arange(rows, dtype=torch.int32, device=device)
            following = torch.searchsorted(cu_seqlens_k, row, right=True)
            ks = cu_seqlens_k[following - 1] if ks is None else ks
            if ke is None:
                ke = row + 1 if causal else cu_seqlens_k[following]
    return Windows(
        keys=keys,
        longest=keys,
        reach=keys,
        ks=ks[None],
        ke=ke[None],
        packed_ks=ks[None],
        packed_ke=ke[None],
        cu_seqlens_k=cu_seqlens_k,
    )


def _own_ends(rows: int, keys: int, device: torch.device, causal: bool) -> Tensor:
    """Return where the windows of the last `rows` of `keys` tokens end, [rows] or [1] int32."""
    if not causal:
        return torch.full((1,), keys, dtype=torch.int32, device=device)
    first = keys - rows + 1
    return torch.arange(first, first + rows, dtype=torch.int32, device=device).clamp(min=0)
