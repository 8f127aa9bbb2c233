"""What `cuda_profile` runs under ncu: every call of cuda_hopper's table once, after a first one.

In front of each stands a kernel that none of them has, MARK. `python -m benchmarks.profiled`
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict

import torch

from benchmarks.cases import cuda_hopper
from hisa.around import complete

MARK = "complete_kernel"


def profiled(quick: bool) -> Sequence[cuda_hopper.Row]:
    """Return what is profiled, in order."""
    short = [row for row in cuda_hopper.TABLE if row.shape.rows == 1024]
    return short if quick else cuda_hopper.TABLE


def main() -> None:
    """Run the calls; ncu looks only between start and stop."""
    row = torch.full((1, 1), -1, dtype=torch.int32, device=cuda_hopper.DEVICE)
    start, end = torch.tensor([[0], [1]], dtype=torch.int32, device=cuda_hopper.DEVICE)
    runtime = torch.cuda.cudart()
    for wanted in profiled("--quick" in sys.argv):
        call = cuda_hopper.build(wanted.peer, **asdict(wanted.shape))
        call()
        torch.cuda.synchronize()
        runtime.cudaProfilerStart()
        complete(row, start, end, keys=1)
        call()
        torch.cuda.synchronize()
        runtime.cudaProfilerStop()


if __name__ == "__main__":
    main()
