"""T20: the ops behave as PyTorch ops: schemas, fake tensors, compile, export, autograd, modes.

Catches schema changes that break saved programs, fake kernels that disagree with the real ones,
graph breaks, recompiles with every length, and indices on the autograd path.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import hisa
from tests.builders import exact_case, int32, random_case
from tests.case import Case, same_bytes
from tests.numeric import DTYPES, FP8
from tests.paged import exact_paged

OPS = ("pool_keys", "index", "flat_index")
MASKS = {
    "bool": torch.ones(2, 5, 5).bool().tril(),
    "additive": torch.full((2, 5, 5), -torch.inf).triu(1),
    "expanded": torch.zeros(2, 1, 5, dtype=torch.bfloat16).expand(2, 3, 5),
    "no rows": torch.zeros(2, 0, 5, dtype=torch.float16),
}
SCHEMAS = Path(__file__).parent / "schemas.json"


def raw_calls(case: Case) -> dict[str, tuple[tuple[Any, ...], dict[str, Any]]]:
    """Arguments of the three raw ops for one call."""
    index = case.index_args()
    pooled = index.pop("pooled") or (None, None)
    index |= {"pooled_k": pooled[0], "pooled_scale": pooled[1]}
    return {
        "index": ((case.q, case.k, case.weights), index),
        "flat_index": ((case.q, case.k, case.weights), case.flat_args()),
        "pool_keys": ((case.k,), case.pool_args()),
    }


def samples(device: str) -> list[Case]:
    """20 small calls of every dtype, with and without each optional argument."""
    cases = [exact_case(seed, budget=2e4, M=3) for seed in range(18)]
    pooled = random_case(0, torch.bfloat16)
    cases.append(pooled.replace(pooled=hisa.pool_keys(pooled.k, block_size=8)))
    cases.append(random_case(1, torch.float32, M=0, N=8))
    return [case.to(device) for case in cases]


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("number", range(20))
def test_opcheck(device: str, op: str, number: int) -> None:
    """All of torch's op tests on 60 samples: schema, autograd registration, fake, AOT dispatch."""
    args, kwargs = raw_calls(samples(device)[number])[op]
    if op != "pool_keys":
        kwargs["return_scores"] = number % 2 == 0
    utils = [
        "test_schema",
        "test_autograd_registration",
        "test_faketensor",
        "test_aot_dispatch_dynamic",
    ]
    if args[0].dtype == FP8:
        utils.remove("test_schema")  # NOTE: compares with an fp8 multiplication that torch lacks
    torch.library.opcheck(getattr(torch.ops.hisa, op).default, args, kwargs, test_utils=utils)


@pytest.mark.parametrize("op", ["paged_pool", "paged_index"])
@pytest.mark.parametrize("seed", range(8))
def test_opcheck_of_paged_caches(op: str, seed: int) -> None:
    """The same for the ops on paged caches, of which one writes to its arguments."""
    paged = exact_paged(seed)
    case = paged.case
    options: dict[str, Any] = {"block_table": paged.block_table, "seq_lens": paged.seq_lens,
                               "block_size": case.block_size}  # fmt: skip
    if op == "paged_pool":
        args = (paged.pages, paged.pooled_k.fill_(0), paged.pooled_scale.fill_(1))
        options |= {"new_tokens": (None, 1, 40)[seed % 3], "pooling": case.pooling}
    else:
        args = (case.q, paged.pages, case.weights)
        options |= {"pooled_k": paged.pooled_k, "pooled_scale": paged.pooled_scale,
                    "next_n": paged.next_n, "block_topk": case.block_topk, "topk": case.topk,
                    "physical": seed % 2 == 0, "return_scores": seed % 3 == 0}  # fmt: skip
    utils = ["test_schema", "test_autograd_registration", "test_faketensor",
             "test_aot_dispatch_dynamic"]  # fmt: skip
    if case.q.dtype == FP8:
        utils.remove("test_schema")  # NOTE: compares with an fp8 multiplication that torch lacks
    torch.library.opcheck(getattr(torch.ops.hisa, op).default, args, options, test_utils=utils)


@pytest.mark.parametrize("mask", MASKS)
def test_opcheck_of_masks(mask: str) -> None:
    """The same for the op that `hisa.hf` finds windows with."""
    torch.library.opcheck(torch.ops.hisa.mask_windows.default, (MASKS[mask],))


def test_schemas_are_kept() -> None:
    """The schemas accept every call that the recorded ones accept (tests/schemas.json).

    After a deliberate change: python -m tests.test_t20_torch_contract
    """
    recorded = json.loads(SCHEMAS.read_text())
    assert recorded == current_schemas()
    for op, text in recorded.items():
        old = torch._C.parse_schema(text)
        name, _, overload = op.partition(".")
        new = getattr(getattr(torch.ops.hisa, name), overload or "default")._schema
        assert new.is_backward_compatible_with(old), op


