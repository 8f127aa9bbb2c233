"""The CUDA kernels that score and select, on a CPU, with threads in random order.

Catches, without a GPU: a wait for the wrong phase, memory that is used again too early, threads
that wait for ever, a row, block or scale taken for its neighbour's. Where two threads may go in any
order, a seed chooses it.
"""

from __future__ import annotations

import ctypes
import itertools
import platform
import shutil
from typing import Any

import pytest
import torch

from tests import builders, oracle
from tests.adversarial import BUILDERS as ADVERSARIAL
from tests.builders import BLOCK_SIZES, exact_case, int32, random_case
from tests.case import Case, same_bytes
from tests.checker import assert_same
from tests.numeric import DTYPES, short_name
from tests.simt import Hopper, Portable, build, pairs_pay, select_best
from tests.test_row_independence import prompt
from tests.test_t02_pruned_rows import check_blocks, check_tokens

pytestmark = [
    pytest.mark.seconds(300),
    pytest.mark.skipif(platform.system() != "Linux" or not shutil.which("c++"), reason="needs c++"),
]
FP8, BF16 = torch.float8_e4m3fn, torch.bfloat16
SHAPES = [(heads, dim) for heads in (16, 32, 64, 128) for dim in (64, 128)]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The emulator, compiled."""
    return build(tmp_path_factory.mktemp("simt"))


def check(hopper: Hopper, case: Case, seed: int) -> None:
    """Compare both operators with the oracle, bit for bit."""
    assert_same(hopper.index(case, seed), oracle.index(case))
    assert_same(hopper.flat_index(case, seed), oracle.flat_index(case))


@pytest.mark.parametrize("dtype", [FP8, BF16], ids=["fp8", "bf16"])
@pytest.mark.parametrize(("heads", "dim"), SHAPES)
def test_every_kernel(library: ctypes.CDLL, dtype: torch.dtype, heads: int, dim: int) -> None:
    """Rows that fill the last group and that do not, packed segments, all block sizes."""
    for seed, size in enumerate(BLOCK_SIZES):
        rows = 3 + seed % 3
        case = exact_case(seed + 10, dtype=dtype, M=rows, N=4 * size + 5, H=heads, D=dim, B=size,
                          block_topk=3, topk=2 * size + 1)  # fmt: skip
        check(Hopper(library), case, seed)


@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize(
    ("dtype", "heads", "dim"),
    [(FP8, 16, 64), (FP8, 32, 64), (BF16, 16, 128), (BF16, 32, 128)],
    ids=str,
)
def test_pairs_of_rows(
    library: ctypes.CDLL, dtype: torch.dtype, heads: int, dim: int, size: int
) -> None:
    """Two rows with all, some and no common blocks, in one segment or two, that begin anywhere.

    Of bf16 keys of 128 channels, with queries of one pair and scores of three rows at hand.
    """
    keys, second = 21 * size + 5, 9 * size + 3
    ks = int32([0, 1, 0, 2 * size + 2, second + 3, 0, second, 7, second + 1, second + size + 2, 0,
                second, 0, 0])  # fmt: skip
    ke = int32([9 * size, 9 * size - 1, 7 * size + 1, 9 * size, keys, 9 * size, keys - 70, 6, keys,
                keys - 3, size, second + size + 9, 9 * size, size + 3])  # fmt: skip
    for seed in range(2):
        case = exact_case(seed, dtype=dtype, M=len(ks), N=keys, H=heads, D=dim, B=size,
                          block_topk=5, topk=2 * size + 1, ks=ks, ke=ke, pooling="max",
                          cu_seqlens_k=int32([0, second, keys]))  # fmt: skip
        scale = 2.0 ** torch.randint(-2, 3, (keys,), generator=torch.Generator().manual_seed(seed))
        case = case.replace(k_scale=scale)
        want = oracle.index(case)
        assert_same(Hopper(library, multiprocessors=1 + seed).index(case), want)
        # Without scores, rows that select all of their tokens are not scored.
        got = Hopper(library, multiprocessors=1 + seed, return_scores=False).index(case)
        assert torch.equal(got.indices, torch.from_numpy(want.indices))


@pytest.mark.parametrize(("common", "pay"), [(64, True), (43, True), (42, False), (0, False)])
def test_pairs_or_single_rows(library: ctypes.CDLL, common: int, pay: bool) -> None:
    """Pairs, if two thirds of the blocks are common, wherever those are in the lists."""
    generator = torch.Generator().manual_seed(common)
    rows, size, number = 200, 128, 1000
    blocks = torch.empty(rows, 64, dtype=torch.int32)
    for pair in range(rows // 2):
        mixed = torch.randperm(number, generator=generator)
        for row in range(2):
            alone = mixed[64 + 64 * row :][: 64 - common]
            of_row = torch.cat([mixed[:common], alone]).sort().values
            blocks[2 * pair + row] = of_row * size
    assert pairs_pay(library, blocks, number * size, size) == pay


@pytest.mark.parametrize("heads", [16, 64])
@pytest.mark.parametrize("alike", [True, False])
def test_either_refinement(library: ctypes.CDLL, heads: int, alike: bool) -> None:
    """So many rows that the GPU chooses: neighbours with the same blocks, and with others."""
    rows, size = 34, 64
    generator = torch.Generator().manual_seed(heads)
    case = exact_case(heads, dtype=FP8, M=rows, N=12 * size, H=heads, D=64, B=size, block_topk=4,
                      topk=size + 1, cu_seqlens_k=None, ks=None, ke=None)  # fmt: skip
    if alike:
        case = case.replace(q=case.q[:1].expand(rows, -1, -1).contiguous(),
                            weights=case.weights[:1].expand(rows, -1).contiguous())  # fmt: skip
    case = case.replace(ke=int32(torch.randint(9 * size, 12 * size, (rows,), generator=generator)))
    assert_same(Hopper(library, multiprocessors=1).index(case), oracle.index(case))


@pytest.mark.parametrize("power", [-126, 98, 112])
def test_huge_and_tiny_weights(library: ctypes.CDLL, power: int) -> None:
    """The same bits from a kernel that scales the weights up, and from one that does not."""
    case = exact_case(2, dtype=FP8, M=4, N=700, H=64, D=64, B=64, block_topk=11, topk=100,
                      cu_seqlens_k=None, ks=None)  # fmt: skip
    weights = case.weights.clone()
    weights[1:3] *= 2.0**power
    case = case.replace(weights=weights)
    check(Hopper(library), case, 0)


@pytest.mark.parametrize(
    "seeds", [range(12), pytest.param(range(400), marks=[pytest.mark.long])], ids=["few", "many"]
)
@pytest.mark.parametrize("shared", [232448, 190000])
def test_fuzz(
    library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch, shared: int, seeds: range
) -> None:
    """Random calls, with room for whole rows of scores and without."""
    monkeypatch.setattr(builders, "shapes", "hopper")
    for seed in seeds:
        case = exact_case(seed, dtype=(FP8, BF16)[seed % 2], budget=6e5)
        if min(case.shape[:2]) > 0:
            check(Hopper(library, shared, multiprocessors=1 + seed % 3), case, seed)


@pytest.mark.parametrize("shared", [232448, 170000])
@pytest.mark.parametrize("topk", [1, 600, 3000])
@pytest.mark.parametrize("heads", [16, 32, 64, 128])
def test_flat_in_chunks(library: ctypes.CDLL, shared: int, topk: int, heads: int) -> None:
    """Windows that begin and end in different chunks; a buffer on the chip and in memory.

    Of groups of four, two and one row.
    """
    windows: dict[str, Any] = {
        "ks": int32([0, 5, 70, 9, 5000]),
        "ke": int32([7000, 6999, 4001, 9, 7000]),
    }
    for dtype in (FP8, BF16):
        case = exact_case(3, dtype=dtype, M=5, N=7000, H=heads, D=64, topk=topk, B=8,
                          cu_seqlens_k=None, **windows)  # fmt: skip
        got = Hopper(library, shared).flat_index(case, seed=topk)
        assert_same(got, oracle.flat_index(case))


@pytest.mark.parametrize("blocks", [400, 900, 2000])
@pytest.mark.parametrize("shared", [232448, 170000])
def test_many_blocks(library: ctypes.CDLL, blocks: int, shared: int) -> None:
    """One warp selects among up to 512 blocks, or 1024; beyond that all of them do."""
    case = exact_case(6, dtype=BF16, M=3, N=8 * blocks, H=16, D=64, B=8, block_topk=150, topk=700,
                      cu_seqlens_k=None, ke=int32([8 * blocks - i for i in range(3)]))  # fmt: skip
    assert_same(Hopper(library, shared).index(case), oracle.index(case))


def test_few_blocks_of_a_row_in_several_chunks(library: ctypes.CDLL) -> None:
    """A row has fewer blocks than a warp can select among, but the chunks of the call are short."""
    case = exact_case(7, dtype=BF16, M=3, N=24000, H=16, D=128, B=8, block_topk=50, topk=33,
                      cu_seqlens_k=None, ks=None, ke=int32([5600, 5592, 4808]))  # fmt: skip
    assert_same(Hopper(library).index(case), oracle.index(case))


def test_groups_with_little_to_copy(library: ctypes.CDLL) -> None:
    """A copier that has no tile in many groups, and is slow, still finds its group."""
    ke = [(37 * i) % 301 if i % 2 else 12 for i in range(60)]
    case = exact_case(5, dtype=FP8, M=60, N=300, H=16, D=64, B=8, topk=20, block_topk=9,
                      cu_seqlens_k=None, ks=None, ke=int32(ke))  # fmt: skip
    for seed in (19, 20, 21):  # without a wait, 19 hangs
        check(Hopper(library, multiprocessors=1 + seed % 2), case, seed)


def test_rows_of_all_lengths(library: ctypes.CDLL) -> None:
    """Many groups for a block of threads; rows that are empty, short, pruned, side by side."""
    ke = [(37 * i) % 301 if i % 5 else 0 for i in range(60)]
    case = exact_case(5, dtype=FP8, M=60, N=300, H=16, D=64, B=8, topk=40, block_topk=9,
                      cu_seqlens_k=None, ks=None, ke=int32(ke))  # fmt: skip
    for seed in range(3):
        check(Hopper(library, multiprocessors=1 + seed), case, seed)


VALUES: dict[str, Any] = {
    "alike": (slice(None), 0.0),
    "infinite": (slice(100, 1900, 7), torch.inf),
    "nan": (slice(5, 1900, 3), torch.nan),
    "outlier": (slice(77, 78), 2.0**100),
    "denormal": (slice(None), 2.0**-126),
}


@pytest.mark.parametrize("values", VALUES)
def test_scores_out_of_the_ordinary(library: ctypes.CDLL, values: str) -> None:
    """The range of a row's scores is no help, or cannot be computed."""
    generator = torch.Generator().manual_seed(1)
    at, value = VALUES[values]
    scale = torch.ones(2000)
    scale[at] = value
    k, q = (torch.randint(-2, 3, shape, generator=generator).bfloat16()
            for shape in ((2000, 64), (2, 16, 64)))  # fmt: skip
    case = Case(q=q, k=k, weights=torch.ones(2, 16), k_scale=scale, topk=700)
    assert_same(Hopper(library).flat_index(case), oracle.flat_index(case))


