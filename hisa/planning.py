"""What a call would run, need and cost, without running it."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import torch

from . import _extension


@dataclass(frozen=True)
class Plan:
    """What `hisa.plan` found out.

    Attributes:
        kernels: for each stage that runs, the kernel family that runs it, such as "cpu/avx2".
        workspace_bytes: memory that the call takes beside inputs and outputs, and returns.
        output_bytes: memory of the results.
        operations: for each stage that runs, at most this many multiply-adds (for pool: additions).
    """

    kernels: dict[str, str]
    workspace_bytes: int
    output_bytes: int
    operations: dict[str, int]

    def __str__(self) -> str:
        """Return one line per stage, then the memory."""
        width = max((len(kernel) for kernel in self.kernels.values()), default=0)
        lines = [
            f"{stage:<8}{kernel:<{width + 2}}{self.operations[stage]:>22,} operations"
            for stage, kernel in self.kernels.items()
        ]
        lines.append(f"workspace {self.workspace_bytes / 2**20:,.1f} MiB")
        lines.append(f"output    {self.output_bytes / 2**20:,.1f} MiB")
        return "\n".join(lines)


def plan(
    M: int,
    N: int,
    H: int,
    D: int,
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    op: str = "index",
    block_size: int = 128,
    block_topk: int = 64,
    topk: int = 2048,
    pooled: bool = False,
    causal: bool = False,
    return_scores: bool = False,
) -> Plan:
    """Say which kernels a call runs, how much workspace it takes and how many operations.

    The workspace is what the call allocates, for contiguous inputs and the number of threads that
    torch uses now. On the CPU it is

        threads * (rows * (H * D * 4 + selector * 8 + block_topk * 8) + 128 * (D + 1) * 4
                   + selector * 8) + pooled keys

    with at most 16 rows, and a selector of at most `2 * topk + 256` keys: independent of M, and of
    N but for the pooled keys. On CUDA it is the pooled keys alone, as long as a row's candidates
    fit in shared memory (at 228 KiB a multiprocessor, up to `topk` 16,384 in any case); beyond,

        rows * 4 * (12704 + 4 * max(topk, block_topk) + block_topk) + pooled keys

    at most, with two rows per multiprocessor or as many as take 256 MiB, but at least one. Pruned
    calls of few rows, up to one per multiprocessor, share out a row's candidates and collect their
    scores,

        M * 4 * (max(ceil(N / block_size), block_topk * block_size) + block_topk + 64) + pooled keys

    with the first two terms of the sum rounded up to multiples of 4, unless that is more than
    32 MiB. The kernels for Hopper, of fp8 and bf16, list the kept
    blocks, `4 * M * block_topk` bytes more, and leave less room in shared memory: for 64 heads of
    128 channels up to `topk` 2048.

    Args:
        M, N, H, D: queries, keys, heads, head dimension.
        dtype: of q and k.
        device: where the tensors would be.
        op: "index" or "flat_index".
        block_size, block_topk, topk, return_scores: as in `hisa.index`.
        pooled: whether pooled keys are given.
        causal: count operations for windows `[0, N - M + m + 1)` instead of `[0, N)`.

    Raises:
        TypeError, ValueError: the call would raise, or this build has no kernels for the device.
    """
    module = _extension.require()
    where = torch.device(device)
    if where.type not in ("cpu", "cuda"):
        raise ValueError(f"device: expected cpu or cuda, got {device}")
    if op not in ("index", "flat_index"):
        raise ValueError(f'op: expected "index" or "flat_index", got "{op}"')
    flat = op == "flat_index"
    guarded = where.type == "cuda" and module.build_info()["cuda"]
    with torch.cuda.device(where) if guarded else nullcontext():
        found = module.plan(
            where.type == "cuda",
            M,
            N,
            H,
            D,
            dtype,
            topk,
            flat,
            block_size,
            block_topk,
            pooled,
            causal,
            torch.get_num_threads(),
        )
    # Pooling adds D channels per key, every other stage multiplies H * D.
    operations = {stage: keys * (D if stage == "pool" else H * D) for stage, keys in found["keys"]}
    return Plan(
        kernels=dict.fromkeys(operations, found["kernels"]),
        workspace_bytes=found["workspace"],
        output_bytes=M * topk * (8 if return_scores else 4),
        operations=operations,
    )
