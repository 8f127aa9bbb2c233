"""Runs both indexers over the same tensors, a few rows at a time."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor

from hisa.checking import check_inputs
from hisa.ops import flat_index, index, pool_keys
from hisa.windows import clamp_windows

from .measures import Measures, measure
from .report import Comparison, Setting

CHUNK_BYTES = 256 * 2**20  # of selections and what is computed from them, at a time
SLOT_BYTES = 64  # of that for each selected token

OneOrMore = int | Sequence[int]
Selection = tuple[Tensor, Tensor]  # indices and scores


def compare(
    q: Tensor,
    k: Tensor,
    weights: Tensor,
    *,
    k_scale: Tensor | None = None,
    ks: Tensor | None = None,
    ke: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    block_size: OneOrMore = 128,
    block_topk: OneOrMore = 64,
    topk: int = 2048,
    pooling: str | Sequence[str] = "mean",
    progress: bool = True,
) -> Comparison:
    """Compare what `hisa.index` selects with what `hisa.flat_index` does, for every row.

    The answer to "does it pick the same tokens?" for your own queries and keys. Where one of
    `block_size`, `block_topk` and `pooling` is a sequence, every combination is compared, and flat
    runs only once.

        comparison = hisa.compare(q, k, weights, ks=ks, ke=ke, block_topk=[32, 64, 128])
        print(comparison)  # or show it in Jupyter, .to_pandas(), .plot()

    Rows whose window meets at most `block_topk` blocks agree by construction; longer contexts are
    where it matters, so the report is by context length.

    Args:
        q, k, weights, k_scale, ks, ke, cu_seqlens_k, topk: as for `hisa.index`. `topk` is at most
            the smallest `block_topk * block_size`.
        block_size, block_topk, pooling: one value, or several.
        progress: show a progress bar, if tqdm is installed and it takes more than two seconds.

    Returns:
        A `Comparison`: for each row and setting recall, IoU, score mass and the best rank that was
        missed, with summaries of them.

    Raises:
        TypeError, ValueError: what `hisa.index` would raise for one of the settings.

    Cost: flat twice (once for the lowest score of each window), and hisa once per setting. Memory:
    16 bytes per row and setting, and 256 MiB at most for the rows at hand, beside what the
    operators take.
    """
    return compare_settings(
        q,
        k,
        weights,
        k_scale=k_scale,
        ks=ks,
        ke=ke,
        cu_seqlens_k=cu_seqlens_k,
        settings=combine(block_size, block_topk, pooling),
        topk=topk,
        progress=progress,
    )


def compare_settings(
    q: Tensor,
    k: Tensor,
    weights: Tensor,
    *,
    k_scale: Tensor | None,
    ks: Tensor | None,
    ke: Tensor | None,
    cu_seqlens_k: Tensor | None,
    settings: tuple[Setting, ...],
    topk: int,
    progress: bool,
) -> Comparison:
    """Compare as `compare` does, under just these settings."""
    for setting in settings:
        sizes = (setting.block_size, setting.block_topk, topk, setting.pooling)
        check_inputs(q, k, weights, k_scale, ks, ke, cu_seqlens_k, None, *sizes)
    start, end, _ = clamp_windows(
        ks, ke, cu_seqlens_k, rows=q.shape[0], keys=k.shape[0], device=k.device
    )
    pooled = {
        (s.block_size, s.pooling): pool_keys(
            k,
            k_scale=k_scale,
            cu_seqlens_k=cu_seqlens_k,
            block_size=s.block_size,
            pooling=s.pooling,
        )
        for s in settings
    }

    found: list[list[Measures]] = [[] for _ in settings]
    rows = rows_at_a_time(topk)
    chunks = [slice(first, first + rows) for first in range(0, q.shape[0], rows)]
    with progress_bar("hisa.compare", len(chunks) * (2 + len(settings)), progress) as step:
        for at in chunks:
            row = {"k_scale": k_scale, "ks": start[at], "ke": end[at]}
            flat = select_flat(q[at], k, weights[at], row, topk)
            step()
            lowest = find_lowest(q[at], k, weights[at], row)
            step()
            for setting, measures in zip(settings, found, strict=True):
                chosen = index(
                    q[at],
                    k,
                    weights[at],
                    k_scale=k_scale,
                    ks=start[at],
                    ke=end[at],
                    cu_seqlens_k=cu_seqlens_k,
                    pooled=pooled[setting.block_size, setting.pooling],
                    block_size=setting.block_size,
                    block_topk=setting.block_topk,
                    topk=topk,
                    return_scores=True,
                )
                measures.append(measure(flat, cast(Selection, chosen), lowest))
                step()
    return Comparison(
        settings=settings,
        topk=topk,
        context=(end - start).clamp(min=0).cpu(),
        **{name: _gather(found, name) for name in Measures._fields},
    )


def combine(
    block_size: OneOrMore, block_topk: OneOrMore, pooling: str | Sequence[str]
) -> tuple[Setting, ...]:
    """Return every combination."""
    sizes = [block_size] if isinstance(block_size, int) else list(block_size)
    budgets = [block_topk] if isinstance(block_topk, int) else list(block_topk)
    poolings = [pooling] if isinstance(pooling, str) else list(pooling)
    for name, values in (("block_size", sizes), ("block_topk", budgets), ("pooling", poolings)):
        if not values:
            raise ValueError(f"{name}: expected one value or several, got none")
    return tuple(itertools.starmap(Setting, itertools.product(sizes, budgets, poolings)))


def rows_at_a_time(topk: int) -> int:
    """Return how many rows to compare together."""
    return max(1, CHUNK_BYTES // (SLOT_BYTES * topk))


def select_flat(
    q: Tensor, k: Tensor, weights: Tensor, row: dict[str, Tensor | None], topk: int
) -> Selection:
    """Select by the flat indexer; `row` is its `k_scale`, `ks` and `ke`."""
    return cast(Selection, flat_index(q, k, weights, **row, topk=topk, return_scores=True))


def find_lowest(q: Tensor, k: Tensor, weights: Tensor, row: dict[str, Tensor | None]) -> Tensor:
    """Return the lowest score in each row's window, `[M]`: the highest for opposite weights."""
    return -select_flat(q, k, -weights, row, 1)[1][:, 0]


def _gather(found: list[list[Measures]], name: str) -> Tensor:
    """Put the chunks of each setting together: `[settings, M]` on the CPU."""
    columns = [[getattr(measures, name).cpu() for measures in chunks] for chunks in found]
    dtype = torch.int32 if name == "worst_miss" else torch.float32
    none = torch.empty(0, dtype=dtype, device="cpu")
    return torch.stack([torch.cat(c) if c else none for c in columns])


@contextmanager
def progress_bar(title: str, steps: int, wanted: bool) -> Iterator[Callable[[], object]]:
    """Show a bar; the caller reports each step."""
    if wanted:
        try:
            from tqdm.auto import tqdm
        except ImportError:
            wanted = False
    if not wanted:
        yield lambda: None
        return
    with tqdm(total=steps, desc=title, unit="step", delay=2, leave=False) as bar:
        yield lambda: bar.update()
