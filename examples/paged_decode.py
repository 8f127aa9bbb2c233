"""A serving engine's decode loop with hisa: paged keys, a shared prompt, drafts, a CUDA graph.

    python examples/paged_decode.py        a few seconds, on a GPU or a CPU

What an engine does for one layer of a model like DeepSeek-V3.2, and nothing else of it: the keys
are random. `Pages` is the part to lift: a pool of fp8 pages in DeepGEMM's layout with a slot for a
pooled key beside each page, so that whoever allocates, shares or copies a page does the same to its
pooled key, and nobody has to free one.
"""

from __future__ import annotations

import torch
from torch import Tensor

import hisa

HEADS, DIM, PAGE, BLOCK = 64, 128, 64, 128
BLOCK_TOPK, TOPK = 8, 256  # small, so that 4000 tokens are pruned; DeepSeek-V3.2 has 64 and 2048
DEVICE = "cuda" if torch.cuda.is_available() and hisa.build_info()["cuda"] else "cpu"


class Pages:
    """A pool of pages, and the sequences that hold some of them."""

    def __init__(self, pages: int, batch: int, width: int) -> None:
        self.data = torch.zeros(pages, PAGE * (DIM + 4), dtype=torch.uint8, device=DEVICE)
        self.pooled = (
            torch.zeros(pages, DIM, dtype=torch.float8_e4m3fn, device=DEVICE),
            torch.zeros(pages, device=DEVICE),
        )
        self.free = list(range(pages))
        # What kernels read; changed in place, so that a CUDA graph sees it.
        self.table = torch.full((batch, width), -1, dtype=torch.int32, device=DEVICE)
        self.lengths = torch.zeros(batch, dtype=torch.int32, device=DEVICE)

    def grow(self, sequence: int, tokens: int) -> None:
        """Give a sequence pages for some tokens in all."""
        for page in range(int((self.table[sequence] >= 0).sum()), -(-tokens // PAGE)):
            self.table[sequence, page] = self.free.pop()

    def share(self, sequence: int, other: int) -> None:
        """Begin a sequence with another one's tokens: with its full pages, and a copy of the last.

        A copied page's pooled key is copied with it. Here it is not even needed: no block of the
        copy is complete before its last page is.
        """
        length = int(self.lengths[other])
        full = length // PAGE
        self.table[sequence, :full] = self.table[other, :full]
        if length % PAGE:
            self.grow(sequence, length)
            self.data[self.table[sequence, full]] = self.data[self.table[other, full]]
        self.lengths[sequence] = length

    def write(self, k: Tensor, positions: Tensor) -> None:
        """Quantise keys [batch, n, DIM] and write them to each sequence's positions [batch, n]."""
        k_fp8, scale = hisa.quantize_fp8(k)
        page = self.table.gather(1, positions // PAGE).long()
        at = (positions % PAGE)[..., None]
        channel = torch.arange(DIM, device=DEVICE)
        self.data[page[..., None], at * DIM + channel] = k_fp8.view(torch.uint8)
        byte = torch.arange(4, device=DEVICE)
        self.data[page[..., None], PAGE * DIM + at * 4 + byte] = scale[..., None].view(torch.uint8)

    def append(self, k: Tensor) -> None:
        """Append keys [batch, n, DIM], for which there are pages, and pool what they complete."""
        new = k.shape[1]
        self.write(k, self.lengths[:, None] + torch.arange(new, device=DEVICE))
        self.lengths += new
        hisa.paged_pool(
            self.data,
            *self.pooled,
            block_table=self.table,
            seq_lens=self.lengths,
            new_tokens=new,
            block_size=BLOCK,
        )

    def select(self, q: Tensor, weights: Tensor, out: Tensor) -> None:
        """Write where the selected tokens of each sequence's last queries [batch, n, ...] lie."""
        q_fp8, scale = hisa.quantize_fp8(q.flatten(0, 1))
        hisa.paged_index(
            q_fp8,
            self.data,
            weights.flatten(0, 1) * scale,
            block_table=self.table,
            seq_lens=self.lengths,
            pooled=self.pooled,
            next_n=q.shape[1],
            block_size=BLOCK,
            block_topk=BLOCK_TOPK,
            topk=TOPK,
            physical=True,  # page * 64 + place in it, as sparse MLA kernels want them
            out=out,
        )


def main() -> None:
    """Prefill one prompt, share it, decode with drafts of two tokens, one of them rejected."""
    torch.manual_seed(0)
    batch, prompt, steps, drafts = 4, 4000, 12, 2
    pages = Pages(pages=400, batch=batch, width=80)

    # A prompt, once; the other sequences begin with its pages.
    pages.grow(0, prompt)
    keys = torch.randn(1, prompt, DIM, device=DEVICE)
    pages.write(keys, torch.arange(prompt, device=DEVICE)[None])
    pages.lengths[0] = prompt
    hisa.paged_pool(
        pages.data,
        *pages.pooled,
        block_table=pages.table,
        seq_lens=pages.lengths,
        new_tokens=None,
        block_size=BLOCK,
    )
    for sequence in range(1, batch):
        pages.share(sequence, 0)
    used = 400 - len(pages.free)
    print(f"{batch} sequences of {prompt} tokens share {used} pages, on {DEVICE}")

    # A step at fixed addresses: new keys and queries are copied in, a graph is replayed, and what
    # it selects is in the same place each time.
    k = torch.zeros(batch, drafts, DIM, device=DEVICE)
    q = torch.zeros(batch, drafts, HEADS, DIM, device=DEVICE)
    weights = torch.zeros(batch, drafts, HEADS, device=DEVICE)
    selected = torch.empty(batch * drafts, TOPK, dtype=torch.int32, device=DEVICE)

    def step() -> None:
        pages.append(k)
        pages.select(q, weights, out=selected)

    for sequence in range(batch):  # pages are given out beforehand; the kernels look them up
        pages.grow(sequence, prompt + steps * drafts)
    run = step
    if DEVICE == "cuda":
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            step()  # whatever is loaded on first use
        torch.cuda.current_stream().wait_stream(side)
        pages.lengths -= drafts
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        run = graph.replay
    for number in range(steps):
        k.normal_(), q.normal_(), weights.normal_()
        run()
        # The second draft of odd steps is rejected: forgotten by its length alone. Should its block
        # have been complete, it is pooled again when it is complete again.
        pages.lengths -= number % 2
    rows = selected.view(batch, drafts, TOPK)
    print(f"after {steps} steps the sequences have {pages.lengths.tolist()} tokens")
    print(f"the last query of sequence 3 selected, among others, {rows[3, -1, -5:].tolist()}")
    assert (rows >= 0).all()


if __name__ == "__main__":
    main()
