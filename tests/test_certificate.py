"""`hisa.certify` and `hisa.exact_index`: what is proved is true, whatever the numbers.

Catches bounds that rounding, ties, negative weights, underflow or a key that is not finite slip
past, kept blocks that are not those of `hisa.index`, and chunks that change a row.
"""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import hisa
from hisa import bounds, proof
from hisa.windows import clamp_windows
from tests import builders
from tests.builders import exact_case, int32, random_case
from tests.case import Case, same_bytes
from tests.numeric import DTYPES, FP8, short_name


def arguments(case: Case, **changes: Any) -> dict[str, Any]:
    """Keyword arguments of `certify`."""
    given = {name: value for name, value in case.index_args().items() if name != "pooled"}
    return {**given, "bound_size": 8, **changes}


def flat(case: Case) -> tuple[Tensor, Tensor]:
    """What flat selects in the windows that the hierarchical indexer reads."""
    start, end, _ = clamp_windows(case.ks, case.ke, case.cu_seqlens_k, rows=len(case.q),
                                  keys=len(case.k), device=case.k.device)  # fmt: skip
    indices, scores = hisa.flat_index(case.q, case.k, case.weights, k_scale=case.k_scale, ks=start,
                                      ke=end, topk=case.topk, return_scores=True)  # fmt: skip
    return indices, scores


def assert_true(case: Case, **changes: Any) -> hisa.Certificate:
    """Assert that proved rows are flat's, and that `exact_index` always is."""
    args = arguments(case, **changes)
    found = hisa.certify(case.q, case.k, case.weights, **args)
    pooled = hisa.pool_keys(case.k, **case.pool_args())
    again = hisa.certify(case.q, case.k, case.weights, **args, pooled=pooled)
    assert same_bytes(again.margin, found.margin)
    plain = {name: value for name, value in args.items() if name != "bound_size"}
    ours = hisa.index(case.q, case.k, case.weights, **plain, return_scores=True)
    assert same_bytes(found.indices, ours[0]) and same_bytes(found.scores, ours[1])
    assert torch.equal(found.proved, found.margin > 0)
    indices, scores = flat(case)
    wrong = found.proved & (found.indices != indices).any(1)
    assert not wrong.any(), f"row {int(wrong.nonzero()[0])} is proved, and differs from flat"
    exact = hisa.exact_index(case.q, case.k, case.weights, **args)
    assert same_bytes(exact.indices, indices) and same_bytes(exact.scores, scores)
    assert torch.equal(exact.escalated, ~found.proved)
    return found


@pytest.mark.parametrize("seed", range(60))
def test_exact_calls(seed: int, device: str) -> None:
    """Ties, packed segments, ragged tails, empty windows, in sizes that a proof takes."""
    heads, depths = builders.SHAPES[builders.shapes]
    random = np.random.default_rng([seed, 1])
    sizes = {
        "H": int(random.choice([h for h in heads if h <= 127])),
        "D": int(random.choice([d for d in depths if d <= 240])),
    }
    assert_true(exact_case(seed, budget=2e5, **sizes).to(device))


