"""T17: bad calls raise the right exception, name the argument, and leave the next call right.

Each entry of `BAD` changes one thing in a call that is otherwise good (the positive control: the
same call without the change runs right before and after). Catches missing checks, which would be
reads out of bounds, and messages that name the wrong argument.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import hisa
from tests.builders import int32, random_case
from tests.case import same_bytes
from tests.families import Family
from tests.numeric import FP8

M, N, H, D = 4, 100, 2, 32
BF16, FP16 = torch.bfloat16, torch.float16


class Bad(NamedTuple):
    """One bad call: the op, what is changed, and what must be raised."""

    op: str
    changes: dict[str, Any]
    error: type[Exception] | tuple[type[Exception], ...]
    message: str


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return a tensor of zeros on the CPU."""
    return torch.zeros(shape).to(dtype)


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return a tensor on another device than the rest."""
    return torch.empty(*shape, dtype=dtype, device="meta")


def for_index_and_flat(changes: dict[str, Any], error: type[Exception], message: str) -> list[Bad]:
    """Return one bad call for each of the two selecting ops."""
    return [Bad("index", changes, error, message), Bad("flat_index", changes, error, message)]


BAD = [
    # rank and shape
    *for_index_and_flat({"q": zeros(M, D)}, ValueError, r"q: expected \[M, H, D\].* got \[4, 32\]"),
    *for_index_and_flat({"q": zeros(1, M, H, D)}, ValueError, r"q: expected \[M, H, D\]"),
    *for_index_and_flat({"q": zeros(M, H, 48)}, ValueError, r"q: .*got \[4, 2, 48\] float32"),
    *for_index_and_flat({"q": zeros(M, 0, D), "weights": zeros(M, 0)}, ValueError, "q: .*heads"),
    *for_index_and_flat({"q": zeros(M, 129, D), "weights": zeros(M, 129)}, ValueError, "q: .*129"),
    *for_index_and_flat({"k": zeros(N)}, ValueError, r"k: expected \[N, D\].* got \[100\]"),
    *for_index_and_flat({"k": zeros()}, ValueError, r"k: expected \[N, D\]"),
    *for_index_and_flat({"k": zeros(1, N, D)}, ValueError, r"k: expected \[N, D\]"),
    *for_index_and_flat({"weights": zeros(M, H + 1)}, ValueError, r"weights: .*\[4, 3\]"),
    *for_index_and_flat({"weights": zeros(M + 1, H)}, ValueError, r"weights: .*\[5, 2\]"),
    *for_index_and_flat({"weights": zeros(M)}, ValueError, r"weights: .*\[4\]"),
    *for_index_and_flat({"k_scale": zeros(N - 1)}, ValueError, r"k_scale: .*\[99\]"),
    *for_index_and_flat({"k_scale": zeros(N, 1)}, ValueError, r"k_scale: .*\[100, 1\]"),
    *for_index_and_flat({"k_scale": zeros()}, ValueError, r"k_scale: .*\[\]"),
    *for_index_and_flat({"ks": int32([0])}, ValueError, r"ks: .*\[1\] int32"),
    *for_index_and_flat({"ke": int32([0] * 5)}, ValueError, r"ke: .*\[5\] int32"),
    *for_index_and_flat({"ks": int32([[0] * 4])}, ValueError, r"ks: .*\[1, 4\] int32"),
    Bad("index", {"cu_seqlens_k": int32([[0, 100]])}, ValueError, r"cu_seqlens_k: .*\[1, 2\]"),
    Bad("index", {"cu_seqlens_k": int32([])}, ValueError, "cu_seqlens_k: expected"),
    Bad("index", {"pooled": (zeros(12, D), zeros(13))}, ValueError, r"pooled_k: .*\[12, 32\]"),
    Bad("index", {"pooled": (zeros(13, 16), zeros(13))}, ValueError, r"pooled_k: .*\[13, 16\]"),
    Bad("index", {"pooled": (zeros(13, D), zeros(12))}, ValueError, r"pooled_scale: .*\[12\]"),
    # D
    *[
        Bad(op, {"q": zeros(M, H, d), "k": zeros(N, d)}, ValueError, f"multiple of 16.* got {d}")
        for op in ("index", "flat_index")
        for d in (0, 8, 24, 272)
    ],
    Bad("pool_keys", {"k": zeros(N, 24)}, ValueError, "multiple of 16.* got 24"),
    # dtype
    *for_index_and_flat({"q": zeros(M, H, D, dtype=BF16)}, TypeError, "q: .*float32, got.*bfl"),
    *for_index_and_flat({"k": zeros(N, D, dtype=FP8)}, TypeError, "q: .*e4m3fn, got.*float32"),
    *for_index_and_flat({"k": zeros(N, D).long()}, TypeError, "k: .*int64"),
    *for_index_and_flat({"k": zeros(N, D).double()}, TypeError, "k: .*float64"),
    *for_index_and_flat(
        {"k": zeros(N, D).to(torch.float8_e5m2), "q": zeros(M, H, D).to(torch.float8_e5m2)},
        TypeError, "k: .*float8_e5m2"),
    *for_index_and_flat({"weights": zeros(M, H, dtype=FP16)}, TypeError, "weights: .*float16"),
    *for_index_and_flat({"weights": zeros(M, H).double()}, TypeError, "weights: .*float64"),
    *for_index_and_flat({"k_scale": zeros(N, dtype=BF16)}, TypeError, "k_scale: .*bfloat16"),
    *for_index_and_flat({"ks": int32([0] * M).long()}, TypeError, "ks: .*int32, got.*int64"),
    *for_index_and_flat({"ke": zeros(M)}, TypeError, "ke: .*int32, got.*float32"),
    Bad("index", {"cu_seqlens_k": int32([0, N]).long()}, TypeError, "cu_seqlens_k: .*int64"),
    Bad("index", {"pooled": (zeros(13, D, dtype=BF16), zeros(13))}, TypeError, "pooled_k: .*bf"),
    Bad("index", {"pooled": (zeros(13, D), zeros(13).half())}, TypeError, "pooled_scale: .*16"),
    Bad("pool_keys", {"k": zeros(N, D).int()}, TypeError, "k: .*int32"),
    Bad("pool_keys", {"k_scale": zeros(N).half()}, TypeError, "k_scale: .*float16"),
    Bad("pool_keys", {"cu_seqlens_k": int32([0, N]).long()}, TypeError, "cu_seqlens_k: .*int64"),
    # device
    *for_index_and_flat({"q": meta(M, H, D)}, ValueError, "q: .* as k is.*meta"),
    *for_index_and_flat({"weights": meta(M, H)}, ValueError, "weights: .* as k is.*meta"),
    *for_index_and_flat({"ks": meta(M, dtype=torch.int32)}, ValueError, "ks: .* as k is.*meta"),
    Bad("index", {"cu_seqlens_k": meta(2, dtype=torch.int32)}, ValueError, "cu_seqlens_k: .*meta"),
    # numbers
    *for_index_and_flat({"topk": 0}, ValueError, "topk: expected at least 1, got 0"),
    *for_index_and_flat({"topk": -1}, ValueError, "topk: expected at least 1, got -1"),
    *for_index_and_flat({"topk": 2**31}, ValueError, "topk: "),
    Bad("index", {"topk": 33}, ValueError, r"topk: .*4 \* 8.* got 33"),
    Bad("index", {"block_topk": 1}, ValueError, "block_topk: expected at least 2.* got 1"),
    Bad("index", {"block_topk": 0}, ValueError, "block_topk: .*got 0"),
    Bad("index", {"block_topk": -(2**62)}, ValueError, "block_topk: "),
    *[
        Bad(op, {"block_size": size}, ValueError, f"block_size: .*8.*256.* got {size}")
        for op in ("index", "pool_keys")
        for size in (0, -8, 1, 4, 24, 100, 512)
    ],
    Bad("index", {"pooling": "median"}, ValueError, "pooling: .*mean.*max.*median"),
    Bad("pool_keys", {"pooling": ""}, ValueError, "pooling: .*mean.*max"),
    # kinds of argument
    *for_index_and_flat({"q": None}, TypeError, "q"),
    *for_index_and_flat({"k": [[1.0] * D]}, TypeError, "k"),
    *for_index_and_flat({"topk": "all"}, TypeError, "topk"),
    *for_index_and_flat({"topk": 2.5}, TypeError, "topk"),
    *for_index_and_flat({"topp": 3}, TypeError, "topp"),
    Bad("index", {"block_size": 8.0}, TypeError, "block_size"),
    Bad("index", {"pooling": None}, TypeError, "pooling"),
    *for_index_and_flat({"topk": 2**70}, ValueError, "topk: .*64 bits"),
    *for_index_and_flat({"return_scores": "yes"}, TypeError, "return_scores: expected bool, got s"),
    Bad("index", {"pooled": 5}, TypeError, "pooled: .*two tensors.*got 5"),
    Bad("index", {"pooled": zeros(13, D)}, TypeError, "pooled: .*two tensors"),
    Bad("index", {"pooled": (zeros(13, D),)}, TypeError, "pooled: .*two tensors.*got 1 of"),
    Bad("index", {"pooled": (zeros(13, D), None)}, TypeError, "pooled_scale: .*None"),
    Bad("index", {"pooled": (zeros(13, D), 3)}, TypeError, "pooled_scale: .*int"),
]  # fmt: skip


def name_of(bad: Bad) -> str:
    """Return a test id."""
    what = "-".join(
        f"{name}={list(value.shape) if isinstance(value, torch.Tensor) else value}"
        for name, value in bad.changes.items()
    )
    return f"{bad.op}-{re.sub(r'[^A-Za-z0-9=,.-]+', '_', what)[:50]}"


def good_call(family: Family, op: str, **changes: Any) -> Any:
    """Run the good call of an op with some arguments changed, on the family's device."""
    case = random_case(0, torch.float32, M=M, N=N, H=H, D=D).to(family.device)
    changes = {name: moved(value, family.device) for name, value in changes.items()}
    if op == "pool_keys":
        arguments = {"k": case.k, **case.pool_args()}
        return family.api.pool_keys(arguments.pop("k"), **arguments) if not changes else (
            family.api.pool_keys(**{**arguments, **changes}))  # fmt: skip
    arguments = case.index_args() if op == "index" else case.flat_args()
    tensors = {"q": case.q, "k": case.k, "weights": case.weights}
    return getattr(family.api, op)(**{**tensors, **arguments, **changes})


