"""T18: the audit of a patch: flat for a share of the rows, agreement by layer."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import hisa
from hisa.agreement import Comparison, LayerReport
from hisa.hf import audit as auditing
from tests.hf.models import PRUNING, TOPK, build, indexers, tokens

ON_CUDA = {"test_equals_compare", "test_the_model_does_not_notice", "test_generate"}
MEASURES = ("recall", "iou", "mass", "worst_miss", "context")
Call = tuple[tuple[Tensor, Tensor, Tensor], dict[str, Any]]


def same(a: Comparison, b: Comparison) -> bool:
    """Whether two comparisons are equal, to the bit, and about the same setting."""
    about = (a.settings, a.topk) == (b.settings, b.topk)
    return about and all(torch.equal(getattr(a, name), getattr(b, name)) for name in MEASURES)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Call]:
    """The calls of hisa.index that are made."""
    made: list[Call] = []
    own = hisa.index

    def index(q: Tensor, k: Tensor, weights: Tensor, **options: Any) -> Any:
        made.append(((q, k, weights), options))
        return own(q, k, weights, **options)

    monkeypatch.setattr(hisa, "index", index)
    return made


def compared(call: Call) -> Comparison:
    """Return what hisa.compare says about a call."""
    tensors, options = call
    return hisa.compare(
        *tensors,
        **{n: v for n, v in options.items() if n not in ("pooled", "return_scores")},
        progress=False,
    )


@pytest.mark.parametrize("precision", ["model", "fp8"])
def test_equals_compare(model: Any, calls: list[Call], precision: str) -> None:
    """With every row audited, a layer's report is that of hisa.compare for the same tensors."""
    with hisa.patch(model, **PRUNING, precision=precision, audit=1.0) as handle:
        model(tokens(2, 90))
        report = handle.report()
    names = {module: name for name, module in model.named_modules()}
    assert list(report.layers) == [names[module] for module in indexers(model)]
    for call, comparison in zip(calls, report.layers.values(), strict=True):
        assert comparison.topk == TOPK and len(comparison.context) == 2 * 90
        assert comparison.recall.min() < 1, "the budget must make a difference for this test"
        assert same(comparison, compared(call))


def test_generate(generator: Any, calls: list[Call]) -> None:
    """With a cache: the prompt in chunks, of left-padded sequences, then one token at a time."""
    prompt = tokens(2, 50)
    mask = torch.ones_like(prompt)
    mask[1, :9] = 0
    options = {"attention_mask": mask, "prefill_chunk_size": 20, "max_new_tokens": 5}
    with hisa.patch(generator, **PRUNING, audit=1.0) as handle:
        generator.generate(prompt, **options, do_sample=False)
    layers = list(handle.report().layers.values())
    for layer, comparison in enumerate(layers):
        parts = [compared(call) for call in calls[layer :: len(layers)]]
        assert len(parts) == 3 + 4
        for name in MEASURES:
            expected = torch.cat([getattr(part, name) for part in parts], dim=-1)
            assert torch.equal(getattr(comparison, name), expected), name
        assert (comparison.context == 0).sum() == 9  # the padding


@pytest.mark.parametrize("share", [1.0, 0.3, 1])
def test_the_model_does_not_notice(deepseek: Any, share: float) -> None:
    """Neither its results nor torch's random numbers change."""
    with hisa.patch(deepseek, **PRUNING):
        expected = deepseek(tokens(2, 90)).logits
    before = torch.get_rng_state()
    with hisa.patch(deepseek, **PRUNING, audit=share) as handle:
        assert torch.equal(deepseek(tokens(2, 90)).logits, expected)
        assert all(len(layer.context) for layer in handle.report().layers.values())
    assert torch.equal(torch.get_rng_state(), before)


