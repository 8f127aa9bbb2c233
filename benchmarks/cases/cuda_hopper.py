"""hisa.index and hisa.flat_index on Hopper: long prefills and chunks against goals and every peer.

The whole operation, queries and keys in, indices out: causal, D = 128, and DeepSeek-V3.2's setting,
blocks of 128, 64 of them kept, 2048 tokens selected. `queries random` are independent of each
other, the worst case for caches; `queries text` drift from row to row, so that neighbours share
most of their blocks (benchmarks/drift.py; the share is measured and printed). fp8 but where a shape
says bf16. Peers are those of cuda_prefill; TileLang and DeepGEMM take fp8 alone.

A limit is what an H200 needs for the multiply-adds at the rate of its largest matrix products, 1470
TFLOP/s in fp8 and 800 in bf16, or for `random`, where no neighbour shares a load, what L2 gives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import hisa
from benchmarks import deepgemm_peer, drift, report, speedups, tilelang_peer
from benchmarks.cases import cuda_prefill
from benchmarks.cases.cuda_prefill import DEEPGEMM, FLAT, INDEX, LOGITS, TILELANG, TOPK, TORCH
from benchmarks.harness import Bench, Measurement

DEVICE = "cuda"
OURS = (INDEX, FLAT)
FOREIGN = (TILELANG, DEEPGEMM, LOGITS)
EVERY = (*OURS, TORCH, *FOREIGN)
RUNS = 20  # at least, of a peer with a goal
LIMIT = """
What limits it, by bare kernels on an H200 and clocks read in them, H=64 but where it says
otherwise. Their launcher is not in the repository, so no command repeats these figures. Products
slow down other instructions: with 256 tensor cycles of products in flight a scheduler has room for
85 instructions of a warp; beyond that time is 0.55 of the tensor cycles plus 1.2 to 1.35 cycles an
instruction. A refine of 64K, text, has for two rows 33 thousand tensor cycles and 33 thousand
instructions of a scheduler, 20 of them to add up dot products, and takes 56 thousand cycles; ncu's
samples show scorers not selected or not dispatched most of the time, and 3 % waiting for keys.
Power: the board's 700 W bring the clock from 1.97 GHz down to 1.5 to 1.6 in a long run. Bare
products of 128 columns with the copies of their keys make 1400 TFLOP/s at 1.32 GHz, added up 1223
to 1241. Selection: with it left out 64K, text, takes 0.8 ms less, flat at 16K as much; 32 heads
wait for it for a sixth of the time.

Designs of refine, ms of 64K x 64K, text and random. One row at a time, three scoring warpgroups:
first 13.5 (random); a shorter copying loop 12.2; two halves of a tile in flight 11.3; bar by
range 10.4, three groups of queries at hand 10.1; scores in registers 8.6 and 9.6; secants 9.17
and 8.41. Two rows, common blocks with 128 columns: 9.9 and 10.7; scores in registers 9.0 and
10.4; three scorers with one product each 8.8 and 9.99; secants, fewer instructions in the
selector 7.94 and 9.07. The GPU chooses between the last of each. Heads as the A operand: a bare
kernel without selection made 742 TFLOP/s. The next product begun before the sums of the last are
stored: 35.9 for 34.0, flat without selection. 256 selecting threads: products of 128 columns do
not compile. Selection: a histogram in shared memory over the range 9.7; a sample's range, a pass
per warp 9.7; counting, in registers 9.0; what scorers mark, read by two rows at once or one after
the other, 39.7 for 41.3, flat. Whole call, text, long runs, 9.5 before: scorers that take two tiles
at a time, and relu() on two pipes, 9.2 to 9.3; products in turns, by a token from scorer to scorer,
9.6 to 9.9; sums stored during the next product, no gain; dot products rounded to bf16 and summed up
by the tensor cores, to be made exact near the bar, 10.5 without that last step: the small products
wait for the large ones. bf16, 64 heads, long runs: row by row 16.5, at 1.44 GHz; by pairs, with
room for the queries of one and the scores of three rows, 15.4, at 1.55. fp8 by pairs, scores handed
on row by row and let go of early, too: 6.32 for 6.35 with 32 heads, 9.23 for 9.25 with 64."""
PORTABLE = """
These are the portable kernels: this build, or this GPU, has not those for Hopper, which the goals
and limits are made for."""


@dataclass(frozen=True)
class Shape:
    """One prefill, or the last rows of one; the fields are columns of the CSV file."""

    rows: int
    keys: int
    heads: int
    queries: str
    dtype: str = "fp8"

    def __str__(self) -> str:
        """Write it as the goals do."""
        rows, keys = (length_text(value) for value in (self.rows, self.keys))
        what = f"{keys} x {keys}" if rows == keys else f"last {rows} of {keys}"
        kind = "" if self.dtype == "fp8" else f", {self.dtype}"
        return f"{what}, H={self.heads}, {self.queries}{kind}"

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of queries and keys."""
        return torch.float8_e4m3fn if self.dtype == "fp8" else torch.bfloat16


