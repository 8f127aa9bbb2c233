"""Which rows of a hierarchical selection are proved to be flat's, and the selection that always is.

A discarded block cannot hold one of flat's tokens if no key in it can score as much as the worst
token that was selected. Such a bound follows from balls around a few keys each (hisa/bounds.py). It
is sound in floating point: what is proved is what `hisa.flat_index` returns on the same device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _extension
from .checking import NUMBER, check, check_index_types, check_types, wants_check
from .contract import check_contract, check_numbers
from .cost import ExactCost, Work
from .ops import Pooled
from .proof import Proof, check_bound_size, check_limits

# NOTE: operators, and not functions that torch.compile looks into: what it makes of a sum or of a
# conversion to bfloat16 and back may round in another way, and then the bounds do not hold.
ARGUMENTS = (
    "(Tensor q, Tensor k, Tensor weights, *, Tensor? k_scale=None, Tensor? ks=None,"
    " Tensor? ke=None, Tensor? cu_seqlens_k=None, Tensor? pooled_k=None, Tensor? pooled_scale=None,"
    ' SymInt block_size=128, SymInt block_topk=64, SymInt topk=2048, str pooling="mean",'
    " SymInt? bound_size=None) -> (Tensor indices, Tensor scores, Tensor "
)
RESULTS = {"certify": "proved, Tensor margin)", "exact_index": "escalated)"}


@dataclass(frozen=True, eq=False, repr=False)
class Certificate:
    """What `hisa.certify` returns.

    Attributes:
        indices: `[M, topk]` int32, what `hisa.index` selects.
        scores: `[M, topk]` float32, in the same order.
        proved: `[M]` bool: the row's tokens are flat's.
        margin: `[M]` float32: the worst selected score less the bound of the discarded blocks;
            positive where the row is proved, inf where nothing is discarded, otherwise what is
            missing. -inf or NaN where fewer than `topk` tokens are selected, or where a query, key
            or weight that counts is not finite.
    """

    indices: Tensor
    scores: Tensor
    proved: Tensor
    margin: Tensor

    def __str__(self) -> str:
        proved, whole = int(self.proved.sum()), int((self.margin == torch.inf).sum())
        return (
            f"{proved} of {len(self.proved)} rows are proved equal to flat, {whole} of them since "
            "nothing is discarded"
        )

    __repr__ = __str__


class ExactSelection(NamedTuple):
    """What `hisa.exact_index` returns.

    Attributes:
        indices: `[M, topk]` int32, the same set as `hisa.flat_index` selects.
        scores: `[M, topk]` float32, in the same order.
        escalated: `[M]` bool: the row was not proved, and flat has run for it.
        work: what `cost` follows from: sizes, and the caller's own windows. Who changes those in
            place changes the cost that is counted afterwards.
    """

    indices: Tensor
    scores: Tensor
    escalated: Tensor
    work: Work

    def cost(self) -> ExactCost:
        """Count operations, and those of flat alone. Waits for the device; the call does not."""
        return self.work.cost(self.escalated)

    def __str__(self) -> str:
        return str(self.cost())

    def __repr__(self) -> str:
        return str(self)


def certify(
    q: Tensor,
    k: Tensor,
    weights: Tensor,
    *,
    k_scale: Tensor | None = None,
    ks: Tensor | None = None,
    ke: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    pooled: Pooled | None = None,
    block_size: int = 128,
    block_topk: int = 64,
    topk: int = 2048,
    pooling: str = "mean",
    bound_size: int | None = None,
) -> Certificate:
    """Select hierarchically, and prove for as many rows as possible that flat would do the same.

    For each row the scores of all tokens in discarded blocks are bounded from above. If no bound
    reaches the worst selected score, the row is proved. The proof allows for rounding, and for any
    signs of the weights. How many rows it reaches depends on the keys: it needs keys that lie close
    together within `bound_size` neighbours, and proves next to nothing for random ones.

    Args:
        q, k, weights, k_scale, ks, ke, cu_seqlens_k, pooled, block_size, block_topk, topk, pooling:
            as for `hisa.index`, but D is at most 240 and H at most 127, for the bounds are scored
            with 16 channels and a head more.
        bound_size: keys that share a bound, at most `block_size`: 8, 16, 32, 64, 128 or 256. Fewer
            give tighter bounds at a higher cost. By default 64, or `block_size` if that is less.

    Returns:
        A `Certificate`, of tensors on the device of k. Nothing is read back from the device.

    Raises:
        TypeError, ValueError: what `hisa.index` would raise, or `bound_size` is not accepted.

    Cost: hisa, its coarse stage once more, and flat over `N / bound_size` keys of D + 16 channels.
    Source: the certificate of HISA's definition, with balls in place of boxes.
    """
    arguments = _arguments(
        q, k, weights, k_scale, ks, ke, cu_seqlens_k, pooled, block_size, block_topk, topk, pooling,
        bound_size,
    )  # fmt: skip
    return Certificate(*torch.ops.hisa.certify(q, k, weights, **arguments))


def exact_index(
    q: Tensor,
    k: Tensor,
    weights: Tensor,
    *,
    k_scale: Tensor | None = None,
    ks: Tensor | None = None,
    ke: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    pooled: Pooled | None = None,
    block_size: int = 128,
    block_topk: int = 64,
    topk: int = 2048,
    pooling: str = "mean",
    bound_size: int | None = None,
) -> ExactSelection:
    """Select flat's tokens, by the hierarchical indexer wherever that can be proved.

    HISA first, then the proof of `hisa.certify`, then `hisa.flat_index` for just the rows that are
    not proved. So the result is always flat's, at the cost of `certify` plus the share of escalated
    rows of that of flat. Where few rows are proved that is more than flat alone: the result says so
    when it is printed, and `.cost()` has the numbers. They are operations, not time.

    Args: those of `hisa.certify`.

    Returns:
        An `ExactSelection`, of tensors on the device of k. Nothing is read back from the device
        before it is printed or asked for its cost.

    Raises:
        TypeError, ValueError: what `hisa.certify` would raise.
    """
    arguments = _arguments(
        q, k, weights, k_scale, ks, ke, cu_seqlens_k, pooled, block_size, block_topk, topk, pooling,
        bound_size,
    )  # fmt: skip
    indices, scores, escalated = torch.ops.hisa.exact_index(q, k, weights, **arguments)
    size = _bound_size(bound_size, block_size)
    work = Work(q.shape[0], k.shape[0], q.shape[1], k.shape[1], block_size, block_topk, size,
                pooled is None, ks, ke, cu_seqlens_k)  # fmt: skip
    return ExactSelection(indices, scores, escalated, work)


def _arguments(
    q: Tensor,
    k: Tensor,
    weights: Tensor,
    k_scale: Tensor | None,
    ks: Tensor | None,
    ke: Tensor | None,
    cu_seqlens_k: Tensor | None,
    pooled: Pooled | None,
    block_size: int,
    block_topk: int,
    topk: int,
    pooling: str,
    bound_size: int | None,
) -> dict[str, Any]:
    """Check what kind of thing each argument is, and return those that the operators name."""
    _extension.require()
    check_index_types(
        q, k, weights, k_scale, ks, ke, cu_seqlens_k, pooled, block_size, block_topk, topk, pooling,
        False,
    )  # fmt: skip
    if bound_size is not None:
        check_types(NUMBER, bound_size=bound_size)
    pooled_k, pooled_scale = (None, None) if pooled is None else pooled
    if wants_check(q, k, weights, k_scale, ks, ke, cu_seqlens_k, pooled_k, pooled_scale):
        check(
            q, k, weights, k_scale=k_scale, ks=ks, ke=ke, cu_seqlens_k=cu_seqlens_k, pooled=pooled,
            block_size=block_size, block_topk=block_topk, topk=topk, pooling=pooling,
        )  # fmt: skip
    return {
        "k_scale": k_scale, "ks": ks, "ke": ke, "cu_seqlens_k": cu_seqlens_k, "pooled_k": pooled_k,
        "pooled_scale": pooled_scale, "block_size": block_size, "block_topk": block_topk,
        "topk": topk, "pooling": pooling, "bound_size": bound_size,
    }  # fmt: skip


def _bound_size(given: int | None, block_size: int) -> int:
    """Return how many keys share a bound."""
    return min(64, block_size) if given is None else given


def _start(
    q: Tensor,
    k: Tensor,
    weights: Tensor,
    *,
    k_scale: Tensor | None = None,
    ks: Tensor | None = None,
    ke: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    pooled_k: Tensor | None = None,
    pooled_scale: Tensor | None = None,
    block_size: int = 128,
    block_topk: int = 64,
    topk: int = 2048,
    pooling: str = "mean",
    bound_size: int | None = None,
) -> Proof:
    """Check an operator's arguments, and compute what all rows share."""
    tensors = (q, k, weights, k_scale, ks, ke, cu_seqlens_k)
    sizes = (block_size, block_topk, topk, pooling)
    _extension.require().check_index(*tensors, pooled_k, pooled_scale, *sizes)
    bound_size = _bound_size(bound_size, block_size)
    check_bound_size(bound_size, block_size)
    check_limits(heads=q.shape[1], dim=k.shape[1])
    pooled = None if pooled_k is None or pooled_scale is None else (pooled_k, pooled_scale)
    return Proof.make(*tensors, pooled, *sizes, bound_size)


