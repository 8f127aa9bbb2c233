"""T4: the output contract. Every test applies the checker; here it is checked itself."""

from __future__ import annotations

import pytest
import torch

from tests import oracle
from tests.builders import exact_case, random_case, shaped
from tests.checker import Result, assert_same, assert_valid_output
from tests.families import REFERENCE


def corrupt(result: Result, what: str) -> Result:
    """Return a result with one mistake."""
    indices, scores = result.indices.clone(), result.scores.clone()
    if what == "swapped":
        indices[0, [0, 1]] = indices[0, [1, 0]]
    elif what == "repeated":
        indices[0, 1] = indices[0, 0]
    elif what == "outside":
        indices[0, 15] = 299
    elif what == "lost":
        indices[0, 15], scores[0, 15] = -1, -torch.inf
    elif what == "tail":
        indices[1, -1] = 0
    elif what == "tail score":
        scores[1, -1] = 0
    elif what == "negative":
        indices[0, 0] = -1
    elif what == "narrow":
        return Result(indices[:, :-1].contiguous(), scores[:, :-1].contiguous())
    elif what == "int64":
        return Result(indices.long(), scores)
    return Result(indices, scores)


@pytest.mark.parametrize(
    "what",
    ["swapped", "repeated", "outside", "lost", "tail", "tail score", "negative", "narrow", "int64"],
)
def test_checker_rejects(what: str) -> None:
    """Positive controls of the checker: each way to break the output contract is noticed."""
    ke = torch.tensor([200, 9], dtype=torch.int32)
    case = random_case(0, torch.float32, M=2, ke=ke)
    good = REFERENCE.index(case)
    assert_valid_output(case, good)
    with pytest.raises(AssertionError):
        assert_valid_output(case, corrupt(good, what))


def test_comparison_rejects_one_wrong_token() -> None:
    """Positive control of `assert_same`: one token or one score bit of one row."""
    case = exact_case(3, M=4, N=200, B=8, topk=8, ks=None, **shaped(H=2))
    expected, got = oracle.index(case), REFERENCE.index(case)
    assert_same(got, expected)
    got.indices[2, 3] += 1
    with pytest.raises(AssertionError, match="row 2, slot 3"):
        assert_same(got, expected)
    got.indices[2, 3] -= 1
    got.scores[1, 0] = torch.nextafter(got.scores[1, 0], torch.tensor(torch.inf))
    with pytest.raises(AssertionError, match="row 1, slot 0"):
        assert_same(got, expected)
