"""T20: `hisa.certify` and `hisa.exact_index` behave as PyTorch ops.

Catches a compiler that sees the bounds' arithmetic and rounds it in its own way, so that a proof is
none; graph breaks, gradients, and fake kernels that disagree.
"""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import pytest
import torch
from torch import Tensor

import hisa
from tests.builders import int32
from tests.case import Case, same_bytes
from tests.numeric import DTYPES, FP8, short_name
from tests.test_certificate import arguments, clusters, flat, line
from tests.test_t20_torch_contract import modes

OPS = ("certify", "exact_index")
FIELDS = {"certify": ("indices", "scores", "proved", "margin"),
          "exact_index": ("indices", "scores", "escalated")}  # fmt: skip


def case_of(dtype: torch.dtype, device: str, **fields: Any) -> Case:
    """A call in which some rows are proved."""
    return clusters(1, dtype, 0.03, rows=20, keys=256, **fields).to(device)


def assert_same(op: str, got: Any, want: Any) -> None:
    """Equal to the bit."""
    for name in FIELDS[op]:
        assert same_bytes(getattr(got, name), getattr(want, name)), name


def raw(case: Case) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    """Arguments of the raw ops."""
    given = arguments(case)
    pooled_k, pooled_scale = hisa.pool_keys(case.k, **case.pool_args())
    given |= {"pooled_k": pooled_k, "pooled_scale": pooled_scale}
    return (case.q, case.k, case.weights), given


@pytest.mark.parametrize("dtype", DTYPES, ids=short_name)
@pytest.mark.parametrize("op", OPS)
def test_opcheck(op: str, dtype: torch.dtype, device: str) -> None:
    """All of torch's op tests: schema, autograd registration, fake, AOT dispatch."""
    args, options = raw(case_of(dtype, device, cu_seqlens_k=int32([0, 100, 256])))
    utils = ["test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    if dtype != FP8:
        utils.append("test_schema")  # NOTE: compares with an fp8 multiplication that torch lacks
    torch.library.opcheck(getattr(torch.ops.hisa, op).default, args, options, test_utils=utils)


@pytest.mark.parametrize("op", OPS)
def test_meta(op: str) -> None:
    """Meta tensors give the shapes, dtypes and strides of the results, and raise for bad calls."""
    args, options = raw(case_of(torch.float32, "cpu"))
    function = getattr(torch.ops.hisa, op)
    there = {n: v.to("meta") if isinstance(v, Tensor) else v for n, v in options.items()}
    on_meta = [tensor.to("meta") for tensor in args]
    for real, fake in zip(function(*args, **options), function(*on_meta, **there), strict=True):
        assert (real.shape, real.dtype, real.stride()) == (fake.shape, fake.dtype, fake.stride())
    for changes, message in (
        ({"bound_size": 16}, "bound_size: expected"),
        ({"topk": 97}, "topk: expected at most"),
        ({"ke": there["ke"][:3]}, "ke: expected"),
    ):
        with pytest.raises(ValueError, match=message):
            function(*on_meta, **{**there, **changes})
    with pytest.raises(ValueError, match="D: expected at most 240"):
        function(on_meta[0].new_empty(20, 4, 256), on_meta[1].new_empty(256, 256), on_meta[2])


@pytest.mark.seconds(180)
@pytest.mark.parametrize("op", OPS)
def test_compile(op: str, device: str) -> None:
    """In one graph, of any lengths, and to the bit: by bounds that leave no room for rounding."""
    torch._dynamo.reset()
    function = getattr(hisa, op)
    proved = []

    sizes = {"block_size": 8, "block_topk": 4, "topk": 4, "bound_size": 8}

    def around(q: Tensor, k: Tensor, weights: Tensor, windows: dict[str, Tensor]) -> Any:
        return function(q * 2, k, weights, **windows, **sizes)

    compiled = torch.compile(around, fullgraph=True, dynamic=True)
    for seed in range(12):
        lengths = torch.randint(64, 200, (30,), generator=torch.Generator().manual_seed(seed))
        case = line(seed, torch.bfloat16, [0, *accumulate(lengths.tolist())]).to(device)
        windows = {name: getattr(case, name) for name in ("ks", "ke", "cu_seqlens_k")}
        call = (case.q, case.k, case.weights, windows)
        got = compiled(*call)
        assert_same(op, got, around(*call))
        double = case.replace(q=case.q * 2)
        rows = got.proved if op == "certify" else torch.ones_like(got.escalated)
        assert torch.equal(got.indices[rows], flat(double)[0][rows])
        proved.append(got.proved if op == "certify" else ~got.escalated)
    assert 0.2 < torch.cat(proved).float().mean() < 0.7


@pytest.mark.parametrize("mode", modes())
@pytest.mark.parametrize("op", OPS)
def test_modes(op: str, mode: str, device: str) -> None:
    """Grad modes, inference, autocast, default dtype, the deterministic flag: nothing changes."""
    case = case_of(torch.bfloat16, device)
    call = (case.q, case.k, case.weights)
    want = getattr(hisa, op)(*call, **arguments(case))
    with modes(device)[mode]():
        assert_same(op, getattr(hisa, op)(*call, **arguments(case)), want)


@pytest.mark.parametrize("op", OPS)
def test_no_gradient(op: str, device: str) -> None:
    """Inputs that require grad give outputs that do not."""
    case = case_of(torch.float32, device)
    tensors = [tensor.clone().requires_grad_() for tensor in (case.q, case.k, case.weights)]
    found = getattr(hisa, op)(*tensors, **arguments(case))
    assert not any(getattr(found, name).requires_grad for name in FIELDS[op])


def test_export_of_exact() -> None:
    """The result leaves an exported program whole, and can still tell its cost."""

    class Selects(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, weights: Tensor, ke: Tensor) -> hisa.ExactSelection:
            return hisa.exact_index(q, k, weights, ke=ke, **sizes)

    case = case_of(torch.float32, "cpu")
    sizes: dict[str, Any] = {"block_size": 8, "block_topk": 12, "topk": 8}
    call = (case.q, case.k, case.weights, case.ke)
    got = torch.export.export(Selects(), call).module()(*call)
    want = hisa.exact_index(*call[:3], ke=case.ke, **sizes)
    assert_same("exact_index", got, want)
    assert str(got) == str(want)
