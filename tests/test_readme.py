"""The Python blocks of README.md run as they stand, and its table is that of the results."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks import summary

README = Path(__file__).parent.parent / "README.md"
RESULTS = README.parent / "benchmarks" / "results"
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


@pytest.mark.seconds(180)
@pytest.mark.skipif(not README.exists(), reason="there is no README.md yet")
def test_snippets_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader who pastes the blocks one after the other sees no error."""
    monkeypatch.chdir(tmp_path)
    text = README.read_text()
    blocks = list(BLOCK.finditer(text))
    assert blocks, "README.md has no Python blocks"
    namespace: dict[str, object] = {"__name__": "readme"}
    for block in blocks:
        line = text[: block.start(1)].count("\n")
        exec(compile("\n" * line + block.group(1), str(README), "exec"), namespace)


@pytest.mark.skipif(not RESULTS.exists(), reason="the results are not part of a distribution")
def test_the_table_is_that_of_the_results() -> None:
    """The figures in README.md are the committed ones."""
    assert summary.summary(RESULTS) in README.read_text()