def moved(value: Any, device: str) -> Any:
    """Bring tensors, also those of a tuple, to a device, unless they are on none."""
    if isinstance(value, tuple):
        return tuple(moved(part, device) for part in value)
    here = isinstance(value, torch.Tensor) and value.device.type == "cpu"
    return value.to(device) if here else value


def test_at_least_sixty() -> None:
    """The table is as long as it should be."""
    assert len(BAD) >= 60


@pytest.mark.parametrize("bad", BAD, ids=name_of)
def test_bad_call(family: Family, bad: Bad) -> None:
    """The call raises as specified; the same call without the change is right before and after."""
    before = good_call(family, bad.op)
    with pytest.raises(bad.error, match=bad.message) as caught:
        good_call(family, bad.op, **bad.changes)
    assert not isinstance(caught.value, NotImplementedError)
    after = good_call(family, bad.op)
    pairs = zip(before, after, strict=True) if isinstance(before, tuple) else [(before, after)]
    assert all(same_bytes(a, b) for a, b in pairs)


@pytest.mark.parametrize("bad", [bad for bad in BAD if "meta" not in bad.message], ids=name_of)
def test_bad_call_without_data(bad: Bad) -> None:
    """The fake kernels restate the contract: what is wrong without data raises the same error."""
    with pytest.raises(bad.error, match=bad.message.split(":")[0]):
        good_call(Family("meta", device="meta"), bad.op, **bad.changes)


