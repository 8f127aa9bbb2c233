"""The examples that are scripts run to their end, on whatever device there is."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from tests.families import usable_cuda

pytestmark = [pytest.mark.gpu] if usable_cuda() else []  # where they run on one
EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.mark.skipif(not EXAMPLES.exists(), reason="the examples are not part of a distribution")
def test_paged_decode(capsys: pytest.CaptureFixture[str]) -> None:
    """A shared prompt takes pages once; drafts are kept or forgotten by lengths alone."""
    runpy.run_path(str(EXAMPLES / "paged_decode.py"), run_name="__main__")
    shown = capsys.readouterr().out
    assert "share 66 pages" in shown  # 62 full ones and four copies of the last
    assert "[4018, 4018, 4018, 4018] tokens" in shown  # 12 steps of two drafts, 6 rejected
