"""T1: fuzz on inputs where fp32 is exact, against the NumPy oracle, bit for bit.

Small integers, power-of-two scales and integer weights leave no rounding to argue about and produce
many exact ties, so every family must give the same indices and scores. Catches lost candidates,
broken ties, ignored windows or scales, wrong block tiling, wrong pooled slots, short outputs.

A failure prints a command that repeats it; the shrunk call is saved to a file that
`tests.shrink.load` reads.
"""

from __future__ import annotations

import pytest

from tests import oracle
from tests.builders import exact_case
from tests.case import Case
from tests.checker import assert_same
from tests.families import Family
from tests.numeric import decode
from tests.shrink import save, shrink

BATCH = 25  # configurations per test
FAST, LONG = 500, 20000


def compare(family: Family, case: Case) -> None:
    """Compare every op on one call with the oracle."""
    expected = oracle.index(case)
    assert_same(family.index(case), expected)
    assert_same(family.flat_index(case), oracle.flat_index(case))
    pooled = family.pool_keys(case)
    want, want_scale, _ = oracle.pool_keys(case)
    assert (decode(pooled[0]) == want).all(), "pooled keys differ"
    assert (pooled[1].numpy() == want_scale).all(), "pooled scales differ"
    assert_same(family.index(case, pooled=pooled), expected, "with pooled keys given")


def fails(family: Family, case: Case) -> bool:
    """Say whether a call is answered wrongly."""
    try:
        compare(family, case)
    except Exception:
        return True
    return False


def fuzz(family: Family, seeds: range) -> None:
    """Compare a range of seeds; report the first failure so that it can be repeated."""
    for seed in seeds:
        case = exact_case(seed)
        try:
            compare(family, case)
        except Exception as error:
            small = shrink(case, lambda smaller: fails(family, smaller))
            pytest.fail(
                f"seed {seed}: {case.describe()}\n{error}\n"
                f"repeat: pytest -n0 tests/test_t01_exact_fuzz.py -k exact_fuzz "
                f"--families {family.name} --fuzz-seed {seed}\n"
                f"shrunk: {small.describe()}\n"
                f"saved:  {save(small, f'seed{seed}')} (tests.shrink.load reads it)"
            )


@pytest.mark.parametrize("start", range(0, FAST, BATCH))
def test_exact_fuzz(any_family: Family, start: int, request: pytest.FixtureRequest) -> None:
    """500 configurations on each kernel family; the reference, which is slow, takes every fifth."""
    only = request.config.getoption("--fuzz-seed")
    if only is not None:
        seeds = range(only, only + (start == 0))
    else:
        seeds = range(start, start + BATCH, 5 if any_family.name == "reference" else 1)
    fuzz(any_family, seeds)


@pytest.mark.long
@pytest.mark.parametrize("start", range(FAST, LONG, 20 * BATCH))
def test_exact_fuzz_long(family: Family, start: int) -> None:
    """20,000 configurations."""
    fuzz(family, range(start, start + 20 * BATCH))