@pytest.mark.parametrize("argument", ["q", "k", "weights"])
def test_sparse_tensors(family: Family, argument: str) -> None:
    sparse = {"q": zeros(M, H, D), "k": zeros(N, D), "weights": zeros(M, H)}[argument].to_sparse()
    with pytest.raises(ValueError, match=f"{argument}: expected a strided tensor"):
        good_call(family, "index", **{argument: sparse})


def test_only_one_half_of_pooled() -> None:
    """The raw op takes pooled keys and scales apart, and refuses one without the other."""
    case = random_case(0, torch.float32, M=M, N=N, H=H, D=D)
    for half in ({"pooled_k": zeros(13, D)}, {"pooled_scale": zeros(13)}):
        with pytest.raises(ValueError, match=r"pooled: .*neither"):
            torch.ops.hisa.index(case.q, case.k, case.weights, block_size=8, topk=4, **half)


def test_cuda_tensors_without_cuda() -> None:
    """A build without CUDA says so; nothing crashes on a machine without a GPU."""
    if hisa.build_info()["cuda"]:
        pytest.skip("this build has CUDA")
    with pytest.raises(ValueError, match=r"device: .*cpu.*cuda"):
        hisa.plan(M, N, H, D, device="cuda")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"op": "sparse"}, "op: .*index.*flat_index.*sparse"),
        ({"device": "meta"}, "device: .*cpu.*meta"),
        ({"block_size": 12}, "block_size: .*12"),
        ({"block_topk": 1}, "block_topk: .*1"),
        ({"topk": 10**6}, "topk: .*1000000"),
        ({"topk": 0, "op": "flat_index"}, "topk: .*0"),
        ({"M": -1}, "M: .*-1"),
        ({"M": 2**31}, "M: .*2147483648"),
        ({"N": -1}, "-1"),
        ({"H": 0}, "got 0"),
        ({"D": 20}, "got 20"),
        ({"dtype": torch.int8}, "dtype: .*int8"),
    ],
    ids=str,
)
def test_bad_plan(changes: dict[str, Any], message: str) -> None:
    """`hisa.plan` refuses what the ops refuse."""
    good: dict[str, Any] = {"M": M, "N": N, "H": H, "D": D}
    assert hisa.plan(**good).output_bytes == M * 2048 * 4
    with pytest.raises((ValueError, TypeError), match=message):
        hisa.plan(**{**good, **changes})


