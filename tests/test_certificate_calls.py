"""`hisa.certify` and `hisa.exact_index`: what they say, wait for and refuse.

Catches a wait for the device, a bad call that raises something else than `hisa.index`, and limits
of which the message does not say why.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import hisa
from tests.builders import int32
from tests.case import Case
from tests.numeric import DTYPES, short_name
from tests.test_certificate import arguments, assert_true, clusters


def test_text() -> None:
    """A line says how many rows are proved, and how many of them had to be."""
    case = clusters(1, torch.float32, 0.003, ke=int32([90] * 20 + [512] * 20))
    found = hisa.certify(case.q, case.k, case.weights, **arguments(case))
    proved = int(found.proved.sum())
    want = f"{proved} of 40 rows are proved equal to flat, 20 of them since nothing is discarded"
    assert str(found) == repr(found) == want


@pytest.mark.gpu
def test_no_synchronisation() -> None:
    """Nothing waits for the device."""
    case = clusters(1, torch.bfloat16, 0.01, cu_seqlens_k=int32([0, 100, 512])).to("cuda")
    hisa.exact_index(case.q, case.k, case.weights, **arguments(case))
    torch.cuda.set_sync_debug_mode("error")
    try:
        hisa.exact_index(case.q, case.k, case.weights, **arguments(case))
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("call", [hisa.certify, hisa.exact_index])
@pytest.mark.parametrize(("changes", "error", "message"), [
    ({"bound_size": 12}, ValueError, "bound_size: expected one of"),
    ({"bound_size": 16}, ValueError, "bound_size: expected .* at most block_size = 8, got 16"),
    ({"bound_size": 8.0}, TypeError, "bound_size: expected int, got float"),
    ({"block_topk": 1}, ValueError, "block_topk: expected at least 2"),
    ({"topk": 97}, ValueError, "topk: expected at most"),
    ({"ke": torch.zeros(40)}, TypeError, "ke: expected"),
])  # fmt: skip
def test_bad_calls(
    call: Any, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    """The messages of `hisa.index`, and one for the balls."""
    case = clusters(1, torch.float32, 0.003)
    with pytest.raises(error, match=message):
        call(case.q, case.k, case.weights, **{**arguments(case), **changes})


def test_too_many_channels_or_heads() -> None:
    """A ball takes channels and a head of its own."""
    with pytest.raises(ValueError, match="D: expected at most 240 for a proof, which needs 16 of"):
        hisa.certify(torch.ones(1, 1, 256), torch.ones(9, 256), torch.ones(1, 1))
    with pytest.raises(ValueError, match="H: expected at most 127 for a proof, which needs 1 of"):
        hisa.certify(torch.ones(1, 128, 16), torch.ones(9, 16), torch.ones(1, 128))


@pytest.mark.parametrize("dtype", DTYPES, ids=short_name)
def test_as_many_channels_and_heads_as_there_can_be(dtype: torch.dtype, device: str) -> None:
    """The bounds hold at the limits too, and prove something."""
    random = torch.Generator().manual_seed(0)
    keys = torch.randn(64, 240, generator=random).repeat_interleave(8, 0).to(dtype)
    q = torch.randn(10, 127, 240, generator=random).to(dtype)
    weights = torch.rand(10, 127, generator=random)
    case = Case(q=q, k=keys, weights=weights, topk=8, block_topk=12).to(device)
    assert assert_true(case).proved.any()
