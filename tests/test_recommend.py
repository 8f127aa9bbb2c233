"""`hisa.recommend`: its candidates, their recall, and the choice among them.

Catches a frontier with a beaten candidate, a pick that misses the target or is not the fastest, a
target lost to rounding, a recall that is not that of `hisa.compare`, and settings that cannot
select enough. What a call takes is measured, so no test depends on it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import hisa
from hisa.agreement import Candidate, Recommendation, Setting, Statistics, recommending
from hisa.testing import needle_inputs, packed_inputs, random_inputs

SETTINGS: dict[str, Any] = {"block_size": (8, 16), "block_topk": (2, 4, 8), "topk": 32}


def recommend(inputs: Any, **changes: Any) -> Recommendation:
    return hisa.recommend(**inputs, **{**SETTINGS, "progress": False, **changes})


def clustered(device: str) -> dict[str, Any]:
    """Keys that are equal within blocks of 16, each block another one."""
    inputs: dict[str, Any] = dict(random_inputs(3, M=30, N=512, H=4, D=16, device=device))
    inputs["k"] = inputs["k"][::16].repeat_interleave(16, 0)
    return inputs


def test_clustered_keys(device: str) -> None:
    """Where a pooled key is every key of its block, few blocks suffice."""
    found = recommend(clustered(device), block_topk=(2, 4, 8, 64), target=0.9, block_size=16)
    recall = {c.setting: c.recall.mean for c in found.candidates}
    assert recall[Setting(16, 2, "mean")] < 0.9 < recall[Setting(16, 8, "mean")]
    assert recall[Setting(16, 64, "max")] == 1
    assert found.pick is not None and found.pick.recall.mean >= 0.9
    assert all(c.seconds > 0 for c in found.candidates) and found.flat_seconds > 0


def test_a_needle_needs_another_pooling(device: str) -> None:
    """The mean of its block hides the needle; the maximum, or a covering budget, shows it."""
    inputs = needle_inputs(43, block_size=8, N=128, H=1, D=16, device=device)
    found = recommend(inputs, block_size=8, block_topk=(4, 16), topk=1, target=1.0)
    recall = {c.setting: c.recall.mean for c in found.candidates}
    assert recall == {
        Setting(8, 4, "mean"): 0,
        Setting(8, 4, "max"): 1,
        Setting(8, 16, "mean"): 1,
        Setting(8, 16, "max"): 1,
    }
    assert found.pick is not None and found.pick.setting != Setting(8, 4, "mean")


def test_recall_is_that_of_compare(device: str) -> None:
    """Of packed sequences, under every setting that can select enough."""
    inputs = packed_inputs(1, [(20, 90), (30, 200)], H=4, D=16, device=device)
    found = recommend(inputs, block_topk=[2, 8], statistic="p1")
    settings = [c.setting for c in found.candidates]
    assert settings == [Setting(*s) for s in [(8, 8, "mean"), (8, 8, "max"), (16, 2, "mean"),
                        (16, 2, "max"), (16, 8, "mean"), (16, 8, "max")]]  # fmt: skip
    for candidate in found.candidates:
        setting = candidate.setting._asdict()
        alone = hisa.compare(**inputs, **setting, topk=32, progress=False)
        assert candidate.recall == alone.overall()[0].recall
    assert min(c.recall.minimum for c in found.candidates) < 1


class Clock:
    """Stands in for the clock: a call takes 1 + block_topk, flat 11, times `rate(calls so far)`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, rate: Callable[[int], float]) -> None:
        self.calls: list[Any] = []
        self.rate = rate
        monkeypatch.setattr(recommending, "_time_on_cpu", self.time)

    def time(self, call: Any, device: torch.device) -> float:
        """Return what a call takes."""
        self.calls.append(call)
        work = 1 + int(call.keywords.get("block_topk", 10))
        return work * self.rate(len(self.calls) - 1)