def clusters(
    seed: int,
    dtype: torch.dtype,
    spread: float,
    rows: int = 40,
    keys: int = 512,
    heads: int = 4,
    dim: int = 16,
    **fields: Any,
) -> Case:
    """Keys in groups of eight that lie `spread` apart: the smaller, the more can be proved."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random)

    k = normal(keys // 8, dim).repeat_interleave(8, 0)
    k = k + spread * normal(keys, dim)
    q, scale = normal(rows, heads, dim), None
    if dtype == FP8:
        scale = torch.exp2(torch.randint(-3, 4, (keys // 8,), generator=random).float())
        scale = scale.repeat_interleave(8)
    ke = torch.randint(keys // 2, keys + 1, (rows,), generator=random).int()
    arguments = {"topk": 8, "block_topk": 12, "ke": ke, "k_scale": scale, **fields}
    return Case(q=q.to(dtype), k=k.to(dtype), weights=normal(rows, heads), **arguments)


@pytest.mark.parametrize("dtype", DTYPES, ids=short_name)
@pytest.mark.parametrize("spread", [0.0, 0.003, 0.01, 0.03, 0.1, 1.0])
def test_clustered_keys(dtype: torch.dtype, spread: float, device: str) -> None:
    """From keys that are the same, with ties between blocks, to keys at random."""
    for seed in range(5):
        assert_true(clusters(seed, dtype, spread).to(device), bound_size=8)


def test_much_is_proved_where_keys_lie_close(device: str) -> None:
    """Neither nothing nor everything, so that the tests above say something."""
    shares = []
    for spread in (0.003, 0.1, 1.0):
        case = clusters(1, torch.float32, spread, rows=200).to(device)
        found = hisa.certify(case.q, case.k, case.weights, **arguments(case))
        assert not found.margin.isinf().any()  # every row discards some block
        shares.append(float(found.proved.float().mean()))
    assert shares[0] > 0.9 > shares[1] > 0.3 > shares[2]


def near_ties(seed: int, dtype: torch.dtype, heads: int, dim: int) -> Case:
    """Keys as good as what some rows select last, put where they are likely to be discarded."""
    case = clusters(seed, dtype, 0.002, 100, 256, heads, dim, topk=1 + seed % 8, block_topk=8)
    random = torch.Generator().manual_seed(seed)
    chosen = hisa.flat_index(case.q, case.k, case.weights, ke=case.ke, k_scale=case.k_scale,
                             topk=case.topk)  # fmt: skip
    copies = 1 + seed % 4
    good = chosen[torch.randint(100, (copies,), generator=random), -1].long()
    at = torch.randint(256, (copies,), generator=random)
    k = case.k.clone().view(torch.uint8)
    k[at] = k[good]
    scale = case.k_scale
    if scale is not None:
        scale = scale.clone()
        scale[at] = scale[good]
    return case.replace(k=k.view(dtype), k_scale=scale)


@pytest.mark.parametrize("dtype", DTYPES, ids=short_name)
@pytest.mark.parametrize("seeds", [
    range(25), pytest.param(range(250), marks=[pytest.mark.long, pytest.mark.seconds(900)]),
], ids=len)  # fmt: skip
@pytest.mark.parametrize(("heads", "dim"), [(4, 16), (16, 64)])  # the latter for Hopper
def test_near_ties(heads: int, dim: int, seeds: range, dtype: torch.dtype, device: str) -> None:
    """A discarded block holds a key as good as a selected one, or all but. 200,000 rows if long."""
    found = [assert_true(near_ties(seed, dtype, heads, dim).to(device)) for seed in seeds]
    share = torch.cat([each.proved for each in found]).float().mean()
    assert 0.02 < share < 0.9


@pytest.mark.parametrize("dtype", DTYPES, ids=short_name)
@pytest.mark.parametrize("power", [-60, -20, 20, 60])
def test_very_small_and_very_large_weights(dtype: torch.dtype, power: int, device: str) -> None:
    """What underflows or overflows is never taken for a proof."""
    for seed in range(3):
        case = clusters(seed, dtype, 0.003)
        for scaled in (
            case.replace(weights=case.weights * 2.0**power),
            case.replace(
                weights=case.weights * 2.0**-power, k_scale=torch.full((512,), 2.0**power)
            ),
        ):
            assert_true(scaled.to(device))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short_name)
def test_tiny_keys_under_large_weights(dtype: torch.dtype, device: str) -> None:
    """Dot products below the smallest normal number, lifted to usual scores."""
    case = clusters(3, dtype, 0.01)
    k = (case.k.float() * 2.0**-126).to(dtype)
    assert_true(case.replace(k=k, weights=case.weights * 2.0**120).to(device))


@pytest.mark.parametrize("dtype", DTYPES, ids=short_name)
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("where", ["q", "k", "weights", "k_scale"])
def test_values_that_are_not_finite(
    where: str, value: float, dtype: torch.dtype, device: str
) -> None:
    """One of them anywhere: rows that it may concern are not proved, unless they are right."""
    for seed in range(4):
        case = clusters(seed, dtype, 0.003).replace(k_scale=torch.ones(512))
        if where == "k_scale" and value < 0:
            return  # a scale is at least 0
        tensor = getattr(case, where).float()
        flat_tensor = tensor.view(-1)
        flat_tensor[torch.randint(flat_tensor.numel(), (3,))] = value
        assert_true(case.replace(**{where: tensor.to(getattr(case, where).dtype)}).to(device))


def line(seed: int, dtype: torch.dtype, edges: list[int]) -> Case:
    """Keys that differ in one channel, where the bound of a ball is the score of its best key.

    Each segment has two blocks of good keys, whose fourth best is selected last, and one hot key in
    a block of zeros: a few units in the last place better than that key, as good, or worse; in some
    segments by far.
    """
    random = torch.Generator().manual_seed(seed)
    keys = 0.1 + 0.3 * torch.rand(edges[-1], generator=random)
    long = [(a, b) for a, b in itertools.pairwise(edges) if b - a >= 64]
    for start, end in long:
        inner = 1 + torch.randperm((end - start) // 8 - 2, generator=random)[:3]
        first, second, last = (start + 8 * inner).tolist()
        for block in (first, second):
            keys[block : block + 8] = 1 + torch.rand(8, generator=random)
        good = torch.cat([keys[first : first + 8], keys[second : second + 8]]).to(dtype)
        fourth = good.float().sort(descending=True).values[3:4].to(dtype)
        bits = fourth.view({1: torch.int8, 2: torch.int16, 4: torch.int32}[dtype.itemsize])
        hot = (bits + int(torch.randint(-2, 3, (), generator=random))).view(dtype).float()
        keys[last : last + 8] = 0
        keys[last + int(torch.randint(8, (), generator=random))] = (
            hot * 0.9 if torch.rand((), generator=random) < 0.3 else hot
        )
    channel = int(torch.randint(16, (), generator=random))
    k, q = torch.zeros(edges[-1], 16), torch.zeros(len(long), 1, 16)
    k[:, channel] = keys
    q[..., channel] = 1 + torch.rand(len(long), 1, generator=random)
    weights = 0.5 + torch.rand(len(long), 1, generator=random)
    return Case(q=q.to(dtype), k=k.to(dtype), weights=weights, topk=4, block_topk=4,
                cu_seqlens_k=int32(edges), ks=int32([a for a, _ in long]),
                ke=int32([b for _, b in long]))  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=short_name)
def test_bounds_without_room(dtype: torch.dtype, device: str) -> None:
    """Where nothing but the slack lies between a bound and a score, in segments of any length."""
    proved = []
    for seed in range(12):
        lengths = torch.randint(64, 200, (30,), generator=torch.Generator().manual_seed(seed))
        case = line(seed, dtype, [0, *lengths.cumsum(0).tolist()])
        proved.append(assert_true(case.to(device)).proved)
    share = torch.cat(proved).float().mean()
    assert 0.2 < share < 0.7


@pytest.mark.parametrize("dtype", DTYPES, ids=short_name)
@pytest.mark.parametrize("exponent", [-120, -30, 0, 30, 98, 120])
def test_no_key_exceeds_its_ball(dtype: torch.dtype, exponent: int, device: str) -> None:
    """The bound of every ball against the scores of its keys, over packed segments."""
    edges = [0, 77, 77, 200, 512]
    scale = torch.full((512,), 2.0**exponent)
    case = line(1, dtype, edges).replace(k_scale=scale).to(device)
    balls = bounds.make_balls(case.k, case.k_scale, case.cu_seqlens_k, 8)
    asked = bounds.make_queries(case.q, case.weights)
    slack = bounds.slack(case.q, asked, balls)
    for slot in range(64):
        start, end = next((a, b) for a, b in itertools.pairwise(edges) if a <= slot * 8 < b)
        first = start + (slot * 8 - start) // 8 * 8
        if first + 8 > end or balls.broken[slot + 1] > balls.broken[slot]:
            continue  # not complete, or said to be unknown
        best = best_score(case.q, case.k, case.weights, case.k_scale, first, first + 8)
        bound = best_score(asked.q, balls.keys, asked.weights, balls.scale, slot, slot + 1)
        assert (best <= bound + slack).all()
        assert (bound + slack <= 2 * best + 2.0**-90).all()
    assert (balls.broken[-1] > 0) == (exponent == 120)


def best_score(q: Tensor, k: Tensor, weights: Tensor, scale: Any, start: int, end: int) -> Tensor:
    """Return each row's best score of keys [start, end)."""
    ks, ke = (
        torch.full((len(q),), edge, dtype=torch.int32, device=q.device) for edge in (start, end)
    )
    best = hisa.flat_index(q, k, weights, k_scale=scale, ks=ks, ke=ke, topk=1, return_scores=True)
    scores: Tensor = best[1]
    return scores[:, 0]


