"""HISA: hierarchical indexing for DeepSeek Sparse Attention.

`hisa.index` selects, for every query, the tokens that sparse attention then looks at: first blocks,
by one pooled key each, then tokens inside the kept blocks, exactly. `hisa.patch` drops it into a
Hugging Face model. The method: arXiv 2603.28458. The definition: `hisa.reference`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from . import _extension, reference, reference_paged
from ._version import __version__
from .agreement import Comparison, Explanation, Recommendation, compare, explain, recommend
from .certificate import Certificate, ExactSelection, certify, exact_index
from .checking import check
from .cost import ExactCost
from .module import HierarchicalIndexer
from .ops import flat_index, index, pool_keys
from .paged import paged_index, paged_pool
from .planning import Plan, plan
from .pooled import PooledKeys
from .quantize import quantize_fp8
from .windows import causal_windows

if TYPE_CHECKING:
    from .hf import PatchHandle, capture, load_capture, patch

__all__ = [
    "Certificate",
    "Comparison",
    "ExactCost",
    "ExactSelection",
    "Explanation",
    "HierarchicalIndexer",
    "PatchHandle",
    "Plan",
    "PooledKeys",
    "Recommendation",
    "__version__",
    "build_info",
    "capture",
    "causal_windows",
    "certify",
    "check",
    "compare",
    "exact_index",
    "explain",
    "flat_index",
    "index",
    "load_capture",
    "paged_index",
    "paged_pool",
    "patch",
    "plan",
    "pool_keys",
    "quantize_fp8",
    "recommend",
    "reference",
    "reference_paged",
]


def build_info() -> dict[str, object]:
    """Say what the compiled extension is: compiler, torch, CUDA or not, CPU kernels, limits.

    Raises:
        RuntimeError: the extension is not built; says what to run.
    """
    return dict(_extension.require().build_info())


def __getattr__(name: str) -> object:
    """Import what is for Hugging Face models when it is first asked for."""
    if name in ("patch", "PatchHandle", "capture", "load_capture"):
        from . import hf

        return getattr(hf, name)
    raise AttributeError(f"module 'hisa' has no attribute {name!r}")