@torch.no_grad()
def _certify(q: Tensor, k: Tensor, weights: Tensor, **options: Any) -> tuple[Tensor, ...]:
    proof = _start(q, k, weights, **options)
    parts = [proof.certify(at) for at in proof.chunks()]
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))


@torch.no_grad()
def _exact_index(q: Tensor, k: Tensor, weights: Tensor, **options: Any) -> tuple[Tensor, ...]:
    proof = _start(q, k, weights, **options)
    parts = [proof.escalate(at) for at in proof.chunks()]
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))


def _fake(
    q: Tensor,
    k: Tensor,
    weights: Tensor,
    *,
    block_size: int = 128,
    block_topk: int = 64,
    topk: int = 2048,
    pooling: str = "mean",
    bound_size: int | None = None,
    **tensors: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    check_numbers(block_size, block_topk, topk, pooling)
    check_contract(k, block_size=block_size, q=q, weights=weights, **tensors)
    if isinstance(bound_size, int) and isinstance(block_size, int):
        check_bound_size(bound_size, block_size)
    check_limits(heads=q.shape[1], dim=k.shape[1])
    rows = q.shape[0]
    indices = q.new_empty(rows, topk, dtype=torch.int32)
    scores = q.new_empty(rows, topk, dtype=torch.float32)
    return indices, scores, q.new_empty(rows, dtype=torch.bool)


def _fake_certify(*args: Any, **options: Any) -> tuple[Tensor, ...]:
    indices, scores, proved = _fake(*args, **options)
    return indices, scores, proved, scores.new_empty(scores.shape[0])


LIBRARY = torch.library.Library("hisa", "FRAGMENT")
for _name, _real, _faked in (
    ("certify", _certify, _fake_certify),
    ("exact_index", _exact_index, _fake),
):
    LIBRARY.define(_name + ARGUMENTS + RESULTS[_name])
    for _key in ("CPU", "CUDA"):
        LIBRARY.impl(_name, _real, _key)
    LIBRARY.impl(_name, torch.library.fallthrough_kernel, "Autograd")
    torch.library.register_fake(f"hisa::{_name}", _faked, lib=LIBRARY)
