"""The inputs of `hisa.testing`, and other indexers' selections brought into the form of hisa's.

Catches inputs that are not what they are said to be: sums that are rounded after all, ties that are
none, a needle that pruning keeps, seeds that depend on the device.
"""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import hisa
from hisa.testing import (
    assert_matches_flat,
    exact_inputs,
    needle_inputs,
    packed_inputs,
    random_inputs,
    to_selection,
)
from hisa.testing.rounding import score_bounds
from tests.builders import int32
from tests.case import same_bytes
from tests.numeric import DTYPES
from tests.test_testing import ones


def test_exact_inputs_have_one_answer(device: str) -> None:
    """Many ties, and every implementation selects the same tokens."""
    for dtype in DTYPES:
        inputs = exact_inputs(0, M=16, N=500, H=4, D=64, dtype=dtype, device=device)
        indices, scores = hisa.flat_index(**inputs, topk=50, return_scores=True)
        want = hisa.reference.flat_index(**inputs, topk=50, return_scores=True)
        assert same_bytes(indices.cpu(), want[0].cpu()) and torch.equal(scores, want[1])
        assert all(len(row.unique()) < 40 for row in scores)
        exact, _ = score_bounds(inputs["q"], inputs["k"], inputs["weights"], ones(inputs))
        assert (exact == exact.float()).all()
    for heads, depth in ((1, 1040), (1025, 1024)):
        with pytest.raises(ValueError, match="H, D: expected"):
            exact_inputs(0, H=heads, D=depth)


def test_inputs_are_the_same_everywhere(device: str) -> None:
    """A seed names the inputs, whatever the device; windows are the causal ones."""
    for build in (random_inputs, exact_inputs):
        here, there = build(3, M=9, N=20, dtype=DTYPES[3]), build(3, M=9, N=20, dtype=DTYPES[3],
                                                                  device=device)  # fmt: skip
        assert all(same_bytes(here[name], there[name].cpu()) for name in here)  # type: ignore[literal-required]
        assert not same_bytes(here["q"], build(4, M=9, N=20, dtype=DTYPES[3])["q"])
        assert here["ke"].tolist() == list(range(12, 21)) and here["k_scale"] is not None
    every = random_inputs(3, M=2, N=20, causal=False)
    assert every["ks"].tolist() == [0, 0] and every["ke"].tolist() == [20, 20]
    packed = packed_inputs(0, [(2, 3), (0, 4), (3, 1)], device=device)
    assert packed["cu_seqlens_k"].tolist() == [0, 3, 7, 8]
    assert packed["ks"].tolist() == [0, 0, 7, 7, 7] and packed["ke"].tolist() == [2, 3, 7, 7, 8]


def test_to_selection(device: str) -> None:
    """Absolute positions in any order and dtype; what is outside goes, what comes twice stays."""
    tokens = torch.tensor([[9, 3, 40, 5, -1], [9, 9, 2, 8, 3]], device=device)
    for dtype in (torch.int64, torch.int32, torch.int16, torch.int8):
        got = to_selection(tokens.to(dtype), keys=10, ks=int32([0, 3]), ke=int32([9, 10]))
        assert got.dtype == torch.int32 and got.device == tokens.device
        assert got.tolist() == [[3, 5, -1, -1, -1], [0, 5, 6, 6, -1]]
    with pytest.raises(TypeError, match="tokens: expected"):
        to_selection(tokens.float(), keys=10)
    with pytest.raises(ValueError, match="tokens: expected"):
        to_selection(tokens[0], keys=10)


def test_the_needle_is_what_pruning_loses(device: str) -> None:
    """Flat takes it, a small budget does not, and the message names it."""
    inputs = needle_inputs(300, N=1024, M=3, device=device)
    assert hisa.flat_index(**inputs, topk=1).tolist() == [[300]] * 3
    for row in hisa.index(**inputs, block_topk=4, topk=64).tolist():
        assert 300 not in row
    with pytest.raises(AssertionError, match=r"row 0, .*lacks token 300 \(reference score 80,"):
        assert_matches_flat(hisa.index(**inputs, block_topk=4, topk=64), **inputs)
    assert_matches_flat(hisa.index(**inputs, block_topk=8, topk=64), **inputs)
    small = needle_inputs(43, block_size=8, N=128, device=device)
    assert 43 not in hisa.index(**small, block_size=8, block_topk=4, topk=32).tolist()[0]
    for token in (0, 127, 896, 1023, 1024, -1):
        with pytest.raises(ValueError, match="token: expected"):
            needle_inputs(token, N=1024)


def test_it_is_imported_on_demand() -> None:
    """`import hisa` leaves it alone."""
    code = "import sys, hisa; assert 'hisa.testing' not in sys.modules; import hisa.testing"
    subprocess.run([sys.executable, "-c", code], check=True)
