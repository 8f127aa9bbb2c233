"""`hisa.explain`: its blocks, ranks and losses against the oracle and against the operators.

Catches a kept set that is not the one that `hisa.index` keeps, blocks that are shifted where a
segment starts, ranks that forget ties, scores that are not those of the operators, and a window
that is read differently.
"""

from __future__ import annotations

import math
import sys
from typing import Any

import numpy as np
import pytest
import torch

import hisa
from hisa.agreement import Explanation
from hisa.agreement.explanation import MOST_LOST, MOST_MARKS
from tests import builders, oracle
from tests.builders import causal, exact_case, int32, random_case, shaped
from tests.case import Case
from tests.numeric import FP8, decode
from tests.test_agreement import hot_token


def explain(case: Case, row: int = 0, device: str = "cpu", **changes: Any) -> Explanation:
    """Explain a row of a case, under other settings if wanted."""
    on = case.to(device)
    arguments = {name: value for name, value in on.index_args().items() if name != "pooled"}
    return hisa.explain(on.q, on.k, on.weights, row=row, **{**arguments, **changes})


def expected_blocks(case: Case, row: int) -> list[tuple[Any, ...]]:
    """Return start, tokens, coarse score, rank, fate, flat's tokens, hisa's and the best score."""
    seen = oracle.window(case, row)
    if seen is None:
        return []
    kept = oracle.index(case).kept[row]
    starts = oracle.candidates(case, seen)
    pooled, pooled_scale, _ = oracle.pool_keys(case)
    q, k, weights = (decode(t)[i] for t, i in ((case.q, row), (case.k, ...), (case.weights, row)))
    slots = [oracle.slot_of(case, start) for start in starts[1:-1]]
    coarse = oracle.exact_score(q, pooled[slots], weights, pooled_scale[slots]).tolist()
    order = sorted(range(len(coarse)), key=lambda i: (-coarse[i], i))

    scores = oracle.exact_score(q, k, weights, oracle.key_scales(case))
    flat = set(ranking(case, row))
    chosen = {int(i) + seen.start for i in oracle.index(case).indices[row] if i >= 0}
    blocks = []
    for i, start in enumerate(starts):
        tokens = set(range(start, start + case.block_size)) & set(range(seen.start, seen.end))
        forced = start in (starts[0], starts[-1])
        fate = "kept" if start in kept else "dropped"
        if forced:
            fate = "sink" if i == 0 else "local"
        rank = (None, None) if forced else (coarse[i - 1], order.index(i - 1) + 1)
        blocks.append((start, len(tokens), *rank, fate, len(tokens & flat), len(tokens & chosen),
                       scores[list(tokens)].max()))  # fmt: skip
    return blocks


def ranking(case: Case, row: int) -> list[int]:
    """Return flat's tokens, best first."""
    seen = oracle.window(case, row)
    if seen is None:
        return []
    scores = oracle.exact_score(
        decode(case.q)[row], decode(case.k), decode(case.weights)[row], oracle.key_scales(case)
    )
    return sorted(range(seen.start, seen.end), key=lambda i: (-scores[i], i))[: case.topk]


CASES = [seed for seed in range(64) if exact_case(seed, budget=3e5).q.shape[0]]


@pytest.mark.parametrize("seed", CASES)
def test_blocks_and_losses(seed: int, device: str) -> None:
    """Of calls with ties, packed segments, ragged tails and empty windows."""
    case = exact_case(seed, budget=3e5)
    for row in range(case.q.shape[0]):
        found = explain(case, row, device)
        seen = oracle.window(case, row)
        assert found.window == ((0, 0) if seen is None else (seen.start, seen.end))
        assert list(found.blocks) == expected_blocks(case, row)
        kept = [block.start for block in found.blocks if block.fate != "dropped"]
        assert kept == oracle.index(case).kept[row]

        ranked = ranking(case, row)
        chosen = set(found.selected.tolist())
        assert found.flat.tolist() == sorted(ranked)
        lost = [(token, rank) for rank, token in enumerate(ranked, 1) if token not in chosen]
        assert [(token.token, token.rank) for token in found.lost] == lost
        assert found.recall == pytest.approx(1 - len(lost) / max(len(ranked), 1))

        scored = [b.coarse for b in found.blocks if b.fate == "kept" and b.coarse is not None]
        pruned = len(found.blocks) > case.block_topk > 2
        assert found.bar == (min(scored) if pruned else None)
        scores = dict(zip(found.flat.tolist(), found.flat_scores.tolist(), strict=True))
        for token in found.lost:
            block = found.blocks[token.block]
            assert block.fate == "dropped" and block.start <= token.token
            assert token.token < block.start + case.block_size
            assert token.score == scores[token.token] and token.coarse_rank == block.rank
            assert block.coarse is not None
            assert token.below == (None if found.bar is None else found.bar - block.coarse)


