"""What surrounds the peers that stay outside of the tree: here they are stand-ins."""

from __future__ import annotations

import ctypes
import importlib.util
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import hisa
from benchmarks import deepgemm_peer, report, summary, tilelang_peer
from benchmarks.__main__ import find_cases, parse
from benchmarks.cases import cuda_decode, cuda_decode_module, cuda_prefill, decode_module
from benchmarks.harness import Bench, Measurement
from benchmarks.inputs import causal, overlap, torch_flat
from hisa import reference_paged

EXAMPLE = """
import neighbour

def hisa_indexer(q, k, k_scale, weights, ks, ke, *, k_block_size, block_topk, topk_tokens):
    assert (ks == 0).all() and len(ks) == len(ke) == len(q)
    assert (k_block_size, block_topk) == neighbour.SIZES
    return k_scale.new_zeros(len(q), topk_tokens).int()
"""


@pytest.fixture
def example(tmp_path: Path) -> Path:
    """Return a folder with a pipeline that, as TileLang's, is called hisa.py and has neighbours."""
    (tmp_path / "hisa.py").write_text(EXAMPLE)
    (tmp_path / "neighbour.py").write_text("SIZES = (128, 64)\n")
    return tmp_path


def test_the_pipeline_is_built_from_a_folder(
    example: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It gets the tensors of hisa.index, and its name and its neighbours get in nobody's way."""
    monkeypatch.delitem(sys.modules, "neighbour", raising=False)
    path = list(sys.path)
    call = tilelang_peer.build(
        example,
        q=torch.zeros(3, 2, 16),
        k=torch.zeros(5, 16),
        weights=torch.zeros(3, 2),
        k_scale=torch.ones(5),
        ke=torch.tensor([3, 4, 5], dtype=torch.int32),
        topk=7,
    )
    assert call().shape == (3, 7)
    assert sys.modules["hisa"] is hisa and sys.path == path


def test_a_peer_that_cannot_run_says_why(example: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The path, or the package, is missing."""
    assert tilelang_peer.obstacle(None) == "needs --tilelang PATH"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert tilelang_peer.obstacle(example) == "tilelang is not installed"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert tilelang_peer.obstacle(example) == ""


def test_the_option_takes_the_example(example: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Another folder is refused before anything runs."""
    known = find_cases()
    assert parse(["cuda_prefill", "--tilelang", str(example)], known).tilelang == example
    assert parse(["cuda_prefill"], known).tilelang is None
    with pytest.raises(SystemExit):
        parse(["--tilelang", str(example / "elsewhere")], known)
    assert "--tilelang: expected a folder with hisa.py, got" in capsys.readouterr().err


def clone(folder: Path) -> Path:
    """Return a folder that has the files which DeepGEMM is known by."""
    for file in (deepgemm_peer.KERNEL, deepgemm_peer.PAGED_KERNEL, deepgemm_peer.CUTLASS):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text("")
    return folder


def test_the_option_takes_a_clone_of_deepgemm(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One without its submodules is refused."""
    known = find_cases()
    assert parse(["cuda_prefill", "--deepgemm", str(clone(tmp_path))], known).deepgemm == tmp_path
    assert parse(["cuda_prefill"], known).deepgemm is None
    for file in (deepgemm_peer.CUTLASS, deepgemm_peer.PAGED_KERNEL):
        (tmp_path / file).unlink()
        with pytest.raises(SystemExit):
            parse(["--deepgemm", str(tmp_path)], known)
        assert f"expected a folder with {file}, got" in capsys.readouterr().err


def test_deepgemm_says_why_it_cannot_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The path, the compiler or the GPU is missing."""
    assert deepgemm_peer.obstacle(None) == "needs --deepgemm PATH"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(shutil, "which", lambda *_, **__: "nvcc")
    assert deepgemm_peer.obstacle(tmp_path) == "needs a GPU of compute capability 9.0"
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    assert deepgemm_peer.obstacle(tmp_path) == "nvcc is not found"


FP8, FP32, INT32 = torch.float8_e4m3fn, torch.float32, torch.int32


def at_addresses(
    pointers: Sequence[int], sizes: Sequence[int], dtypes: Sequence[torch.dtype]
) -> list[Tensor]:
    """Return what a launcher gets as tensors."""
    return [
        torch.frombuffer((ctypes.c_char * (n * dtype.itemsize)).from_address(at), dtype=dtype)
        for at, n, dtype in zip(pointers, sizes, dtypes, strict=True)
    ]


def launch(*arguments: int) -> None:
    """Do what DeepGEMM's kernels do, on a CPU."""
    *pointers, rows, keys, heads, stride = arguments
    sizes = (rows * heads * 128, keys * 128, keys, rows * heads, rows, rows, rows * stride)
    dtypes = (FP8, FP8, FP32, FP32, INT32, INT32, FP32)
    q, k, k_scale, weights, ks, ke, out = at_addresses(pointers, sizes, dtypes)
    dots = torch.einsum("mhd,nd->mhn", q.view(rows, heads, 128).float(), k.view(keys, 128).float())
    tokens = torch.arange(keys)
    outside = (tokens < ks[:, None]) | (tokens >= ke[:, None])
    scores = (dots.relu() * weights.view(rows, heads, 1)).sum(1) * k_scale
    out.view(rows, stride).fill_(-torch.inf)[:, :keys] = scores.masked_fill(outside, -torch.inf)


def test_deepgemm_gets_chunks_and_their_best_are_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it selects is flat, for several chunks of rows, the last of them not full."""
    monkeypatch.setattr(deepgemm_peer, "launcher", lambda folder, device: launch)
    monkeypatch.setattr(deepgemm_peer, "CHUNK_ROWS", 64)
    monkeypatch.setattr(deepgemm_peer, "SCORE_BYTES", 16 * 512 * 4)
    plain = causal(90, 300, 32, 128, "float8_e4m3fn")
    wanted = torch_flat(plain, 256, 90)
    q, k, weights, _, ke = plain
    inputs = {"q": q, "k": k, "weights": weights, "k_scale": torch.ones(300), "ke": ke}
    assert [at.stop for at, _ in deepgemm_peer.split(ke)] == [16, 32, 48, 64, 80, 90]
    found = deepgemm_peer.build(tmp_path, **inputs, topk=256)()
    assert ((found >= 0).sum(1) == (wanted >= 0).sum(1)).all() and overlap(wanted, found) == 1
    deepgemm_peer.build_logits(tmp_path, **inputs)()


@pytest.mark.parametrize("name", ["q", "k_scale", "ke"])
def test_deepgemm_refuses_what_its_kernel_does_not_take(tmp_path: Path, name: str) -> None:
    """Pointers leave no room for other dtypes."""
    q, k, weights, _, ke = causal(4, 8, 64, 128, "float32")
    inputs = {"q": q.to(torch.float8_e4m3fn), "k": k.to(torch.float8_e4m3fn), "weights": weights}
    inputs |= {"k_scale": torch.ones(8), "ke": ke}
    with pytest.raises(ValueError, match="expected contiguous fp8 q and k"):
        deepgemm_peer.build(tmp_path, **{**inputs, name: inputs[name].double()}, topk=4)
    with pytest.raises(ValueError, match=r"q: expected \[M, 32 or 64, 128\], got \[4, 64, 64\]"):
        deepgemm_peer.build(tmp_path, **{**inputs, "q": inputs["q"][..., :64]}, topk=4)


def launch_paged(*arguments: int) -> None:
    """Do what DeepGEMM's paged kernels do, on a CPU."""
    *pointers, batch, next_n, heads, pages, page_bytes, width, stride = arguments
    rows = batch * next_n
    sizes = (rows * heads * 128, pages * page_bytes, rows * heads, batch, batch * width)
    dtypes = (FP8, torch.uint8, FP32, INT32, INT32)
    q, cache, weights, lengths, table = at_addresses(pointers[:5], sizes, dtypes)
    (out,) = at_addresses(pointers[6:], (rows * stride,), (FP32,))
    out = out.view(rows, stride).fill_(-torch.inf)
    keys, scales = reference_paged.split_pages(cache.view(pages, page_bytes), 128)
    for row in range(rows):
        ids = table.view(batch, width)[row // next_n].long()
        dots = keys[ids].view(-1, 128).float() @ q.view(rows, heads, 128)[row].float().T
        scores = (dots.relu() * weights.view(rows, heads)[row]).sum(1) * scales[ids].view(-1)
        end = int(lengths[row // next_n]) - next_n + row % next_n + 1
        out[row, :end] = scores[:end]


@pytest.mark.parametrize("next_n", [1, 2])
def test_deepgemm_reads_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, next_n: int) -> None:
    """What it selects is what hisa.paged_index does with every block kept."""
    made: list[tuple[int, ...]] = []
    monkeypatch.setattr(deepgemm_peer, "count_multiprocessors", lambda device: 132)
    monkeypatch.setattr(
        deepgemm_peer, "paged_launchers", lambda *_: (lambda *a: made.append(a), launch_paged)
    )
    rows, heads = 3 * next_n, 32
    keys = torch.randn(15, 64 * 128).to(FP8).view(torch.uint8)
    inputs: dict[str, Any] = {
        "q": torch.randn(rows, heads, 128).to(FP8),
        "pages": torch.cat([keys, torch.rand(15, 64).view(torch.uint8)], 1),
        "weights": torch.randn(rows, heads),
        "block_table": torch.randperm(15).int().view(3, 5),
        "seq_lens": torch.tensor([320, 40, 257], dtype=torch.int32),
        "next_n": next_n,
    }
    found = deepgemm_peer.build_paged(tmp_path, topk=50, **inputs)()
    assert made[0][2:] == (3, next_n)
    pooled = (torch.zeros(15, 128).to(FP8), torch.zeros(15))
    wanted = hisa.paged_index(**inputs, pooled=pooled, block_topk=3, topk=50)
    assert found.shape == (rows, 50) and overlap(wanted, found) == 1
    assert ((found >= 0).sum(1) == (wanted >= 0).sum(1)).all()
    assert deepgemm_peer.build_paged_logits(tmp_path, **inputs)().shape == (rows, 512)
    for bad, message in (
        ({"next_n": 3}, "and next_n 1 or 2"),
        ({"pages": inputs["pages"][:, 1:].contiguous()}, r"expected \[P, 8448\], got \[15, 8447\]"),
        ({"seq_lens": inputs["seq_lens"].long()}, "int32 tables"),
    ):
        with pytest.raises(ValueError, match=message):
            deepgemm_peer.build_paged_logits(tmp_path, **{**inputs, **bad})


def test_selections_are_compared_before_they_are_timed() -> None:
    """The share of common tokens is noted; few of them, or another shape, stop the run."""
    ours = torch.arange(40).expand(252, 40).int()
    bench = Bench("cuda_prefill", quick=True)
    cuda_prefill.check_tilelang(bench, 64, {"hisa.index": ours, "TileLang": ours.flip(1)})
    assert "selects 100.0% of the tokens of hisa.index (H=64" in bench.text[0]
    with pytest.raises(RuntimeError, match=r"TileLang has only 90\.00%"):
        cuda_prefill.check_tilelang(bench, 64, {"hisa.index": ours, "TileLang": ours + 4})
    with pytest.raises(RuntimeError, match=r"TileLang returns \[252, 39\]"):
        cuda_prefill.check_tilelang(bench, 64, {"hisa.index": ours, "TileLang": ours[:, 1:]})
    results = {"hisa.flat_index": ours, "DeepGEMM + torch.topk": ours + 1}
    with pytest.raises(RuntimeError, match=r"DeepGEMM \+ torch.topk has only 97\.50%"):
        cuda_prefill.check_deepgemm(bench, 64, results)


@pytest.mark.parametrize("kernels", ["cuda/mma-64x128", "cuda/mma-64x128, cuda/wgmma-32x128"])
def test_goals_are_for_the_kernels_they_were_set_for(
    kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The portable ones; others are named, and asked for memory alone."""
    names = iter(kernels.split(", "))
    monkeypatch.setattr("benchmarks.harness.kernels", lambda *_: next(names))
    bench = Bench("cuda_prefill", quick=True)
    bench.note_kernels(*[(64, torch.float8_e4m3fn)] * len(kernels.split(", ")))
    assert bench.text == [f"\nkernels {kernels}"]
    found = {
        peer: Measurement(peer, {}, (0.01,), 2**29, None)
        for peer in ("hisa.index", "hisa.flat_index")
    }
    cuda_prefill.goals(bench, found, 65536, 64)
    units = [what.split()[0] for what, *_ in bench.goals]
    assert units == (["MiB"] if "wgmma" in kernels else ["ms", "ms", "MiB"])
    bench.skip("TileLang", {}, "reason")
    assert bench.rows()[0]["kernels"] == kernels


@pytest.mark.parametrize("measured", [True, False], ids=["measured", "skipped"])
def test_the_summary_shows_the_peer_where_it_ran(tmp_path: Path, measured: bool) -> None:
    """A peer that was skipped leaves its column empty; shapes of ours alone are left out."""
    shape: report.Record = {"rows": 8, "keys": 8, "heads": 2, "peak_extra_bytes": 2**30}
    records: list[report.Record] = [
        {"peer": peer, "median_s": median, **shape}
        for peer, median in [("hisa.index", 1), ("hisa.flat_index", 2), ("torch in chunks", 3)]
    ]
    for peer in ("TileLang", "DeepGEMM + torch.topk"):
        records.append({"peer": peer, "median_s": 1.5 if measured else None, **shape})
    records.append({"peer": "hisa.index", "median_s": 1, **shape, "keys": 9})
    report.write_csv(tmp_path / "cuda_prefill.csv", records)
    header, times, memory = summary.prefill_rows(tmp_path)
    theirs = ("1.50 s, 1.5x" if measured else "",) * 2
    assert header[1:4] == ("`hisa.index`", "TileLang", "DeepGEMM + torch.topk")
    assert times == ("8 x 8, H=2, random, portable", "1.00 s", *theirs, "3.00 s, 3.0x",
                     "2.00 s, 2.0x", "cuda_prefill")  # fmt: skip
    assert memory[0] == "memory of 8 x 8, H=2, random, portable"
    assert memory[1:3] == ("1.00 GiB", "1.00 GiB" if measured else "")


def test_the_summary_shows_calls_alone_and_together(tmp_path: Path) -> None:
    """What one of many takes is theirs, divided; a peer that waits for the host has no ratio."""
    shape: report.Record = {"batch": 2, "tokens": 8, "next_n": 1}
    medians = {"hisa.paged_index": 2e-5, f"hisa.paged_index{cuda_decode.TOGETHER}": 16e-5,
               "TileLang": 9e-4, "flat": 6e-5}  # fmt: skip
    records = [{"peer": peer, "median_s": median, **shape} for peer, median in medians.items()]
    report.write_csv(tmp_path / "cuda_decode.csv", records)
    assert summary.decode_rows(tmp_path) == [
        ("decode, 2 x 8 tokens, paged", "20.0 us; 10.0 us each of 16 in a graph",
         "TileLang: 900 us; flat: 60.0 us", "3.0x time", "cuda_decode")
    ]  # fmt: skip


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_decode_steps_of_the_module(cache: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The case for a GPU, on a CPU: peers take the same steps, and agree where all blocks fit."""
    pytest.importorskip("transformers")
    monkeypatch.setattr(cuda_decode_module, "DEVICE", "cpu")
    monkeypatch.setattr(cuda_decode_module, "ROOM", 64)
    monkeypatch.setattr(cuda_decode_module, "STEPS", 3)
    compiled = [cuda_decode_module.COMPILED] if cache == "static" else []
    compiling = {how: {"fullgraph": True, "backend": "aot_eager"} for how in compiled}
    monkeypatch.setattr(cuda_decode_module, "COMPILING", compiling)
    results = {
        peer + how: cuda_decode_module.build(peer + how, keys=3000, cache=cache)()
        for peer in (decode_module.OWN, decode_module.HISA)
        for how in ("", *compiled)
    }
    cuda_decode_module.check(results)
    torch._dynamo.reset()
