"""T11: every CUDA kernel on small shapes, for compute-sanitizer to watch (`make sanitize-cuda`).

Compares with the oracle as well, so that a run that did nothing is not a clean one.
"""

from __future__ import annotations

import torch

from tests import oracle
from tests.builders import exact_case, int32
from tests.checker import assert_same
from tests.families import CUDA, available
from tests.numeric import DTYPES
from tests.paged import exact_paged
from tests.test_around import DTYPES as ROPE_DTYPES
from tests.test_around import SHAPES as ROPE_SHAPES
from tests.test_around import (
    test_completes_rows_of_all_lengths,
    test_turns_as_the_models_do,
)
from tests.test_cuda_dispatch import KERNELS
from tests.test_t18_mask_windows import DTYPES as MASK_DTYPES
from tests.test_t18_mask_windows import LAYOUTS, assert_right, fuzzed

# In chunks; in the workspace. Keys, topk, heads, channels: the last two for Hopper.
LAYOUTS_OF_SCORES = [
    (30000, 2048, 1, 16), (70000, 65000, 1, 16), (9000, 600, 16, 64), (20000, 9000, 16, 64),
]  # fmt: skip


def select(shapes: int) -> int:
    """Run what selects; returns the number of shapes so far."""
    for dtype in DTYPES:
        for heads, depth, _ in KERNELS:
            case = exact_case(shapes, dtype=dtype, M=3, N=260, H=heads, D=depth, B=8, topk=21,
                              block_topk=5, ke=int32([260, 133, 7]))  # fmt: skip
            assert_same(CUDA.index(case), oracle.index(case))
            assert_same(CUDA.flat_index(case), oracle.flat_index(case))
            shapes += 1
    # Hopper scores two rows together if there are enough. Of bf16 keys of 128 channels, a block of
    # threads has to have three pairs before they take turns at scores.
    for dtype, rows, heads, depth in ((torch.float8_e4m3fn, 140, 16, 64),
                                      (torch.float8_e4m3fn, 140, 32, 64),
                                      (torch.bfloat16, 800, 16, 128)):  # fmt: skip
        case = exact_case(shapes, dtype=dtype, M=rows, N=500, H=heads, D=depth, B=64,
                          topk=70, block_topk=3, pooling="max", cu_seqlens_k=None)  # fmt: skip
        assert_same(CUDA.index(case), oracle.index(case))
        shapes += 1
    for rows in (1, 9):  # Hopper splits a row over several multiprocessors
        case = exact_case(shapes, dtype=torch.float8_e4m3fn, M=rows, N=9000, H=16, D=64, B=8,
                          topk=300, block_topk=200, budget=1e9)  # fmt: skip
        assert_same(CUDA.index(case), oracle.index(case))
        shapes += 1
    for n, topk, heads, depth in LAYOUTS_OF_SCORES:
        case = exact_case(shapes, dtype=torch.bfloat16, M=1, N=n, H=heads, D=depth, topk=topk)
        assert_same(CUDA.flat_index(case), oracle.flat_index(case))
        shapes += 1
    for dtype in DTYPES:
        for heads, depth in ((16, 64), (64, 128), (3, 32)):
            for page_size in (16, 64):
                paged = exact_paged(shapes, dtype=dtype, H=heads, D=depth, B=64, topk=70,
                                    block_topk=3, page_size=page_size, next_n=2,
                                    lengths=[500, 0, 133])  # fmt: skip
                assert_same(paged.pool(CUDA).index(CUDA), oracle.index(paged.case))
                shapes += 1
    return shapes


def main() -> None:
    """Run all shapes, by every family of kernels."""
    shapes = 0
    for family in (family for family in available() if family.device == "cuda"):
        with family.active():
            shapes = select(shapes)
    for dtype in MASK_DTYPES:
        for seed, layout in enumerate(LAYOUTS.values()):
            mask = fuzzed(seed, dtype).cuda()
            assert_right(layout(mask), mask)
            shapes += 1
    for dtype in ROPE_DTYPES:
        for shape in ROPE_SHAPES:
            for interleaved in (False, True):
                test_turns_as_the_models_do("cuda", shape, dtype, interleaved)
                shapes += 1
    test_completes_rows_of_all_lengths("cuda")
    print(f"{shapes + 1} shapes right")


if __name__ == "__main__":
    main()