@pytest.mark.skipif(builders.shapes != "any", reason="scores of many heads and channels tie less")
def test_the_inputs_say_something() -> None:
    """Many rows of the calls above lose tokens, some are empty, some tie with the bar."""
    cases = [exact_case(seed, budget=3e5) for seed in CASES]
    found = [explain(case, row) for case in cases for row in range(case.q.shape[0])]
    assert sum(len(e.lost) > 0 for e in found) > 30 and sum(not e.blocks for e in found) > 10
    assert sum(any(lost.below == 0 for lost in e.lost) for e in found) > 5
    assert sum(any(lost.below is None for lost in e.lost) for e in found) > 5
    starts = [e.blocks[0].start % e.block_size for e in found if e.blocks]
    assert sum(start > 0 for start in starts) > 10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, FP8])
@pytest.mark.parametrize("pooling", ["mean", "max"])
def test_the_kept_blocks_are_those_of_index(dtype: torch.dtype, pooling: str, device: str) -> None:
    """On sums that round: all tokens of these blocks are what index selects, given room for all.

    Flat's tokens and scores and the selection are the operators', to the bit.
    """
    case = causal(random_case(5, dtype, M=12, N=700, topk=40, pooling=pooling, block_topk=6))
    on = case.replace(cu_seqlens_k=int32([0, 5, 700]), ks=int32([7] * 12)).to(device)
    arguments = on.index_args()
    everything = hisa.index(on.q, on.k, on.weights, **{**arguments, "topk": 6 * 8}).cpu()
    chosen = hisa.index(on.q, on.k, on.weights, **arguments).cpu()
    flat, scores = hisa.flat_index(on.q, on.k, on.weights, **on.flat_args(), return_scores=True)
    for row in range(12):
        found = explain(on, row, device)
        tokens = [
            token
            for block in found.blocks
            if block.fate != "dropped"
            for token in range(block.start, block.start + 8)
            if token in range(*found.window)
        ]
        assert len(found.blocks) > 80 and found.lost
        assert [token - 7 for token in tokens] == [i for i in everything[row].tolist() if i >= 0]
        assert (found.selected - 7).tolist() == [i for i in chosen[row].tolist() if i >= 0]
        assert (found.flat - 7).tolist() == flat[row].tolist()
        assert torch.equal(found.flat_scores, scores[row].cpu())


def test_one_hot_token_in_a_cold_block(device: str) -> None:
    """What hisa loses is flat's first token, and the block's coarse score is why."""
    found = explain(hot_token(1), device=device)
    (lost,) = found.lost
    block = found.blocks[5]
    assert (lost.token, lost.rank, lost.block) == (43, 1, 5) and found.recall == 0
    assert block.fate == "dropped" and (block.rank, block.coarse) == (14, 0) and block.best == 20
    assert found.bar is not None and lost.below == found.bar > 0 and lost.coarse_rank == 14
    text = str(found)
    assert "Lost: 1 of flat's 1 tokens" in text and f"{found.bar:.4g} below the bar" in text
    assert "S # # . . x . . . . . . . . . L" in text