def current_schemas() -> dict[str, str]:
    """Schemas of this build."""
    paged = ("paged_pool", "paged_index")
    around = ("mask_windows", "rope_quantize", "fold_weights", "complete")
    names = (*OPS, "certify", "exact_index", *paged, *around)
    packets = {op: getattr(torch.ops.hisa, op) for op in names}
    schemas = {op: str(packet.default._schema) for op, packet in packets.items()}
    return schemas | {
        f"{op}.out": str(packet.out._schema)
        for op, packet in packets.items()
        if "out" in packet.overloads()
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fake_shapes(device: str, dtype: torch.dtype) -> None:
    """Fake and meta tensors give the real outputs' shapes, dtypes and strides."""
    case = random_case(0, dtype, M=5, N=41).to(device)
    mode = FakeTensorMode(shape_env=ShapeEnv())
    for op, (args, kwargs) in raw_calls(case).items():
        function = getattr(torch.ops.hisa, op)
        for scores in (False, True) if op != "pool_keys" else (None,):
            extra = {} if scores is None else {"return_scores": scores}
            real = function(*args, **kwargs, **extra)
            with mode:
                fake_args = [mode.from_tensor(a) for a in args]
                fake_kwargs = {k: mode.from_tensor(v) if isinstance(v, Tensor) else v
                               for k, v in kwargs.items()}  # fmt: skip
                fake = function(*fake_args, **fake_kwargs, **extra)
            on_meta = function(*[a.to("meta") for a in args], **extra,
                               **{k: v.to("meta") if isinstance(v, Tensor) else v
                                  for k, v in kwargs.items()})  # fmt: skip
            for a, b, c in zip(real, fake, on_meta, strict=True):
                assert a.shape == b.shape == c.shape and a.dtype == b.dtype == c.dtype
                assert a.stride() == b.stride() == c.stride()
                assert a.device == b.device and c.device.type == "meta"


def select(q: Tensor, k: Tensor, weights: Tensor, ks: Tensor, ke: Tensor) -> Tensor:
    """Run a small function around the op, as a model would."""
    indices, scores = hisa.index(q * 2, k, weights, ks=ks, ke=ke, block_size=8, block_topk=4,
                                 topk=9, return_scores=True)  # fmt: skip
    flat = hisa.flat_index(q, k, weights, ke=ke, topk=9)
    pooled = hisa.pool_keys(k, block_size=8)
    again = hisa.index(q, k, weights, pooled=pooled, block_size=8, block_topk=4, topk=9)
    return indices.float() + scores.clamp(min=-1) + flat + again


def arguments(m: int, n: int, device: str) -> tuple[Tensor, ...]:
    """Return arguments of `select` for some lengths."""
    windows = {"ks": int32([0] * m), "ke": int32([n - i for i in range(m)])}
    case = random_case(m + n, torch.float32, M=m, N=n, H=2, D=16, **windows).to(device)
    return case.q, case.k, case.weights, case.ks, case.ke


@pytest.mark.parametrize("dynamic", [True, False])
def test_compile(device: str, dynamic: bool) -> None:
    """fullgraph, dynamic and static, the same bytes as eager; dynamic shapes compile once."""
    torch._dynamo.reset()
    graphs = []

    def counting(graph: Any, inputs: Any) -> Callable[..., Any]:
        graphs.append(graph)
        lookup = torch._dynamo.lookup_backend("aot_eager")
        compiled: Callable[..., Any] = lookup(graph, inputs)
        return compiled

    compiled = torch.compile(select, fullgraph=True, dynamic=dynamic, backend=counting)
    shapes = [(5, 60), (6, 61), (9, 133)] if dynamic else [(5, 60)]
    for m, n in shapes:
        given = arguments(m, n, device)
        assert torch.equal(compiled(*given), select(*given))
    assert len(graphs) == 1


@pytest.mark.seconds(180)
def test_compile_with_inductor(device: str) -> None:
    """The default backend, which may reorder, fuse and reuse buffers around the op."""

    def scaled(q: Tensor, k: Tensor, weights: Tensor) -> Tensor:
        return hisa.index(q * 2, k, weights, block_size=8, block_topk=4, topk=9)

    torch._dynamo.reset()
    compiled = torch.compile(scaled, fullgraph=True, dynamic=True)
    for m, n in ((5, 60), (6, 61)):
        q, k, weights, *_ = arguments(m, n, device)
        assert torch.equal(compiled(q, k, weights), scaled(q, k, weights))


def test_compile_ignores_hisa_check(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """HISA_CHECK=1 neither breaks the graph nor the result."""
    monkeypatch.setenv("HISA_CHECK", "1")
    torch._dynamo.reset()
    compiled = torch.compile(select, fullgraph=True, backend="aot_eager")
    given = arguments(4, 50, device)
    assert torch.equal(compiled(*given), select(*given))


class Indexer(nn.Module):
    """A module with learned projections around the op, whose indices pick rows of a value table."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(16, 32)
        self.weigh = nn.Linear(16, 2)
        self.value = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        """Select four tokens per row and average their values, weighted by nothing."""
        q = self.project(x).view(-1, 2, 16)
        indices = hisa.index(q, x, self.weigh(x).float(), block_size=8, block_topk=2, topk=4)
        values: Tensor = self.value(x)
        return values[indices.clamp(min=0)].mean(1)


def test_export(device: str) -> None:
    """torch.export with a dynamic length gives a program with our op in it and the same result."""
    module, x = Indexer().eval().to(device), torch.randn(40, 16, device=device)
    length = torch.export.Dim("length", min=2, max=4096)
    program = torch.export.export(module, (x,), dynamic_shapes=({0: length},))
    assert any("hisa.index" in str(node.target) for node in program.graph.nodes)
    for n in (40, 57):
        x = torch.randn(n, 16, device=device)
        assert torch.equal(program.module()(x), module(x))


def test_no_gradient_through_selection(device: str) -> None:
    """Inputs that require grad give outputs that do not, and a module around it trains."""
    case = random_case(0, torch.float32).to(device)
    for tensor in (case.q, case.k, case.weights):
        tensor.requires_grad_()
    indices, scores = hisa.index(case.q, case.k, case.weights, topk=8, return_scores=True)
    pooled = hisa.pool_keys(case.k)
    flat, flat_scores = hisa.flat_index(case.q, case.k, case.weights, topk=8, return_scores=True)
    for output in (indices, scores, flat, flat_scores, *pooled):
        assert not output.requires_grad and output.grad_fn is None
    module, x = Indexer().to(device), torch.randn(40, 16, device=device, requires_grad=True)
    module(x).square().sum().backward()
    assert x.grad is not None and x.grad.abs().sum() > 0
    assert module.value.weight.grad is not None and module.project.weight.grad is None


@pytest.mark.parametrize("compiled", [False, True])
def test_training_step_compiled(device: str, compiled: bool) -> None:
    """The backward pass of a compiled module equals the eager one."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    module, x = Indexer().to(device), torch.randn(40, 16, device=device)
    call = torch.compile(module, fullgraph=True, backend="aot_eager") if compiled else module
    call(x).square().sum().backward()
    want = torch.autograd.grad(module(x).square().sum(), module.value.weight)[0]
    torch.testing.assert_close(module.value.weight.grad, want)


def modes(device: str = "cpu") -> dict[str, Callable[[], Any]]:
    """Contexts in which a call must give what it gives outside of them."""
    return {
        "no_grad": torch.no_grad,
        "inference": torch.inference_mode,
        "autocast bf16": lambda: torch.autocast(device, torch.bfloat16),
        "autocast fp16": lambda: torch.autocast(device, torch.float16),
        "default dtype": lambda: DefaultDtype(torch.float64),
        "deterministic": lambda: Deterministic(),
    }


class DefaultDtype:
    """Change torch's default dtype for a while."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def __enter__(self) -> None:
        self.before = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)

    def __exit__(self, *_: object) -> None:
        torch.set_default_dtype(self.before)


class Deterministic:
    """Turn on torch's deterministic algorithms, errors included."""

    def __enter__(self) -> None:
        torch.use_deterministic_algorithms(True)

    def __exit__(self, *_: object) -> None:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("mode", modes())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_modes(device: str, dtype: torch.dtype, mode: str) -> None:
    """Grad modes, inference, autocast, default dtype, the deterministic flag: nothing changes."""
    case = random_case(0, dtype).to(device)
    calls = raw_calls(case)
    for op, (args, kwargs) in calls.items():
        want = getattr(torch.ops.hisa, op)(*args, **kwargs)
        with modes(device)[mode]():
            got = getattr(torch.ops.hisa, op)(*args, **kwargs)
        assert all(same_bytes(a, b) for a, b in zip(got, want, strict=True))


def test_inference_tensors(device: str) -> None:
    """Tensors made in inference mode are fine outside of it, and the other way round."""
    with torch.inference_mode():
        made = random_case(0, torch.float32).to(device)
    outside = random_case(0, torch.float32).to(device)
    assert same_bytes(hisa.index(made.q, made.k, made.weights, topk=9),
                      hisa.index(outside.q, outside.k, outside.weights, topk=9))  # fmt: skip


def test_raw_op_without_scores_has_an_empty_second_result() -> None:
    """`torch.ops.hisa` returns two tensors; the second is [0, topk] unless scores are asked for."""
    case = random_case(0, torch.float32)
    for op in (torch.ops.hisa.index, torch.ops.hisa.flat_index):
        indices, scores = op(case.q, case.k, case.weights, topk=9)
        assert indices.shape == (6, 9) and scores.shape == (0, 9) and scores.dtype == torch.float32


def test_subclass_and_parameter_inputs() -> None:
    """Parameters and tensors in a module's state are tensors like any other."""
    case = random_case(0, torch.float32)
    want = hisa.index(case.q, case.k, case.weights, topk=9)
    assert same_bytes(
        hisa.index(nn.Parameter(case.q), case.k, nn.Buffer(case.weights), topk=9), want
    )


def test_import_before_torch() -> None:
    """`import hisa` alone finds torch's libraries: user code sorts its imports by name."""
    script = "import hisa; hisa.build_info(); import torch; torch.ops.hisa.index"
    root = Path(__file__).parent.parent
    run = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


if __name__ == "__main__":
    SCHEMAS.write_text(json.dumps(current_schemas(), indent=2) + "\n")
