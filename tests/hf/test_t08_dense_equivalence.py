"""T8 for the patch: with a covering budget, the indexer selects what the model's own selects.

Both add the same terms in different orders, so a token may differ if its score is within the
rounding error of the row's threshold, and only then. The scores that decide are fp64.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import hisa
from tests.hf.models import COVERING, TOPK, build, here, indexers

ON_CUDA = True
CASES = 40  # of each model and dtype, so that all together are more than 1,000 rows x 100


def random_windows(batch: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Causal windows behind up to half a row of left padding."""
    pad = here(torch.randint(0, length // 2, (batch, 1), generator=generator, device="cpu"))
    position = torch.arange(length).expand(batch, -1)
    return pad.expand(-1, length), position + 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_selection(kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    indexer = indexers(build(kind))[0].to(dtype)
    generator = torch.Generator().manual_seed(0)
    spied: list[tuple[Tensor, ...]] = []
    index: Any = hisa.index

    def spy(q: Tensor, k: Tensor, weights: Tensor, **options: Any) -> Tensor:
        spied.append((q, k, weights))
        result: Tensor = index(q, k, weights, **options)
        return result

    def random(*shape: int) -> Tensor:
        made: Tensor = here(torch.randn(shape, generator=generator, device="cpu"))
        return made

    monkeypatch.setattr(hisa, "index", spy)
    for case in range(CASES):
        batch, length = 1 + case % 3, 20 + 5 * (case % 13)
        states = random(batch, length, 32).to(dtype)
        resid = random(batch, length, 16).to(dtype)
        angle = random(1, length, 4).repeat(1, 1, 2)
        turn = (angle.cos().to(dtype), angle.sin().to(dtype))
        ks, ke = random_windows(batch, length, generator)
        columns = torch.arange(length)
        mask = (columns >= ks[..., None]) & (columns < ke[..., None])
        own = indexer(states, resid, turn, mask, None)
        with hisa.patch(indexer, **COVERING):
            ours = indexer(states, resid, turn, mask, None)
        assert own.shape == ours.shape and own.dtype == ours.dtype
        q, k, weights = (tensor.double() for tensor in spied.pop())
        dots = torch.einsum("mhd,bnd->mhbn", q, k.unflatten(0, (batch, length)))
        dots = dots[torch.arange(batch * length), :, torch.arange(batch).repeat_interleave(length)]
        terms = weights[..., None] * dots.relu()  # [B * S, H, T]
        scores = terms.sum(1).view(batch, length, length).masked_fill(~mask, -torch.inf)
        error = 1e-5 * terms.abs().sum(1).view(batch, length, length).amax(-1, keepdim=True)
        threshold = scores.topk(min(TOPK, length), dim=-1).values[..., -1:]
        for selected in (own, ours):
            chosen = torch.zeros_like(mask).scatter(-1, selected.long(), True)
            assert not (mask & chosen & (scores < threshold - error)).any()
            assert not (mask & ~chosen & (scores > threshold + error)).any()
