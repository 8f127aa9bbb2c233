"""HISA inside a small DeepSeek-V3.2, on real text: `make demo`, or `python examples/quickstart.py`.

1. A prefill of several thousand bytes of Python's own source: the model's own indexer and HISA, on
   the same hidden states, layer by layer. How long, how much memory, how many tokens in common?
2. Generation after that prompt, with the model's own indexer and with HISA.
3. Several documents packed into one batch, through `hisa.index` itself.

The model has DeepSeek-V3.2's architecture and random weights, so nothing is downloaded. It shows
the mechanics and says nothing about quality: for that, look at the indexer of a trained model.
"""

from __future__ import annotations

import ast
import bisect
import colorsys
import ctypes
import heapq
import inspect
import keyword
import textwrap
import time
import warnings
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from transformers import DeepseekV32Config, DeepseekV32ForCausalLM

import hisa

PROMPT_TOKENS = 4096
NEW_TOKENS = 16
TOPK = 256  # tokens that attention looks at
BLOCK_SIZE = 64
BLOCK_TOPK = 16
BUDGET = BLOCK_SIZE * BLOCK_TOPK  # tokens that HISA scores per query, to select the best TOPK
SOURCES: Sequence[ModuleType] = (textwrap, heapq, ast, bisect, colorsys, keyword)


# ---- the text and the model -----------------------------------------------------------------


def source_bytes(module: ModuleType) -> Tensor:
    """Return the source of a standard library module, one token per byte."""
    return torch.tensor(list(inspect.getsource(module).encode()))


def build_model() -> Any:
    """Make a DeepSeek-V3.2, small and random: 3 layers, indexers with 16 heads of 128 channels."""
    torch.manual_seed(0)
    config = DeepseekV32Config(
        vocab_size=256,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=3,
        first_k_dense_replace=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        q_lora_rank=128,
        kv_lora_rank=64,
        qk_nope_head_dim=32,
        qk_rope_head_dim=32,
        v_head_dim=32,
        index_n_heads=16,
        index_head_dim=128,
        index_topk=TOPK,
        bos_token_id=None,
        eos_token_id=None,
        initializer_range=0.1,
    )
    model: Any = DeepseekV32ForCausalLM(config)
    return model.eval()


# ---- measuring ------------------------------------------------------------------------------


@dataclass
class Call:
    """One call of one layer's indexer: what went in, what came out, what it cost."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    selected: Tensor  # [S, topk]
    seconds: float
    peak_bytes: int


class Recorder:
    """Records the calls of a module while it is used as a context manager."""

    def __init__(self, indexer: torch.nn.Module) -> None:
        self.indexer = indexer
        self.calls: list[Call] = []

    def __enter__(self) -> Recorder:
        self.hooks = [
            self.indexer.register_forward_pre_hook(self.before),
            self.indexer.register_forward_hook(self.after, with_kwargs=True),
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self.hooks:
            hook.remove()

    def before(self, module: torch.nn.Module, args: Any) -> None:
        self.resident = reset_peak_memory()
        self.start = time.perf_counter()

    def after(self, module: torch.nn.Module, args: Any, kwargs: Any, result: Tensor) -> None:
        seconds = time.perf_counter() - self.start
        extra = peak_memory() - self.resident
        self.calls.append(Call(args, kwargs, result[0], seconds, extra))


def reset_peak_memory() -> int:
    """Make Linux forget this process's peak memory; return its use now, in bytes."""
    ctypes.CDLL(None).malloc_trim(0)  # what is free but kept would hide what the next call needs
    Path("/proc/self/clear_refs").write_text("5")
    return peak_memory()


def peak_memory() -> int:
    """Return the most memory that this process used since the last reset, in bytes."""
    status = Path("/proc/self/status").read_text().split()
    return int(status[status.index("VmHWM:") + 1]) * 1024


