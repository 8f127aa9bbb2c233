"""What a seeded bug is, and which tests look for some of them."""

from __future__ import annotations

from typing import NamedTuple


class Mutant(NamedTuple):
    """One seeded bug."""

    name: str
    file: str  # below csrc/
    old: str
    new: str
    times: int = 1  # how often `old` occurs; all are replaced
    tests: tuple[str, ...] = ()  # what pytest is given instead of the usual tests


def mutated(mutant: Mutant, text: str) -> str:
    """Return a source file's text with the bug in it; ValueError if the text has moved on."""
    found = text.count(mutant.old)
    if found != mutant.times:
        raise ValueError(f"{mutant.name}: {mutant.old!r} occurs {found} times in {mutant.file}")
    return text.replace(mutant.old, mutant.new)


PAGED = ("tests/test_paged.py", "tests/test_paged_lifetime.py", "tests/test_paged_layout.py",
         "tests/test_paged_calls.py")  # fmt: skip
