"""Variants of the method: what each finds of flat's selection, for how many scores.

In plain torch, on keys with a structure: which of them deserves kernels of its own? All keep about
the same number of tokens. The cost is that of all dot products, in units of the flat indexer's.

mean, max        one pooled key per block: the method, and the other pooling that it has
mean and max     two pooled keys per block, the better score counts
whole blocks     no refine stage: the best topk / B blocks are the selection
three levels     superblocks of 8 blocks by their mean keys first, then the blocks of the best half
fewer heads      the coarse stage asks only the quarter of the heads with the largest |w| * |q|
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks import report
from benchmarks.harness import Bench

HEADS, DIM, BLOCK, BUDGET, TOPK = 16, 64, 128, 16, 512
VERDICT = """
Beside the mean, no other variant pays here. The maximum finds more of single long keys and much
less of all else, so it stays an option. Both together cost more and find no more than the better
one. Whole blocks lose a third or more. Superblocks save little, since refining costs most: 4% of
the scores for 1 to 3% of the recall, at 256 blocks a row; they may be worth another look at a
million keys, where the coarse stage is the larger part. A quarter of the heads misjudges blocks."""
SUPER = 8  # blocks of a superblock
Chosen = tuple[Tensor, float]  # blocks [M, m], share of flat's dot products beside the refine stage


def run(bench: Bench) -> None:
    """Print one table."""
    rows, keys = (16, 4096) if bench.quick else (256, 32768)
    lines: list[tuple[str, ...]] = [("variant", "cost", *SCENES)]
    scenes = {name: Scene(make, rows, keys) for name, make in SCENES.items()}
    for name, variant in VARIANTS.items():
        found = [scene.recall(variant) for scene in scenes.values()]
        bench.records += [
            {"variant": name, "scene": scene, "recall": f"{recall:.4f}", "cost": f"{cost:.4f}"}
            for scene, (recall, cost) in zip(scenes, found, strict=True)
        ]
        cost = sum(cost for _, cost in found) / len(found)
        lines.append((name, f"{cost:.3f}", *(f"{recall:.3f}" for recall, _ in found)))
    bench.say("\nMean recall of flat's tokens, by what the keys are like:\n")
    bench.say(report.table(lines))
    bench.say(VERDICT)


class Scene:
    """Queries, weights and keys of one kind, with every score."""

    def __init__(self, make: Callable[[int, int, torch.Generator], tuple[Tensor, Tensor]],
                 rows: int, keys: int) -> None:  # fmt: skip
        random = torch.Generator().manual_seed(1)
        self.q, self.k = make(rows, keys, random)
        self.weights = torch.randn(rows, HEADS, generator=random).abs()
        self.blocks = self.k.view(-1, BLOCK, DIM)
        self.scores = self.score(self.k)
        self.flat = self.scores.topk(TOPK).indices

    def score(self, keys: Tensor, weights: Tensor | None = None) -> Tensor:
        """Score keys [n, D] for every row: [M, n]."""
        weights = self.weights if weights is None else weights
        parts = [
            torch.einsum("mhd,nd->mhn", q, keys).relu_().mul_(w[..., None]).sum(1)
            for q, w in zip(self.q.split(8), weights.split(8), strict=True)
        ]
        return torch.cat(parts)

    def recall(self, variant: Callable[[Scene], Chosen]) -> tuple[float, float]:
        """Return the mean share of flat's tokens that the variant selects, and its cost."""
        blocks, cost = variant(self)
        rows, count = self.scores.shape
        open_ = torch.zeros(rows, count // BLOCK).scatter_(1, blocks, 1.0)
        kept = self.scores.masked_fill(open_.repeat_interleave(BLOCK, 1) == 0, -torch.inf)
        chosen = torch.zeros(rows, count).scatter_(1, kept.topk(TOPK).indices, 1.0)
        refined = blocks.shape[1] * BLOCK / count if blocks.shape[1] * BLOCK > TOPK else 0.0
        return float(chosen.gather(1, self.flat).mean()), cost + refined


def mean(scene: Scene) -> Chosen:
    """One mean key per block."""
    return scene.score(scene.blocks.mean(1)).topk(BUDGET).indices, 1 / BLOCK


def maximum(scene: Scene) -> Chosen:
    """One key of the largest values per channel."""
    return scene.score(scene.blocks.amax(1)).topk(BUDGET).indices, 1 / BLOCK


def mean_and_max(scene: Scene) -> Chosen:
    """Both of them."""
    both = (scene.score(scene.blocks.mean(1)), scene.score(scene.blocks.amax(1)))
    ranks = [score.argsort(1).argsort(1) for score in both]  # their scales differ
    return torch.maximum(*ranks).topk(BUDGET).indices, 2 / BLOCK


def whole_blocks(scene: Scene) -> Chosen:
    """Blocks instead of tokens."""
    return scene.score(scene.blocks.mean(1)).topk(TOPK // BLOCK).indices, 1 / BLOCK


def three_levels(scene: Scene) -> Chosen:
    """Superblocks first."""
    means = scene.blocks.mean(1)
    above = scene.score(means.view(-1, SUPER, DIM).mean(1))
    best = above.topk(max(1, above.shape[1] // 2)).indices
    open_ = torch.zeros_like(above).scatter_(1, best, 1.0).repeat_interleave(SUPER, 1)
    scores = scene.score(means).masked_fill(open_ == 0, -torch.inf)
    return scores.topk(BUDGET).indices, 0.5 / BLOCK + 1 / (BLOCK * SUPER)


def fewer_heads(scene: Scene) -> Chosen:
    """The heads that weigh most decide about blocks."""
    weight = scene.weights * scene.q.norm(dim=2)
    asked = torch.zeros_like(weight).scatter_(1, weight.topk(HEADS // 4).indices, 1.0)
    scores = scene.score(scene.blocks.mean(1), scene.weights * asked)
    return scores.topk(BUDGET).indices, 0.25 / BLOCK


VARIANTS: dict[str, Callable[[Scene], Chosen]] = {
    "mean": mean,
    "max": maximum,
    "mean and max": mean_and_max,
    "whole blocks": whole_blocks,
    "three levels": three_levels,
    "fewer heads": fewer_heads,
}


def queries_near(keys: Tensor, rows: int, random: torch.Generator) -> Tensor:
    """Return queries whose heads look for keys that there are."""
    at = torch.randint(len(keys), (rows, HEADS), generator=random)
    return keys[at] + torch.randn(rows, HEADS, DIM, generator=random)


def topics(rows: int, keys: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """Runs of 100 to 700 keys around a centre each."""
    lengths = torch.randint(100, 700, (keys // 100,), generator=random)
    centres = torch.randn(len(lengths), DIM, generator=random).repeat_interleave(lengths, 0)[:keys]
    k = centres + 0.7 * torch.randn(keys, DIM, generator=random)
    return queries_near(centres, rows, random), k


def drift(rows: int, keys: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """A walk that forgets within some 200 keys."""
    k = torch.randn(keys, DIM, generator=random)
    for i in range(1, keys):
        k[i] = 0.995 * k[i - 1] + 0.1 * k[i]
    return queries_near(k, rows, random), k


def needles(rows: int, keys: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random keys, one in 32 of which is three times as long."""
    k = torch.randn(keys, DIM, generator=random)
    k[torch.rand(keys, generator=random) < 1 / 32] *= 3
    return queries_near(k, rows, random), k


def hot_tokens(rows: int, keys: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """Topics, and in every block one key of another topic: a hot token in a cold block."""
    q, k = topics(rows, keys, random)
    at = torch.arange(keys // BLOCK) * BLOCK + torch.randint(
        BLOCK, (keys // BLOCK,), generator=random
    )
    k[at] = 2 * k[torch.randint(keys, (len(at),), generator=random)]
    return q, k


def no_structure(rows: int, keys: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """Independent normal numbers."""
    k = torch.randn(keys, DIM, generator=random)
    return torch.randn(rows, HEADS, DIM, generator=random), k


SCENES: dict[str, Callable[[int, int, torch.Generator], tuple[Tensor, Tensor]]] = {
    "topics": topics,
    "drift": drift,
    "needles": needles,
    "hot tokens": hot_tokens,
    "random": no_structure,
}
