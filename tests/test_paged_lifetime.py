"""A paged cache over time, as a server has it: pages come and go, pooled keys need no care.

Catches pooled keys that outlive their block, slots that two blocks would share, blocks that are
pooled too early or never, and state that a rollback, a copy or a reused page leaves behind.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from tests.builders import int32, shaped
from tests.case import same_bytes
from tests.families import Family
from tests.numeric import DTYPES, FP8, short_name
from tests.paged import api, new_pages, new_slots, write

HEADS, DEPTH = shaped(H=2, D=16).values()


@dataclass(eq=False)
class Sequence:
    """The pages of one sequence, and its keys as they would lie in one piece."""

    k: Tensor  # [N, D]
    scale: Tensor  # [N]
    pages: list[int] = field(default_factory=list)


class Server:
    """A pool of pages that sequences share; the little of a server that pages need."""

    def __init__(self, family: Family, dtype: torch.dtype, page_size: int, size: int, count: int,
                 seed: int = 0) -> None:  # fmt: skip
        self.family, self.api, self.dtype = family, api(family), dtype
        self.page_size, self.size = page_size, size
        self.random = torch.Generator().manual_seed(seed)
        self.pages = new_pages(count, page_size, DEPTH, dtype)
        self.pooled = new_slots(count, DEPTH, dtype)
        self.free = torch.randperm(count, generator=self.random).tolist()
        self.sequences: list[Sequence] = []

    def pick(self, most: int) -> int:
        """Return a random number from 0 to `most`."""
        return int(torch.randint(most + 1, (), generator=self.random))

    def start(self) -> Sequence:
        """Add an empty sequence."""
        keys = torch.zeros(0, DEPTH).to(self.dtype)
        self.sequences.append(Sequence(keys, torch.zeros(0)))
        return self.sequences[-1]

    def copy_page(self, page: int) -> int:
        """Copy a page, and with it the slot of its pooled key."""
        copy: int = self.free.pop()
        for tensor in (self.pages, *self.pooled):
            bytes_of = tensor.view(torch.uint8).view(len(tensor), -1)
            bytes_of[copy] = bytes_of[page]
        return copy

    def append(self, sequence: Sequence, n: int) -> None:
        """Append n random tokens; a page that others have too is copied before it is written."""
        k = torch.randn(n, DEPTH, generator=self.random).to(self.dtype)
        scale = torch.rand(n, generator=self.random) + 0.5
        used = Counter(page for other in self.sequences for page in other.pages)
        for i in range(n):
            index, place = divmod(len(sequence.k), self.page_size)
            if place == 0:
                sequence.pages.append(self.free.pop())
            elif used[sequence.pages[index]] > 1:
                used[sequence.pages[index]] -= 1
                sequence.pages[index] = self.copy_page(sequence.pages[index])
            write(self.pages, sequence.pages[index], place, k[i : i + 1], scale[i : i + 1])
            sequence.k = joined(sequence.k, k[i : i + 1])
            sequence.scale = torch.cat([sequence.scale, scale[i : i + 1]])

    def fork(self, sequence: Sequence) -> Sequence:
        """Add a sequence that shares all pages of another so far."""
        self.sequences.append(Sequence(sequence.k, sequence.scale, list(sequence.pages)))
        return self.sequences[-1]

    def cut(self, sequence: Sequence, n: int) -> None:
        """Forget all tokens but the first n: rejected drafts, or the end of a sequence (0)."""
        sequence.k, sequence.scale = sequence.k[:n], sequence.scale[:n]
        kept = -(-n // self.page_size)
        dropped, sequence.pages = sequence.pages[kept:], sequence.pages[:kept]
        used = {page for other in self.sequences for page in other.pages}
        self.free = [page for page in dropped if page not in used] + self.free

    def table(self) -> dict[str, Tensor]:
        """Return the table and the lengths of all sequences."""
        width = max(len(sequence.pages) for sequence in self.sequences) + 1
        ids = [s.pages + [-1] * (width - len(s.pages)) for s in self.sequences]
        lengths = [len(s.k) for s in self.sequences]
        tensors = {"block_table": int32(ids), "seq_lens": int32(lengths)}
        return {name: tensor.to(self.family.device) for name, tensor in tensors.items()}

    def pool(self, new_tokens: int | None) -> None:
        """Pool what new tokens have completed."""
        on = [tensor.to(self.family.device) for tensor in (self.pages, *self.pooled)]
        self.api.paged_pool(*on, **self.table(), new_tokens=new_tokens, block_size=self.size)
        self.pooled = (on[1].cpu(), on[2].cpu())

    def assert_nothing_is_lost(self) -> None:
        """Assert that each page is free or used, and that each complete block has its bytes."""
        used = {page for sequence in self.sequences for page in sequence.pages}
        assert len(self.free) == len(set(self.free)) and not used & set(self.free)
        assert len(self.free) + len(used) == len(self.pages), "pages have leaked"
        for sequence in self.sequences:
            assert len(sequence.pages) == -(-len(sequence.k) // self.page_size)
            scale = sequence.scale.to(self.family.device) if self.dtype == FP8 else None
            keys = sequence.k.to(self.family.device)
            fresh = self.family.api.pool_keys(keys, k_scale=scale, block_size=self.size)
            each = self.size // self.page_size  # pages of a block; the last one's slot is its own
            slots = sequence.pages[each - 1 :: each][: len(sequence.k) // self.size]
            for mine, want in zip(self.pooled, fresh, strict=True):
                for number, slot in enumerate(slots):
                    assert same_bytes(mine[slot : slot + 1], want[number : number + 1].cpu()), slot

    def assert_right(self, next_n: int = 2) -> None:
        """Compare every sequence's selection with that from its keys in one piece."""
        rows = len(self.sequences) * next_n
        q = torch.randn(rows, HEADS, DEPTH, generator=self.random).to(self.dtype)
        weights = torch.randn(rows, HEADS, generator=self.random)
        sizes = {"block_size": self.size, "block_topk": 3, "topk": self.size}
        device = self.family.device
        got = self.api.paged_index(
            q.to(device), self.pages.to(device), weights.to(device), **self.table(), **sizes,
            pooled=tuple(t.to(device) for t in self.pooled), next_n=next_n, return_scores=True,
        )  # fmt: skip
        for s, sequence in enumerate(self.sequences):
            n, which = len(sequence.k), slice(s * next_n, (s + 1) * next_n)
            want = self.family.api.index(
                q[which].to(device), sequence.k.to(device), weights[which].to(device), **sizes,
                k_scale=sequence.scale.to(device) if self.dtype == FP8 else None,
                ke=int32(range(n - next_n + 1, n + 1)).to(device), return_scores=True,
            )  # fmt: skip
            for mine, theirs in zip(got, want, strict=True):
                assert same_bytes(mine[which], theirs), f"sequence {s} of {n} tokens"


