"""T15: the seeded bugs of `python -m tests.mutants`, which runs the suite on each, still apply."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.mutants.catalogue import CUDA_MUTANTS, MUTANTS, Mutant, mutated

CSRC = Path(__file__).parent.parent / "csrc"


@pytest.mark.parametrize("mutant", [*MUTANTS, *CUDA_MUTANTS], ids=lambda mutant: mutant.name)
def test_still_applies(mutant: Mutant) -> None:
    """The catalogue follows the sources."""
    mutated(mutant, (CSRC / mutant.file).read_text())