@dataclass(frozen=True)
class Row:
    """A goal and a limit in milliseconds, and what one peer reached."""

    shape: Shape
    peer: str
    goal: float
    limit: float


# The sweep over the context, of which the plot is made; then what has goals besides.
CONTEXTS = tuple(Shape(1 << i, 1 << i, 64, "text") for i in range(12, 18))
SHORT, LONG, LONGEST = CONTEXTS[2], CONTEXTS[4], CONTEXTS[5]
RANDOM = Shape(65536, 65536, 64, "random")
SHAPES: dict[Shape, tuple[str, ...]] = {
    **dict.fromkeys(CONTEXTS, EVERY),
    RANDOM: EVERY,
    Shape(65536, 65536, 32, "text"): (*OURS, *FOREIGN),
    Shape(8192, 131072, 64, "text"): (*OURS, *FOREIGN),
    Shape(8192, 1 << 20, 64, "text"): (*OURS, *FOREIGN),
    Shape(1024, 65536, 64, "text"): (*OURS, *FOREIGN),
    Shape(65536, 65536, 64, "text", "bf16"): (*OURS, TORCH),
}
TABLE = (
    Row(LONG, INDEX, 8.0, 5.8),
    Row(RANDOM, INDEX, 10.5, 8.0),
    Row(Shape(65536, 65536, 32, "text"), INDEX, 5.0, 2.9),
    Row(LONGEST, INDEX, 17.0, 12.5),
    Row(Shape(8192, 131072, 64, "text"), INDEX, 1.2, 0.84),
    Row(Shape(8192, 1 << 20, 64, "text"), INDEX, 2.5, 1.5),
    Row(Shape(1024, 65536, 64, "text"), INDEX, 0.17, 0.10),
    Row(LONG, FLAT, 36.0, 24.0),
    Row(SHORT, FLAT, 2.4, 1.5),
    Row(Shape(65536, 65536, 64, "text", "bf16"), INDEX, 15.0, 10.7),
)
QUICK = Shape(1024, 16384, 64, "text")

Found = dict[Shape, dict[str, Measurement]]


@lru_cache(maxsize=1)
def make_inputs(rows: int, keys: int, heads: int, queries: str, dtype: str) -> dict[str, Any]:
    """Return the inputs, the same tensors for all peers."""
    return drift.make_inputs(rows, keys, heads, queries, dtype)


def build(
    peer: str,
    *,
    tilelang: Path | None = None,
    deepgemm: Path | None = None,
    **shape: Any,
) -> Callable[[], Tensor | None]:
    """Return one peer's call."""
    return cuda_prefill.call(peer, make_inputs(**shape), tilelang=tilelang, deepgemm=deepgemm)


def run(bench: Bench) -> None:
    """Measure the sweep and the shapes with goals; then say what was reached of each limit."""
    bench.note_kernels(*dict.fromkeys((shape.heads, shape.torch_dtype) for shape in SHAPES))
    if bench.portable:
        bench.say(PORTABLE)
    build_all = partial(build, tilelang=bench.tilelang, deepgemm=bench.deepgemm)
    found: Found = {}
    for shape, peers in ({QUICK: EVERY} if bench.quick else SHAPES).items():
        share = drift.shared_blocks(make_inputs(**asdict(shape)))
        bench.say(f"\n{shape}: a row and the next share {share:.1%} of their blocks")
        ready = (*(peer for peer in peers if peer not in FOREIGN), *foreign(bench, shape, peers))
        if shape == SHORT or bench.quick:
            compare(bench, build_all, shape, ready)
        found[shape] = bench.measure(
            build_all,
            ready,
            asdict(shape),
            operations=operations(shape),
            memory=ready,
            max_runs=RUNS,
            seconds=0.5,
            runs={row.peer: RUNS for row in TABLE if row.shape == shape},
        )
    make_inputs.cache_clear()
    rows = [row for row in TABLE if row.shape in found]
    if rows:
        bench.say(
            "\nMedians, what they are of the limit, and how often the peers' time they are.\n"
        )
        bench.say(report.table(list(reached(rows, found))))
        if not bench.portable and not bench.quick:
            bench.say(LIMIT)
    for row in rows:
        ms = found[row.shape][row.peer].median * 1e3
        bench.goal(f"ms of {row.peer}, {row.shape}", ms, at_most=row.goal, digits=3)