BAD_DATA = [
    ({"ks": int32([0, 1, -2, 3])}, "row 2"),
    ({"ke": int32([5, N + 1, 6, 7])}, "row 1"),
    ({"ks": int32([5, 5, 5, 50]), "ke": int32([9, 9, 9, 49])}, "row 3"),
    ({"ks": int32([N + 5, 0, 0, 0]), "ke": int32([N + 5] * 4)}, "row 0"),
    ({"ks": int32([0, 30, 0, 0]), "ke": int32([9, 61, 9, 9]),
      "cu_seqlens_k": int32([0, 60, N])}, "row 1"),
    ({"cu_seqlens_k": int32([1, N])}, "cu_seqlens_k"),
    ({"cu_seqlens_k": int32([0, N - 1])}, "cu_seqlens_k"),
    ({"cu_seqlens_k": int32([0, 60, 50, N]), "ke": int32([3] * 4)}, "cu_seqlens_k.*segment 1"),
    ({"k_scale": torch.ones(N).index_fill(0, torch.tensor([17]), -1.0)}, "k_scale.*token 17"),
    ({"k_scale": torch.ones(N).index_fill(0, torch.tensor([9]), torch.nan)}, "k_scale.*token 9"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"), BAD_DATA, ids=lambda x: x if isinstance(x, str) else ""
)
def test_check_names_the_bad_row(
    changes: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`hisa.check` finds bad data and says where; HISA_CHECK=1 makes every call do it."""
    case = random_case(0, torch.float32, M=M, N=N, H=H, D=D)
    hisa.check(case.q, case.k, case.weights, **case.index_args())
    bad = case.replace(**changes)
    arguments = (bad.q, bad.k, bad.weights)
    with pytest.raises(ValueError, match=message):
        hisa.check(*arguments, **bad.index_args())
    hisa.index(*arguments, **bad.index_args())  # harmless without the check
    monkeypatch.setenv("HISA_CHECK", "1")
    with pytest.raises(ValueError, match=message):
        hisa.index(*arguments, **bad.index_args())
    if ("row" in message and "cu_seqlens_k" not in changes) or "k_scale" in changes:
        with pytest.raises(ValueError, match=message):
            hisa.flat_index(*arguments, **bad.flat_args())
    hisa.index(case.q, case.k, case.weights, **case.index_args())


def test_check_raises_what_the_op_raises() -> None:
    """`hisa.check` repeats the op's own argument checks."""
    case = random_case(0, torch.float32, M=M, N=N, H=H, D=D)
    with pytest.raises(ValueError, match="block_size"):
        hisa.check(case.q, case.k, case.weights, block_size=9)
    with pytest.raises(TypeError, match="weights"):
        hisa.check(case.q, case.k, case.weights.half())


@pytest.mark.parametrize("bad", BAD, ids=name_of)
def test_bad_call_while_checking(bad: Bad, monkeypatch: pytest.MonkeyPatch) -> None:
    """HISA_CHECK=1 looks at the values after the arguments, and so does `hisa.check`."""
    monkeypatch.setenv("HISA_CHECK", "1")
    cpu = Family("cpu")
    with pytest.raises(bad.error, match=bad.message):
        good_call(cpu, bad.op, **bad.changes)
    if bad.op == "index" and "topp" not in bad.changes:
        case = random_case(0, torch.float32, M=M, N=N, H=H, D=D)
        arguments = {"q": case.q, "k": case.k, "weights": case.weights, **case.index_args()}
        with pytest.raises(bad.error, match=bad.message):
            hisa.check(**{**arguments, **bad.changes})


def test_checking_where_there_are_no_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """HISA_CHECK=1 leaves meta tensors, fake tensors and vmap as they are without it."""
    monkeypatch.setenv("HISA_CHECK", "1")
    case = random_case(0, torch.float32, M=M, N=N, H=H, D=D, ks=int32([0] * M), ke=int32([N] * M))
    tensors, arguments = (case.q, case.k, case.weights), case.index_args()
    want = hisa.index(*tensors, **arguments)
    ks = arguments.pop("ks")
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(tensor) for tensor in (*tensors, ks, arguments["ke"])]
        got = hisa.index(*fakes[:3], ks=fakes[3], **{**arguments, "ke": fakes[4]})
        assert got.shape == want.shape
    in_vmap = torch.vmap(lambda start: hisa.index(*tensors, ks=start, **arguments))
    assert torch.equal(in_vmap(ks[None])[0], want)
    metas = [tensor.to("meta") for tensor in (*tensors, ks, arguments["ke"])]
    got = hisa.index(*metas[:3], ks=metas[3], **{**arguments, "ke": metas[4]})
    assert got.shape == want.shape and got.is_meta


def test_check_accepts_all_good_windows() -> None:
    """Empty windows, windows up to a segment's end, and no windows at all are fine."""
    case = random_case(0, torch.float32, M=M, N=N, H=H, D=D, ks=int32([0, 60, 100, 7]),
                       ke=int32([60, 100, 100, 7]), cu_seqlens_k=int32([0, 60, 60, N]))  # fmt: skip
    hisa.check(case.q, case.k, case.weights, **case.index_args())
    hisa.check(case.q, case.k, case.weights, topk=8)
    empty = case.rows(slice(0, 0))
    hisa.check(empty.q, empty.k, empty.weights, **empty.index_args())


@pytest.mark.parametrize(
    ("q", "k", "error", "message"),
    [
        (int32([0, 4]), int32([0, 4]).long(), TypeError, "cu_seqlens_k: .*int64"),
        (zeros(2), int32([0, 4]), TypeError, "cu_seqlens_q: .*float32"),
        (int32([0, 4]), int32([0, 4, 8]), ValueError, "cu_seqlens_q: .*same S"),
        (int32([]), int32([]), ValueError, "cu_seqlens_q: "),
        (int32([[0, 4]]), int32([0, 4]), ValueError, r"cu_seqlens_q: .*\[1, 2\]"),
        ([0, 4], int32([0, 4]), TypeError, "cu_seqlens_q"),
    ],
    ids=range(6),
)
def test_bad_causal_windows(q: Any, k: Any, error: type[Exception], message: str) -> None:
    """`causal_windows` refuses what it cannot mean."""
    with pytest.raises(error, match=message):
        hisa.causal_windows(q, k)


@pytest.mark.parametrize(
    "x", [torch.zeros(3).int(), [1.0], torch.zeros(()), torch.zeros(3, 0)], ids=str
)
def test_bad_quantize(x: Any) -> None:
    """`quantize_fp8` refuses integers, lists and tensors without channels."""
    with pytest.raises((TypeError, ValueError), match="x: expected"):
        hisa.quantize_fp8(x)
