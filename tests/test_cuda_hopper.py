"""The kernels for Hopper: every one, and every way to lay out its memory.

Rows are scored in groups, keys copied in tiles of 128 tokens and in boxes of a block, scores handed
on in chunks; which of it a call needs follows from its sizes. Catches a row, block or scale taken
for its neighbour's, a chunk read before it is written, a group whose rows have different windows.
The rest of the suite runs on these kernels with `--shapes hopper`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import hisa
from tests import builders, oracle
from tests import test_t16_layout as layouts
from tests.builders import BLOCK_SIZES, exact_case, int32
from tests.case import Case
from tests.checker import assert_same
from tests.families import CPU, CUDA, CUDA_MANY, Family, hopper
from tests.numeric import short_name
from tests.test_paged_cuda import Cache

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not hopper(), reason="needs compute capability 9.0, and kernels for it"),
]
DTYPES = [torch.float8_e4m3fn, torch.bfloat16]


@pytest.fixture(autouse=True, params=[CUDA, CUDA_MANY], ids=lambda family: family.name)
def either_kernel(request: pytest.FixtureRequest) -> Iterator[Family]:
    """Few rows by the kernel that is made for them, and by those for many."""
    with request.param.active():
        yield request.param


def check(case: Case) -> None:
    """Compare both operators with the oracle, bit for bit."""
    assert_same(CUDA.index(case), oracle.index(case))
    assert_same(CUDA.flat_index(case), oracle.flat_index(case))


@pytest.mark.parametrize("dtype", DTYPES, ids=short_name)
@pytest.mark.parametrize("depth", [64, 128])
@pytest.mark.parametrize("heads", [16, 32, 64, 128])
def test_every_kernel(dtype: torch.dtype, heads: int, depth: int) -> None:
    """Rows that fill the last group and that do not, packed segments, all block sizes."""
    plan = hisa.plan(8, 900, heads, depth, dtype=dtype, device="cuda", block_size=8, block_topk=9,
                     topk=21)  # fmt: skip
    assert set(plan.kernels.values()) == {f"cuda/wgmma-{heads}x{depth}"}
    for seed, size in enumerate(BLOCK_SIZES):
        check(exact_case(seed, dtype=dtype, M=7 + seed % 3, N=7 * size + 5, H=heads, D=depth,
                         B=size, block_topk=3, topk=2 * size + 1))  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=short_name)
@pytest.mark.parametrize("topk", [1, 600, 2048, 9000, 30000])
def test_flat_in_every_layout(dtype: torch.dtype, topk: int) -> None:
    """All scores at once, in chunks with a buffer on the chip, in chunks with one in memory."""
    ke = int32([20000, 19999, 13001, 9, 20000, 1500])
    case = exact_case(3, dtype=dtype, M=6, N=20000, H=16, D=64, topk=topk, B=8, cu_seqlens_k=None,
                      ks=int32([0, 5, 70, 9, 13000, 0]), ke=ke)  # fmt: skip
    plan = hisa.plan(*case.shape, dtype=dtype, device="cuda", op="flat_index", topk=topk)
    assert (plan.workspace_bytes > 0) == (topk >= 9000)
    assert_same(CUDA.flat_index(case), oracle.flat_index(case))


@pytest.mark.parametrize("dtype", DTYPES, ids=short_name)
@pytest.mark.parametrize(("block_topk", "topk"), [(100, 40), (1500, 900), (2000, 12000)])
def test_hierarchical_in_every_layout(dtype: torch.dtype, block_topk: int, topk: int) -> None:
    """Budgets of 800, 12,000 and 16,000 tokens, in blocks of 8: sixteen boxes of a tile."""
    case = exact_case(4, dtype=dtype, M=3, N=20000, H=16, D=64, B=8, topk=topk, cu_seqlens_k=None,
                      block_topk=block_topk, ke=int32([20000, 19999, 17001]))  # fmt: skip
    assert_same(CUDA.index(case), oracle.index(case))


@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("dtype", DTYPES, ids=short_name)
@pytest.mark.parametrize("depth", [64, 128])
@pytest.mark.parametrize("heads", [16, 32, 64])
def test_pairs_of_rows(heads: int, depth: int, dtype: torch.dtype, size: int) -> None:
    """More rows than multiprocessors, so two are scored together: with all, some, no common blocks.

    Rows of one pair are in different segments, begin and end elsewhere, or have nothing to score.
    """
    rows, keys = 301, 13 * size + 5
    ks = [0 if i % 7 else (31 * i) % (5 * size) for i in range(rows)]
    ke = [keys - (13 * i) % (6 * size) if i % 5 else 3 * i for i in range(rows)]
    packed = int32([0, 4 * size + 3, 4 * size + 3, keys])
    for seed, segments in enumerate([None, packed]):
        case = exact_case(seed, dtype=dtype, M=rows, N=keys, H=heads, D=depth, B=size,
                          block_topk=5, topk=2 * size + 1, cu_seqlens_k=segments, pooling="max",
                          ks=int32(ks), ke=int32(ke))  # fmt: skip
        got, want = CUDA.index(case), CPU.index(case)  # the oracle would take minutes
        assert torch.equal(got.indices, want.indices) and torch.equal(got.scores, want.scores)
        on = case.to("cuda")  # without scores, rows that select all of their tokens are not scored
        indices = hisa.index(on.q, on.k, on.weights, **on.index_args())
        assert torch.equal(indices.cpu(), want.indices)


@pytest.mark.parametrize("alike", [True, False])
@pytest.mark.parametrize(
    ("heads", "depth", "dtype"),
    [(32, 64, DTYPES[0]), (64, 64, DTYPES[0]), (64, 128, DTYPES[1])],
    ids=str,
)
def test_either_refinement(heads: int, depth: int, dtype: torch.dtype, alike: bool) -> None:
    """So many rows that the GPU chooses: neighbours with the same blocks, and with others."""
    rows = 32 * torch.cuda.get_device_properties(0).multi_processor_count + 5
    size = 64
    case = exact_case(heads, dtype=dtype, M=rows, N=20 * size, H=heads, D=depth, B=size,
                      block_topk=4, topk=size + 1, cu_seqlens_k=None, ks=None)  # fmt: skip
    if alike:
        case = case.replace(q=case.q[:1].expand(rows, -1, -1).contiguous(),
                            weights=case.weights[:1].expand(rows, -1).contiguous())  # fmt: skip
    case = case.replace(ke=int32([20 * size - (13 * m) % (8 * size) for m in range(rows)]))
    got, want = CUDA.index(case), CPU.index(case)
    assert torch.equal(got.indices, want.indices) and torch.equal(got.scores, want.scores)


@pytest.mark.parametrize("power", [-126, 98, 112])
def test_huge_and_tiny_weights(power: int) -> None:
    """The same bits from a kernel that scales the weights up, and from one that does not."""
    case = exact_case(2, dtype=torch.float8_e4m3fn, M=4, N=700, H=64, D=64, B=64, block_topk=11,
                      topk=100, cu_seqlens_k=None, ks=None)  # fmt: skip
    weights = case.weights.clone()
    weights[1:3] *= 2.0**power
    check(case.replace(weights=weights))


@pytest.mark.parametrize("blocks", [400, 900, 3000])
def test_select_blocks(blocks: int) -> None:
    """One warp selects among up to 512 blocks, or 1024; beyond that all of them do."""
    case = exact_case(6, dtype=torch.bfloat16, M=5, N=8 * blocks, H=16, D=64, B=8, block_topk=50,
                      topk=33, cu_seqlens_k=None,
                      ke=int32([8 * blocks - i for i in range(5)]))  # fmt: skip
    assert_same(CUDA.index(case), oracle.index(case))


@pytest.mark.parametrize("dtype", DTYPES, ids=short_name)
def test_rows_of_all_lengths(dtype: torch.dtype) -> None:
    """Many more groups than blocks of threads; rows that are empty, short, pruned, side by side."""
    ke = [(37 * i) % 901 if i % 5 else 0 for i in range(1200)]
    case = exact_case(5, dtype=dtype, M=1200, N=900, H=16, D=64, B=8, topk=40, block_topk=9,
                      cu_seqlens_k=None, ks=None, ke=int32(ke))  # fmt: skip
    check(case)


@pytest.mark.parametrize("values", ["alike", "infinite", "nan", "outlier", "denormal"])
def test_scores_out_of_the_ordinary(values: str) -> None:
    """The range of a row's scores is no help, or cannot be computed."""
    rows, keys, topk = 4, 3000, 700
    generator = torch.Generator().manual_seed(1)
    k = torch.randint(-2, 3, (keys, 64), generator=generator).bfloat16()
    weights = torch.ones(rows, 16)
    changes: dict[str, Any] = {
        "alike": (slice(None), 1.0),
        "infinite": (slice(100, 2900, 7), torch.inf),
        "nan": (slice(5, 2900, 3), torch.nan),
        "outlier": (slice(77, 78), 2.0**100),
        "denormal": (slice(None), 2.0**-126),
    }
    at, value = changes[values]
    scale = torch.ones(keys)
    if values == "alike":
        k[:] = 1
    elif values == "nan":
        k[at] = torch.nan
    else:
        scale[at] = value
    q = torch.randint(-2, 3, (rows, 16, 64), generator=generator).bfloat16()
    case = Case(q=q, k=k, weights=weights, k_scale=scale, topk=topk, block_size=128, block_topk=8)
    assert_same(CUDA.flat_index(case), oracle.flat_index(case))


