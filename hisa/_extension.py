"""Loads the compiled extension, or keeps the reason why it is not there until someone needs it."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

import torch  # noqa: F401  # its libraries have to be loaded before the extension's

_module: ModuleType | None = None
_reason: ImportError | None = None
try:
    _module = import_module("hisa._C")  # registers torch.ops.hisa.*
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
        raise RuntimeError(
            "hisa's compiled extension cannot be loaded. Build it against the installed torch with "
            "`pip install --no-build-isolation .` in hisa's source folder. "
            f"The import said: {_reason}"
        ) from _reason
    return _module
