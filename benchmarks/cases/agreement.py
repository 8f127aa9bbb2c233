"""What it costs to know: hisa.compare, hisa.certify and hisa.exact_index against flat and hisa.

Keys lie in groups of 512 around random centres, as far from them as `spread` says, in units of what
the centres are from zero: 1 is nearly random. Queries are random, the last of the keys, bf16.
The first table says how much of flat's selection hisa finds, and how many rows are proved to be
flat's. The second has other bounds than those of hisa.certify, in plain torch and with no allowance
for rounding, where the keys of a group differ in all channels or, as much, in the first few only:
boxes of the smallest and largest value per channel, as they are and after a Hadamard rotation, and
balls with the constant sum_h |w_h| * |q_h|. That of certify is a spectral norm where this is less.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import hisa
from benchmarks import report
from benchmarks.harness import Bench

HISA, FLAT, BOTH = "hisa.index", "hisa.flat_index", "hisa.index and hisa.flat_index"
COMPARE, CERTIFY, EXACT = "hisa.compare", "hisa.certify", "hisa.exact_index"
DIM, GROUP, BLOCK, BUDGET = 128, 512, 128, 64
SPREADS = (0.01, 0.03, 0.1, 0.3, 1.0)


def make_inputs(
    rows: int, keys: int, heads: int, spread: float, device: str, channels: int = DIM
) -> dict[str, Any]:
    """Return queries, keys, weights and causal windows; keys of a group differ in `channels`."""
    random = torch.Generator(device).manual_seed(rows + keys)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, generator=random)

    centres = normal(keys // GROUP, DIM).repeat_interleave(GROUP, 0)
    each = torch.where(torch.arange(DIM, device=device) < channels, (DIM / channels) ** 0.5, 0.0)
    return {
        "q": normal(rows, heads, DIM).bfloat16(),
        "k": (centres + spread * each * normal(keys, DIM)).bfloat16(),
        "weights": normal(rows, heads).abs(),
        "ke": torch.arange(keys - rows + 1, keys + 1, device=device, dtype=torch.int32),
    }


def build(
    peer: str, *, rows: int, keys: int, heads: int, spread: float = 0.03, device: str = "cpu"
) -> Callable[[], object]:
    """Return one peer's call, with the default setting: 64 blocks of 128, 2048 tokens."""
    inputs = make_inputs(rows, keys, heads, spread, device)
    if peer == COMPARE:
        return lambda: hisa.compare(**inputs, progress=False)
    if peer == BOTH:
        return lambda: (hisa.index(**inputs), hisa.flat_index(**inputs))
    one: dict[str, Callable[..., object]] = {
        HISA: hisa.index,
        FLAT: hisa.flat_index,
        CERTIFY: hisa.certify,
        EXACT: hisa.exact_index,
    }
    return lambda: one[peer](**inputs)


def run(bench: Bench) -> None:
    """Measure the instruments, and what there is to see."""
    shape = {"rows": 512 if bench.quick else 4096, "keys": 16384, "heads": 16}
    measure(bench, "cpu", **shape)
    bench.say()
    bench.say(report.table(shares(shape["heads"])))
    bench.say("\nRows proved by other bounds, for 8 and for 64 keys each:\n")
    bench.say(report.table(other_bounds(shape["heads"])))


def measure(bench: Bench, device: str, rows: int, keys: int, heads: int) -> None:
    """Measure every instrument at one shape, and note its goal."""
    peers = (BOTH, HISA, FLAT, COMPARE, CERTIFY, EXACT)

    def on_device(peer: str, **shape: Any) -> Callable[[], object]:
        return build(peer, device=device, **shape)

    found = bench.measure(on_device, peers, {"rows": rows, "keys": keys, "heads": heads},
                          memory=(), min_runs=3, max_runs=20, seconds=1.0)  # fmt: skip
    at = f"{rows} x {keys}, H={heads}"
    both, flat = found[BOTH].median, found[FLAT].median
    bench.goal(
        f"{COMPARE} / flat and hisa, {at}", found[COMPARE].median / both, at_most=3, digits=2
    )
    bench.goal(f"{CERTIFY} / flat, {at}", found[CERTIFY].median / flat, at_most=2, digits=2)
    if device == "cpu":
        bench.goal(f"seconds of {COMPARE}, {at}", found[COMPARE].median, at_most=60, digits=1)


