"""A prompt's needle is found by later chunks and while decoding, however the keys are kept.

Catches, of the bugs that integrations have: chunked prefill that scores the current chunk alone or
pools it alone, blocks that straddle two chunks and are never pooled, slots that are read before
they are written, positions that count from a chunk's start.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import hisa
from tests.builders import shaped
from tests.numeric import FP8, short_name
from tests.paged import new_pages, new_slots, write

H, D = shaped(H=2, D=16).values()
B, PAGE, LENGTH = 32, 16, 420
PROMPT, NEEDLE = 400, 133  # not at a block's edge; the budget is 96 tokens of 3 blocks
OPTIONS: dict[str, Any] = {"block_topk": 3, "topk": 20}
Step = Callable[[slice], Tensor]  # appends these tokens, selects for them


def call(device: str, dtype: torch.dtype, needle: int) -> dict[str, Tensor]:
    """Return keys and queries: every query looks for the one key that stands out."""
    random = torch.Generator().manual_seed(0)
    k = torch.randn(LENGTH, D, generator=random) / 10
    q = torch.randn(LENGTH, H, D, generator=random) / 10
    k[needle, 3], q[..., 3] = 40, 3
    tensors = {"q": q.to(dtype), "k": k.to(dtype), "weights": torch.ones(LENGTH, H)}
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def contiguous(given: dict[str, Tensor]) -> Step:
    """Keys in one piece, pooled anew in every call."""

    def step(part: slice) -> Tensor:
        ke = torch.arange(
            part.start + 1, part.stop + 1, dtype=torch.int32, device=given["k"].device
        )
        found = hisa.index(given["q"][part], given["k"][: part.stop], given["weights"][part], ke=ke,
                           block_size=B, **OPTIONS)  # fmt: skip
        assert isinstance(found, Tensor)
        return found

    return step


def stored(given: dict[str, Tensor]) -> Step:
    """Keys in a `PooledKeys`."""
    k = given["k"]
    store = hisa.PooledKeys(1, D, dtype=k.dtype, device=k.device, scaled=False, block_size=B)

    def step(part: slice) -> Tensor:
        store.append(k[None, part])
        found = store.index(given["q"][None, part], given["weights"][None, part], **OPTIONS)
        assert isinstance(found, Tensor)
        return found[0]

    return step


def paged(given: dict[str, Tensor]) -> Step:
    """Keys in pages, which are poison until they are written, and so are their slots."""
    k, device = given["k"].cpu(), given["k"].device
    count = -(-LENGTH // PAGE)
    table = torch.randperm(count, generator=torch.Generator().manual_seed(1)).int()
    pages = new_pages(count, PAGE, D, k.dtype)
    pooled_k, pooled_scale = (t.to(device) for t in new_slots(count, D, k.dtype))
    where: dict[str, Any] = {"block_table": table[None].to(device), "block_size": B}

    def step(part: slice) -> Tensor:
        for t in range(part.start, part.stop):
            write(pages, int(table[t // PAGE]), t % PAGE, k[t : t + 1], None)
        n = part.stop - part.start
        where["seq_lens"] = torch.tensor([part.stop], dtype=torch.int32, device=device)
        on_device = pages.to(device)
        hisa.paged_pool(on_device, pooled_k, pooled_scale, new_tokens=n, **where)
        found = hisa.paged_index(given["q"][part], on_device, given["weights"][part], next_n=n,
                                 pooled=(pooled_k, pooled_scale), **where, **OPTIONS)  # fmt: skip
        assert isinstance(found, Tensor)
        return found

    return step


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, FP8], ids=short_name)
@pytest.mark.parametrize("keep", [contiguous, stored, paged], ids=lambda keep: str(keep.__name__))
@pytest.mark.parametrize("chunk", [23, 64, 100, PROMPT])
def test_needle_in_an_earlier_chunk(
    device: str, dtype: torch.dtype, keep: Callable[[dict[str, Tensor]], Step], chunk: int
) -> None:
    """Chunked prefill, then token by token: found by every row behind it, and as in one call.

    Moved about, so that it lies in the first chunk, at both edges of one, and in the last.

    Integration bugs: chunked prefill.
    """
    for needle in (B, NEEDLE, 3 * chunk - 1, 3 * chunk, PROMPT - 2 * B):
        if needle >= PROMPT - B:
            continue
        given = call(device, dtype, needle)
        step, rows = keep(given), []
        for start in range(0, PROMPT, chunk):
            rows.append(step(slice(start, min(start + chunk, PROMPT))))
        for token in range(PROMPT, LENGTH):
            rows.append(step(slice(token, token + 1)))
        found = torch.cat(rows)
        assert (found[needle:] == needle).any(1).all()
        assert torch.equal(found, contiguous(given)(slice(0, LENGTH)))
