"""How much of the flat indexer's selection the hierarchical one finds, and why not all of it."""

from __future__ import annotations

from .comparing import compare
from .explaining import explain
from .explanation import Block, Explanation, Lost
from .layers import LayerReport
from .recommending import Candidate, Recommendation, recommend
from .report import Comparison, Setting, Statistics, Summary

__all__ = [
    "Block",
    "Candidate",
    "Comparison",
    "Explanation",
    "LayerReport",
    "Lost",
    "Recommendation",
    "Setting",
    "Statistics",
    "Summary",
    "compare",
    "explain",
    "recommend",
]
