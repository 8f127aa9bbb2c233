"""`hisa.compare`: its measures against plain Python sets, its summaries, its table and plot.

Catches padding that counts as a token, ranks that forget ties, windows that run into the next
segment, chunks that change a row, and a percentile taken from the wrong end.
"""

from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import hisa
from hisa.agreement import Comparison, Setting, comparing
from hisa.agreement.measures import Measures, measure
from hisa.testing import needle_inputs
from tests import oracle
from tests.builders import causal, exact_case, int32, random_case
from tests.case import Case
from tests.numeric import decode


def compare(case: Case, device: str = "cpu", **changes: Any) -> Comparison:
    """Compare a case's selections, under other settings if wanted."""
    on = case.to(device)
    arguments = {name: value for name, value in on.index_args().items() if name != "pooled"}
    return hisa.compare(on.q, on.k, on.weights, **{**arguments, "progress": False, **changes})


def expected(case: Case) -> list[tuple[float, float, float, int]]:
    """Return recall, IoU, mass and worst miss of each row, from every score of its window."""
    q, k, weights = (decode(t) for t in (case.q, case.k, case.weights))
    scale = oracle.key_scales(case)
    ours = oracle.index(case).indices
    found = []
    for row in range(len(q)):
        seen = oracle.window(case, row)
        if seen is None:
            found.append((1.0, 1.0, 1.0, 0))
            continue
        tokens = range(seen.start, seen.end)
        scores = oracle.exact_score(q[row], k[tokens], weights[row], scale[tokens]).astype(float)
        ranked = sorted(range(len(tokens)), key=lambda i: (-scores[i], i))
        flat = ranked[: case.topk]
        chosen = {int(i) for i in ours[row] if i >= 0}
        both = chosen & set(flat)
        above = scores - scores.min()
        wanted = above[flat].sum()
        mass = above[list(chosen)].sum() / wanted if wanted else 1.0
        missed = [rank for rank, i in enumerate(flat, 1) if i not in chosen]
        found.append((len(both) / len(flat), len(both) / len(chosen | set(flat)), mass,
                      missed[0] if missed else 0))  # fmt: skip
    return found


@pytest.mark.parametrize("seed", range(60))
def test_measures(seed: int, device: str) -> None:
    """Of calls with ties, packed segments, ragged tails and empty windows."""
    case = exact_case(seed, budget=3e5)
    found = compare(case, device)
    columns = (found.recall[0], found.iou[0], found.mass[0], found.worst_miss[0])
    got = list(zip(*(column.tolist() for column in columns), strict=True))
    want = expected(case)
    assert len(got) == len(want)
    for mine, theirs in zip(got, want, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-6)


def test_the_inputs_lose_something() -> None:
    """Many of the calls above lose tokens, some have rows without any, and some have ties."""
    cases = [exact_case(seed, budget=3e5) for seed in range(60)]
    rows = [row for case in cases for row in expected(case)]
    assert sum(recall < 1 for recall, *_ in rows) > 30
    assert len({miss for *_, miss in rows}) > 5
    assert any(oracle.window(case, row) is None for case in cases for row in range(len(case.q)))


def hot_token(topk: int = 16) -> Case:
    """One token far above all others, in a block whose other keys point the other way."""
    return Case(**needle_inputs(43, block_size=8, N=128, H=1, D=16), block_topk=4, topk=topk)


def test_one_hot_token_in_a_cold_block(device: str) -> None:
    """What hisa loses is named: flat's first token."""
    found = compare(hot_token(1), device)
    assert found.recall.item() == 0 and found.worst_miss.item() == 1
    assert compare(hot_token(16), device).recall.item() < 1
    assert compare(hot_token(16), device, block_topk=16).worst_miss.item() == 0


