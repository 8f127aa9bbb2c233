"""How much of the flat indexer's selection the hierarchical one finds, on your own tensors."""

from __future__ import annotations

from .comparing import compare
from .report import Comparison, Setting, Statistics, Summary

__all__ = ["Comparison", "Setting", "Statistics", "Summary", "compare"]
