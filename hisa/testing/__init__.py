"""Checks for the tests of your own integration, and inputs to feed it.

    inputs = hisa.testing.random_inputs(0, M=64, N=1000, dtype=torch.bfloat16)
    indices = my_indexer(**inputs, topk=256)
    hisa.testing.assert_matches_flat(indices, **inputs)

`import hisa` does not import this module; `import hisa.testing` does.
"""

from __future__ import annotations

from .flat import assert_matches_flat
from .form import assert_valid_indices, to_selection
from .inputs import Inputs, PackedInputs, exact_inputs, needle_inputs, packed_inputs, random_inputs

__all__ = [
    "Inputs",
    "PackedInputs",
    "assert_matches_flat",
    "assert_valid_indices",
    "exact_inputs",
    "needle_inputs",
    "packed_inputs",
    "random_inputs",
    "to_selection",
]
