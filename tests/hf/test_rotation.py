"""The patch turns queries by one operator where that gives the model's own bits, else as the model.

Catches an operator used for a function that it does not reproduce, and one that is never used.
"""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

import hisa.hf.rotation as under_test
from hisa.around import rope_quantize
from hisa.hf.models import SPECS, IndexerSpec, rotary
from tests.hf.models import indexers

ON_CUDA = True
LAYOUTS = {
    "deepseek_v32": False,
    "glm_moe_dsa": True,
    "axk2": False,
    "hy_v4": False,
    "hy_v4_vl": None,  # turns in fp32 and pairs neighbours in place
    "dots3_note": True,
}


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.model_type)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_model_has_its_layout(spec: IndexerSpec, dtype: torch.dtype) -> None:
    pytest.importorskip(spec.module_name)
    found = under_test.find_layout(rotary(spec), dtype, torch.empty(0).device)
    assert found is LAYOUTS[spec.model_type]


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("quantize", [False, True])
def test_operator_and_model_agree(
    deepseek: Any, monkeypatch: pytest.MonkeyPatch, last: bool, quantize: bool
) -> None:
    module = indexers(deepseek)[0]
    spec = dataclasses.replace(SPECS[0], rope_last=last)
    x = torch.randn(2, 5, module.n_heads, module.head_dim)
    angle = torch.rand(2, 5, module.qk_rope_head_dim // 2).repeat(1, 1, 2)
    cos_sin = (angle.cos(), angle.sin())
    ran: list[Tensor] = []

    def operator(x: Tensor, *rest: Any, **options: Any) -> tuple[Tensor, Tensor]:
        ran.append(x)
        return rope_quantize(x, *rest, **options)

    monkeypatch.setattr(under_test, "rope_quantize", operator)
    y, scale = under_test.rotate(module, spec, x, cos_sin, quantize=quantize)
    assert ran[-1] is x
    with monkeypatch.context() as patcher:
        patcher.setattr(under_test, "find_layout", lambda *a: None)
        wanted, wanted_scale = under_test.rotate(module, spec, x, cos_sin, quantize=quantize)
    assert torch.equal(y.float(), wanted.float())
    assert (scale is None) == (wanted_scale is None) == (not quantize)
    if scale is not None and wanted_scale is not None:
        assert torch.equal(scale, wanted_scale)


def test_a_replaced_function_runs(deepseek: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody's own RoPE, put into the model's module after the patch, is what turns."""
    calls = []

    def function(q: Tensor, k: Tensor, *rest: Any, **options: Any) -> tuple[Tensor, Tensor]:
        calls.append(q)
        return q + 1, k + 1

    module, spec = indexers(deepseek)[0], SPECS[0]
    x = torch.zeros(1, 2, module.n_heads, module.head_dim)
    angles = torch.zeros(1, 2, module.qk_rope_head_dim)
    under_test.rotate(module, spec, x, (angles, angles))
    monkeypatch.setattr(sys.modules[spec.module_name], spec.rotary, function)
    y = under_test.rotate(module, spec, x, (angles, angles))[0]
    assert calls and (y[..., : module.qk_rope_head_dim] == 1).all()
    assert (y[..., module.qk_rope_head_dim :] == 0).all()


def test_a_function_that_fails_on_the_example_runs() -> None:
    def function(q: Tensor, k: Tensor, *rest: Any, **options: Any) -> tuple[Tensor, Tensor]:
        raise RuntimeError("another shape, please")

    assert under_test.find_layout(function, torch.float32, torch.device("cpu")) is None
