"""T15: the seeded bugs of `python -m tests.mutants`, which runs the suite on each, still apply."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.mutants.catalogue import MUTANTS
from tests.mutants.catalogue_cuda import CUDA_MUTANTS
from tests.mutants.catalogue_hopper import HOPPER_MUTANTS
from tests.mutants.mutant import Mutant, mutated

CSRC = Path(__file__).parent.parent / "csrc"


@pytest.mark.parametrize(
    "mutant", [*MUTANTS, *CUDA_MUTANTS, *HOPPER_MUTANTS], ids=lambda mutant: mutant.name
)
def test_still_applies(mutant: Mutant) -> None:
    """The catalogue follows the sources."""
    mutated(mutant, (CSRC / mutant.file).read_text())