def test_settings_are_compared_together(device: str) -> None:
    """Every combination, in order, each as if it were alone."""
    case = causal(random_case(1, torch.bfloat16, M=40, N=400, topk=30))
    lists = {"block_size": [8, 16], "block_topk": (4, 6), "pooling": ["mean", "max"]}
    found = compare(case, device, **lists)
    assert found.settings[:3] == (
        Setting(8, 4, "mean"),
        Setting(8, 4, "max"),
        Setting(8, 6, "mean"),
    )
    assert len(found.settings) == 8 and found.recall.shape == (8, 40)
    for i, setting in enumerate(found.settings):
        alone = compare(case, device, **setting._asdict())
        for name in Measures._fields:
            assert torch.equal(getattr(found, name)[i], getattr(alone, name)[0])
    assert found.recall.min() < found.recall[-1].mean() <= 1


def test_chunks_change_nothing(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows a few at a time, the last chunk a short one."""
    case = exact_case(11, M=23, N=300, H=2, D=16, B=8, block_topk=3, topk=10)
    whole = compare(case, device)
    monkeypatch.setattr(comparing, "CHUNK_BYTES", 10 * comparing.SLOT_BYTES * case.topk)
    parts = compare(case, device)
    for name in (*Measures._fields, "context"):
        assert torch.equal(getattr(whole, name), getattr(parts, name))


def test_no_rows_and_no_keys(device: str) -> None:
    """Empty calls have an answer."""
    case = random_case(2, torch.float32)
    empty = compare(case.rows([]).replace(k_scale=None, ks=None, ke=None), device)
    assert empty.recall.shape == (1, 0) and empty.summary() == []
    assert "0 rows" in str(empty)
    blind = compare(case.replace(ks=int32([0] * 6), ke=int32([0] * 6), cu_seqlens_k=None), device)
    assert blind.recall.eq(1).all() and blind.summary() == [] and blind.overall()[0].rows == 0


def selection(tokens: list[int], scores: list[float]) -> tuple[Tensor, Tensor]:
    return int32([tokens]), torch.tensor([scores])


INF, NAN = math.inf, math.nan


@pytest.mark.parametrize(("flat", "chosen", "lowest", "want"), [
    # -0.0 equals 0.0, so the lower token has the better rank
    (([3, 5, 9], [0.0, -0.0, 1.0]), ([5, 9, -1], [0.0, 1.0, -INF]), 0.0, (2 / 3, 2 / 3, 1.0, 2)),
    (([3, 5, 9], [-0.0, 0.0, 1.0]), ([3, 9, -1], [0.0, 1.0, -INF]), 0.0, (2 / 3, 2 / 3, 1.0, 3)),
    # a NaN ranks with -inf, behind every other token but before unused slots
    (([1, 2, -1], [NAN, -4.0, -INF]), ([2, -1, -1], [-4.0, -INF, -INF]), NAN, (0.5, 0.5, NAN, 2)),
    (([1, 2, -1], [-INF, 7.0, -INF]), ([-1, -1, -1], [-INF] * 3), -INF, (0.0, 0.0, NAN, 1)),
    # all as low as the lowest
    (([0, 1, 2], [5.0, 5.0, 5.0]), ([2, 3, 4], [5.0, 5.0, 5.0]), 5.0, (1 / 3, 0.2, 1.0, 1)),
])  # fmt: skip
def test_special_scores(flat: Any, chosen: Any, lowest: float, want: tuple[float, ...]) -> None:
    """Zeros of both signs, infinities and NaN keep their place in the order of preference."""
    got = measure(selection(*flat), selection(*chosen), torch.tensor([lowest]))
    assert [v.item() for v in got] == pytest.approx(want, nan_ok=True)


def many() -> Comparison:
    """A report over contexts 0 to 1000, recall at random."""
    recall = torch.from_numpy(np.random.default_rng(3).random((1, 1001))).float()
    context = torch.arange(1001, dtype=torch.int32)
    return Comparison(settings=(Setting(128, 64, "mean"),), topk=4, context=context, recall=recall,
                      iou=recall / 2, mass=recall, worst_miss=context[None] % 7)  # fmt: skip


def test_summary() -> None:
    """Mean, 1st percentile and minimum by power of two; each row in one group."""
    report = many()
    groups = report.summary()
    assert [(g.shortest, g.longest) for g in groups[:3] + groups[-2:]] == [
        (1, 1), (2, 2), (3, 4), (257, 512), (513, 1000)]  # fmt: skip
    assert sum(group.rows for group in groups) == 1000
    last = report.recall[0, 513:].double().numpy()
    assert groups[-1].recall.mean == pytest.approx(last.mean())
    assert groups[-1].recall.minimum == last.min()
    assert groups[-1].worst_miss == 1 and groups[0].worst_miss == 1
    (whole,) = report.overall()
    assert whole.rows == 1000 and whole.iou.mean == pytest.approx(whole.recall.mean / 2)
    tenth = float(np.sort(report.recall[0, 1:])[9])  # 1% of the rows do not exceed it
    assert whole.recall.p1 == tenth


def test_text_and_html() -> None:
    """One line per setting and context, under a header."""
    report = many()
    lines = str(report).splitlines()
    assert len(lines) == 2 + len(report.summary()) and "513 to 1000" in lines[-1]
    page = report._repr_html_()
    assert page.count("<tr>") == 1 + len(report.summary()) and "513 to 1000" in page


def test_pandas() -> None:
    """The summary and every row, as tables."""
    pytest.importorskip("pandas")
    report = many()
    table = report.to_pandas()
    assert len(table) == len(report.summary()) and table["longest"].iloc[-1] == 1000
    assert table["recall_minimum"].iloc[-1] == report.summary()[-1].recall.minimum
    rows = report.to_pandas(rows=True)
    assert len(rows) == 1001 and rows["worst_miss"].tolist() == report.worst_miss[0].tolist()
    assert set(rows["block_size"]) == {128}


def test_plot() -> None:
    """A line per setting; a measure that there is not is named."""
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("agg")
    case = causal(random_case(1, torch.bfloat16, M=40, N=400, topk=30))
    report = compare(case, block_topk=[4, 6])
    ax = report.plot()
    legend = ax.get_legend()
    assert len(ax.lines) == 2 and legend is not None and len(legend.get_texts()) == 2
    assert report.plot("mass", ax=ax) is ax and len(ax.lines) == 4
    with pytest.raises(ValueError, match="measure: expected one of recall, iou, mass"):
        report.plot("speed")


def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without pandas, matplotlib and tqdm, all but tables and pictures work."""
    for name in ("pandas", "matplotlib", "matplotlib.pyplot", "tqdm", "tqdm.auto"):
        monkeypatch.setitem(sys.modules, name, None)
    report = compare(hot_token(), progress=True)
    with pytest.raises(ImportError, match=r"pandas is not installed; `pip install hisa-indexer"):
        report.to_pandas()
    with pytest.raises(ImportError, match="matplotlib is not installed"):
        report.plot()


def test_importing_hisa_imports_none_of_them() -> None:
    """They are imported when they are used."""
    code = "import sys, hisa; print(sorted({'pandas', 'matplotlib'} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


@pytest.mark.parametrize(("changes", "error", "message"), [
    ({"block_topk": [4, 1]}, ValueError, "block_topk: expected at least 2"),
    ({"block_size": [8, 9]}, ValueError, "block_size: expected one of"),
    ({"pooling": ["mean", "median"]}, ValueError, "pooling: expected"),
    ({"block_topk": [2, 4], "topk": 32}, ValueError, "topk: expected at most"),
    ({"block_topk": []}, ValueError, "block_topk: expected one value or several, got none"),
    ({"block_topk": [4.0]}, TypeError, "block_topk: expected int, got float"),
    ({"topk": 0}, ValueError, "topk: expected at least 1"),
    ({"ks": torch.zeros(1)}, TypeError, "ks: expected"),
])  # fmt: skip
def test_bad_calls(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    """Every setting is checked before anything runs, with the messages of `hisa.index`."""
    with pytest.raises(error, match=message):
        compare(hot_token(), **changes)
