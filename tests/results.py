"""Calls of the operators that can write to memory which their caller keeps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import hisa
from hisa.around import mask_windows, rope_quantize
from tests.builders import int32, random_case, shaped
from tests.numeric import FP8
from tests.paged import exact_paged, put

SELECTION = ("indices", "scores")
RESULTS = {
    "pool_keys": ("pooled_k", "pooled_scale"),
    "index": SELECTION,
    "flat_index": SELECTION,
    "paged_index": SELECTION,
    "mask_windows": ("ks", "ke", "summary"),
    "rope_quantize": ("y", "scale"),
}
FUNCTIONS = {op: getattr(hisa, op, None) for op in RESULTS}
FUNCTIONS |= {"mask_windows": mask_windows, "rope_quantize": rope_quantize}


@dataclass
class Call:
    """A call of an operator that has `out=`, with everything but that."""

    op: str
    options: dict[str, Any]

    @property
    def inputs(self) -> dict[str, Tensor]:
        """The tensors that it reads."""
        tensors = {n: v for n, v in self.options.items() if isinstance(v, Tensor)}
        if self.options.get("pooled") is not None:
            tensors |= dict(zip(("pooled_k", "pooled_scale"), self.options["pooled"], strict=True))
        return tensors

    def __call__(self, **changes: Any) -> tuple[Tensor, ...]:
        """Run it, and return its results as a tuple."""
        results = FUNCTIONS[self.op](**{**self.options, **changes})  # type: ignore[misc]
        return (results,) if isinstance(results, Tensor) else tuple(results)

    def into(self, results: tuple[Tensor, ...]) -> None:
        """Write to these tensors."""
        out = results if len(results) > 1 else results[0]
        assert FUNCTIONS[self.op](**self.options, out=out) is out  # type: ignore[misc]

    def replace(self, name: str, value: Tensor) -> Call:
        """Return the call with another tensor."""
        if name in self.options:
            return Call(self.op, {**self.options, name: value})
        pair = dict(zip(("pooled_k", "pooled_scale"), self.options["pooled"], strict=True))
        return Call(self.op, {**self.options, "pooled": (*{**pair, name: value}.values(),)})


def selections(case: Any, scores: bool) -> list[Call]:
    """The calls that take keys in one piece."""
    tensors = {"q": case.q, "k": case.k, "weights": case.weights, "return_scores": scores}
    return [
        Call("index", {**tensors, **case.index_args()}),
        Call("flat_index", {**tensors, **case.flat_args()}),
        Call("pool_keys", {"k": case.k, **case.pool_args()}),
    ]


def paged_call(seed: int, device: str, **fixed: Any) -> Call:
    """A paged call, its pooled keys up to date."""
    paged = exact_paged(seed, **fixed)
    pooled = tuple(t.to(device) for t in paged.pooled())
    pages, where = paged.pages.to(device), put_all(paged.where(), device)
    hisa.paged_pool(pages, *pooled, new_tokens=None, pooling=paged.case.pooling, **where)
    case = paged.case.to(device)
    return Call("paged_index", {
        "q": case.q, "pages": pages, "weights": case.weights, **where, "pooled": pooled,
        "next_n": paged.next_n, "block_topk": case.block_topk, "topk": case.topk,
        "physical": seed % 2 == 0, "return_scores": seed % 3 > 0,
    })  # fmt: skip


def put_all(arguments: dict[str, Any], device: str) -> dict[str, Any]:
    """Bring all tensors to a device."""
    return {name: put(value, device) for name, value in arguments.items()}


def around_calls(device: str, rows: int = 5) -> list[Call]:
    """The operators around a selection."""
    random = torch.Generator().manual_seed(rows)
    mask = (torch.rand(2, rows, 70, generator=random) < 0.7).to(device)
    x = torch.randn(2, rows, 3, 32, generator=random)
    angles = torch.rand(1, rows, 16, generator=random)
    turned = {"x": x, "cos": angles.cos(), "sin": angles.sin(), "first": 8}
    turned = {n: put(v, device) for n, v in turned.items()}
    half = {n: v.bfloat16() if isinstance(v, Tensor) else v for n, v in turned.items()}
    return [
        Call("mask_windows", {"mask": mask}),
        Call("mask_windows", {"mask": mask[..., :0]}),
        Call("rope_quantize", {**turned, "quantize": True, "power_of_two": True}),
        Call("rope_quantize", {**half, "interleaved": True}),
        Call("rope_quantize", {"x": half["x"], "quantize": True}),
    ]


def typical(device: str, dtype: torch.dtype = torch.float32) -> dict[str, Call]:
    """One call of each op that prunes, with every optional tensor."""
    windows: dict[str, Any] = {
        "ks": int32([0, 3, 40, 7, 150, 9]),
        "ke": int32([300, 3, 131, 299, 150, 200]),
    }
    dtype = shaped(dtype=dtype)["dtype"]
    case = random_case(3, dtype, k_scale=torch.rand(300) + 0.5, cu_seqlens_k=int32([0, 300]),
                       **windows)  # fmt: skip
    pooled = hisa.pool_keys(case.k, k_scale=case.k_scale, block_size=8)
    calls = selections(case.replace(pooled=pooled).to(device), True)
    calls += [paged_call(4, device, dtype=FP8, lengths=[300, 205, 0], B=32, block_topk=3, topk=50,
                         next_n=2, page_size=16), *around_calls(device)[:3:2]]  # fmt: skip
    return {call.op: call for call in calls}
