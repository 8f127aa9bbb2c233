"""`hisa.testing`: right answers pass, each seeded fault fails with a message that names it.

Catches a check that sees no fault, or sees one in a tie within rounding; windows, segments and
unused slots taken for something else; and inputs that are not what they are said to be.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import hisa
from hisa.testing import (
    assert_matches_flat,
    assert_valid_indices,
    exact_inputs,
    flat,
    form,
    needle_inputs,
    packed_inputs,
    random_inputs,
    to_selection,
)
from hisa.testing.rounding import score_bounds
from tests.builders import exact_case, int32, random_case
from tests.numeric import DTYPES, short_name

with_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=short_name)


def without(inputs: Any, *names: str) -> dict[str, Any]:
    return {name: value for name, value in inputs.items() if name not in names}


def windows(inputs: Any) -> dict[str, Any]:
    """What `assert_valid_indices` wants to know of a call."""
    named = {name: inputs.get(name) for name in ("ks", "ke", "cu_seqlens_k")}
    return {"keys": len(inputs["k"]), **named}


def torch_topk(inputs: Any, topk: int) -> Tensor:
    """Select as Hugging Face's indexer does: masked scores, `torch.topk`, absolute positions."""
    q, k, weights = inputs["q"].float(), inputs["k"].float(), inputs["weights"]
    scores: Tensor = (weights[:, None] @ (q @ k.T).relu())[:, 0]
    if inputs["k_scale"] is not None:
        scores = scores * inputs["k_scale"]
    key = torch.arange(len(k), device=k.device)
    outside = (key < inputs["ks"][:, None]) | (key >= inputs["ke"][:, None])
    return scores.masked_fill(outside, -torch.inf).topk(min(topk, len(k)), dim=1).indices.int()


def calls(dtype: torch.dtype, device: str) -> list[Any]:
    """Inputs with ties and without, segments, ragged tails and empty windows."""
    at: dict[str, Any] = {"dtype": dtype, "device": device, "H": 3, "D": 32}
    return [
        random_inputs(0, M=20, N=301, **at),
        random_inputs(1, M=3, N=50, causal=False, **at),
        random_inputs(2, M=40, N=30, **at),  # 10 rows see nothing
        random_inputs(3, M=0, N=30, **at),
        random_inputs(4, M=4, N=0, **at),
        packed_inputs(5, [(5, 5), (3, 90), (0, 7), (4, 1), (1, 200)], **at),
        exact_inputs(6, M=20, N=301, **at),
        needle_inputs(70, block_size=16, M=2, N=200, **at),
    ]


@with_dtypes
def test_right_answers_pass(dtype: torch.dtype, device: str) -> None:
    """Of `index` within its budget, `flat_index`, the reference and `torch.topk`, with scores."""
    budget: dict[str, Any] = {"block_size": 8, "block_topk": 40, "topk": 64}
    for inputs in calls(dtype, device):
        flat_inputs = without(inputs, "cu_seqlens_k")
        for indices, scores in (
            hisa.index(**inputs, **budget, return_scores=True),
            hisa.flat_index(**flat_inputs, topk=64, return_scores=True),
            hisa.reference.index(**inputs, **budget, return_scores=True),
        ):
            assert_valid_indices(indices, topk=64, scores=scores, **windows(inputs))
            assert_matches_flat(indices, **inputs, topk=64, scores=scores)
        theirs = to_selection(torch_topk(inputs, 64), keys=len(inputs["k"]),
                              ks=inputs["ks"], ke=inputs["ke"])  # fmt: skip
        assert_matches_flat(theirs, **inputs)


@pytest.mark.parametrize("seed", range(40))
def test_valid_beyond_the_budget(seed: int, device: str) -> None:
    """The form of pruned selections is known as well; wild windows and segments are clamped."""
    case = exact_case(seed, budget=3e5)
    on = case.to(device)
    result = hisa.index(on.q, on.k, on.weights, **on.index_args(), return_scores=True)
    sizes: dict[str, Any] = {"block_size": case.block_size, "block_topk": case.block_topk}
    call = {"keys": len(on.k), "ks": on.ks, "ke": on.ke, "cu_seqlens_k": on.cu_seqlens_k}
    assert_valid_indices(result[0], topk=case.topk, scores=result[1], **call, **sizes)
    indices, scores = hisa.flat_index(on.q, on.k, on.weights, **on.flat_args(), return_scores=True)
    assert_matches_flat(indices, on.q, on.k, on.weights, **on.flat_args(), scores=scores)