def foreign(bench: Bench, shape: Shape, peers: tuple[str, ...]) -> list[str]:
    """Return which peers from elsewhere can run, after one call each; skip the others."""
    obstacles = {TILELANG: tilelang_peer.obstacle(bench.tilelang)}
    obstacles |= dict.fromkeys((DEEPGEMM, LOGITS), deepgemm_peer.obstacle(bench.deepgemm))
    ready = []
    for peer in (peer for peer in peers if peer in FOREIGN):
        reason = obstacles[peer]
        try:
            if not reason:
                build(peer, tilelang=bench.tilelang, deepgemm=bench.deepgemm, **asdict(shape))()
                torch.cuda.synchronize()
        except Exception as error:  # what TileLang's compiler raises is not known beforehand
            reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"
        if reason:
            bench.skip(peer, asdict(shape), reason)
        else:
            ready.append(peer)
    return ready


def compare(
    bench: Bench,
    build_all: Callable[..., Callable[[], Tensor | None]],
    shape: Shape,
    peers: tuple[str, ...],
) -> None:
    """Note what share of our tokens the peers from elsewhere select; raise if it is too small."""
    for own, other, check in (
        (INDEX, TILELANG, cuda_prefill.check_tilelang),
        (FLAT, DEEPGEMM, cuda_prefill.check_deepgemm),
    ):
        if other in peers:
            bench.agree(build_all, (own, other), asdict(shape), partial(check, bench, shape.heads))


def operations(shape: Shape) -> dict[str, int]:
    """Return the multiply-adds of every peer's call."""
    size, dtype = (shape.rows, shape.keys, shape.heads, drift.DIM), shape.torch_dtype
    found: dict[str, int] = {}
    for op, peers in (
        ("index", (INDEX, TILELANG)),
        ("flat_index", (FLAT, TORCH, DEEPGEMM, LOGITS)),
    ):
        plan = hisa.plan(*size, dtype=dtype, device=DEVICE, op=op, topk=TOPK, causal=True)
        found |= dict.fromkeys(peers, sum(n for s, n in plan.operations.items() if s != "pool"))
    return found


def reached(rows: list[Row], found: Found) -> Iterator[list[str]]:
    """Yield the lines of the table of goals, the header first."""
    others = (TILELANG, DEEPGEMM, FLAT)
    header = ["", "peer", "goal", "limit", "median", "TFLOP/s", "of the limit"]
    yield [*header, *(f"{other} / it" for other in others)]
    for row in rows:
        peers = found[row.shape]
        ours = peers[row.peer]
        yield [
            str(row.shape),
            row.peer,
            *(f"{value:g} ms" for value in (row.goal, row.limit)),
            report.time_text(ours.median),
            f"{ours.flops / 1e12:.0f}",
            f"{row.limit / (ours.median * 1e3):.0%}",
            *(ratio(peers, other, row.peer) for other in others),
        ]


def ratio(peers: Mapping[str, Measurement], other: str, own: str) -> str:
    """Write another peer's time over ours, if it was measured and is another."""
    return (
        f"{peers[other].median / peers[own].median:.1f}" if other in peers and other != own else ""
    )


def length_text(tokens: int) -> str:
    """Write a length: 100, 8K, 1M."""
    for unit, shift in (("M", 20), ("K", 10)):
        if tokens and tokens % (1 << shift) == 0:
            return f"{tokens >> shift}{unit}"
    return str(tokens)


def draw(results: Path) -> None:
    """Draw the sweep, from the CSV file in that folder."""
    speedups.draw(results / "cuda_hopper.csv", results / "cuda_hopper.svg")