def test_all_is_kept_within_the_budget(device: str) -> None:
    """With at most block_topk blocks there is no bar, and nothing is lost."""
    found = explain(hot_token(), device=device, block_topk=16)
    assert [block.fate for block in found.blocks] == ["sink", *["kept"] * 14, "local"]
    assert not found.lost and found.recall == 1 and found.bar is None
    assert "Nothing is lost" in str(found)
    only = explain(hot_token().replace(ks=int32([3]), ke=int32([7])), device=device)
    assert [(b.start, b.tokens, b.fate) for b in only.blocks] == [(0, 4, "sink")]
    assert "\n  S\n  S sink\n" in str(only) and only._repr_html_().count("<span") == 1
    two = explain(hot_token().replace(ks=int32([6]), ke=int32([9])), device=device)
    assert [(b.start, b.tokens, b.fate) for b in two.blocks] == [(0, 2, "sink"), (8, 1, "local")]


@pytest.mark.parametrize("changes", [
    {"ks": int32([50]), "ke": int32([50])},
    {"ks": int32([2**31 - 1]), "ke": int32([-(2**31)])},
    {"ks": int32([3]), "cu_seqlens_k": int32([10, 128])},
    {"k": torch.zeros(0, 16)},
])  # fmt: skip
def test_an_empty_window(changes: dict[str, Any], device: str) -> None:
    """Is said to be one."""
    found = explain(hot_token().replace(**changes), device=device)
    assert found.window == (0, 0) and not found.blocks and found.recall == 1
    assert len(found.flat) == len(found.flat_scores) == len(found.selected) == 0
    for text in (str(found), found._repr_html_()):
        assert "row 0 has an empty window" in text


def coarse_scores(values: list[float]) -> Case:
    """Return a call whose blocks have these scores, with a block of zeros before and after them."""
    k = torch.zeros(8 * (len(values) + 2), 16)
    k[8:-8, 0] = torch.tensor(values).repeat_interleave(8)
    q = torch.ones(1, 2, 16)
    q[0, 0, 0] = q[0, 1, 1] = 2
    return Case(q=q, k=k, weights=torch.tensor([[1.0, -1.0]]), block_topk=4, topk=32)


def test_reasons(device: str) -> None:
    """A tie, a NaN and a budget of two blocks are told apart."""
    tie = explain(coarse_scores([5, 5, 5, 9]), device=device, topk=30)
    assert {(lost.block, lost.below) for lost in tie.lost} == {(2, 0.0), (3, 0.0)}
    assert "equal to the bar of 5; lower blocks come first" in str(tie)
    two = explain(coarse_scores([5, 3, 3, 9]), device=device, block_topk=2, topk=16)
    assert two.bar is None and {lost.below for lost in two.lost} == {None}
    assert "only the first and the last block are kept" in str(two)

    case = coarse_scores([5, 0, 7, 9])
    case.k[16, :2] = math.inf  # infinity less infinity, for this token and for the block's mean
    case.k[17:24, 0] = 8
    nan = explain(case, device=device, topk=20)
    block = nan.blocks[2]
    assert block.coarse is not None and math.isnan(block.coarse)
    assert (block.rank, block.fate, block.flat, block.best) == (4, "dropped", 7, 8)
    assert {(lost.block, lost.below) for lost in nan.lost} == {(2, math.inf)}
    assert [lost.rank for lost in nan.lost] == [*range(9, 16)] and "a NaN ranks last" in str(nan)


def many(blocks: int) -> Explanation:
    """A row over many blocks, from token 20 on."""
    case = random_case(3, torch.float32, M=1, N=8 * blocks + 16, topk=40, block_topk=6,
                       **shaped(H=2, D=16))  # fmt: skip
    return explain(case.replace(ks=int32([20])))


