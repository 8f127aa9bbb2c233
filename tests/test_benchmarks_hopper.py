"""The parts of the benchmark on Hopper that need no GPU: its inputs, its tables, its plot."""

from __future__ import annotations

import functools
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

import hisa
from benchmarks import drift, report, speedups, summary
from benchmarks.cases import cuda_hopper, cuda_prefill
from benchmarks.cases.cuda_hopper import Row, Shape
from benchmarks.cases.cuda_prefill import FLAT, INDEX
from benchmarks.harness import Bench, Measurement
from hisa import reference


def measured(peer: str, shape: Shape, seconds: float) -> Measurement:
    """Return a measurement of 10^9 multiply-adds."""
    return Measurement(peer, asdict(shape), (seconds,) * 3, 2**20, 10**9)


@pytest.mark.parametrize("decay", [0.0, 0.9, 0.98])
def test_walks_are_stationary(decay: float) -> None:
    """Unit variance in every row, neighbours correlate by the decay, across the parts as well."""
    random = torch.Generator().manual_seed(0)
    parts = list(drift.walk(drift.PART + 40, 20000, decay, random))
    assert [len(part) for part in parts] == [drift.PART, 40]
    x = torch.cat(parts)
    assert x.mean(1).abs().max() < 0.05
    assert (x.var(1) - 1).abs().max() < 0.05
    assert ((x[1:] * x[:-1]).mean(1) - decay).abs().max() < 0.05
    assert ((x[5:] * x[:-5]).mean(1) - decay**5).abs().max() < 0.05


def test_a_walk_adds_independent_noise() -> None:
    """What a row is more than the decayed row before it has nothing to do with its neighbours."""
    x = torch.cat(list(drift.walk(2 * drift.PART, 5000, 0.9, torch.Generator().manual_seed(1))))
    noise = (x[1:] - 0.9 * x[:-1]) / 0.19**0.5
    assert (noise.var(1) - 1).abs().max() < 0.1
    assert (noise[1:] * noise[:-1]).mean(1).abs().max() < 0.08
    assert (noise * x[:-1]).mean(1).abs().max() < 0.08


@pytest.mark.parametrize("dtype", ["fp8", "bf16"])
def test_inputs_are_what_the_operator_takes(dtype: str) -> None:
    """The queries are the last of the keys; scales are there for fp8 only."""
    inputs = drift.make_inputs(300, 512, 4, "text", dtype, device="cpu")
    assert inputs["q"].shape == (300, 4, 128) and inputs["k"].shape == (512, 128)
    assert inputs["ke"].tolist() == list(range(213, 513))
    assert ("k_scale" in inputs) == (dtype == "fp8")
    assert (hisa.index(**inputs, topk=64, block_topk=2)[:, 0] >= 0).all()
    assert hisa.flat_index(**inputs, topk=64).shape == (300, 64)
    if dtype == "bf16":
        correlation = (inputs["q"][1:].float() * inputs["q"][:-1].float()).mean()
        assert abs(float(correlation) - 0.98) < 0.1
    with pytest.raises(ValueError, match='queries: expected "random" or "text"'):
        drift.make_inputs(1, 1, 1, "prose", dtype, device="cpu")


