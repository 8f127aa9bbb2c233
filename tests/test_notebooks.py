"""The notebooks in examples run from top to bottom, show pictures, and are kept without outputs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

import hisa

EXAMPLES = Path(__file__).parent.parent / "examples"
NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))
CELL_SECONDS = 120

nbformat = pytest.importorskip("nbformat", reason="nbclient is not installed")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

every_notebook = pytest.mark.parametrize(
    "path", [pytest.param(path, id=path.stem) for path in NOTEBOOKS]
)


def read(path: Path) -> Any:
    return nbformat.read(path, as_version=4)


def code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_there_are_notebooks() -> None:
    assert len(NOTEBOOKS) >= 2


@every_notebook
def test_outputs_are_not_kept(path: Path) -> None:
    """A diff shows what somebody wrote, and nothing of the machine that it ran on."""
    notebook = read(path)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    for cell in code_cells(notebook):
        assert not cell.outputs and cell.execution_count is None, cell.source


@pytest.mark.seconds(240)
@every_notebook
def test_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From top to bottom, in an empty folder, with the hisa that is tested."""
    pytest.importorskip("matplotlib")
    pytest.importorskip("transformers")
    folders = [str(Path(hisa.__file__).parent.parent), os.environ.get("PYTHONPATH")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, folders)))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "runtime"))

    notebook = read(path)
    work = tmp_path / "work"
    work.mkdir()
    where = {"metadata": {"path": str(work)}}
    nbclient.NotebookClient(notebook, timeout=CELL_SECONDS, resources=where).execute()

    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not list(work.iterdir())