def test_share(deepseek: Any) -> None:
    """The same calls audit the same rows; another layer, and the next call, others."""
    contexts = []
    for _ in range(2):
        with hisa.patch(deepseek, **PRUNING, audit=0.25) as handle:
            for _ in range(2):
                deepseek(tokens(4, 300))
        contexts.append([layer.context for layer in handle.report().layers.values()])
    first, again = contexts
    assert len(first) == 3 and all(map(torch.equal, first, again))
    for context in first:
        assert abs(len(context) - 600) < 5 * (2400 * 0.25 * 0.75) ** 0.5
        assert abs(float(context.double().mean()) - 150.5) < 20  # no part of a prompt is preferred
    assert not torch.equal(first[0], first[1])
    half = len(first[0]) // 2
    assert not torch.equal(first[0][:half], first[0][half : 2 * half])


def test_nothing_is_drawn(
    deepseek: Any, calls: list[Call], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A call without audited rows costs no more than without an audit."""
    monkeypatch.setattr(auditing, "select_flat", None)
    with hisa.patch(deepseek, **PRUNING, audit=1e-9) as handle:
        deepseek(tokens(1, 60))
    assert len(calls) == 3 and not any("return_scores" in options for _, options in calls)
    assert [len(layer.context) for layer in handle.report().layers.values()] == [0, 0, 0]
    assert len(str(handle.report()).splitlines()) == 2


def test_sampled_rows(deepseek: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row is judged by its own queries, weights, window and selection."""
    with hisa.patch(deepseek, **PRUNING, audit=1.0) as handle:
        deepseek(tokens(2, 90))
    whole = handle.report().layers
    rows = torch.tensor([3, 59, 89, 150, 179])
    monkeypatch.setattr(auditing.LayerAudit, "_draw", lambda *_: rows)
    with hisa.patch(deepseek, **PRUNING, audit=0.1) as handle:
        deepseek(tokens(2, 90))
    for name, layer in handle.report().layers.items():
        for measure in MEASURES:
            expected = getattr(whole[name], measure)[..., rows]
            assert torch.equal(getattr(layer, measure), expected), measure


def test_memory_is_bounded(deepseek: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """When it is full, a random half stays, and half as many rows are added from then on."""
    monkeypatch.setattr(auditing, "MOST_ROWS", 1000)
    with hisa.patch(deepseek, **PRUNING, audit=1.0) as handle:
        for length in [10] * 80 + [100] * 8:  # as many rows of each length
            deepseek(tokens(8, length))
            kept = [len(layer.context) for layer in handle.report().layers.values()]
            assert max(kept) <= 1000
    assert min(kept) > 300
    for layer in handle.report().layers.values():
        later = float((layer.context > 10).double().mean())
        assert 0.37 < later < 0.53, "the kept rows prefer a part of the run; expected 0.45"


def test_off(deepseek: Any, calls: list[Call], monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no audit to ask for, and nothing of it runs."""
    monkeypatch.setattr(auditing, "LayerAudit", None)
    with hisa.patch(deepseek, **PRUNING) as handle:
        deepseek(tokens(1, 60))
        forwards = [vars(indexer)["forward"] for indexer in indexers(deepseek)]
        assert [forward.audit for forward in forwards] == [None] * 3
    assert not any("return_scores" in options for _, options in calls)
    with pytest.raises(RuntimeError, match=r"no rows were audited; call hisa\.patch\(.*audit="):
        handle.report()
    assert handle.status().audit == 0 and "audit" not in str(handle.status())


def test_the_report_outlives_the_patch() -> None:
    """And the model."""
    model = build("deepseek_v32")
    with hisa.patch(model, **PRUNING, audit=1.0) as handle:
        assert "mask scans, audit=1.0\n" in str(handle.status()) and handle.status().audit == 1
        model(tokens(1, 60))
        report = handle.report()
    model(tokens(1, 60))  # no longer audited
    del model
    for layer, again in zip(report.layers.values(), handle.report().layers.values(), strict=True):
        assert same(layer, again)


def test_inference_mode(deepseek: Any) -> None:
    """Rows from inside and outside of it go together."""
    with hisa.patch(deepseek, **PRUNING, audit=1.0) as handle:
        with torch.inference_mode():
            deepseek(tokens(1, 60))
        with torch.enable_grad():
            deepseek(tokens(1, 60))
    for layer in handle.report().layers.values():
        assert torch.equal(layer.recall[:, :60], layer.recall[:, 60:])


def test_chunks_do_not_matter(deepseek: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are judged a few at a time."""
    reports = []
    for rows in (7, 10**6):
        monkeypatch.setattr(auditing, "rows_at_a_time", lambda topk, rows=rows: rows)
        with hisa.patch(deepseek, **PRUNING, audit=0.5) as handle:
            deepseek(tokens(2, 60))
        reports.append(handle.report().layers)
    assert all(map(same, reports[0].values(), reports[1].values()))


@pytest.mark.parametrize(
    ("audit", "error", "message"),
    [
        (-0.01, ValueError, r"audit: expected a share of the rows, 0 to 1, got -0\.01"),
        (1.5, ValueError, r"0 to 1, got 1\.5"),
        (float("nan"), ValueError, "0 to 1, got nan"),
        ("0.1", TypeError, r"audit: expected a float, got '0\.1'"),
        (True, TypeError, "audit: expected a float, got True"),
        (None, TypeError, "audit: expected a float, got None"),
    ],
)
def test_bad_shares(deepseek: Any, audit: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        hisa.patch(deepseek, audit=audit)


@pytest.fixture
def report(deepseek: Any) -> LayerReport:
    """Contexts of 1 to 300 tokens."""
    with hisa.patch(deepseek, **PRUNING, audit=1.0) as handle:
        deepseek(tokens(1, 300))
    return handle.report()


def test_table(report: LayerReport) -> None:
    lines = str(report).splitlines()
    assert lines[0] == "audit of 3 layers, 900 rows: 4 blocks of 8, mean"
    assert lines[1].split()[:5] == ["layer", "context", "rows", "recall", "1st"]
    assert len(lines) == 2 + 3 * 10  # contexts of 1, 2, 4, ..., 512
    assert lines[-1].split()[:5] == ["model.layers.2.self_attn.indexer", "257", "to", "300", "44"]
    whole = report._repr_html_()
    assert whole.count("<tr>") == 1 + 3 * 10 and "4 blocks of 8, mean" in whole
    assert repr(report) == str(report)
    for name, summaries in report.summary().items():
        assert summaries == report.layers[name].summary()


def test_pandas(report: LayerReport) -> None:
    pytest.importorskip("pandas")
    table = report.to_pandas()
    assert len(table) == 30 and list(table.columns[:2]) == ["layer", "block_size"]
    rows = report.to_pandas(rows=True)
    assert len(rows) == 900 and set(rows["layer"]) == set(report.layers)
    last = rows[rows["layer"] == "model.layers.2.self_attn.indexer"]
    assert last["recall"].tolist() == report.layers[last["layer"].iloc[0]].recall[0].tolist()
    assert LayerReport({}).to_pandas().empty


def test_plot(report: LayerReport) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("agg")
    axes = report.plot("iou")
    assert len(axes.lines) == 10 and axes.lines[-1].get_label() == "up to 512"
    assert np.asarray(axes.lines[-1].get_xdata()).tolist() == [0, 1, 2]
    expected = [summaries[-1].iou.mean for summaries in report.summary().values()]
    assert np.asarray(axes.lines[-1].get_ydata()).tolist() == expected
    assert axes.get_ylabel().startswith("iou")
    assert report.plot(ax=axes) is axes and len(axes.lines) == 20
    with pytest.raises(ValueError, match="measure: expected one of recall, iou, mass, got 'f1'"):
        report.plot("f1")
    LayerReport({}).plot()
    assert "nothing" in str(LayerReport({}))
