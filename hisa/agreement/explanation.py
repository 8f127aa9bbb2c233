"""What `hisa.explain` returns: one row's blocks, and what was lost, as text, HTML or a plot."""

from __future__ import annotations

import html
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

from torch import Tensor

from .display import html_table, optional, text_table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Fate = Literal["sink", "local", "kept", "dropped"]

# How the picture shows a block: mark, colour, meaning.
MARKS = {
    "sink": ("S", "#4c78a8", "sink"),
    "kept": ("#", "#54a24b", "kept"),
    "dropped": (".", "#d9d9d9", "dropped"),
    "lost": ("x", "#e45756", "dropped with flat's tokens"),
    "local": ("L", "#72b7b2", "local"),
}
MOST_MARKS = 512  # of a picture; with more blocks, each mark stands for several
SPACED_MARKS = 48  # up to so many, a line with spaces between them
LINE_MARKS = 64
MOST_LOST = 8  # lines of the table
HEADER = (
    "block at", "tokens lost", "best flat rank", "score", "coarse score", "coarse rank", "why",
)  # fmt: skip


class Block(NamedTuple):
    """A block that meets the row's window."""

    start: int  # its first token, which may lie before the window
    tokens: int  # in the window
    coarse: float | None  # score of its pooled key; None: always kept, so never scored
    rank: int | None  # by this score, from 1 on
    fate: Fate  # "sink": the first one; "local": the last one; both are always kept
    flat: int  # tokens that flat selects in it
    selected: int  # tokens that hisa selects in it
    best: float  # exact score of its best token in the window; a NaN counts as -inf

    @property
    def shown(self) -> str:
        """The key of MARKS."""
        return "lost" if self.fate == "dropped" and self.flat else self.fate


class Lost(NamedTuple):
    """A token that flat selects and hisa does not."""

    token: int
    rank: int  # in flat, from 1 on
    score: float
    block: int  # position in `Explanation.blocks`
    coarse_rank: int | None  # of the block
    below: float | None  # the bar less the block's coarse score; None: there is no bar


