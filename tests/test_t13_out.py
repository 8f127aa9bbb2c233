"""T13: results written to memory that the caller keeps, at addresses that a CUDA graph may hold.

Catches elements that are left as they were, bytes beside a result that are not, results of another
shape, dtype, device or layout, or over an input, and memory that is allocated all the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import hisa
from tests.builders import exact_case, int32, random_case, shaped
from tests.case import same_bytes
from tests.numeric import DTYPES, FP8, short_name
from tests.results import FUNCTIONS, RESULTS, Call, around_calls, paged_call, selections, typical
from tests.test_t20_torch_contract import raw_calls

EDGE = 64  # bytes on either side of a result


def room_for(results: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], list[Tensor]]:
    """Return poisoned tensors like these, and the memory around each of them."""
    outs, around = [], []
    for result in results:
        size = result.numel() * result.element_size()
        memory = torch.full((size + 2 * EDGE,), 0xA5, dtype=torch.uint8, device=result.device)
        outs.append(memory[EDGE : EDGE + size].view(result.dtype).view(result.shape))
        around.append(memory)
    return tuple(outs), around


def assert_written(call: Call) -> None:
    """Every element is what the ordinary call returns, and nothing else is written."""
    want = call()
    outs, around = room_for(want)
    call.into(outs)
    for got, wanted, memory in zip(outs, want, around, strict=True):
        assert same_bytes(got, wanted), call
        edges = torch.cat([memory[:EDGE], memory[len(memory) - EDGE :]])
        assert bool((edges == 0xA5).all()), call


@pytest.mark.parametrize("seed", range(60))
def test_equals_the_ordinary_call(device: str, seed: int) -> None:
    """Of random calls, ragged and packed, on poisoned memory."""
    for call in selections(exact_case(seed, budget=1e5).to(device), seed % 3 > 0):
        assert_written(call)
    assert_written(paged_call(seed, device))


@pytest.mark.parametrize("rows", [0, 1, 40])
def test_around_a_selection(device: str, rows: int) -> None:
    """The same of masks and projections."""
    for call in around_calls(device, rows):
        assert_written(call)


@pytest.mark.parametrize("dtype", DTYPES, ids=short_name)
def test_of_nothing(device: str, dtype: torch.dtype) -> None:
    """No rows, no keys, empty windows, no pages: -1 and -inf are written all the same."""
    empty = {"ks": int32([5] * 6), "ke": int32([5, 4, -3, 0, 1, 5])}
    for changes in ({"M": 0}, {"N": 0}, {"M": 0, "N": 0}, {"N": 1}, empty):
        for call in selections(random_case(1, dtype, **changes).to(device), True):
            assert_written(call)
    for lengths in ([], [0, 0], [0, 40]):
        for seed in (1, 2):
            assert_written(paged_call(seed, device, dtype=dtype, lengths=lengths))
    call = paged_call(1, device, dtype=dtype, lengths=[0, 0])
    none = {
        "pages": call.options["pages"][:0],
        "pooled": tuple(t[:0] for t in call.options["pooled"]),
    }
    assert_written(Call("paged_index", {**call.options, **none}))
    none = {"block_table": call.options["block_table"][:, :0]}
    assert_written(Call("paged_index", {**call.options, **none}))


def test_pooled_keys(device: str) -> None:
    """A store selects into [S, n, topk], or [n, topk] for one segment."""
    heads, depth, dtype = shaped(H=4, D=32, dtype=torch.float32).values()
    store = hisa.PooledKeys(3, depth, dtype=dtype, device=device, block_size=8)
    store.append(torch.randn(3, 203, depth, device=device).to(dtype))
    q = torch.randn(3, 2, heads, depth, device=device).to(dtype)
    weights = torch.rand(3, 2, heads, device=device)
    for which in (None, 1):
        rows = (q, weights) if which is None else (q[1], weights[1])
        few: dict[str, Any] = {"block_topk": 4, "topk": 20, "segments": which}
        want = store.index(*rows, return_scores=True, **few)
        outs = torch.full_like(want[0], -777), torch.full_like(want[1], -777)
        assert store.index(*rows, out=outs, return_scores=True, **few) is outs
        assert all(same_bytes(a, b) for a, b in zip(outs, want, strict=True))
        alone = torch.full_like(want[0], -777)
        assert store.index(*rows, out=alone, **few) is alone
        assert same_bytes(alone, want[0])
        for bad in (alone[..., :-1], alone.flatten(0, -2)[None, None], alone.mT.contiguous().mT):
            with pytest.raises(ValueError, match="indices: "):
                store.index(*rows, out=bad, **few)
        with pytest.raises(TypeError, match=r"indices: .*int32.*int64"):
            store.index(*rows, out=alone.long(), **few)
        with pytest.raises(TypeError, match=r"out: .*indices, scores"):
            store.index(*rows, out=alone, return_scores=True, **few)


def wrong(result: Tensor) -> dict[str, tuple[type[Exception], Tensor]]:
    """Tensors that a result cannot be written to."""
    wide = result.new_empty(*result.shape, 2)
    other = torch.float64 if result.dtype != torch.float64 else torch.float32
    return {
        "dtype": (TypeError, result.to(other)),
        "longer": (ValueError, result.new_empty(result.shape[0] + 1, *result.shape[1:])),
        "shorter": (ValueError, result.new_empty(result.shape[0] - 1, *result.shape[1:])),
        "wider": (ValueError, result.new_empty(*result.shape[:-1], result.shape[-1] + 1)),
        "narrower": (ValueError, result.new_empty(*result.shape[:-1], result.shape[-1] - 1)),
        "dimension": (ValueError, result[None]),
        "device": (ValueError, result.to("meta")),
        "every second": (ValueError, wide[..., 0].copy_(result)),
        "expanded": (ValueError, result[:1].expand(result.shape)),
        "misaligned": (ValueError, misaligned(result)),
    }


def misaligned(result: Tensor) -> Tensor:
    """Return a tensor that begins one byte, on a GPU one element, behind where it may."""
    size, width = result.numel(), result.element_size()
    if result.is_cuda:
        return result.new_empty(size + 1)[1:].view(result.shape)
    memory = bytearray(size * width + 1)
    return (
        torch.frombuffer(memory, dtype=torch.uint8 if width == 1 else result.dtype, offset=1)
        .view(result.dtype)
        .view(result.shape)
    )


@pytest.mark.parametrize("op", RESULTS)
def test_bad_results(device: str, op: str) -> None:
    """Each is named, and nothing has been written to any."""
    call = typical(device)[op]
    want = call()
    for i, name in enumerate(RESULTS[op]):
        for kind, (error, bad) in wrong(want[i]).items():
            if kind == "misaligned" and device != "cpu" and name not in ("pooled_k", "y"):
                continue  # an element is all the alignment that others need
            outs = [*room_for(want)[0]]
            outs[i] = bad
            before = [None if t.is_meta else t.clone() for t in outs]
            with pytest.raises(error, match=f"^{name}: expected"):
                call.into(tuple(outs))
            for now, then in zip(outs, before, strict=True):
                assert then is None or same_bytes(now, then), (name, kind)


@pytest.mark.parametrize("op", RESULTS)
def test_what_is_not_tensors(op: str) -> None:
    """A tuple of the wrong length, one tensor for two, something else."""
    call = typical("cpu")[op]
    want = call()
    for bad in (want[0], want[:-1], (*want, want[0]), 3, "out"):
        with pytest.raises(
            TypeError, match=rf"^out: expected tensors \({', '.join(RESULTS[op])}\)"
        ):
            FUNCTIONS[op](**call.options, out=bad)  # type: ignore[misc]
    with pytest.raises(TypeError, match=f"^{RESULTS[op][-1]}: expected Tensor, got NoneType"):
        FUNCTIONS[op](**call.options, out=(*want[:-1], None))  # type: ignore[misc]


def joined(first: Tensor, second: Tensor, shared: int) -> tuple[Tensor, Tensor]:
    """Return a copy of the first, and a tensor like the second that begins in its last bytes."""
    sizes = [t.numel() * t.element_size() for t in (first, second)]
    begin = -(-sizes[0] // 16) * 16 - shared
    memory = torch.zeros(begin + sizes[1] + shared, dtype=torch.uint8, device=first.device)
    copy = memory[: sizes[0]].view(first.dtype).view(first.shape).copy_(first)
    return copy, memory[begin : begin + sizes[1]].view(second.dtype).view(second.shape)


@pytest.mark.parametrize("op", RESULTS)
def test_memory_of_its_own(device: str, op: str) -> None:
    """A result over the end of any other tensor is refused, right behind it is none the worse."""
    call = typical(device)[op]
    want = call()
    for i, name in enumerate(RESULTS[op]):
        for other, tensor in call.inputs.items():
            for shared in (0, 16):
                copy, out = joined(tensor.contiguous(), want[i], shared)
                outs = tuple(out if j == i else torch.empty_like(t) for j, t in enumerate(want))
                changed = call.replace(other, copy)
                if shared == 0:
                    changed.into(outs)
                    assert all(same_bytes(a, b) for a, b in zip(outs, want, strict=True))
                    continue
                before = copy.clone()
                with pytest.raises(ValueError, match=f"^{name}: .*memory of its own.* {other} has"):
                    changed.into(outs)
                assert same_bytes(copy, before)
    for i, j in ((0, 1), (1, 0)):
        first, second = joined(want[i], want[j], 16)
        outs = (first, second, *want[2:]) if i == 0 else (second, first, *want[2:])
        with pytest.raises(ValueError, match=f"^{RESULTS[op][1]}: .*memory of its own"):
            call.into(outs)


@pytest.mark.parametrize("op", RESULTS)
def test_autograd_notices(device: str, op: str) -> None:
    """Versions move; what requires a gradient is refused, what is an inference tensor is not."""
    call = typical(device)[op]
    want = call()
    outs = tuple(torch.zeros_like(t) for t in want)
    call.into(outs)
    assert [t._version for t in outs] == [1] * len(outs)  # zeros_like counts none
    for name, out in zip(RESULTS[op], outs, strict=True):
        if not out.is_floating_point() or out.dtype == FP8:
            continue
        out.requires_grad_()
        with pytest.raises(ValueError, match=f"^{name}: .*require grad"):
            call.into(outs)
        with torch.no_grad():
            call.into(outs)
        out.requires_grad_(False)
    with torch.inference_mode():
        made = tuple(torch.zeros_like(t) for t in want)
        call.into(made)
    call.into(made)
    assert all(same_bytes(a, b) for a, b in zip(made, want, strict=True))


def raw_results(call: Call, scores: bool) -> dict[str, Any]:
    """The results as the raw operator takes them."""
    results = dict(zip(RESULTS[call.op], call(), strict=True))
    return results if scores else dict([*results.items()][:1])


@pytest.mark.parametrize("scores", [False, True])
@pytest.mark.parametrize("op", RESULTS)
def test_opcheck(device: str, op: str, scores: bool) -> None:
    """All of torch's op tests: schema, autograd registration, fake, AOT dispatch."""
    call = typical(device)[op]
    options = {**call.options, **raw_results(call, scores or op in ("pool_keys", "mask_windows"))}
    options.pop("return_scores", None)
    if "pooled" in options:
        options["pooled_k"], options["pooled_scale"] = options.pop("pooled")
    if options.pop("quantize", False) and not scores:
        options["y"] = torch.empty_like(call.options["x"])
    utils = ["test_schema", "test_autograd_registration", "test_faketensor",
             "test_aot_dispatch_dynamic"]  # fmt: skip
    if any(t.dtype == FP8 for t in options.values() if isinstance(t, Tensor)):
        utils.remove("test_schema")  # NOTE: compares with an fp8 multiplication that torch lacks
    torch.library.opcheck(getattr(torch.ops.hisa, op).out, (), options, test_utils=utils)