def faulty(indices: Tensor, scores: Tensor, what: str) -> tuple[Tensor, Tensor]:
    """Return a selection with one fault; row 1 has 9 tokens, all others 16."""
    indices, scores = indices.clone(), scores.clone()
    if what == "unsorted":
        indices[2, [3, 4]] = indices[2, [4, 3]]
    elif what == "repeated":
        indices[2, 4] = indices[2, 3]
    elif what == "outside":
        indices[0, 15] = 200
    elif what == "absolute":
        indices[2] += 100
    elif what == "hole":
        indices[2, 7] = -1
    elif what == "lost":
        indices[1, 8] = -1
    elif what == "tail":
        indices[1, 12] = 8
    elif what == "-2":
        indices[1, 12] = -2
    elif what == "tail score":
        scores[1, 12] = 0
    elif what == "narrow":
        indices = indices[:, :-1]
    elif what == "rows":
        indices = indices[:-1]
    elif what == "int64":
        indices = indices.long()
    elif what == "score dtype":
        scores = scores.double()
    return indices, scores


FAULTS = [
    ("unsorted", r"row 2, window \[100, 300\): slot 4 holds \d+ after \d+, expected ascending"),
    ("repeated", r"row 2, .*: slot 4 holds (\d+) after \1, expected ascending"),
    ("outside", r"row 0, window \[0, 200\): slot 15 holds 200, outside"),
    ("absolute", r"row 2, .*: slot \d+ holds 2\d\d, outside of the window"),
    ("hole", "row 2, .*: slot 7 holds -1, expected a token in each of the first 16 slots"),
    ("lost", "row 1, .*: slot 8 holds -1, expected a token in each of the first 9 slots"),
    ("tail", "row 1, .*: slot 12 holds 8, expected -1 from slot 9 on"),
    ("-2", "row 1, .*: slot 12 holds -2, expected -1 from slot 9 on"),
    ("tail score", "row 1, .*: slot 12 holds -1 with the score 0, expected the score -inf"),
    ("narrow", r"indices: expected \[4, 16\] int32, got \[4, 15\] int32"),
    ("rows", r"indices: expected \[4, 16\] int32, got \[3, 16\] int32"),
    ("int64", r"indices: expected \[4, 16\] int32, got \[4, 16\] int64"),
    ("score dtype", r"scores: expected \[4, 16\] float32, got \[4, 16\] float64"),
]


@pytest.mark.parametrize(("what", "message"), FAULTS, ids=[what for what, _ in FAULTS])
def test_faults_of_form(what: str, message: str, device: str) -> None:
    """Both assertions name the first row at fault and what is wrong there."""
    seen: dict[str, Any] = {"ks": int32([0, 0, 100, 0]), "ke": int32([200, 9, 300, 300])}
    case = random_case(0, torch.float32, M=4, N=300, **seen).to(device)
    call = (case.q, case.k, case.weights)
    args = case.flat_args()
    indices, scores = hisa.flat_index(*call, **args, return_scores=True)
    seen.update(keys=300, topk=16)
    assert_valid_indices(indices, scores=scores, **seen)
    indices, scores = faulty(indices, scores, what)
    with pytest.raises(AssertionError, match=message):
        assert_valid_indices(indices, scores=scores, **seen)
    with pytest.raises(AssertionError, match=message):
        assert_matches_flat(indices, *call, **args, scores=scores)


def test_too_many_blocks(device: str) -> None:
    """Right in number and order, but not from so few blocks; and too few tokens for the blocks."""
    indices = int32([[0, 8, 16, 24, 32, 40, -1, -1]]).to(device)
    sizes: dict[str, Any] = {"keys": 48, "topk": 6, "block_size": 8}
    assert_valid_indices(indices[:, :6], **sizes, block_topk=6)
    with pytest.raises(AssertionError, match=r"row 0.*: tokens of 6 blocks, expected at most 5"):
        assert_valid_indices(indices[:, :6], **sizes, block_topk=5)
    # of [3, 45) two blocks are kept, of 5 tokens each
    ends = torch.cat([torch.arange(5), torch.arange(37, 42)])[None].int().to(device)
    seen: dict[str, Any] = {"ks": int32([3]), "ke": int32([45]), **sizes, "topk": 10}
    assert_valid_indices(ends, **seen, block_topk=2)
    # of [3, 48), whose last block is complete, 13
    more = torch.cat([torch.arange(5), torch.arange(37, 45)])[None].int().to(device)
    assert_valid_indices(more, **{**seen, "ke": int32([48]), "topk": 13}, block_topk=2)
    with pytest.raises(AssertionError, match=r"slot 9 holds -1, expected a token in .* first 10"):
        assert_valid_indices(torch.where(ends == 41, -1, ends), **seen, block_topk=2)


