"""T17: the instruments check the values of windows where the ops do, under HISA_CHECK=1.

Catches windows that are cut off on the way to an op, which then has nothing to object to.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

import hisa

INSTRUMENTS: list[Callable[..., Any]] = [
    partial(hisa.compare, progress=False),
    partial(hisa.explain, row=0),
    partial(hisa.recommend, progress=False, target=0.5),
    partial(hisa.certify),
    partial(hisa.exact_index),
]


@pytest.mark.parametrize("call", INSTRUMENTS, ids=lambda call: str(call.func.__name__))
def test_hisa_check(call: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A window that reaches beyond the keys is cut off, or named."""
    q, k, weights = torch.randn(20, 4, 16), torch.randn(256, 16), torch.randn(20, 4)
    ke = torch.tensor([256] * 19 + [257], dtype=torch.int32)
    run = partial(call, q, k, weights, ke=ke, block_size=8, block_topk=4, topk=8)
    run()
    monkeypatch.setenv("HISA_CHECK", "1")
    with pytest.raises(ValueError, match=r"ks, ke: expected .*, got \[0, 257\) in row 19"):
        run()