def test_balls_lie_in_their_segments() -> None:
    """The group of each slot begins where `pool_keys` says, at every kind of edge."""
    edges = [0, 8, 8, 19, 24, 40, 61, 64]
    first = bounds._first_tokens(64, 8, 8, int32(edges), torch.device("cpu")).tolist()
    for slot in range(8):
        start = max(edge for edge in edges if edge <= slot * 8)
        assert first[slot] == start + (slot * 8 - start) // 8 * 8


def test_spectral_bound_is_one_and_helps() -> None:
    """At least the largest singular value, and less than the sum over heads for many heads."""
    q, weights = torch.randn(20, 64, 128), torch.rand(20, 64)
    asked = bounds.make_queries(q, weights)
    scaled = q.double() * weights.double().sqrt()[:, :, None]
    true = torch.linalg.matrix_norm(scaled, 2) * weights.double().sum(1).sqrt()
    steepest = asked.weights[:, -1].double()
    assert (steepest >= true).all() and (steepest < 2 * true).all()
    assert (steepest < 0.5 * asked.reach).all()


def test_chunks_change_nothing(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows and keys a few at a time."""
    case = clusters(1, torch.bfloat16, 0.01, cu_seqlens_k=int32([0, 100, 512])).to(device)
    whole = hisa.certify(case.q, case.k, case.weights, **arguments(case))
    monkeypatch.setattr(proof, "CHUNK_BYTES", 20000)
    monkeypatch.setattr(bounds, "CHUNK_BYTES", 5000)
    parts = hisa.certify(case.q, case.k, case.weights, **arguments(case))
    for name in ("indices", "scores", "proved", "margin"):
        assert same_bytes(getattr(whole, name), getattr(parts, name))


def test_every_size_of_blocks_and_balls(device: str) -> None:
    """Balls as large as a block, or a part of it."""
    case = clusters(4, torch.float32, 0.01, keys=4096)
    for block_size in (8, 64, 256):
        for bound_size in (8, 64, 256):
            if bound_size <= block_size:
                sizes = {"block_size": block_size, "block_topk": 4, "topk": 9}
                assert_true(case.replace(**sizes).to(device), bound_size=bound_size)


def test_default_size_of_balls(device: str) -> None:
    """64 keys share a bound, or a block where that has fewer."""
    case = clusters(4, torch.float32, 0.01, keys=4096).to(device)
    for block_size, used in ((8, 8), (32, 32), (64, 64), (256, 64)):
        sizes = {"block_size": block_size, "block_topk": 4}
        given, chosen = (
            hisa.certify(case.q, case.k, case.weights, **arguments(case, **sizes, bound_size=size))
            for size in (None, used)
        )
        assert same_bytes(given.margin, chosen.margin)


def test_two_blocks(device: str) -> None:
    """With block_topk = 2 no block between the first and the last is kept."""
    assert_true(clusters(5, torch.float16, 0.01, block_topk=2).to(device))


def test_no_rows_no_keys_and_empty_windows(device: str) -> None:
    """Empty calls have an answer."""
    case = random_case(2, torch.float32).replace(cu_seqlens_k=None)
    none = int32([0] * 6)
    assert assert_true(case.replace(ks=none, ke=none).to(device)).proved.all()
    keys = case.replace(k=case.k[:0], k_scale=None, ks=None, ke=None)
    assert assert_true(keys.to(device)).proved.all()
    rows = case.rows([]).replace(ks=None, ke=None)
    assert assert_true(rows.to(device)).proved.shape == (0,)


@pytest.mark.parametrize(
    ("dtype", "capability", "kernel", "want"),
    [
        (FP8, (9, 0), "cuda/mma-64x128", -22),
        (FP8, (9, 0), "cuda/wgmma-64x128", -12),
        (FP8, (8, 9), "cuda/mma-64x128", -12),
        (FP8, (12, 1), "cuda/mma-64x128", -12),
        (FP8, (10, 0), "cuda/mma-64x128", -22),
        (torch.bfloat16, (9, 0), "cuda/wgmma-64x128", -22),
        (torch.bfloat16, (8, 9), "cuda/mma-64x128", -22),
    ],
)
def test_few_bits_are_known(
    dtype: torch.dtype,
    capability: tuple[int, int],
    kernel: str,
    want: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Products of fp8 itself are rounded coarsely, and a proof allows for it."""
    q: Any = SimpleNamespace(dtype=dtype, device=torch.device("cuda"), shape=(5, 64, 128))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    plan = SimpleNamespace(kernels={"flat": kernel})
    monkeypatch.setattr(bounds, "plan", lambda *_, **__: plan)
    assert bounds.dot_roundoff(q) == 2.0**want