def joined(a: Tensor, b: Tensor) -> Tensor:
    """Return rows behind rows, of any dtype."""
    return torch.cat([a.view(torch.uint8), b.view(torch.uint8)]).view(a.dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=short_name)
@pytest.mark.parametrize(("page_size", "size"), [(16, 16), (16, 32), (32, 128)])
def test_random_lives(family: Family, dtype: torch.dtype, page_size: int, size: int) -> None:
    """Sequences start, grow, fork, are cut and end at random; at every step all are right.

    Integration bugs: prefix caches, pages that leak, drafts on a shared prefix.
    """
    server = Server(family, dtype, page_size, size, 200, seed=page_size + size)
    server.start()
    for _ in range(60):
        sequence = server.sequences[server.pick(len(server.sequences) - 1)]
        event = server.pick(9)
        most = 1
        if event == 0 and len(server.sequences) < 5:
            server.fork(sequence)
        elif event == 1 and len(server.sequences) < 5:
            server.append(server.start(), most := 1 + server.pick(4 * size))
        elif event == 2:
            server.cut(sequence, server.pick(len(sequence.k)))
        elif event == 3 and len(server.sequences) > 2:
            server.cut(sequence, 0)
            server.sequences.remove(sequence)
        elif len(sequence.k) < 10 * size:
            server.append(sequence, most := 1 + server.pick(size))
        server.pool(most)
        server.assert_right()
        server.assert_nothing_is_lost()
    for sequence in server.sequences:
        server.cut(sequence, 0)
    server.assert_nothing_is_lost()
    assert sorted(server.free) == list(range(200))