@pytest.mark.parametrize(("n", "topk"), [(700, 690), (5000, 4990), (9000, 1500), (9000, 8500)])
@pytest.mark.parametrize("values", [[torch.nan, -torch.inf, 3.0, 5.0], [torch.nan, 3.0, 5.0]])
def test_nan_and_infinity_among_the_best(
    library: ctypes.CDLL, n: int, topk: int, values: list[float]
) -> None:
    """NaN ranks with -inf, in registers, in memory, in a buffer; some of both are selected."""
    scale = torch.tensor(values)[torch.arange(n) * 7 % 11 % len(values)]
    k = torch.ones(n, 64).bfloat16()
    case = Case(q=torch.ones(2, 16, 64).bfloat16(), k=k, weights=torch.ones(2, 16), k_scale=scale,
                topk=topk, ke=int32([n, n - 3]))  # fmt: skip
    for shared in (232448, 190000):
        assert_same(Hopper(library, shared).flat_index(case), oracle.flat_index(case))


@pytest.mark.parametrize("kind", ["random", "ties", "rising", "falling", "odd", "zeros"])
@pytest.mark.parametrize(("n", "count"), [(1, 1), (700, 33), (3000, 1000), (3001, 3000)])
def test_portable_selection(library: ctypes.CDLL, kind: str, n: int, count: int) -> None:
    """At once; in chunks with a buffer that overflows often, and one that hardly ever does."""
    generator = torch.Generator().manual_seed(n)
    scores = torch.randn(n, generator=generator)
    if kind == "ties":
        scores = torch.randint(-2, 3, (n,), generator=generator).float()
    elif kind in ("rising", "falling"):
        scores = scores.sort(descending=kind == "falling").values
    elif kind == "odd":
        odd = torch.tensor([torch.nan, -torch.inf, torch.inf, -0.0, 0.0, 1e-45])
        scores = odd[torch.randint(6, (n,), generator=generator)]
    elif kind == "zeros":
        scores = torch.where(scores > 0, 0.0, -0.0)
    ranked = scores.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    want = ranked.sort(descending=True, stable=True).indices[:count].sort().values.int()
    layouts = [(4096, 0), (512, (count + 512 + 3) // 4 * 4), (256, (2 * count + 256 + 3) // 4 * 4)]
    for seed, (chunk, capacity) in enumerate(layouts):
        got, chosen = select_best(
            library, scores, count, chunk=chunk, capacity=capacity, seed=seed
        )  # fmt: skip
        assert torch.equal(got, want), f"chunk {chunk}, capacity {capacity}"
        assert torch.equal(chosen.nan_to_num(), scores[want.long()].nan_to_num())


@pytest.mark.parametrize("dtype", [FP8, BF16], ids=["fp8", "bf16"])
@pytest.mark.parametrize("peers", [1, 2, 3, 4])
def test_few_rows(library: ctypes.CDLL, dtype: torch.dtype, peers: int) -> None:
    """A cluster for each row: parts with tiles and without, windows that begin and end anywhere."""
    hopper = Hopper(library, split=peers)
    for seed, (size, block_topk, keys) in enumerate([(8, 40, 1500), (64, 5, 1500), (128, 2, 900)]):
        ks, ke = int32([0, 77, 5, keys // 2]), int32([keys, keys - 3, 9, keys - 1])
        for topk in (33, 2 * size):
            case = exact_case(seed, dtype=dtype, M=4, N=keys, H=16, D=64, B=size, topk=topk,
                              block_topk=block_topk, ks=ks, ke=ke, budget=1e8)  # fmt: skip
            assert_same(hopper.index(case, seed), oracle.index(case))


@pytest.mark.parametrize(("heads", "dim"), SHAPES)
def test_few_rows_by_every_kernel(library: ctypes.CDLL, heads: int, dim: int) -> None:
    """Packed segments, a cluster of two."""
    for seed, dtype in enumerate((FP8, BF16)):
        case = exact_case(seed + 20, dtype=dtype, M=3, N=300, H=heads, D=dim, B=64, block_topk=3,
                          topk=100)  # fmt: skip
        assert_same(Hopper(library, split=2).index(case, seed), oracle.index(case))


@pytest.mark.parametrize("block_topk", [2**31, 2**32, 2**32 + 2, 2**32 + 3, 2**63 - 1])
def test_few_rows_that_keep_all_blocks(library: ctypes.CDLL, block_topk: int) -> None:
    """A budget is clamped to the blocks there are, not cut to 32 bits."""
    case = exact_case(3, dtype=FP8, M=2, N=1000, H=16, D=64, B=64, topk=64, block_topk=40)
    want = oracle.index(case)
    found = Hopper(library, split=2).index(case.replace(block_topk=block_topk), 0)
    assert_same(found, want)


@pytest.mark.parametrize("seed", range(4))
def test_few_rows_whose_scores_crowd(library: ctypes.CDLL, seed: int) -> None:
    """Ties of all, one far from all, NaN and infinities: where the histogram is of no use."""
    scales = torch.ones(4, 900)
    scales[1, 700] = 1e30
    scales[2, ::7] = float("nan")
    scales[3, ::3] = float("inf")
    case = exact_case(seed, dtype=FP8, M=2, N=900, H=16, D=64, B=8, block_topk=60, topk=200,
                      k_scale=None, cu_seqlens_k=None, ks=int32([0, 3]),
                      ke=int32([900, 899]), budget=1e8)  # fmt: skip
    k = case.k[:1].expand(900, -1).contiguous() if seed == 0 else case.k
    case = case.replace(k=k, k_scale=scales[seed])
    want = Hopper(library).index(case, seed)
    found = Hopper(library, split=2).index(case, seed)
    assert same_bytes(found.indices, want.indices)
    assert torch.equal(found.scores.nan_to_num(7.0), want.scores.nan_to_num(7.0))


@pytest.mark.parametrize("alike", [True, False], ids=["alike", "unlike"])
@pytest.mark.parametrize(
    ("dtype", "heads", "dim"),
    [(FP8, 16, 128), (FP8, 64, 128), (BF16, 32, 64), (BF16, 32, 128)],
    ids=str,
)
def test_rows_where_sums_round(
    library: ctypes.CDLL, dtype: torch.dtype, heads: int, dim: int, alike: bool
) -> None:
    """By pairs, each by itself, first or second of a pair, by a cluster: the same bytes."""
    case = prompt(dtype, 5, 8 * 64 + 5, heads, dim, alike, 64)
    whole = Hopper(library, multiprocessors=1).index(case)
    order = torch.arange(5).flip(0)
    ways: list[dict[str, Any]] = [{"multiprocessors": 1}, {"multiprocessors": 8}]
    ways += [{"multiprocessors": 8, "split": peers} for peers in (1, 3)]
    for hopper in (Hopper(library, **way) for way in ways):
        for rows in (torch.arange(5), order[1:], order[2:3]):
            for mine, want in zip(hopper.index(case.rows(rows), 1), whole, strict=True):
                assert same_bytes(mine, want[rows])


# What of test_t02_pruned_rows each emulated call has: block size, blocks kept, topk; rows; kernel.
PRUNED: dict[str, tuple[dict[str, Any], tuple[int, int, int], int, tuple[Any, ...]]] = {
    "alone": ({"multiprocessors": 8}, (64, 30, 300), 3, (FP8, 16, 64)),
    "pairs": ({"multiprocessors": 1}, (64, 30, 300), 3, (FP8, 16, 64)),
    "long keys": ({"multiprocessors": 1}, (64, 10, 300), 7, (BF16, 16, 128)),
    "chunks": ({"multiprocessors": 8, "shared": 120_000}, (128, 96, 999), 3, (FP8, 16, 64)),
    "cluster": ({"split": 2}, (64, 30, 300), 3, (FP8, 16, 64)),
    "few tokens": ({"split": 2}, (64, 5, 310), 3, (FP8, 16, 64)),
}


def adversarial() -> list[Any]:
    """Every kind with every builder of rows; in the fast suite builders take turns."""
    calls = []
    for (i, kind), (j, name) in itertools.product(enumerate(PRUNED), enumerate(ADVERSARIAL)):
        marks = [] if i == j % len(PRUNED) else [pytest.mark.long]
        calls.append(pytest.param(kind, name, marks=marks, id=f"{kind}-{name}"))
    return calls


@pytest.mark.parametrize(("kind", "name"), adversarial())
def test_adversarial_rows(library: ctypes.CDLL, kind: str, name: str) -> None:
    """T2: tokens of kept blocks, a few rows; blocks, by one warp or by a cluster."""
    options, layout, rows, kernel = PRUNED[kind]
    hopper = Hopper(library, **options)
    check_tokens(hopper, name, layout, rows, *kernel)
    check_blocks(hopper, name, 300, 40, *kernel)


# Heads and channels of every instance of the portable kernels.
PORTABLE = [(16, 64), (32, 64), (64, 64), (100, 64), (16, 128), (32, 128), (64, 128), (70, 128),
            (20, 48), (5, 256)]  # fmt: skip


@pytest.mark.parametrize("split", [0, 1], ids=["many", "few"])
@pytest.mark.parametrize("dtype", DTYPES, ids=short_name)
@pytest.mark.parametrize(("heads", "dim"), PORTABLE)
def test_portable_kernels(
    library: ctypes.CDLL, dtype: torch.dtype, heads: int, dim: int, split: int
) -> None:
    """Rows in packed segments, by a block of threads each, and by several."""
    case = exact_case(heads + dim, dtype=dtype, M=3, N=300, H=heads, D=dim, B=8, block_topk=18,
                      topk=40, cu_seqlens_k=int32([0, 13, 300]), ks=int32([13, 16, 2]),
                      ke=int32([300, 297, 11]))  # fmt: skip
    kernels = Portable(library, multiprocessors=6, split=split)
    assert_same(kernels.index(case, heads), oracle.index(case))
    assert_same(kernels.flat_index(case, dim), oracle.flat_index(case))


@pytest.mark.parametrize("dtype", [torch.float32, BF16, FP8], ids=short_name)
@pytest.mark.parametrize("multiprocessors", [5, 8, 23])
def test_portable_few_rows(library: ctypes.CDLL, dtype: torch.dtype, multiprocessors: int) -> None:
    """Two parts of a row to nine, some of them empty; rows that are pruned, whole, short, empty."""
    few = Portable(library, multiprocessors=multiprocessors, split=1)
    ks, ke = int32([0, 77, 5, 450, 900]), int32([1100, 1097, 9, 600, 900])
    for seed, (size, block_topk) in enumerate([(8, 40), (8, 5), (128, 2), (64, 5), (32, 30)]):
        for topk in (1, 33, min(1400, block_topk * size)):
            case = exact_case(seed, dtype=dtype, M=5, N=1100, H=2, D=16, B=size, topk=topk,
                              block_topk=block_topk, ks=ks, ke=ke, cu_seqlens_k=None, budget=1e8,
                              pooling="max")  # fmt: skip
            assert_same(few.index(case, seed), oracle.index(case), case.describe())
            assert_same(few.flat_index(case, seed), oracle.flat_index(case), case.describe())


@pytest.mark.parametrize("topk", [40, 1200])
def test_portable_few_rows_without_scores(library: ctypes.CDLL, topk: int) -> None:
    """Where all of a row is selected nothing is scored, and memory that holds NaN is not read."""
    few = Portable(library, multiprocessors=8, split=1, return_scores=False)
    case = exact_case(1, dtype=BF16, M=3, N=1100, H=2, D=16, B=64, topk=topk, block_topk=19,
                      ks=int32([0, 7, 30]), ke=int32([1100, 900, 20]), cu_seqlens_k=None,
                      budget=1e8)  # fmt: skip
    assert same_bytes(few.index(case).indices, torch.from_numpy(oracle.index(case).indices))
    assert same_bytes(few.flat_index(case).indices,
                      torch.from_numpy(oracle.flat_index(case).indices))  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=short_name)
@pytest.mark.parametrize(("heads", "dim"), [(64, 128), (40, 64), (3, 48)])
def test_portable_parts_change_no_bit(
    library: ctypes.CDLL, dtype: torch.dtype, heads: int, dim: int
) -> None:
    """Sums that are rounded: the same bytes by one block of threads a row, three, and nine."""
    case = random_case(heads, dtype, M=2, N=1100, H=heads, D=dim, topk=90, block_size=8,
                       block_topk=60, ks=int32([0, 5]), ke=int32([1100, 1090]))  # fmt: skip
    want = Portable(library)
    for multiprocessors in (3, 9):
        few = Portable(library, multiprocessors=multiprocessors, split=1)
        for mine, other in ((few.index(case), want.index(case)),
                            (few.flat_index(case), want.flat_index(case))):  # fmt: skip
            assert same_bytes(mine.indices, other.indices)
            assert same_bytes(mine.scores, other.scores)


@pytest.mark.parametrize("values", VALUES)
def test_portable_few_rows_out_of_the_ordinary(library: ctypes.CDLL, values: str) -> None:
    """Ties of all, infinities, NaN."""
    generator = torch.Generator().manual_seed(2)
    at, value = VALUES[values]
    scale = torch.ones(2000)
    scale[at] = value
    k, q = (torch.randint(-2, 3, shape, generator=generator).bfloat16()
            for shape in ((2000, 16), (2, 3, 16)))  # fmt: skip
    case = Case(q=q, k=k, weights=torch.ones(2, 3), k_scale=scale, topk=700)
    assert_same(Portable(library, multiprocessors=7, split=1).flat_index(case),
                oracle.flat_index(case))  # fmt: skip


@pytest.mark.parametrize(
    "seeds", [range(30), pytest.param(range(1000), marks=[pytest.mark.long])], ids=["few", "many"]
)
@pytest.mark.parametrize("shared", [166912, 60000])
def test_portable_fuzz(library: ctypes.CDLL, shared: int, seeds: range) -> None:
    """Random calls, by whichever kernel: with room for whole rows of scores and without."""
    for seed in seeds:
        case = exact_case(seed, budget=3e5)
        want, flat = oracle.index(case), oracle.flat_index(case)
        for kernels in (Portable(library, shared), Portable(library, shared, 300, split=2)):
            assert_same(kernels.index(case, seed), want, case.describe())
            assert_same(kernels.flat_index(case, seed), flat, case.describe())