@pytest.mark.parametrize("blocks", [2, 48, 49, MOST_MARKS, MOST_MARKS + 1, 3000])
def test_text_and_html(blocks: int) -> None:
    """One line if it fits, else several; a mark stands for more than one block in the longest."""
    found = many(blocks)
    title, _, *picture, legend, _, loss = str(found).split("\nblock at")[0].split("\n")
    marks = "".join(picture).translate(str.maketrans("", "", " 0123456789"))
    assert title.endswith(f"recall {found.recall:.4f}") and f"{blocks} blocks of 8" in title
    assert len(picture) == (1 if blocks <= 48 else -(-len(marks) // 64))
    assert marks[0] == "S" and marks[-1] == "L" and set(marks[1:-1]) <= set("#.x")
    if blocks <= MOST_MARKS:
        shown = {"sink": "S", "kept": "#", "dropped": ".", "local": "L"}
        lost = {token.block for token in found.lost}
        want = ["x" if i in lost else shown[b.fate] for i, b in enumerate(found.blocks)]
        assert marks == "".join(want) and "a mark is" not in legend
    else:
        each = -(-(blocks - 2) // (MOST_MARKS - 2))
        assert len(marks) == 2 + -(-(blocks - 2) // each) and f"up to {each} blocks" in legend
        lost_marks = {(token.block - 1) // each for token in found.lost}
        assert {i for i, mark in enumerate(marks[1:-1]) if mark == "x"} == lost_marks
    lines = str(found).split("\nblock at")[1].split("\n")[1:] if found.lost else []
    assert len(lines) == min(MOST_LOST, len({token.block for token in found.lost}))
    assert loss.startswith("Lost" if lines else "Nothing is lost")

    page = found._repr_html_()
    assert page.count("<span") == len(marks) and page.count("<tr>") == len(lines) + bool(lines)
    assert repr(found) == str(found)


def test_plot() -> None:
    """A bar for each scored block, dots for flat's tokens, the lost ones red."""
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("agg")
    found = many(60)
    ax = found.plot()
    right = ax.figure.axes[1]
    inner = [block.coarse for block in found.blocks[1:-1]]
    bars: list[Any] = [patch for container in ax.containers for patch in container]
    heights = {round(patch.get_x() + 0.5): patch.get_height() for patch in bars}
    assert len(bars) == 58 and [heights[i] for i in range(1, 59)] == inner
    dots = {str(c.get_label()): np.array(c.get_offsets()) for c in right.collections}
    assert len(dots["flat's tokens: selected"]) == 40 - len(found.lost)
    red = dots["flat's tokens: lost"]
    lost = sorted(found.lost)
    assert np.floor(red[:, 0] + 0.5).tolist() == [token.block for token in lost]
    assert red[:, 1].tolist() == [token.score for token in lost]
    (bar,) = (np.asarray(line.get_ydata()).tolist() for line in ax.lines)
    assert bar == [found.bar] * 2
    legend = ax.get_legend()
    assert legend is not None and len(legend.get_texts()) > 6
    assert found.plot(ax) is ax
    assert explain(hot_token().replace(ke=int32([0]))).plot().get_legend() is None


def test_matplotlib_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Text and HTML do without it."""
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    found = many(10)
    assert str(found) and found._repr_html_()
    with pytest.raises(ImportError, match=r"matplotlib is not installed; `pip install hisa-ind"):
        found.plot()


@pytest.mark.parametrize(("changes", "error", "message"), [
    ({"row": 1}, ValueError, "row: expected 0 to M - 1 = 0, got 1"),
    ({"row": -1}, ValueError, "row: expected 0 to M - 1 = 0, got -1"),
    ({"row": 0.0}, TypeError, "row: expected int, got float"),
    ({"row": True}, TypeError, "row: expected int, got bool"),
    ({"block_topk": 1}, ValueError, "block_topk: expected at least 2"),
    ({"block_size": 9}, ValueError, "block_size: expected one of"),
    ({"pooling": "median"}, ValueError, "pooling: expected"),
    ({"topk": 33}, ValueError, "topk: expected at most"),
    ({"ks": torch.zeros(1)}, TypeError, "ks: expected"),
    ({"ks": int32([0, 0])}, ValueError, "ks: expected"),
])  # fmt: skip
def test_bad_calls(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    """Are told as `hisa.index` does."""
    with pytest.raises(error, match=message):
        explain(hot_token(), **changes)


def test_no_rows() -> None:
    """There is none to explain."""
    with pytest.raises(ValueError, match="row: expected 0 to M - 1 = -1, got 0"):
        explain(hot_token().rows([]))