@pytest.mark.parametrize("dtype", DTYPES, ids=short_name)
@pytest.mark.parametrize("page_size", [16, 32])
def test_token_by_token(family: Family, dtype: torch.dtype, page_size: int) -> None:
    """Pooled after every token, after every 7, and once at the end: the same bytes."""
    slots = []
    for step in (1, 7, 203):
        server = Server(family, dtype, page_size, 32, 20)
        sequence, whole = server.start(), Server(family, dtype, page_size, 32, 20)
        whole.append(whole.start(), 203)
        for first in range(0, 203, step):
            n = min(step, 203 - first)
            tokens = slice(first, first + n)
            append_these(server, sequence, whole.sequences[0], tokens)
            server.pool(n if step < 203 else None)
        server.assert_right()
        slots.append([*server.pooled, server.pages])
    for others in slots[1:]:
        for a, b in zip(slots[0], others, strict=True):
            assert same_bytes(a, b)


def append_these(server: Server, target: Sequence, source: Sequence, tokens: slice) -> None:
    """Append some tokens of another server's sequence, into pages of the same ids."""
    for n in range(tokens.start, tokens.stop):
        index, place = divmod(n, server.page_size)
        if place == 0:
            target.pages.append(source.pages[index])
        key, scale = source.k[n : n + 1], source.scale[n : n + 1]
        write(server.pages, target.pages[index], place, key, scale)
        target.k, target.scale = joined(target.k, key), torch.cat([target.scale, scale])


def test_a_reused_page_keeps_a_stale_pooled_key(family: Family) -> None:
    """A freed page's pooled key is not read by its next owner, and is replaced when it may be.

    Integration bugs: prefix caches.
    """
    server = Server(family, FP8, 16, 32, 14)
    first = server.start()
    server.append(first, 14 * 16)
    server.pool(None)
    stale = server.pooled[0].clone()
    server.cut(first, 0)
    second = server.sequences[0]
    for n in range(1, 14 * 16 + 1):
        server.append(second, 1)
        server.pool(1)
        server.assert_right(next_n=1)
        complete = set(second.pages[1 : n // 32 * 2 : 2])
        for page in range(14):
            same = same_bytes(server.pooled[0][page], stale[page])
            assert same != (page in complete), (n, page)


def test_a_rejected_draft_is_pooled_again(family: Family) -> None:
    """A block that was complete, cut back and filled with other tokens has a new pooled key.

    Integration bugs: speculative rollback.
    """
    server = Server(family, torch.bfloat16, 16, 32, 20)
    sequence = server.start()
    server.append(sequence, 4 * 32 - 2)
    server.pool(None)
    server.append(sequence, 4)  # drafts, across the end of block 3
    server.pool(4)
    slot = sequence.pages[7]
    drafted = server.pooled[0][slot].clone()
    server.cut(sequence, 4 * 32 - 2)
    server.append(sequence, 1)
    server.pool(1)
    assert same_bytes(server.pooled[0][slot], drafted)  # stale, and not read
    server.append(sequence, 1 + 4 * 32)
    server.pool(1 + 4 * 32)
    assert not same_bytes(server.pooled[0][slot], drafted)
    server.assert_right()


def test_a_copied_page_takes_its_pooled_key_along(family: Family) -> None:
    """All pages of a sequence moved elsewhere, slots with them: nothing is pooled again."""
    server = Server(family, FP8, 16, 32, 40)
    sequence = server.start()
    server.append(sequence, 290)
    server.pool(None)
    old = sequence.pages
    sequence.pages = [server.copy_page(page) for page in old]
    for tensor in (server.pages, *server.pooled):
        tensor.view(torch.uint8).view(len(tensor), -1)[old] = 0xFF
    server.assert_right(next_n=3)