def test_every_call_is_timed_as_it_would_be_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """All rows at once, flat in the same windows, and the median is taken of warm calls."""
    inputs = packed_inputs(1, [(20, 90), (30, 200)], H=4, D=16)
    inputs["ke"][0] = 200  # in the second sequence, so that it is read as the end of the first
    rates = [9.0, 1.0, 3.0, 2.0, 8.0, 2.5]
    clock = Clock(monkeypatch, lambda number: rates[number // 2])
    found = recommend(inputs, block_size=8, block_topk=4, pooling="max")
    assert found.candidates[0].seconds == 5 * 2.5 and found.flat_seconds == 11 * 2.5
    options: Any = {"block_size": 8, "block_topk": 4, "pooling": "max", "topk": 32}
    ours, flat = clock.calls[:2]
    assert torch.equal(ours(), hisa.index(**inputs, **options))
    ks, ke = inputs["ks"], inputs["ke"].clone()
    ke[0] = 90
    tensors = (inputs["q"], inputs["k"], inputs["weights"])
    assert torch.equal(flat(), hisa.flat_index(*tensors, ks=ks, ke=ke, topk=32))


@pytest.mark.parametrize("rate", [
    lambda number: 1 + number / 10, lambda number: 1 / (1 + number / 10),
    lambda number: 100 if 8 <= number < 16 else 1,
], ids=["slower", "faster", "interrupted"])  # fmt: skip
def test_a_machine_that_drifts_favours_none(
    monkeypatch: pytest.MonkeyPatch, rate: Callable[[int], float]
) -> None:
    """The settings take turns: an order by work is an order by time, however they are given."""
    for budgets in ((4, 5, 6, 7, 8), (8, 7, 6, 5, 4)):
        clock = Clock(monkeypatch, rate)
        found = recommend(clustered("cpu"), block_size=8, block_topk=budgets, pooling="mean")
        assert len(clock.calls) == 6 * 6
        ordered = sorted(found.candidates, key=lambda c: c.seconds)
        assert [c.setting.block_topk for c in ordered] == [4, 5, 6, 7, 8]
        assert found.flat_seconds > ordered[-1].seconds


def made(*measured: tuple[float, float], **changes: Any) -> Recommendation:
    """Make a recommendation from (seconds, mean recall); the 1st percentile is half of it."""
    candidates = tuple(
        Candidate(Setting(128, 2 + i, "mean"), Statistics(recall, recall / 2, 0.0), seconds)
        for i, (seconds, recall) in enumerate(measured)
    )
    options = {"topk": 10, "target": 0.9, "statistic": "mean", "flat_seconds": 5.0, **changes}
    return Recommendation(candidates, **options)


def test_frontier() -> None:
    """Slower and worse, equally fast and worse, slower and equally good: all are beaten."""
    found = made((3, 0.95), (1, 0.5), (2, 0.4), (2, 0.7), (2, 0.8), (4, 0.95), (0.5, 0.1), (6, 1))
    order = [found.candidates.index(c) for c in found.frontier]
    assert order == [6, 1, 4, 0, 7]
    assert found.pick == found.candidates[0]


@pytest.mark.parametrize(("target", "statistic", "pick"), [
    (0.0, "mean", 1), (0.5, "mean", 1), (0.51, "mean", 2), (0.96, "mean", 0), (1.0, "mean", 0),
    (0.25, "p1", 1), (0.4, "p1", 2), (0.5, "p1", 0), (0.51, "p1", None),
])  # fmt: skip
def test_pick(target: float, statistic: str, pick: int | None) -> None:
    """The fastest one whose statistic reaches the target."""
    found = made((3, 1.0), (1, 0.5), (2, 0.95), target=target, statistic=statistic)
    assert found.pick == (None if pick is None else found.candidates[pick])


def test_a_target_that_is_met_exactly() -> None:
    """Recall is in float32, of which the target may be a little ahead; 1 is 1 all the same."""
    nine_of_ten = float(torch.tensor(0.9))
    assert nine_of_ten < 0.9 and made((1, nine_of_ten)).pick is not None
    assert made((1, 0.8999)).pick is None
    assert made((1, 1 - 1e-9), target=1.0).pick is None


def test_text_and_html() -> None:
    """The fastest first, with marks, and a last line that says what to do."""
    found = made((3, 0.95), (1, 0.5), (4, 0.95))
    lines = str(found).splitlines()
    assert len(lines) == 1 + 1 + 3 + 1 and "mean recall of at least 0.9, topk 10" in lines[0]
    assert [line.split()[1] for line in lines[2:5]] == ["3", "2", "4"]
    assert [line.split()[-1] for line in lines[2:5]] == ["frontier", "pick", "1.25x"]
    assert lines[-1].startswith("Take 2 blocks of 128, mean: 3e+03 ms. hisa.flat_index takes 5e")
    page = found._repr_html_()
    assert page.count("<tr>") == 4 and "<td>pick</td>" in page and lines[-1] in page


def test_text_without_a_pick() -> None:
    """It says that the target is missed and by how much, or that flat is as fast."""
    found = made((3, 0.85), (1, 0.5), target=0.99, statistic="mean")
    assert found.pick is None and not any("pick" in cells for cells in found._table())
    assert "No setting reaches the target. The best is 2 blocks of 128, mean, with 0.8500." in str(
        found
    )
    assert "The pick is 2 blocks of 128, mean, but nothing is gained" in str(
        made((3, 0.95), flat_seconds=3.0)
    )
    assert "1st percentile of recall" in str(made((3, 0.85), statistic="p1"))


def test_pandas() -> None:
    """A row for each candidate."""
    pytest.importorskip("pandas")
    table = made((3, 0.95), (1, 0.5), (4, 0.95)).to_pandas()
    assert table["block_topk"].tolist() == [3, 2, 4] and table["seconds"].tolist() == [1, 3, 4]
    assert table["frontier"].tolist() == [True, True, False]
    assert table["pick"].tolist() == [False, True, False]
    assert table["recall_p1"].tolist() == [0.25, 0.475, 0.475]


def test_plot() -> None:
    """All candidates, the frontier, the target, flat, and the pick if there is one."""
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("agg")
    found = made((3, 0.95), (1, 0.5), (4, 0.95))
    ax = found.plot()
    frontier, target, flat, pick = (np.asarray(line.get_xydata()).tolist() for line in ax.lines)
    assert frontier == [[1000, 0.5], [3000, 0.95]] and pick == [[3000, 0.95]]
    assert target[0][1] == target[1][1] == 0.9 and flat[0][0] == flat[1][0] == 5000
    assert len(np.asarray(ax.collections[0].get_offsets())) == 3
    missed = made((3, 0.85))
    assert missed.plot(ax=ax) is ax and len(ax.lines) == 4 + 3


def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without pandas, matplotlib and tqdm, all but tables and pictures work."""
    for name in ("pandas", "matplotlib", "matplotlib.pyplot", "tqdm", "tqdm.auto"):
        monkeypatch.setitem(sys.modules, name, None)
    found = recommend(clustered("cpu"), block_size=16, block_topk=4, progress=True)
    with pytest.raises(ImportError, match="pandas is not installed; `pip install hisa-indexer"):
        found.to_pandas()
    with pytest.raises(ImportError, match="matplotlib is not installed"):
        found.plot()


@pytest.mark.parametrize(("changes", "error", "message"), [
    ({"target": 1.5}, ValueError, "target: expected a number from 0 to 1, got 1.5"),
    ({"target": float("nan")}, ValueError, "target: expected a number from 0 to 1, got nan"),
    ({"target": "0.9"}, TypeError, "target: expected float, got str"),
    ({"statistic": "p2"}, ValueError, "statistic: expected 'mean' or 'p1', got 'p2'"),
    ({"topk": 129}, ValueError, "topk: expected at most 128, the largest block_topk .*, got 129"),
    ({"topk": 0}, ValueError, "topk: expected at least 1"),
    ({"topk": 2.0}, TypeError, "topk: expected int, got float"),
    ({"block_topk": (1, 8)}, ValueError, "block_topk: expected at least 2"),
    ({"block_size": (9, 16)}, ValueError, "block_size: expected one of"),
    ({"block_topk": ()}, ValueError, "block_topk: expected one value or several, got none"),
    ({"pooling": "median"}, ValueError, "pooling: expected"),
    ({"ks": torch.zeros(30)}, TypeError, "ks: expected"),
    ({"ke": torch.zeros(30, dtype=torch.int32)}, ValueError,
     "q: expected a row that sees a token, got none in 30 rows"),
])  # fmt: skip
def test_bad_calls(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    """Named with what was expected and what came, before anything is measured."""
    with pytest.raises(error, match=message):
        recommend({**clustered("cpu"), **{k: v for k, v in changes.items() if k in ("ks", "ke")}},
                  **{k: v for k, v in changes.items() if k not in ("ks", "ke")})  # fmt: skip