def shares(heads: int, device: str = "cpu") -> list[tuple[str, ...]]:
    """Say for each spread and topk what hisa finds, and what is proved."""
    lines: list[tuple[str, ...]] = [
        ("spread", "topk", "recall", "rows as flat", "proved, bound_size 8", "16", "64")
    ]
    for spread in SPREADS:
        inputs = make_inputs(512, 32768, heads, spread, device)
        for topk in (256, 2048):
            found = hisa.compare(**inputs, topk=topk, progress=False)
            proved = [
                hisa.certify(**inputs, topk=topk, bound_size=size).proved.float().mean()
                for size in (8, 16, 64)
            ]
            same = (found.worst_miss == 0).float().mean()
            cells = (found.recall.mean(), same, *proved)
            lines.append((f"{spread:g}", str(topk), *(f"{float(cell):.3f}" for cell in cells)))
    return lines


def other_bounds(heads: int) -> list[tuple[str, ...]]:
    """Say of how many rows each kind of bound proves that no discarded block matters."""
    kinds = ("boxes", "rotated boxes", "balls, sum")
    sizes = (8, 64)
    names = [f"{kind} {size}" for kind in (*kinds, "certify") for size in sizes]
    lines: list[tuple[str, ...]] = [("channels", "spread", "topk", *names)]
    for channels, spread, topk in itertools.product((DIM, 16), SPREADS[:3], (256, 2048)):
        inputs = make_inputs(512, 32768, heads, spread, "cpu", channels)
        q, k, weights, ke = (inputs[name] for name in ("q", "k", "weights", "ke"))
        worst = hisa.index(**inputs, topk=topk, return_scores=True)[1].amin(1)
        last = (ke - 1) // BLOCK  # kept, as is block 0; the others compete for the rest
        kept = hisa.flat_index(q, hisa.pool_keys(k)[0], weights, ks=torch.ones_like(last), ke=last,
                               topk=BUDGET - 2)  # fmt: skip
        blocks = torch.arange(len(k) // BLOCK)
        gone = ((blocks > 0) & (blocks < last[:, None])).scatter(1, kept.long() + 1, False)
        cells = [
            bound(kind, q.float(), k.float(), weights, size).where(gone, -torch.inf).amax(1) < worst
            for kind in kinds for size in sizes
        ]  # fmt: skip
        cells += [hisa.certify(**inputs, topk=topk, bound_size=size).proved for size in sizes]
        shown = (f"{float(cell.float().mean()):.3f}" for cell in cells)
        lines.append((str(channels), f"{spread:g}", str(topk), *shown))
    return lines


def bound(kind: str, q: Tensor, k: Tensor, weights: Tensor, size: int) -> Tensor:
    """Return what no score in each block exceeds, [M, blocks]; weights are not negative."""
    if kind == "rotated boxes":
        turn = torch.ones(1, 1)
        while len(turn) < DIM:
            turn = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), turn)
        q, k = q @ turn / DIM**0.5, k @ turn / DIM**0.5
    groups = k.view(-1, size, DIM)
    centre, steep = groups.mean(1), (weights * q.norm(dim=2)).sum(1, keepdim=True)
    rise = None
    if "boxes" in kind:
        low, high = groups.aminmax(dim=1)
        centre, rise, steep = (low + high) / 2, (high - low) / 2, torch.zeros_like(steep)
    scores = []
    for rows, weight in zip(q.split(8), weights.split(8), strict=True):
        dots = rows @ centre.T if rise is None else rows @ centre.T + rows.abs() @ rise.T
        scores.append((dots.relu_() * weight[..., None]).sum(1))
    radius = (groups - centre[:, None]).norm(dim=2).amax(1)
    bounds: Tensor = (torch.cat(scores) + steep * radius).view(len(q), -1, BLOCK // size).amax(2)
    return bounds
