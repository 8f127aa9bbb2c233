"""T18: what a patch logs, warns about and reports; and that importing it needs no transformers."""

from __future__ import annotations

import logging
import subprocess
import sys
import warnings
from types import SimpleNamespace
from typing import Any

import pytest

import hisa
from hisa.hf import Settings
from tests.hf.models import COVERING, PRUNING, build, tokens

IDS = tokens(1, 60)


def test_status(caplog: pytest.LogCaptureFixture) -> None:
    model = build("glm_moe_dsa")
    caplog.set_level(logging.INFO, "hisa")
    with hisa.patch(model, **PRUNING) as handle:
        model(tokens(2, 60))
        model(tokens(1, 20))
        status = handle.status()
        assert "2 of 2 indexers patched" in repr(handle)
    assert status.settings == handle.settings == Settings(block_size=8, block_topk=4)
    full, last = status.layers[0], status.layers[2]
    assert (full.name, full.state) == ("model.layers.0.self_attn.indexer", "patched")
    assert (full.calls, full.rows, full.fallbacks) == (2, 140, {})
    assert full.pruned_rows == 2 * (60 - 32)  # rows that see more than 4 blocks of 8
    assert (last.name, last.state, last.calls) == ("model.layers.2.self_attn", "shared", 0)
    lines = str(status).splitlines()
    assert len(lines) == 5 and "block_size=8" in lines[0] and "56" in lines[2]
    assert "hisa patched model.layers.1.self_attn.indexer (glm_moe_dsa)" in caplog.text
    assert "hisa removed from 2 indexers" in caplog.text


def test_warns_once_when_the_budget_covers_all(deepseek: Any) -> None:
    """While a model generates; else when the patch is removed, if nothing was pruned until then."""
    with hisa.patch(deepseek, **COVERING):
        with pytest.warns(UserWarning, match="covers all of the 61 tokens") as record:
            deepseek.generate(IDS, max_new_tokens=3, do_sample=False)
        assert len(record) == 1
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            deepseek.generate(IDS, max_new_tokens=3, do_sample=False)
    handle = hisa.patch(deepseek, **COVERING)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        deepseek(IDS)  # perhaps the first chunk of a long prompt
    with pytest.warns(UserWarning, match="covers all of the 60 tokens"):
        handle.remove()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with hisa.patch(deepseek, **PRUNING):
            options = {"prefill_chunk_size": 16, "max_new_tokens": 3, "do_sample": False}
            deepseek.generate(IDS, **options)
            deepseek(tokens(1, 10))  # short, but longer ones were pruned
        with hisa.patch(deepseek, **PRUNING):
            pass  # nothing seen, nothing to say


def test_a_device_without_kernels() -> None:
    """Is found when patching, not in the first forward."""
    if hisa.build_info()["cuda"]:
        pytest.skip("this build has kernels for every device")
    indexer = SimpleNamespace(
        n_heads=4, head_dim=16, index_topk=8, parameters=lambda: [SimpleNamespace(is_cuda=True)]
    )
    with pytest.raises(ValueError, match="DeepseekV32Indexer: device: expected cpu"):
        Settings().check("DeepseekV32Indexer", indexer)


def test_import_is_lazy() -> None:
    """Neither hisa nor its patch needs transformers until a model is given."""
    code = (
        "import sys, torch; sys.modules['transformers'] = None; import hisa, hisa.hf\n"
        "try: hisa.patch(object())\n"
        "except TypeError as error: print(error)\n"
        "import warnings; warnings.simplefilter('ignore'); print(hisa.patch(torch.nn.Linear(1, 1)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert "expected a torch.nn.Module, got object" in result.stdout
    assert "0 of 0 indexers" in result.stdout
