"""Tables as text and HTML, and libraries that only pictures and tables need."""

from __future__ import annotations

import html
from collections.abc import Sequence
from importlib import import_module
from typing import Any

Table = Sequence[Sequence[str]]  # the header first


def text_table(table: Table) -> list[str]:
    """Return the lines of a table, its columns aligned to the right."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return [
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in table
    ]


def html_table(table: Table) -> str:
    """Return a table for Jupyter."""
    tags = ["th", *["td"] * (len(table) - 1)]
    return f"<table>{''.join(map(_html_row, tags, table))}</table>"


def _html_row(tag: str, cells: Sequence[str]) -> str:
    return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"


def optional(name: str) -> Any:
    """Import a library that only pictures and tables need.

    Raises:
        ImportError: it is not installed; says how to get it.
    """
    try:
        return import_module(name)
    except ImportError as error:
        library = name.split(".")[0]
        raise ImportError(
            f"{library} is not installed; `pip install hisa-indexer[plot]` brings it"
        ) from error
