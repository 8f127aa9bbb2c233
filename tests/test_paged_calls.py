"""Paged calls that are wrong, or compiled: what is raised, and what torch asks of operators.

Catches checks that are missing or name the wrong argument, fake kernels that disagree with the real
ones, and slots that are written behind torch's back.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import hisa
from tests.builders import int32, shaped
from tests.case import same_bytes
from tests.families import Family
from tests.numeric import FP8
from tests.paged import new_slots, small

BF16, FP16 = torch.bfloat16, torch.float16


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return a tensor of zeros."""
    return torch.zeros(shape).to(dtype)


PAGES, SIZE = 35, 16 * 36  # what `small` has
BOTH = ("paged_pool", "paged_index")
BAD: list[tuple[tuple[str, ...], dict[str, Any], type[Exception], str]] = [
    # pages
    (BOTH, {"pages": zeros(PAGES, 16, 32, dtype=FP8)}, TypeError, "pages: .*uint8.*float8_e4m3fn"),
    (BOTH, {"pages": zeros(PAGES, SIZE).to(torch.int8)}, TypeError, "pages: .*uint8.*int8"),
    (BOTH, {"pages": zeros(PAGES * SIZE).to(torch.uint8)}, ValueError, "pages: "),
    (BOTH, {"pages": zeros(PAGES, SIZE + 1).to(torch.uint8)}, ValueError, r"pages: .*\[35, 577\]"),
    (BOTH, {"pages": zeros(PAGES, 8 * 36).to(torch.uint8)}, ValueError, r"pages: .*\[35, 288\]"),
    (BOTH, {"pages": zeros(PAGES, 48 * 36).to(torch.uint8)}, ValueError, "pages: .*1728"),
    (BOTH, {"pages": zeros(PAGES, 16, 32).to(torch.uint8)}, ValueError, r"pages: .*\[35, 16, 32\]"),
    (BOTH, {"pages": zeros(PAGES, 16, 2, 36).to(torch.uint8)}, ValueError, "pages: .*2, 36"),
    (BOTH, {"pages": zeros(PAGES, 0).to(torch.uint8)}, ValueError, "pages: "),
    (BOTH, {"pages": zeros(PAGES, 64 * 36).to(torch.uint8)}, ValueError,
     "block_size: .*page_size = 64, got 32"),
    # the table and the lengths
    (BOTH, {"block_table": int32([0])}, ValueError, r"block_table: .*\[batch, W\].*\[1\]"),
    (BOTH, {"block_table": int32([[0], [0]]).long()}, TypeError, "block_table: .*int32, got.*64"),
    (BOTH, {"seq_lens": int32([0])}, ValueError, r"seq_lens: .*\[1\] int32"),
    (BOTH, {"seq_lens": int32([[0, 0]])}, ValueError, r"seq_lens: .*\[1, 2\] int32"),
    (BOTH, {"seq_lens": zeros(2)}, TypeError, "seq_lens: .*int32, got.*float32"),
    # slots
    (BOTH, {"pooled_k": zeros(PAGES - 1, 32, dtype=FP8)}, ValueError, r"pooled_k: .*\[34, 32\]"),
    (BOTH, {"pooled_k": zeros(PAGES, 32, dtype=BF16)}, TypeError, "pooled_k: .*e4m3fn, got.*bfl"),
    (BOTH, {"pooled_k": zeros(PAGES, dtype=FP8)}, ValueError, r"pooled_k: .*\[35\]"),
    (BOTH, {"pooled_scale": zeros(PAGES + 1)}, ValueError, r"pooled_scale: .*\[36\]"),
    (BOTH, {"pooled_scale": zeros(PAGES, dtype=FP16)}, TypeError, "pooled_scale: .*float16"),
    # numbers
    (BOTH, {"block_size": 24}, ValueError, "block_size: .*24"),
    (("paged_pool",), {"block_size": 8}, ValueError, "block_size: .*page_size = 16, got 8"),
    (BOTH, {"block_size": 32.0}, TypeError, "block_size"),
    (("paged_pool",), {"new_tokens": 0}, ValueError, "new_tokens: .*got 0"),
    (("paged_pool",), {"new_tokens": -3}, ValueError, "new_tokens: .*got -3"),
    (("paged_pool",), {"new_tokens": "all"}, TypeError, "new_tokens: .*str"),
    (("paged_pool",), {"pooling": "sum"}, ValueError, "pooling: .*sum"),
    (("paged_pool",), {"pooled_k": zeros(PAGES, 24, dtype=FP8)}, ValueError, "D.*got 24"),
    (("paged_index",), {"next_n": 0}, ValueError, "next_n: .*got 0"),
    (("paged_index",), {"next_n": 3}, ValueError, r"q: .*\[4, 2, 32\]"),
    (("paged_index",), {"next_n": 2**40}, ValueError, "(next_n|q): "),
    (("paged_index",), {"block_topk": 1}, ValueError, "block_topk: .*got 1"),
    (("paged_index",), {"topk": 129}, ValueError, r"topk: .*4 \* 32.*129"),
    (("paged_index",), {"topk": 0}, ValueError, "topk: .*0"),
    (("paged_index",), {"physical": 1}, TypeError, "physical: expected bool"),
    # queries
    (("paged_index",), {"q": zeros(4, 2, 32)}, TypeError, "q: .*e4m3fn, got.*float32"),
    (("paged_index",), {"q": zeros(4, 32, dtype=FP8)}, ValueError, r"q: .*\[4, 32\]"),
    (("paged_index",), {"q": zeros(4, 2, 48, dtype=FP8)}, ValueError, "(pages|pooled_k): .*48"),
    (("paged_index",), {"q": zeros(4, 0, 32, dtype=FP8), "weights": zeros(4, 0)}, ValueError,
     "heads"),
    (("paged_index",), {"weights": zeros(4, 3)}, ValueError, r"weights: .*\[4, 3\]"),
    (("paged_index",), {"weights": zeros(4, 2, dtype=BF16)}, TypeError, "weights: .*bfloat16"),
    (("paged_index",), {"pooled": zeros(2, 2, 2)[:1]}, TypeError, "pooled: .*two tensors"),
    (("paged_index",), {"pooled": None}, TypeError, "pooled: .*two tensors.*None"),
]  # fmt: skip


