"""T18: `precision="fp8"` scores what the model projects, in 8 bits, and says so.

Catches a scale left out or put on the wrong side, a rotation of queries or keys alone, and an
option that is accepted and forgotten.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import hisa
import hisa.hf.indexer as under_test
from hisa.quantize import rotate_hadamard
from tests.hf.models import PRUNING, tokens

ON_CUDA = True
OPTIONS: list[dict[str, Any]] = [
    {},
    {"power_of_two": True},
    {"hadamard": True},
    {"power_of_two": True, "hadamard": True},
]


class Recorder:
    """Records what the patch projects and what it hands to hisa.index."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.keys: list[Tensor] = []
        self.queries: list[Tensor] = []
        self.weights: list[Tensor] = []
        self.calls: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        project_queries, project_weights = under_test.project_queries, under_test.project_weights
        project_keys, index = under_test.project_keys, hisa.index

        def keys(*arguments: Any) -> Tensor:
            self.keys.append(project_keys(*arguments))
            return self.keys[-1]

        def queries(*arguments: Any) -> tuple[Tensor, Tensor | None]:
            *projected, _ = arguments
            self.queries.append(project_queries(*projected)[0])  # without settings: as they are
            return project_queries(*arguments)

        def weights(*arguments: Any) -> Tensor:
            *projected, _ = arguments
            self.weights.append(project_weights(*projected))  # without the queries' scales
            return project_weights(*arguments)

        def record(q: Tensor, k: Tensor, weights: Tensor, **options: Any) -> Any:
            self.calls.append((q, k, weights, options["k_scale"]))
            return index(q, k, weights, **options)

        monkeypatch.setattr(under_test, "project_keys", keys)
        monkeypatch.setattr(under_test, "project_queries", queries)
        monkeypatch.setattr(under_test, "project_weights", weights)
        monkeypatch.setattr(hisa, "index", record)


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "+".join(o) or "plain")
def test_scores_in_fp8(
    deepseek: Any, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    """Queries, weights and keys multiply to what the model's own do, within fp8's rounding.

    Integration bugs: Hadamard and scales, compared after quantisation.
    """
    recorder = Recorder(monkeypatch)
    with hisa.patch(deepseek, **PRUNING, precision="fp8", **options) as handle:
        deepseek(tokens(1, 40))
    shown = str(handle.status())
    assert "precision='fp8'" in shown and all(f"{name}=True" in shown for name in options)
    for projected, keys, own, (q, k, weights, k_scale) in zip(
        recorder.queries, recorder.keys, recorder.weights, recorder.calls, strict=True
    ):
        assert q.dtype == k.dtype == torch.float8_e4m3fn
        wanted = projected.flatten(0, 1).float()
        wanted = rotate_hadamard(wanted) if options.get("hadamard") else wanted
        q_scale = weights / own.flatten(0, 1)  # [M, H]
        got = q.float() * q_scale[..., None]
        # 3 bits behind the point, and what is lost below the smallest normal number
        bound = wanted.abs() * 2**-4 + q_scale[..., None] * 2**-10
        assert ((got - wanted).abs() <= bound * 1.001).all()
        dots = torch.einsum("mhd,nd->mhn", got, k.float() * k_scale[:, None])
        true = torch.einsum("mhd,nd->mhn", projected.flatten(0, 1), keys.flatten(0, 1))
        lengths = projected.flatten(0, 1).norm(dim=-1)[..., None] * keys.flatten(0, 1).norm(dim=-1)
        assert ((dots - true).abs() <= 2**-3 * lengths).all()
        largest = q.float().abs().amax(-1)
        if options.get("power_of_two"):
            assert (torch.frexp(k_scale).mantissa == 0.5).all()
            assert (largest > 200).all() and (largest <= 448).all()
        else:
            assert (largest == 448).all()


def test_rotation_keeps_dot_products() -> None:
    """The Hadamard matrix is orthogonal, symmetric, and of one magnitude."""
    for size in (1, 2, 64, 128):
        matrix = rotate_hadamard(torch.eye(size))
        torch.testing.assert_close(matrix @ matrix.T, torch.eye(size))
        assert torch.equal(matrix, matrix.T)
        torch.testing.assert_close(matrix.abs(), torch.full((size, size), size**-0.5))
    with pytest.raises(ValueError, match=r"x: expected .* power of two, got \[3, 48\]"):
        rotate_hadamard(torch.zeros(3, 48))


def test_scale_rounded_up_to_a_power_of_two() -> None:
    """Never below the plain scale, less than twice as large, and a power of two already stays."""
    x = torch.randn(1000, 16) * 10.0 ** torch.linspace(-30, 30, 1000)[:, None]
    plain, rounded = hisa.quantize_fp8(x)[1], hisa.quantize_fp8(x, power_of_two=True)[1]
    assert (torch.frexp(rounded).mantissa == 0.5).all()
    assert (rounded >= plain).all() and (rounded < 2 * plain).all()
    exact = torch.full((1, 16), 448.0 * 2.0**-5)
    assert hisa.quantize_fp8(exact, power_of_two=True)[1].item() == 2.0**-5
    special = torch.tensor([[torch.inf] * 16, [torch.nan] * 16])
    assert not hisa.quantize_fp8(special, power_of_two=True)[1].isfinite().any()


def test_hadamard_needs_a_power_of_two(deepseek: Any) -> None:
    """A head dimension that cannot be rotated is refused when the model is patched."""
    indexer = next(m for m in deepseek.modules() if type(m).__name__.endswith("Indexer"))
    before, indexer.head_dim = indexer.head_dim, 48
    try:
        with pytest.raises(ValueError, match=r"hadamard: expected .* power of two.*got 48"):
            hisa.patch(deepseek, **PRUNING, precision="fp8", hadamard=True)
    finally:
        indexer.head_dim = before