@pytest.mark.parametrize("block_topk", [3, 6, 64])
def test_kept_blocks_are_those_of_the_reference(
    block_topk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first and the last block of the row's window, and the best of the others."""
    monkeypatch.setattr(drift, "BLOCK_TOPK", block_topk)
    monkeypatch.setattr(drift, "SCORE_FLOATS", 300)
    inputs = drift.make_inputs(900, 1100, 4, "random", "fp8", device="cpu")
    pooled = hisa.pool_keys(inputs["k"], k_scale=inputs["k_scale"])
    rows = torch.tensor([0, 55, 56, 500, 700, 899])
    kept = drift.kept_blocks(inputs, rows)
    for row, found in zip(rows.tolist(), kept, strict=True):
        window = reference.Row(0, int(inputs["ke"][row]), 0)
        wanted = reference.coarse(
            inputs["q"][row], inputs["weights"][row], pooled, window, 128, block_topk
        )
        assert found.nonzero().flatten().tolist() == wanted


@pytest.mark.parametrize("keys", [65536, 131072])
def test_neighbours_in_a_text_share_three_quarters(keys: int) -> None:
    """Random rows share few blocks, and the rows of a text most, at the end of a long context."""
    text = drift.make_inputs(64, keys, 64, "text", "fp8", device="cpu")
    assert drift.shared_blocks(text) > 0.75
    random = drift.make_inputs(64, keys, 64, "random", "fp8", device="cpu")
    assert drift.shared_blocks(random) < 0.25
    same = {name: text[name][:1].expand(64, *text[name].shape[1:]) for name in ("q", "weights")}
    assert drift.shared_blocks({**text, **same}) > 0.99


def test_every_goal_is_measured() -> None:
    """Goals belong to shapes and peers of the run, and are above their limits."""
    for row in cuda_hopper.TABLE:
        assert row.peer in cuda_hopper.SHAPES[row.shape] and row.limit < row.goal
    assert str(Shape(8192, 1 << 20, 64, "text")) == "last 8K of 1M, H=64, text"
    assert str(Shape(65536, 65536, 32, "text", "bf16")) == "64K x 64K, H=32, text, bf16"


def test_the_table_says_what_was_reached() -> None:
    """Rate, share of the limit, and the peers' times over ours where they were measured."""
    shape = Shape(8192, 8192, 64, "text")
    peers = {
        INDEX: measured(INDEX, shape, 0.004),
        FLAT: measured(FLAT, shape, 0.008),
        "TileLang": measured("TileLang", shape, 0.010),
    }
    rows = [Row(shape, INDEX, 5.0, 3.0), Row(shape, FLAT, 9.0, 6.0)]
    _, index, flat = cuda_hopper.reached(rows, {shape: peers})
    assert index[2:] == ["5 ms", "3 ms", "4.00 ms", "0", "75%", "2.5", "", "2.0"]
    assert flat[4:] == ["8.00 ms", "0", "75%", "1.2", "", ""]


def test_a_peer_that_fails_is_skipped_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """The others are measured all the same."""

    def call(peer: str, inputs: dict[str, Any], **_: Any) -> object:
        if peer == "TileLang":
            raise LookupError("no such layout\nand a long story")
        return lambda: None

    monkeypatch.setattr(cuda_prefill, "call", call)
    monkeypatch.setattr(cuda_hopper, "make_inputs", lambda **_: {})
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr("benchmarks.tilelang_peer.obstacle", lambda _: "")
    bench = Bench("cuda_hopper", quick=True)
    assert cuda_hopper.foreign(bench, cuda_hopper.QUICK, cuda_hopper.EVERY) == []
    notes = {str(r["peer"]): r["note"] for r in bench.records}
    assert notes["TileLang"] == "skipped: LookupError: no such layout"
    assert notes["DeepGEMM logits"] == "skipped: needs --deepgemm PATH"
    monkeypatch.setattr("benchmarks.deepgemm_peer.obstacle", lambda _: "")
    ready = cuda_hopper.foreign(bench, cuda_hopper.QUICK, cuda_hopper.EVERY)
    assert ready == ["DeepGEMM + torch.topk", "DeepGEMM logits"]


def test_the_case_runs_from_inputs_to_goals(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU, with the shapes and goals that it can do; peers from elsewhere are skipped."""
    make = functools.partial(drift.make_inputs, device="cpu")
    monkeypatch.setattr(cuda_hopper, "make_inputs", functools.lru_cache(maxsize=1)(make))
    monkeypatch.setattr(cuda_hopper, "DEVICE", "cpu")
    monkeypatch.setattr("benchmarks.meters.peak_bytes", lambda *_: 0)
    text, other = Shape(64, 1024, 32, "text"), Shape(32, 512, 32, "random", "bf16")
    shapes = {text: cuda_hopper.EVERY, other: (FLAT, INDEX, "torch in chunks")}
    monkeypatch.setattr(cuda_hopper, "SHAPES", shapes)
    monkeypatch.setattr(cuda_hopper, "TABLE", (Row(text, INDEX, 9e9, 1.0), Row(other, FLAT, 0, 0)))
    bench = Bench("cuda_hopper", quick=False)
    cuda_hopper.run(bench)
    assert [(what, verdict) for what, _, _, verdict in bench.goals] == [
        ("ms of hisa.index, last 64 of 1K, H=32, text", "met"),
        ("ms of hisa.flat_index, last 32 of 512, H=32, random, bf16", "MISSED"),
    ]
    runs = {(r["peer"], r["dtype"]): r["runs"] for r in bench.records}
    assert runs["hisa.index", "fp8"] == 20 and runs["TileLang", "fp8"] == 0
    assert "a row and the next share 100.0% of their blocks" in "".join(bench.text)


def test_some_peers_are_called_more_often() -> None:
    """`runs` takes the place of min_runs for a peer, and a quick run ignores it."""
    options: dict[str, Any] = {"runs": {"a": 7}, "min_runs": 2, "max_runs": 9, "seconds": 0.0}
    for quick, runs in ((False, 7), (True, 2)):
        bench = Bench("case", quick=quick)
        found = bench.measure(lambda peer: lambda: None, ("a", "b"), {}, **options)
        assert {peer: len(m.seconds) for peer, m in found.items()} == {"a": runs, "b": 2}


def results(folder: Path) -> Path:
    """Write a CSV file of the whole case: every peer takes as many ms as the letters of its name.

    hisa.index takes 1 ms.
    """
    kernels: report.Record = {"kernels": "cuda/wgmma-64x128, cuda/wgmma-32x128"}
    records = [
        measured(peer, shape, 0.001 if peer == INDEX else len(peer) / 1000).record() | kernels
        for shape, peers in cuda_hopper.SHAPES.items()
        for peer in peers
        if peer != "TileLang" or shape.keys < 131072
    ]
    report.write_csv(folder / "cuda_hopper.csv", records)
    return folder


def test_the_summary_has_every_shape(tmp_path: Path) -> None:
    """A row for each, a column for each peer; a peer that did not run leaves its cell empty."""
    assert summary.prefill_rows(tmp_path)[1:] == []
    _, *rows, memory = summary.prefill_rows(results(tmp_path))
    assert [row[0] for row in rows] == [str(shape) for shape in cuda_hopper.SHAPES]
    assert rows[4][1:] == ("1.00 ms", "8.00 ms, 8.0x", "21.0 ms, 21.0x", "15.0 ms, 15.0x",
                           "15.0 ms, 15.0x", "cuda_hopper")  # fmt: skip
    assert rows[5][2] == rows[-1][2] == rows[-1][3] == "" and rows[-1][4] == "15.0 ms, 15.0x"
    assert memory[:3] == ("memory of 128K x 128K, H=64, text", "1.00 MiB", "")


def test_the_summary_has_both_kinds_of_kernels(tmp_path: Path) -> None:
    """Those for Hopper first, then the portable ones, each with its case."""
    results(tmp_path)
    ours = {"rows": 65536, "keys": 65536, "heads": 64, "median_s": 2, "peak_extra_bytes": 0}
    report.write_csv(
        tmp_path / "cuda_prefill.csv", [{"peer": p, **ours} for p in (INDEX, FLAT, "TileLang")]
    )
    kinds = [(row[0], row[-1]) for row in summary.prefill_rows(tmp_path) if "random" in row[0]]
    assert kinds == [("64K x 64K, H=64, random", "cuda_hopper"),
                     ("64K x 64K, H=64, random, portable", "cuda_prefill")]  # fmt: skip


def test_the_plot_is_drawn_from_the_csv_file(tmp_path: Path) -> None:
    """Without a GPU, the same bytes every time; a peer that is missing at a length has a gap."""
    pytest.importorskip("matplotlib")
    curves = speedups.read(results(tmp_path) / "cuda_hopper.csv")
    assert list(curves) == list(speedups.PEERS)
    for peer, lengths in (("torch in chunks", range(12, 18)), ("TileLang", range(12, 17))):
        assert [length for length, _ in curves[peer]] == [1 << i for i in lengths]
        assert [gain for _, gain in curves[peer]] == pytest.approx([len(peer)] * len(lengths))
    plot = tmp_path / "cuda_hopper.svg"
    cuda_hopper.draw(tmp_path)
    once = plot.read_bytes()
    cuda_hopper.draw(tmp_path)
    assert plot.read_bytes() == once
    text = re.findall(r">([^<>]+)</text>", once.decode())
    assert {"TileLang, 8.0x at 64K", "hisa.flat_index, 15.0x at 128K", "4K"} <= set(text)


def test_no_plot_of_a_quick_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One length makes no line."""
    report.write_csv(
        tmp_path / "cuda_hopper.csv", [measured(INDEX, cuda_hopper.QUICK, 1.0).record()]
    )
    cuda_hopper.draw(tmp_path)
    assert not (tmp_path / "cuda_hopper.svg").exists()
    assert "has no lengths to compare" in capsys.readouterr().err