def ones(inputs: Any) -> Tensor:
    """The key scales."""
    k, scale = inputs["k"], inputs["k_scale"]
    return torch.ones(len(k), device=k.device) if scale is None else scale


def selected(device: str, **fields: Any) -> tuple[Any, Tensor, Tensor]:
    """A call of 8 causal rows, and its flat selection with scores."""
    inputs = random_inputs(0, M=8, N=400, H=4, D=64, device=device, **fields)
    return inputs, *hisa.flat_index(**inputs, topk=32, return_scores=True)


def swapped(inputs: Any, indices: Tensor, row: int, gap: int) -> tuple[Tensor, int, int]:
    """Put the token that ranks `gap` behind the last selected one into that one's place."""
    every, scores = hisa.flat_index(**inputs, topk=400, return_scores=True)
    order = scores[row].argsort(descending=True, stable=True)
    out, into = int(every[row, order[31]]), int(every[row, order[31 + gap]])
    indices = indices.clone()
    indices[row] = torch.where(indices[row] == out, into, indices[row]).sort().values
    return indices, out, into


@with_dtypes
def test_one_token_below_the_threshold(dtype: torch.dtype, device: str) -> None:
    """The next best instead of the last selected: the message has tokens, scores and threshold."""
    inputs, indices, _ = selected(device, dtype=dtype)
    for row in range(8):
        wrong, out, into = swapped(inputs, indices, row, 1)
        with pytest.raises(AssertionError) as raised:
            assert_matches_flat(wrong, **inputs)
        exact, eps = score_bounds(inputs["q"][row : row + 1], inputs["k"],
                                  inputs["weights"][row : row + 1], ones(inputs))  # fmt: skip
        message = str(raised.value)
        assert message.startswith(f"row {row}, window [0, {393 + row}): has token {into} ")
        assert f"lacks token {out} (reference score {float(exact[0, out]):.9g}," in message
        assert f"score 32 of {393 + row}, is {float(exact[0, out]):.9g}" in message
        assert eps[0, out] < 1e-3 and message.count("allowed error") == 2


def test_pruned_selections_are_not_flat(device: str) -> None:
    """A budget that does not cover the windows; and a topk that is not that of the selection."""
    inputs, indices, _ = selected(device)
    pruned = hisa.index(**inputs, block_size=16, block_topk=6, topk=32)
    with pytest.raises(AssertionError, match=r"row 0, .*has token .* but lacks token"):
        assert_matches_flat(pruned, **inputs)
    with pytest.raises(AssertionError, match=r"indices: expected \[8, 33\]"):
        assert_matches_flat(indices, **inputs, topk=33)
    padded = torch.nn.functional.pad(indices, (0, 1), value=-1)
    with pytest.raises(AssertionError, match="slot 32 holds -1, expected a token"):
        assert_matches_flat(padded, **inputs)


def pair(low: float, high: float, device: str) -> dict[str, Any]:
    """Two tokens with these scores, in one head and 16 channels."""
    k = torch.zeros(2, 16)
    k[:, 0] = torch.tensor([low, high])
    q = torch.zeros(1, 1, 16)
    q[0, 0, 0] = 1
    call = {"q": q, "k": k, "weights": torch.ones(1, 1)}
    return {name: value.to(device) for name, value in call.items()}


def test_near_ties(device: str) -> None:
    """A token worse by less than both bounds is accepted, one worse by more is not."""
    bound = 17 * 2.0**-24 * (4 if device == "cuda" else 1) + 3 * 2.0**-24  # of each score, about
    worse = int32([[0]]).to(device)
    for gap, right in ((0, True), (1.6 * bound, True), (2.4 * bound, False), (0.1, False)):
        call = pair(1.0, 1 + gap, device)
        assert_matches_flat(int32([[1]]).to(device), **call)
        if right:
            assert_matches_flat(worse, **call)
        else:
            with pytest.raises(AssertionError, match=r"has token 0 .* but lacks token 1"):
                assert_matches_flat(worse, **call)
            assert_matches_flat(worse, **call, dot_roundoff=2.0**-7)


