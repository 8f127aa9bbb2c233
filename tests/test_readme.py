"""The Python blocks of README.md and of a page run as they stand; the table is the results'."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks import summary

README = Path(__file__).parent.parent / "README.md"
WRAPPING = README.parent / "docs" / "wrapping.md"
RESULTS = README.parent / "benchmarks" / "results"
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


@pytest.mark.seconds(180)
@pytest.mark.parametrize("page", [README, WRAPPING], ids=lambda page: str(page.name))
def test_snippets_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader who pastes the blocks one after the other sees no error."""
    if not page.exists():
        pytest.skip(f"{page.name} is not part of a distribution")
    monkeypatch.chdir(tmp_path)
    text = page.read_text()
    blocks = list(BLOCK.finditer(text))
    assert blocks, f"{page.name} has no Python blocks"
    namespace: dict[str, object] = {"__name__": "readme"}
    for block in blocks:
        line = text[: block.start(1)].count("\n")
        exec(compile("\n" * line + block.group(1), str(page), "exec"), namespace)


@pytest.mark.skipif(not RESULTS.exists(), reason="the results are not part of a distribution")
def test_the_table_is_that_of_the_results() -> None:
    """The figures in README.md are the committed ones."""
    assert summary.summary(RESULTS) in README.read_text()