def call(op: str, device: str = "cpu", **changes: Any) -> Any:
    """Run the good call of an op with some arguments changed."""
    paged = small()
    slots = {"pooled_k": paged.pooled_k, "pooled_scale": paged.pooled_scale}
    arguments = {**paged.where(), "pages": paged.pages, **slots}
    if op == "paged_index":
        arguments |= {"q": paged.case.q, "weights": paged.case.weights, "next_n": 2}
        arguments |= {"block_topk": 4, "topk": 50}
    arguments |= changes
    on = {n: v.to(device) if isinstance(v, Tensor) else v for n, v in arguments.items()}
    if op == "paged_index":
        pair = on.pop("pooled_k"), on.pop("pooled_scale")
        on.setdefault("pooled", pair)
    return getattr(hisa, op)(**on)


def name_of(bad: Any) -> str:
    """Return a test id."""
    if not isinstance(bad, dict):
        return bad if bad in BOTH else ""
    return "-".join(
        f"{name}={list(value.shape) if isinstance(value, Tensor) else value}"
        for name, value in bad.items()
    )


@pytest.mark.parametrize(
    ("op", "changes", "error", "message"),
    [(op, *bad) for ops, *bad in BAD for op in ops],
    ids=name_of,
)
def test_bad_call(
    op: str, changes: dict[str, Any], error: type[Exception], message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """It raises as specified: with data, while values are checked, and without data."""
    assert small().pages.shape == (PAGES, SIZE)
    for checking in ("0", "1"):
        monkeypatch.setenv("HISA_CHECK", checking)
        call(op)
        with pytest.raises(error, match=message):
            call(op, **changes)
    call(op, "meta")
    with pytest.raises(error, match=message.split(":")[0]):
        call(op, "meta", **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seq_lens": int32([300, 1000])}, "seq_lens: .*got 1000 in sequence 1"),
        ({"seq_lens": int32([2**31 - 1, 0])}, "seq_lens: .*in sequence 0"),
        ({"entry": (1, 12, -1)}, "block_table: .*205 tokens of sequence 1, got -1 at entry 12"),
        ({"entry": (0, 3, PAGES)}, "block_table: .*sequence 0, got 35 at entry 3"),
    ],
    ids=str,
)
def test_check_names_the_sequence(
    changes: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """HISA_CHECK=1 says which sequence its pages do not hold; without, the call is harmless."""
    if "entry" in changes:
        row, entry, page = changes["entry"]
        changes = {"block_table": small().block_table.clone()}
        changes["block_table"][row, entry] = page
    for op in BOTH:
        monkeypatch.setenv("HISA_CHECK", "0")
        call(op, **changes)
        monkeypatch.setenv("HISA_CHECK", "1")
        with pytest.raises(ValueError, match=message):
            call(op, **changes)
        call(op, seq_lens=int32([300, -4]))  # a padded entry


def test_the_slots_version_moves() -> None:
    """Autograd notices that slots have been written; no gradient comes out of them."""
    paged = small(torch.float32)
    pooled_k, pooled_scale = new_slots(len(paged.pages), 32, torch.float32)
    before = pooled_k._version, pooled_scale._version
    hisa.paged_pool(paged.pages.requires_grad_(), pooled_k, pooled_scale, **paged.where())
    assert (pooled_k._version, pooled_scale._version) == (before[0] + 1, before[1] + 1)
    assert not pooled_k.requires_grad
    with torch.inference_mode():
        slots = [t.clone() for t in (pooled_k, pooled_scale)]
        hisa.paged_pool(paged.pages, slots[0], slots[1], **paged.where())


@pytest.mark.parametrize("dynamic", [True, False])
def test_compiled_decode_step(family: Family, dynamic: bool) -> None:
    """Pool, then select, in one graph: the same bytes, and the slots written in place."""

    def step(q: Tensor, pages: Tensor, weights: Tensor, pooled_k: Tensor, pooled_scale: Tensor,
             table: Tensor, lengths: Tensor) -> Tensor:  # fmt: skip
        hisa.paged_pool(pages, pooled_k, pooled_scale, block_table=table, seq_lens=lengths,
                        new_tokens=None, block_size=32)  # fmt: skip
        return hisa.paged_index(q, pages, weights, block_table=table, seq_lens=lengths,
                                pooled=(pooled_k, pooled_scale), next_n=2, block_size=32,
                                block_topk=4, topk=50)  # fmt: skip

    torch._dynamo.reset()
    compiled: Any = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for lengths in ([300, 205], [310, 64]):
        paged = small(lengths=lengths, **shaped(H=2, D=32))
        slots = [t.clone() for t in paged.pooled()]
        got = compiled(paged.case.q, paged.pages, paged.case.weights, *slots, paged.block_table,
                       paged.seq_lens)  # fmt: skip
        pooled = paged.pool(family)
        assert torch.equal(got, pooled.index(family).indices)
        for mine, theirs in zip(slots, pooled.pooled(), strict=True):
            assert same_bytes(mine, theirs)
