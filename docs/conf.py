"""Sphinx's settings. `make docs` builds the site, with warnings as errors."""

from __future__ import annotations

from typing import Any

from hisa import __version__

project = "hisa"
release = __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
html_theme = "furo"
html_title = f"hisa {release}"
exclude_patterns = ["_build"]

default_role = "code"  # docstrings write names in single backticks
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the signatures have them
python_use_unqualified_type_names = True
napoleon_use_rtype = False
napoleon_use_param = False
myst_heading_anchors = 2


def mark_code(*event: Any) -> None:
    """Make an indented block behind a paragraph of a docstring a block of code."""
    lines = event[-1]
    marked: list[str] = []
    for line in lines:
        paragraph = len(marked) > 1 and marked[-1] == "" and marked[-2][:1].strip()
        if line.startswith("    ") and paragraph:
            marked += ["::", ""]
        marked.append(line)
    lines[:] = marked


def setup(app: Any) -> None:
    """Run before napoleon does."""
    app.connect("autodoc-process-docstring", mark_code, priority=400)