def agreement(flat: Tensor, ours: Tensor) -> tuple[float, float]:
    """Return mean recall and IoU of two selections [rows, k]; -1 marks unused slots."""
    recalls, ious = [], []
    for a, b in zip(flat, ours, strict=True):
        a, b = a[a >= 0], b[b >= 0]
        common = int(torch.isin(a, b).sum())
        recalls.append(common / len(a))
        ious.append(common / (len(a) + len(b) - common))
    return sum(recalls) / len(recalls), sum(ious) / len(ious)


def show(header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a table."""
    table = [list(map(str, row)) for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table:
        cells = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        print("   ", row[0].ljust(widths[0]), " ", "   ".join(cells))
    print()


def say(text: str) -> None:
    """Print a paragraph; line breaks before and after it are kept."""
    stripped = text.strip("\n")
    print(text.replace(stripped, textwrap.fill(stripped, 96)), flush=True)


# ---- 1: prefill -----------------------------------------------------------------------------


@torch.no_grad()
def compare_prefill(model: Any, prompt: Tensor) -> None:
    say(
        f"1. Prefill of {prompt.shape[1]} bytes of Python source, with the model's own indexers ..."
    )
    indexers = [layer.self_attn.indexer for layer in model.model.layers]
    with ExitStack() as stack:
        recorders = [stack.enter_context(Recorder(indexer)) for indexer in indexers]
        model(prompt, use_cache=False)

    say("   ... and with HISA on the same hidden states.\n")
    rows = []
    for number, recorder in enumerate(recorders):
        own = recorder.calls[0]
        ours = repeat_with_hisa(own, indexers[number])
        recall, iou = agreement(pruned_rows(own.selected), pruned_rows(ours.selected))
        rows.append(
            (
                f"layer {number}",
                f"{own.seconds:.2f} s",
                f"{ours.seconds:.2f} s",
                f"{own.peak_bytes / 2**20:.0f} MiB",
                f"{ours.peak_bytes / 2**20:.0f} MiB",
                f"{recall:.1%}",
                f"{iou:.1%}",
            )
        )
    header = ("", "own: time", "HISA: time", "own: memory", "HISA: memory", "recall", "IoU")
    show(header, rows)
    say(
        "Recall is the share of the own indexer's tokens that HISA selects too, IoU the tokens in "
        "common over the tokens in either: means over the queries that see more blocks than HISA "
        "keeps. For all other queries both select the same, but for scores that are equal within "
        "rounding."
    )


def repeat_with_hisa(own: Call, indexer: torch.nn.Module) -> Call:
    """Make a recorded call again, with HISA in place of the indexer's own forward."""
    patch = hisa.patch(indexer, block_size=BLOCK_SIZE, block_topk=BLOCK_TOPK)
    with patch, Recorder(indexer) as recorder:
        indexer(*own.args, **own.kwargs)
    return recorder.calls[0]


def pruned_rows(selected: Tensor) -> Tensor:
    """Return the rows that HISA prunes, with slots that point past the query marked as unused."""
    last = torch.arange(len(selected))[:, None]
    return selected.masked_fill(selected > last, -1)[BUDGET:]


# ---- 2: generation --------------------------------------------------------------------------


def compare_generation(model: Any, prompt: Tensor) -> None:
    say(f"\n2. Generation of {NEW_TOKENS} tokens after that prompt, prefill included.\n")
    own = generate("the model's own indexer", model, prompt, None)

    every_block = -(-(prompt.shape[1] + NEW_TOKENS) // BLOCK_SIZE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # hisa warns that such a budget prunes nothing
        with hisa.patch(model, block_size=BLOCK_SIZE, block_topk=every_block):
            generate("HISA, every block kept", model, prompt, own)

    with hisa.patch(model, block_size=BLOCK_SIZE, block_topk=BLOCK_TOPK) as handle:
        generate(f"HISA, {BLOCK_TOPK} blocks kept", model, prompt, own)
        status = handle.status()

    say(
        "\nWith every block kept, HISA is the flat indexer: the same tokens. With fewer, tokens of "
        "discarded blocks can be lost, and with random weights every loss shows: nothing taught "
        "this model which tokens matter. What the patch did in the last run:\n"
    )
    print(textwrap.indent(str(status), "    "))


@torch.no_grad()
def generate(label: str, model: Any, prompt: Tensor, expected: Tensor | None) -> Tensor:
    """Generate greedily, and print the time and how many tokens are the expected ones."""
    print(f"    {label:<26}", end="", flush=True)
    start = time.perf_counter()
    tokens: Tensor = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=NEW_TOKENS, do_sample=False
    )[0, prompt.shape[1] :]
    print(f"{time.perf_counter() - start:6.1f} s", end="")
    if expected is None:
        print()
    else:
        print(f"   same tokens: {int((tokens == expected).sum())} of {NEW_TOKENS}", flush=True)
    return tokens


# ---- 3: packed documents --------------------------------------------------------------------


def compare_packed(documents: dict[str, Tensor]) -> None:
    say("\n3. Documents of different lengths, packed into one batch, through hisa.index.\n")
    parts = [project(tokens) for tokens in documents.values()]
    q, k, weights = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    edges = cumulative(map(len, documents.values()))

    packed = select(q, k, weights, edges)
    ks, ke = hisa.causal_windows(edges, edges)
    flat = hisa.flat_index(q, k, weights, ks=ks, ke=ke, topk=TOPK)

    rows = []
    for name, (start, end) in zip(documents, pairwise(edges.tolist()), strict=True):
        document = slice(start, end)
        alone = select(q[document], k[document], weights[document], cumulative([end - start]))
        recall, iou = agreement(flat[document], packed[document])
        equal = "yes" if torch.equal(packed[document], alone) else "NO"
        rows.append((name, end - start, f"{recall:.1%}", f"{iou:.1%}", equal))
    show(("document", "tokens", "recall", "IoU", "same bits when alone"), rows)
    say(
        "What is selected in a document does not depend on what it is packed with, to the last "
        f"bit. Where a document fits in the kept blocks ({BUDGET} tokens), it is what flat selects."
    )


def cumulative(lengths: Iterable[int]) -> Tensor:
    """Return where each document begins, then where the last one ends: [S + 1] int32."""
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


def select(q: Tensor, k: Tensor, weights: Tensor, edges: Tensor) -> Tensor:
    """Select hierarchically in packed documents, causally."""
    ks, ke = hisa.causal_windows(edges, edges)
    return hisa.index(
        q,
        k,
        weights,
        ks=ks,
        ke=ke,
        cu_seqlens_k=edges,
        block_size=BLOCK_SIZE,
        block_topk=BLOCK_TOPK,
        topk=TOPK,
    )


def project(tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return q [S, 16, 128], k [S, 128] and weights [S, 16] of bytes, through random layers."""
    generator = torch.Generator().manual_seed(0)
    embedding, to_q, to_k, to_weights = (
        torch.randn(rows, columns, generator=generator) / rows**0.5
        for rows, columns in ((256, 256), (256, 16 * 128), (256, 128), (256, 16))
    )
    last_bytes = torch.nn.functional.pad(embedding[tokens].T, (7, 0)).unfold(1, 8, 1).sum(-1).T
    return (last_bytes @ to_q).view(-1, 16, 128), last_bytes @ to_k, last_bytes @ to_weights


# ---- main -----------------------------------------------------------------------------------


def main() -> None:
    model = build_model()
    sources = {f"{module.__name__}.py": source_bytes(module) for module in SOURCES}
    prompt = torch.cat(list(sources.values()))[None, :PROMPT_TOKENS]
    compare_prefill(model, prompt)
    compare_generation(model, prompt)
    lengths = dict(zip(sources, (3000, 2400, 1800, 1500, 1000, 700), strict=True))
    compare_packed({name: tokens[: lengths[name]] for name, tokens in sources.items()})
    say(
        "\nAll weights were random: this run proves that the mechanics work, not that the "
        "selection is good. How much of flat's selection HISA keeps depends on the trained model "
        "and its text."
    )


if __name__ == "__main__":
    main()
