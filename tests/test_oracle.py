"""The tools of this suite: number formats, oracle, checker. A blind oracle proves nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests import oracle
from tests.builders import exact_case, random_case
from tests.families import FAMILIES, REFERENCE
from tests.numeric import DTYPES, E4M3, FP8, decode, fma, round_to, short_name


def test_e4m3_table_is_the_format() -> None:
    """All 256 bytes decode as torch decodes them."""
    want = torch.arange(256, dtype=torch.uint8).view(FP8).float().numpy()
    assert np.array_equal(E4M3, want, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=short_name)
def test_rounding_agrees_with_torch(dtype: torch.dtype) -> None:
    """Our rounding equals torch's cast: on random values and on every midpoint of e4m3."""
    values = [torch.randn(20000) * 10.0**e for e in range(-9, 3)]
    midpoints = torch.from_numpy(np.sort(E4M3[:127]))
    values += [
        (midpoints[1:] + midpoints[:-1]) / 2,
        -midpoints,
        torch.tensor([torch.nan, 0.0, -0.0]),
    ]
    x = torch.cat(values).clamp(-448, 448)
    assert np.array_equal(round_to(dtype, x.numpy()), x.to(dtype).float().numpy(), equal_nan=True)


def test_fma_rounds_once() -> None:
    """The emulated fma equals exact rational arithmetic, in cases where rounding twice is wrong."""
    from fractions import Fraction

    rng = np.random.default_rng(0)
    a, b, c = (rng.standard_normal(3000).astype(np.float32) for _ in range(3))
    c[:1000] *= np.float32(2.0**-20)
    c[1000:2000] = -(a * b)[1000:2000]
    a[2900:], b[2900:] = np.float32(1 + 2.0**-23), np.float32(1 + 2.0**-12)
    got = fma(a, b, c)
    for x, y, z, value in zip(a, b, c, got, strict=True):
        exact = Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z))
        error = abs(exact - Fraction(float(value)))
        for side in (np.inf, -np.inf):
            other = np.nextafter(value, np.float32(side))
            assert error <= abs(exact - Fraction(float(other)))


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
def test_the_reference_has_no_defaults(default: torch.dtype) -> None:
    """It computes in fp32 whatever torch's default dtype is."""
    case = random_case(3, torch.float32)
    want, pooled = REFERENCE.index(case), REFERENCE.pool_keys(case)
    torch.set_default_dtype(default)
    try:
        got, again = REFERENCE.index(case), REFERENCE.pool_keys(case)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(got.indices, want.indices) and torch.equal(got.scores, want.scores)
    assert torch.equal(again[0], pooled[0]) and torch.equal(again[1], pooled[1])


def test_both_scores_agree_on_exact_inputs() -> None:
    """On inputs that the builder calls exact, the order of the sums does not matter."""
    for seed in range(40):
        case = exact_case(seed, budget=2e5)
        a, b = oracle.index(case), oracle.index(case, oracle.ieee_score)
        assert np.array_equal(a.indices, b.indices) and np.array_equal(a.scores, b.scores)


def test_fuzz_reaches_what_it_claims() -> None:
    """The T1 builder makes pruned rows, ties at the threshold, every dtype, every block size."""
    seen = {"rows": 0, "pruned": 0, "tied": 0}
    kinds = set()
    for seed in range(250):
        case = exact_case(seed)
        expected, wide = oracle.index(case), oracle.index(case.replace(topk=case.topk + 1))
        kinds |= {case.q.dtype, case.block_size, case.pooling}
        for row in range(case.q.shape[0]):
            window = oracle.window(case, row)
            if window is None:
                continue
            seen["rows"] += 1
            seen["pruned"] += len(oracle.candidates(case, window)) > case.block_topk
            lowest, more = expected.scores[row].min(), np.sort(wide.scores[row])[0]
            seen["tied"] += bool(lowest == more and lowest > -np.inf)
    assert len(kinds) == 4 + 6 + 2
    assert seen["pruned"] > 0.3 * seen["rows"] and seen["tied"] > 0.1 * seen["rows"], seen


def test_oracle_by_hand() -> None:
    """A call small enough to work out on paper.

    10 tokens, B = 8: block 0 is complete, block 1 is cut. One head, q = e0: the score is the key's
    first channel if positive. k = 3 of [1, 5, 0, 5, 2, 0, 0, 5 | 5, 1]: four fives tie for three
    places, so the lowest three win.
    """
    k = torch.zeros(10, 16)
    k[:, 0] = torch.tensor([1.0, 5, 0, 5, 2, 0, 0, 5, 5, 1])
    q = torch.zeros(1, 1, 16)
    q[0, 0, 0] = 1
    case = random_case(0, torch.float32).replace(q=q, k=k, weights=torch.ones(1, 1), topk=3)
    assert oracle.index(case).indices.tolist() == [[1, 3, 7]]
    assert oracle.index(case).kept == [[0, 8]]
    pooled, scale, used = oracle.pool_keys(case)
    assert pooled[:, 0].tolist() == [18 / 8, 0] and scale.tolist() == [1, 1]
    assert used.tolist() == [True, False]
    assert decode(k)[3, 0] == 5


def test_what_needs_a_gpu_can_be_collected() -> None:
    """On a machine without one too, else a mistake in a file keeps its tests from running there."""
    names = ",".join(family.name for family in FAMILIES if family.device == "cuda")
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only", "-m", "gpu or long"]
    command += ["-p", "no:cacheprovider", "--families", names, "tests"]
    root = Path(__file__).parent.parent
    run = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-3000:]