@pytest.mark.parametrize("dynamic", [True, False])
def test_compile(device: str, dynamic: bool) -> None:
    """Results that a compiled function writes to are those that its caller has."""

    def step(q: Tensor, k: Tensor, weights: Tensor, indices: Tensor, scores: Tensor,
             pooled_k: Tensor, pooled_scale: Tensor) -> Tensor:  # fmt: skip
        pooled = hisa.pool_keys(k, block_size=8, out=(pooled_k, pooled_scale))
        hisa.flat_index(q, k, weights, topk=9, out=indices)
        flat = indices.clone()
        hisa.index(q * 2, k, weights, pooled=pooled, block_size=8, block_topk=4, topk=9,
                   return_scores=True, out=(indices, scores))  # fmt: skip
        return flat + indices

    torch._dynamo.reset()
    compiled: Any = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for m, n in [(5, 60), (6, 61), (9, 133)] if dynamic else [(5, 60)]:
        case = random_case(m + n, M=m, N=n, **shaped(H=2, D=16, dtype=torch.float32)).to(device)
        results = (torch.zeros(m, 9, dtype=torch.int32), torch.zeros(m, 9),
                   torch.zeros(-(-n // 8), case.shape[3], dtype=case.k.dtype),
                   torch.zeros(-(-n // 8)))  # fmt: skip
        eager, ours = ([t.to(device).clone() for t in results] for _ in range(2))
        want = step(case.q, case.k, case.weights, *eager)
        assert torch.equal(compiled(case.q, case.k, case.weights, *ours), want)
        assert all(same_bytes(a, b) for a, b in zip(ours, eager, strict=True))


def test_fake_results() -> None:
    """Without data the results are looked at as well."""
    case = random_case(0, torch.float32).to("meta")
    args, options = raw_calls(case)["index"]
    good = {"indices": torch.empty(6, 16, dtype=torch.int32, device="meta")}
    assert torch.ops.hisa.index.out(*args, **options, **good) is None
    scores = torch.empty(6, 16, device="meta")
    torch.ops.hisa.index.out(*args, **options, **good, scores=scores)
    for name, bad, error in (
        ("indices", good["indices"][:5], ValueError),
        ("indices", good["indices"].long(), TypeError),
        ("indices", torch.empty(16, 6, dtype=torch.int32, device="meta").T, ValueError),
        ("indices", torch.empty(6, 16, dtype=torch.int32), ValueError),
        ("scores", scores[:0], ValueError),
        ("scores", scores.half(), TypeError),
    ):
        with pytest.raises(error, match=f"{name}: expected"):
            torch.ops.hisa.index.out(*args, **options, **{**good, name: bad})


def allocated(run: Callable[[], Any]) -> int:
    """Return how many tensors the CPU operators of a call allocate."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        run()
    return sum(event.count for event in profiler.key_averages() if event.key == "aten::empty")


@pytest.mark.parametrize("op", RESULTS)
def test_allocates_its_workspace_only(op: str) -> None:
    """What the ordinary call allocates but its results: one piece of scratch memory, or nothing."""
    call = typical("cpu")[op]
    want = call()
    scratch = 1 if op.endswith("index") else 0
    assert allocated(lambda: call.into(want)) == scratch
    assert allocated(call) == scratch + len(want)


@pytest.mark.gpu
@pytest.mark.parametrize("op", RESULTS)
def test_allocates_its_workspace_only_on_cuda(op: str) -> None:
    """The peak of a call with results is lower by them; nothing stays behind."""
    call = typical("cuda", torch.bfloat16)[op]
    want = call()

    def peak(run: Callable[[], Any]) -> int:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before

    size = sum(-(-t.numel() * t.element_size() // 512) * 512 for t in want)
    workspace = peak(lambda: call.into(want))
    assert peak(call) == workspace + size
    if not op.endswith("index"):
        assert workspace == 0
    before = torch.cuda.memory_allocated()
    for _ in range(100):
        call.into(want)
    assert torch.cuda.memory_allocated() == before


# Lengths of a replay's windows: shrinking, growing, none, beyond the end.
LENGTHS = (300, 120, 9, 0, 0, 1, 64, 299, 305, 300)


@pytest.mark.gpu
@pytest.mark.seconds(300)
@pytest.mark.parametrize("dtype", DTYPES, ids=short_name)
def test_replays_of_one_graph(dtype: torch.dtype) -> None:
    """1,000 replays with other lengths give the bytes of ordinary calls, at the same addresses."""
    case = random_case(0, dtype).replace(ks=int32([0] * 6), ke=int32([0] * 6)).to("cuda")
    packed = selections(case.replace(block_topk=4, topk=20), True)
    paged = paged_call(1, "cuda", dtype=dtype, lengths=[300, 290], B=16, block_topk=4, topk=20,
                       page_size=16)  # fmt: skip
    lengths = paged.options["seq_lens"]
    calls = [*packed[:2], paged]
    outs = [tuple(torch.full_like(t, -7) for t in call()) for call in calls]

    def step() -> None:
        for call, out in zip(calls, outs, strict=True):
            call.into(out)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    addresses = [t.data_ptr() for out in outs for t in out]
    rows = torch.arange(6, dtype=torch.int32, device="cuda")
    for replay in range(1000):
        length = LENGTHS[replay % len(LENGTHS)]
        case.ks.copy_(rows * (replay % 7) - 3)
        case.ke.copy_((length - rows * (replay % 3)).int())
        lengths.copy_((length - rows[: len(lengths)] * (replay % 5)).int())
        case.weights.copy_(case.weights.roll(1, 0))
        graph.replay()
        for call, out in zip(calls, outs, strict=True):
            for mine, ordinary in zip(out, call(), strict=True):
                assert same_bytes(mine, ordinary), (replay, call.op)
    assert addresses == [t.data_ptr() for out in outs for t in out]