@pytest.mark.parametrize("dtype", DTYPES, ids=short_name)
@pytest.mark.parametrize("layout", layouts.LAYOUTS)
def test_layouts_of_arguments(
    dtype: torch.dtype, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """T16 in a shape that these kernels take: the copy engine wants more of strides than others."""
    monkeypatch.setattr(builders, "shapes", "hopper")
    layouts.test_each_argument(CUDA, dtype, layout)


@pytest.mark.parametrize("dtype", DTYPES, ids=short_name)
@pytest.mark.parametrize("test", [layouts.test_expanded, layouts.test_overlapping])
def test_rows_on_top_of_each_other(
    dtype: torch.dtype, test: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same for rows that the copy engine cannot bring where they are."""
    monkeypatch.setattr(builders, "shapes", "hopper")
    test(CUDA, dtype)


def random_call(seed: int) -> Callable[[], torch.Tensor]:
    """A call on normal inputs of a random shape, op, dtype and number of heads."""
    generator = torch.Generator("cuda").manual_seed(seed)
    pick = torch.Generator().manual_seed(seed)
    dtype = DTYPES[seed % 2]
    heads = (16, 32, 64, 128)[seed // 2 % 4]
    rows, keys = (int(torch.randint(1, most, (), generator=pick)) for most in (600, 6000))

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device="cuda")

    q, k = (normal(*shape).to(dtype) for shape in ((rows, heads, 128), (keys, 128)))
    weights = normal(rows, heads)
    ke = (torch.rand(rows, generator=generator, device="cuda") * keys).int()
    scale = normal(keys).exp() if dtype == torch.float8_e4m3fn else None
    if seed % 3 == 0:
        return lambda: hisa.flat_index(q, k, weights, ke=ke, topk=300, k_scale=scale)
    return lambda: hisa.index(q, k, weights, ke=ke, topk=300, block_size=64, block_topk=8,
                              k_scale=scale)  # fmt: skip


@pytest.mark.parametrize("op", ["flat", "row by row", "pairs"])
@pytest.mark.parametrize("dtype", DTYPES, ids=short_name)
@pytest.mark.parametrize("heads", [32, 64])
def test_scales_of_a_long_call(op: str, dtype: torch.dtype, heads: int) -> None:
    """Each key has its own scale, however busy shared memory is: 40 times the same bits.

    Without a fence before the copy engine writes the next scales, every fifth flat call of 32 heads
    had a wrong row.
    """
    keys = 16384
    generator = torch.Generator("cuda").manual_seed(heads)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device="cuda", dtype=torch.bfloat16)

    alike = 16 if op == "pairs" else 1  # neighbours, which then keep mostly the same blocks
    q = normal(keys // alike, heads, 128).repeat_interleave(alike, 0).to(dtype)
    k = normal(keys, 128).to(dtype)
    weights = normal(keys // alike, heads).float().repeat_interleave(alike, 0)
    scale = normal(keys).float().exp()
    ke = torch.arange(1, keys + 1, device="cuda", dtype=torch.int32)

    def call() -> torch.Tensor:
        if op == "flat":
            return hisa.flat_index(q, k, weights, ke=ke, topk=2048, k_scale=scale)
        return hisa.index(q, k, weights, ke=ke, topk=2048, k_scale=scale, block_topk=32)

    want = call()
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(40):
        wrong += (call() != want).any(1).sum()
    assert wrong.item() == 0


@pytest.mark.long
@pytest.mark.seconds(600)
def test_soak() -> None:
    """100,000 launches of 50 calls, in random order: a result is always the first one's bits."""
    calls = [random_call(seed) for seed in range(50)]
    want = [call() for call in calls]
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    for number in torch.randint(
        50, (100_000,), generator=torch.Generator().manual_seed(0)
    ).tolist():
        wrong += (calls[number]() != want[number]).any()
    assert wrong.item() == 0


def paged_call(dtype: torch.dtype, heads: int, next_n: int) -> Callable[[], torch.Tensor]:
    """A step that pools pages and selects from them."""
    cache = Cache(dtype, heads, next_n)
    cache.refill(0)
    return lambda: cache.call()[0]


def assert_runs_beside_others(calls: list[Callable[[], torch.Tensor]]) -> None:
    """Another kernel holds half of the multiprocessors for longer than all calls take."""
    held = torch.cuda.get_device_properties(0).multi_processor_count // 2
    q = torch.randn(2 * held, 64, 128, device="cuda").to(torch.float8_e4m3fn)
    k = torch.randn(2**21, 128, device="cuda").to(torch.float8_e4m3fn)
    weights = torch.randn(2 * held, 64, device="cuda")
    want = [call() for call in calls]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # two rows to a block of threads, one to a multiprocessor
        for _ in range(3):
            hisa.flat_index(q, k, weights, topk=2048)
    got = [call() for call in calls]
    torch.cuda.current_stream().synchronize()
    assert not stream.query(), "the other kernel ended too early to show anything"
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_half_of_the_multiprocessors() -> None:
    """None waits for the other kernel (T14).

    Integration bugs: a hang.
    """
    assert_runs_beside_others([random_call(seed) for seed in range(1, 9)])


@pytest.mark.parametrize("next_n", [1, 50])
def test_half_of_the_multiprocessors_in_pages(next_n: int) -> None:
    """The same of paged calls, of few rows and of so many that all are scored by groups."""
    kinds = [(torch.float8_e4m3fn, 64), (torch.bfloat16, 16), (torch.bfloat16, 128)]
    assert_runs_beside_others([paged_call(dtype, heads, next_n) for dtype, heads in kinds])