def test_scores_below_zero_have_no_rounding(device: str) -> None:
    """Dot products that are negative whatever their rounding score exactly 0."""
    call = pair(-1.0, -2.0, device)
    exact, eps = score_bounds(call["q"], call["k"], call["weights"], torch.ones(2, device=device))
    assert (exact == 0).all() and (eps < 1e-30).all()
    with pytest.raises(AssertionError, match="lacks token 1"):
        assert_matches_flat(int32([[0]]).to(device), **pair(-1.0, 1e-20, device))


def test_wrong_scores(device: str) -> None:
    """A score off by more than its bound, and one that only looks like the next."""
    inputs, indices, scores = selected(device)
    wrong = scores.clone()
    wrong[3, 5] += 1e-3
    token = int(indices[3, 5])
    message = f"row 3, .*: the score .* of token {token} .*reference score .*allowed error.* wrong"
    with pytest.raises(AssertionError, match=message):
        assert_matches_flat(indices, **inputs, scores=wrong)
    with pytest.raises(AssertionError, match=r"row 0, .*: the score .* is wrong"):
        assert_matches_flat(indices, **inputs, scores=scores.roll(1, dims=1))
    wrong[3, 5] = torch.nan
    with pytest.raises(AssertionError, match=r"row 3, .*: the score nan"):
        assert_matches_flat(indices, **inputs, scores=wrong)


def test_special_values(device: str) -> None:
    """NaN ranks with -inf, an infinite score is the best, and what may overflow bounds nothing."""
    inputs, _, _ = selected(device)
    inputs["k_scale"] = torch.ones(400, device=device)
    inputs["k_scale"][7], inputs["k_scale"][9] = torch.nan, torch.inf
    inputs["k"][11], inputs["k"][13, 0] = torch.nan, torch.inf
    indices, scores = hisa.flat_index(**inputs, topk=32, return_scores=True)
    assert_matches_flat(indices, **inputs, scores=scores)
    every, scores = hisa.flat_index(**inputs, topk=400, return_scores=True)
    assert_matches_flat(every, **inputs, scores=scores)
    wrong, _, _ = swapped(inputs, indices, 2, 300)
    with pytest.raises(AssertionError, match="row 2, "):
        assert_matches_flat(wrong, **inputs)
    nan = torch.where(indices == indices[:, :1], 7, indices).sort(dim=1).values
    with pytest.raises(AssertionError, match=r"has token 7 \(reference score -inf, "):
        assert_matches_flat(nan, **inputs)
    huge = pair(2e38, 3e38, device)
    huge["q"] *= 2
    for scale in (1.0, 1e-9):  # the score overflows, or only the dot product
        huge["k_scale"] = torch.full((2,), scale, device=device)
        assert_matches_flat(int32([[0]]).to(device), **huge)


def test_chunks_change_nothing(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One row and seven keys at a time: the same answers, the same row is named."""
    monkeypatch.setattr(form, "CHUNK_BYTES", 1)
    monkeypatch.setattr(flat, "KEYS", 7)
    test_one_token_below_the_threshold(torch.float32, device)
    test_right_answers_pass(torch.bfloat16, device)
    test_faults_of_form("hole", FAULTS[4][1], device)


BAD_CALLS: list[tuple[Callable[[Any, Any], object], type[Exception], str]] = [
    (lambda c, i: assert_matches_flat(i, **{**c, "ks": c["ks"].long()}), TypeError, "ks: expected"),
    (lambda c, i: assert_matches_flat(i, **{**c, "q": c["q"][:, :, 1:]}), ValueError, "q: "),
    (lambda c, i: assert_matches_flat(i.tolist(), **c), TypeError, "indices: expected Tensor"),
    (lambda c, i: assert_valid_indices(i, keys=9, topk=4, ks=c["ks"].long()), TypeError, "ks:"),
    (lambda c, i: assert_valid_indices(i, keys=9, topk=32, ks=c["ks"], ke=c["ke"][1:]), ValueError,
     r"ke: expected \[8\] int32, got \[7\]"),
    (lambda c, i: assert_valid_indices(i, keys=9, topk=4, block_size=8), ValueError, "both or"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "message"), BAD_CALLS)
def test_bad_calls(call: Any, error: type[Exception], message: str, device: str) -> None:
    """Mistakes in the call itself are not assertion errors."""
    inputs, indices, _ = selected(device)
    with pytest.raises(error, match=message):
        call(inputs, indices)
