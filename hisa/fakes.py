"""What fake kernels are made of: they stand in for the operators where tensors have no data."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, cast

import torch
from torch import Tensor

from . import _extension
from .contract import check_result

Function = TypeVar("Function", bound=Callable[..., object])


def fake_kernel(
    name: str, results: tuple[str, ...] = (), optional: str = ""
) -> Callable[[Function], Function]:
    """Register a fake kernel where the operator exists, that is, where the extension is built.

    Args:
        name: the operator's.
        results: arguments of its overload `out`, if it has one, which gets the same fake kernel.
        optional: argument that says whether the last result is wanted; in `out`, giving it does.
    """

    def register(function: Function) -> Function:
        def out(*args: object, **kwargs: object) -> None:
            given = {result: kwargs.pop(result, None) for result in results}
            if optional:
                kwargs[optional] = given[results[-1]] is not None
            wanted = cast(tuple[Tensor, ...], function(*args, **kwargs))
            for (result, got), new in zip(given.items(), wanted, strict=True):
                if isinstance(got, Tensor):
                    check_result(result, got, new.shape, new.dtype, new.device)

        if _extension.available():
            torch.library.register_fake(f"hisa::{name}", function)
            if results:
                torch.library.register_fake(f"hisa::{name}.out", out)
        return function

    return register


def empty_selection(q: Tensor, topk: int, return_scores: bool) -> tuple[Tensor, Tensor]:
    """Return a selection's tensors, without values."""
    rows = q.shape[0]
    indices = q.new_empty(rows, topk, dtype=torch.int32)
    return indices, q.new_empty(rows if return_scores else 0, topk, dtype=torch.float32)
