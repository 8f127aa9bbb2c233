"""How much of the flat indexer's selection the hierarchical one finds, and why not all of it."""

from __future__ import annotations

from .comparing import compare
from .explaining import explain
from .explanation import Block, Explanation, Lost
from .layers import LayerReport
from .report import Comparison, Setting, Statistics, Summary

__all__ = [
    "Block",
    "Comparison",
    "Explanation",
    "LayerReport",
    "Lost",
    "Setting",
    "Statistics",
    "Summary",
    "compare",
    "explain",
]
