"""What surrounds the peer that stays outside of the tree: TileLang's example, here a stand-in."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

import hisa
from benchmarks import report, summary, tilelang_peer
from benchmarks.__main__ import find_cases, parse
from benchmarks.cases import cuda_prefill
from benchmarks.harness import Bench

EXAMPLE = """
import neighbour

def hisa_indexer(q, k, k_scale, weights, ks, ke, *, k_block_size, block_topk, topk_tokens):
    assert (ks == 0).all() and len(ks) == len(ke) == len(q)
    assert (k_block_size, block_topk) == neighbour.SIZES
    return k_scale.new_zeros(len(q), topk_tokens).int()
"""


@pytest.fixture
def example(tmp_path: Path) -> Path:
    """Return a folder with a pipeline that, as TileLang's, is called hisa.py and has neighbours."""
    (tmp_path / "hisa.py").write_text(EXAMPLE)
    (tmp_path / "neighbour.py").write_text("SIZES = (128, 64)\n")
    return tmp_path


def test_the_pipeline_is_built_from_a_folder(
    example: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It gets the tensors of hisa.index, and its name and its neighbours get in nobody's way."""
    monkeypatch.delitem(sys.modules, "neighbour", raising=False)
    path = list(sys.path)
    call = tilelang_peer.build(
        example,
        q=torch.zeros(3, 2, 16),
        k=torch.zeros(5, 16),
        weights=torch.zeros(3, 2),
        k_scale=torch.ones(5),
        ke=torch.tensor([3, 4, 5], dtype=torch.int32),
        topk=7,
    )
    assert call().shape == (3, 7)
    assert sys.modules["hisa"] is hisa and sys.path == path


def test_a_peer_that_cannot_run_says_why(example: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The path, or the package, is missing."""
    assert tilelang_peer.obstacle(None) == "needs --tilelang PATH"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert tilelang_peer.obstacle(example) == "tilelang is not installed"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert tilelang_peer.obstacle(example) == ""


def test_the_option_takes_the_example(example: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Another folder is refused before anything runs."""
    known = find_cases()
    assert parse(["cuda_prefill", "--tilelang", str(example)], known).tilelang == example
    assert parse(["cuda_prefill"], known).tilelang is None
    with pytest.raises(SystemExit):
        parse(["--tilelang", str(example / "elsewhere")], known)
    assert "--tilelang: expected a folder with hisa.py, got" in capsys.readouterr().err


def test_selections_are_compared_before_they_are_timed() -> None:
    """The share of common tokens is noted; few of them, or another shape, stop the run."""
    ours = torch.arange(40).expand(252, 40).int()
    bench = Bench("cuda_prefill", quick=True)
    cuda_prefill.check_tilelang(bench, 64, {"hisa.index": ours, "TileLang": ours.flip(1)})
    assert "selects 100.0% of the tokens of hisa.index (H=64" in bench.text[0]
    with pytest.raises(RuntimeError, match=r"TileLang has only 90\.00%"):
        cuda_prefill.check_tilelang(bench, 64, {"hisa.index": ours, "TileLang": ours + 4})
    with pytest.raises(RuntimeError, match=r"TileLang returns \[252, 39\]"):
        cuda_prefill.check_tilelang(bench, 64, {"hisa.index": ours, "TileLang": ours[:, 1:]})


@pytest.mark.parametrize("measured", [True, False], ids=["measured", "skipped"])
def test_the_summary_shows_the_peer_where_it_ran(tmp_path: Path, measured: bool) -> None:
    """One row more for every prefill that it took part in."""
    shape: report.Record = {"rows": 8, "keys": 8, "heads": 2, "peak_extra_bytes": 2**30}
    records: list[report.Record] = [
        {"peer": peer, "median_s": median, **shape}
        for peer, median in [("hisa.index", 1), ("hisa.flat_index", 2), ("torch in chunks", 3)]
    ]
    records.append({"peer": "TileLang", "median_s": 1.5 if measured else None, **shape})
    report.write_csv(tmp_path / "cuda_prefill.csv", records)
    rows = summary.cuda_prefill_rows(tmp_path)
    theirs = [row[2:4] for row in rows if "TileLang" in row[2]]
    assert theirs == [("TileLang: 1.50 s, 1.00 GiB", "1.5x time")] * measured
    assert len(rows) == 2 + measured
