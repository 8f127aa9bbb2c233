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


@pytest.mark.parametrize("spread", [0.0, 0.03, 1.0])
def test_text_of_exact(spread: float, device: str) -> None:
    """Rows by flat, the cost, and plain words where the bounds prove little or flat costs less."""
    case = clusters(1, torch.float32, spread, keys=2048, ke=int32([90] * 8 + [2048] * 32))
    case = case.to(device)
    found = hisa.exact_index(case.q, case.k, case.weights, **arguments(case))
    cost = found.cost()
    count = int(found.escalated.sum())
    want = f"flat has run for {count} of 40 rows"
    want += f"; in all {cost.ratio:.2f} times the operations of flat"
    if (32 - count) * 2 < 32:
        want += f"; the bounds prove little: {32 - count} of the 32 rows that discard blocks"
    if cost.ratio >= 1:
        want += "; flat alone would cost less"
    assert str(found) == repr(found) == str(cost) == want
    assert ("little" in want) == (spread == 1.0)
    assert ("would cost less" in want) == (spread == 1.0)


@pytest.mark.parametrize("block_topk", [2, 12])
@pytest.mark.parametrize("pooled", [False, True])
def test_cost_as_planned(pooled: bool, block_topk: int) -> None:
    """The stages that a plan has cost what it says, and the others what flat on the balls would."""
    rows, keys, heads, dim = 100, 700, 4, 16
    ke = int32(range(keys - rows + 1, keys + 1))
    case = clusters(1, torch.float32, 0.01, rows, keys - keys % 8, ke=ke, block_topk=block_topk)
    case = case.replace(k=torch.cat([case.k, case.k[:4]]))
    given = arguments(case, pooled=hisa.pool_keys(case.k, block_size=8) if pooled else None)
    cost = hisa.exact_index(case.q, case.k, case.weights, **given).cost()
    shape: dict[str, Any] = {"M": rows, "N": keys, "H": heads, "D": dim, "causal": True}
    flat = hisa.plan(**shape, op="flat_index").operations["flat"]
    plan = hisa.plan(**shape, block_size=8, block_topk=block_topk, topk=8, pooled=pooled)
    coarse = plan.operations.get("coarse", 0)
    assert cost.flat_operations == flat
    assert (
        cost.operations["pool"] == plan.operations.get("pool", 0) == (0 if pooled else keys * dim)
    )
    assert cost.operations["coarse"] == 2 * coarse  # once to select, once to know what was kept
    assert cost.operations["refine"] == plan.operations["refine"]
    inner = sum(-(-int(end) // 8) - 2 for end in ke)
    assert cost.operations["bound"] == inner * 5 * 32 + rows * 16 * (dim + 2 * heads)
    assert 0 < cost.escalated < rows == cost.discarding
    assert flat * cost.ratio == pytest.approx(sum(cost.operations.values()))


def test_cost_of_windows_in_segments(device: str) -> None:
    """Windows are counted as they are read: cut at the keys and their own segment."""
    case = clusters(2, torch.float32, 1.0, rows=3, cu_seqlens_k=int32([0, 100, 512]),
                    ks=int32([-5, 96, 200]), ke=int32([600, 200, 600])).to(device)  # fmt: skip
    cost = hisa.exact_index(case.q, case.k, case.weights, **arguments(case)).cost()
    assert cost.flat_operations == (100 + 4 + 312) * 4 * 16
    assert (cost.rows, cost.discarding) == (3, 2)  # 13, 1 and 39 blocks; 12 are kept


def test_cost_of_nothing(device: str) -> None:
    """No window has a token: there is no cost of flat to compare with."""
    case = clusters(1, torch.float32, 1.0, ke=int32([0] * 40)).to(device)
    found = hisa.exact_index(case.q, case.k, case.weights, **arguments(case))
    assert (
        str(found) == "flat has run for 0 of 40 rows" and found.cost().ratio != found.cost().ratio
    )


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
