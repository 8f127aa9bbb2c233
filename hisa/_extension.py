"""Loads the compiled extension, or keeps the reason why it is not there until someone needs it."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from types import ModuleType

import torch  # its libraries have to be loaded before the extension's

_module: ModuleType | None = None
_reason: ImportError | None = None
try:
    _module = import_module("hisa._C")  # registers torch.ops.hisa.*
    _built_for = str(_module.build_info()["torch"])
    if not torch.__version__.startswith(_built_for):
        _module = None
        raise ImportError(f"it was built against torch {_built_for}, this is {torch.__version__}")
except ImportError as error:
    _reason = error


def available() -> bool:
    """Whether the compiled operators can be used."""
    return _module is not None


def require() -> ModuleType:
    """Return `hisa._C`.

    Raises:
        RuntimeError: it is not built, or was built against another torch; says what to run.
    """
    if _module is None:
        source = Path(__file__).parent.parent
        hint = (
            f" This is the source folder {source}; what is installed elsewhere is found from any "
            "other folder, or after `make build` here."
            if (source / "setup.py").exists()
            else ""
        )
        raise RuntimeError(
            "hisa's compiled extension cannot be loaded. Build it against the installed torch with "
            f"`pip install --no-build-isolation .` in hisa's source folder.{hint} "
            f"The import said: {_reason}"
        ) from _reason
    return _module