@dataclass(frozen=True, eq=False, repr=False)
class Explanation:
    """What became of each block of one row's context, and which of flat's tokens were lost.

    Attributes:
        row: which row of q.
        window: its first token and one past its last, inside of the keys and of one segment; (0, 0)
            if it is empty.
        block_size, block_topk, topk, pooling: as given.
        bar: the lowest coarse score of a block that was kept for its score. None where none was: if
            there are at most `block_topk` blocks, or two of them are kept.
        blocks: every block that meets the window, in order.
        lost: flat's tokens that hisa lacks, best first. All lie in dropped blocks.
        flat: `[F]` int32, the tokens that flat selects, ascending.
        flat_scores: `[F]` float32, their scores.
        selected: int32, the tokens that hisa selects, ascending.

    Tokens are numbered as the keys in `k`. Tensors are on the CPU.
    """

    row: int
    window: tuple[int, int]
    block_size: int
    block_topk: int
    topk: int
    pooling: str
    bar: float | None
    blocks: tuple[Block, ...]
    lost: tuple[Lost, ...]
    flat: Tensor
    flat_scores: Tensor
    selected: Tensor

    @property
    def recall(self) -> float:
        """The share of flat's tokens that hisa selects too; 1 for an empty window."""
        return 1 - len(self.lost) / len(self.flat) if len(self.flat) else 1.0

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw each block's coarse score, and the exact scores of flat's tokens where they lie.

        Args:
            ax: matplotlib's axes to draw into; new ones by default.

        Raises:
            ImportError: matplotlib is not installed; says how to get it.
        """
        pyplot = optional("matplotlib.pyplot")
        if ax is None:
            ax = pyplot.subplots(figsize=(10, 4), layout="constrained")[1]
        right = ax.twinx()  # a token's score may be far above that of a mean
        ax.set_title(self._title(), fontsize="medium")
        ax.set_xlabel(f"blocks of {self.block_size} tokens")
        ax.set_ylabel("coarse score of a block (bars)")
        right.set_ylabel("score of flat's tokens (dots)")
        self._draw_blocks(ax)
        self._draw_tokens(right)
        if self.blocks:
            shown = zip(*(axes.get_legend_handles_labels() for axes in (ax, right)), strict=True)
            handles, labels = (left + other for left, other in shown)
            ax.legend(handles, labels, fontsize="small", ncols=4, loc="upper center",
                      bbox_to_anchor=(0.5, -0.15))  # fmt: skip
        return ax

    def _draw_blocks(self, ax: Axes) -> None:
        for name, (_, colour, meaning) in MARKS.items():
            which = [i for i, block in enumerate(self.blocks) if block.shown == name]
            if name in ("sink", "local"):
                for i in which:
                    ax.axvspan(i - 0.5, i + 0.5, color=colour, alpha=0.5, label=meaning)
            elif which:
                heights = [_finite(self.blocks[i].coarse) for i in which]
                ax.bar(which, heights, width=1, color=colour, label=meaning)
        if self.bar is not None and math.isfinite(self.bar):
            ax.axhline(self.bar, color="black", linestyle=":", label="the bar")

    def _draw_tokens(self, ax: Axes) -> None:
        lost = {token.token for token in self.lost}
        for colour, meaning, is_lost in (("black", "selected", False), ("red", "lost", True)):
            which = [i for i, token in enumerate(self.flat.tolist()) if (token in lost) == is_lost]
            if which:
                x = (self.flat[which] + 0.5 - self.blocks[0].start) / self.block_size - 0.5
                y = self.flat_scores[which]
                label = f"flat's tokens: {meaning}"
                ax.scatter(x.tolist(), y.tolist(), s=6, color=colour, label=label)

    def __str__(self) -> str:
        if not self.blocks:
            return self._title()
        return "\n".join([self._title(), "", *self._picture(), "", *self._losses()])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        """Return the picture and the table for Jupyter."""
        cells = "".join(
            f'<span style="background:{MARKS[name][1]}" title="{html.escape(_describe(blocks))}">'
            f"{MARKS[name][0]}</span>"
            for name, blocks in self._marks()
        )
        style = "white-space:pre-wrap;overflow-wrap:anywhere;line-height:1.5"
        picture = f'<pre style="{style}">{cells}</pre>' if cells else ""
        table = html_table(self._table()) if self.lost else ""
        notes = [self._title(), *([self._legend(), self._loss()] if self.blocks else [])]
        title, *rest = (f"<p>{html.escape(note)}</p>" for note in notes)
        return "".join([title, picture, *rest, table])

    def _title(self) -> str:
        start, end = self.window
        if not self.blocks:
            return f"hisa.explain: row {self.row} has an empty window, so nothing is selected"
        kept = sum(block.fate != "dropped" for block in self.blocks)
        return (
            f"hisa.explain: row {self.row}, tokens {start} to {end - 1}, {len(self.blocks)} blocks "
            f"of {self.block_size}, {kept} kept; recall {self.recall:.4f}"
        )

    def _marks(self) -> list[tuple[str, tuple[Block, ...]]]:
        """Return the picture's marks: the first and the last block alone, others maybe together."""
        inner = self.blocks[1:-1]
        each = max(1, -(-len(inner) // (MOST_MARKS - 2)))
        groups = [inner[i : i + each] for i in range(0, len(inner), each)]
        groups = [self.blocks[:1], *groups, self.blocks[1:][-1:]]
        by_need = ("sink", "local", "lost", "kept", "dropped")
        return [
            (min((block.shown for block in group), key=by_need.index), group)
            for group in groups
            if group
        ]

    def _picture(self) -> Iterator[str]:
        """Draw the context, a mark for a block, and say what the marks mean."""
        marks = self._marks()
        drawn = [MARKS[name][0] for name, _ in marks]
        if len(drawn) <= SPACED_MARKS:
            yield "  " + " ".join(drawn)
        else:
            width = len(str(marks[-1][1][0].start))
            for i in range(0, len(drawn), LINE_MARKS):
                line = "".join(drawn[i : i + LINE_MARKS])
                yield f"  {marks[i][1][0].start:{width}}  {line}"
        yield "  " + self._legend()

    def _legend(self) -> str:
        marks = self._marks()
        shown = {name for name, _ in marks}
        each = max(len(blocks) for _, blocks in marks)
        meanings = [
            f"{mark} {meaning}" for name, (mark, _, meaning) in MARKS.items() if name in shown
        ]
        note = f"; a mark is up to {each} blocks: x if any is, else #" if each > 1 else ""
        return ", ".join(meanings) + note

    def _losses(self) -> Iterator[str]:
        """Say what was lost and why, a line for each block."""
        yield self._loss()
        if self.lost:
            yield from text_table(self._table())

    def _loss(self) -> str:
        flat = len(self.flat)
        if not self.lost:
            return f"Nothing is lost: all of flat's tokens ({flat}) are selected."
        blocks = len({lost.block for lost in self.lost})
        part = f" (the first {MOST_LOST} of {blocks})" if blocks > MOST_LOST else ""
        return f"Lost: {len(self.lost)} of flat's {flat} tokens, in these blocks{part}:"

    def _table(self) -> list[tuple[str, ...]]:
        """Return a row for each block that tokens were lost in, by the best of them."""
        by_block: dict[int, list[Lost]] = {}
        for lost in self.lost:
            by_block.setdefault(lost.block, []).append(lost)
        return [HEADER, *(self._cells(lost) for lost in list(by_block.values())[:MOST_LOST])]

    def _cells(self, lost: list[Lost]) -> tuple[str, ...]:
        best, block = lost[0], self.blocks[lost[0].block]
        scored = len(self.blocks) - 2
        rank = f"{best.coarse_rank} of {scored}"
        numbers = (str(block.start), str(len(lost)), str(best.rank), f"{best.score:.4g}")
        return (*numbers, f"{block.coarse:.4g}", rank, self._why(best))

    def _why(self, lost: Lost) -> str:
        """Say why the block of a lost token was dropped."""
        if lost.below is None:
            return "only the first and the last block are kept"
        if math.isnan(self.blocks[lost.block].coarse or 0.0):
            return "a NaN ranks last"
        if lost.below > 0:
            return f"{lost.below:.4g} below the bar of {self.bar:.4g}"
        return f"equal to the bar of {self.bar:.4g}; lower blocks come first"


def _finite(value: float | None) -> float:
    """Return what can be drawn."""
    return value if value is not None and math.isfinite(value) else math.nan


def _describe(blocks: tuple[Block, ...]) -> str:
    """Describe a mark, for the pointer that rests on it."""
    flat = sum(block.flat for block in blocks)
    holds = f"{flat} of flat's tokens"
    if len(blocks) > 1:
        kept = sum(block.fate == "kept" for block in blocks)
        return f"{len(blocks)} blocks from {blocks[0].start} on: {kept} kept, {holds}"
    (block,) = blocks
    rank = "" if block.rank is None else f", coarse score {block.coarse:.4g}, rank {block.rank}"
    return f"block at {block.start}: {MARKS[block.shown][2]}{rank}, {holds}"
