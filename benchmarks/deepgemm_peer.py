"""DeepGEMM's flat indexer as a peer: the fastest public kernel for Hopper, then torch.topk.

DeepGEMM is not part of this tree, and its Python package is not needed: deepgemm_launcher.cu
launches its two kernels (scores, and -inf outside of the windows) from their headers, and
deepgemm_paged_launcher.cu those for paged caches. nvcc compiles either at the first call, ten
seconds, into a folder for temporary files, where the next run finds it.

`--deepgemm PATH` is a clone of DeepGEMM with its submodules; of its files it needs

    deep_gemm/include              the kernels
    third-party/cutlass/include    CUTLASS and CuTe, as of the submodule

Scores of all pairs do not fit into memory, so 8192 queries take turns, or fewer where their scores
take more than `SCORE_BYTES`: the scores of the keys up to the last that one of them may see, then
the best of these scores. A decode step is a single call, its schedule made before, as an engine
makes one for all layers of a step.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

KERNEL = "deep_gemm/include/deep_gemm/impls/sm90_fp8_mqa_logits.cuh"
CUTLASS = "third-party/cutlass/include/cutlass/cutlass.h"
PAGED_KERNEL = KERNEL.replace("mqa", "paged_mqa")
FLAGS = (  # as DeepGEMM compiles its kernels
    *("-std=c++20", "-O3", "-w", "--expt-relaxed-constexpr", "--expt-extended-lambda"),
    *("--ptxas-options=--register-usage-level=10", "-gencode=arch=compute_90a,code=sm_90a"),
    *("-shared", "-Xcompiler=-fPIC"),
)
HEADS = (32, 64)
DIM = 128
TILE_ROWS, TILE_KEYS = 4, 256  # the kernel writes whole tiles
CHUNK_ROWS = 8192
SCORE_BYTES = 8 << 30
PAGE = 64  # tokens, in the paged kernel
NEXT_N = (1, 2)

Launch = Callable[..., bytes | None]  # pointers, then numbers; None, or what went wrong


def missing(folder: Path) -> str:
    """Return the first of the needed files that the folder lacks; an empty string if none."""
    files = (KERNEL, PAGED_KERNEL, CUTLASS)
    return next((file for file in files if not (folder / file).is_file()), "")


def obstacle(folder: Path | None) -> str:
    """Return why the peer cannot run; an empty string if it can."""
    if folder is None:
        return "needs --deepgemm PATH"
    if nvcc() is None:
        return "nvcc is not found"
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        return "needs a GPU of compute capability 9.0"
    return ""


def build(
    folder: Path | None,
    *,
    q: Tensor,
    k: Tensor,
    weights: Tensor,
    k_scale: Tensor,
    ke: Tensor,
    topk: int,
) -> Callable[[], Tensor]:
    """Return one call with the arguments of `hisa.flat_index`: [M, topk], unsorted.

    Raises:
        ValueError: the peer cannot run (`obstacle` says so beforehand), or not with these tensors.
    """
    chunks = build_scores(folder, q=q, k=k, weights=weights, k_scale=k_scale, ke=ke)

    def call() -> Tensor:
        indices = torch.full((len(q), topk), -1, device=q.device, dtype=torch.int32)
        for at, scores in chunks():
            best = best_of(scores, topk)
            indices[at, : best.shape[1]] = best
        return indices

    return call


def build_logits(folder: Path | None, **inputs: Tensor) -> Callable[[], None]:
    """Return one call that makes all scores, a chunk's over those of the chunk before."""
    chunks = build_scores(folder, **inputs)

    def call() -> None:
        for _ in chunks():
            pass

    return call


def build_scores(
    folder: Path | None, *, q: Tensor, k: Tensor, weights: Tensor, k_scale: Tensor, ke: Tensor
) -> Callable[[], Iterator[tuple[slice, Tensor]]]:
    """Return a function that yields chunks of rows with their scores, in memory that is reused.

    Scores are [R, the keys that the chunk may see rounded up to 256], fp32, -inf outside of the
    windows [0, ke).
    """
    if folder is None:
        raise ValueError(obstacle(folder))
    heads = q.shape[1]
    expected = [(q, torch.float8_e4m3fn), (k, torch.float8_e4m3fn), (weights, torch.float32)]
    expected += [(k_scale, torch.float32), (ke, torch.int32)]
    if heads not in HEADS or q.shape[2] != DIM:
        raise ValueError(f"q: expected [M, 32 or 64, {DIM}], got {[*q.shape]}")
    if not all(t.dtype == dtype and t.is_contiguous() for t, dtype in expected):
        raise ValueError("expected contiguous fp8 q and k, fp32 weights and k_scale, int32 ke")
    launch = launcher(folder, q.device)
    ks = torch.zeros_like(ke)
    chunks = split(ke)
    size = max(
        round_up(at.stop - at.start, TILE_ROWS) * round_up(end, TILE_KEYS) for at, end in chunks
    )

    def scores() -> Iterator[tuple[slice, Tensor]]:
        buffer = torch.empty(size, device=q.device)
        for at, end in chunks:
            rows, width = at.stop - at.start, round_up(end, TILE_KEYS)
            tensors = (q[at], k, k_scale, weights[at], ks[at], ke[at], buffer)
            check(launch(*(t.data_ptr() for t in tensors), rows, end, heads, width))
            yield at, buffer[: rows * width].view(rows, width)

    return scores


def build_paged(folder: Path | None, *, topk: int, **inputs: Any) -> Callable[[], Tensor]:
    """Return one call with the arguments of `hisa.paged_index`: [batch * next_n, topk], unsorted.

    Raises:
        ValueError: the peer cannot run (`obstacle` says so beforehand), or not with these tensors.
    """
    scores = build_paged_logits(folder, **inputs)
    return lambda: best_of(scores(), topk)


def build_paged_logits(
    folder: Path | None,
    *,
    q: Tensor,
    pages: Tensor,
    weights: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    next_n: int,
) -> Callable[[], Tensor]:
    """Return one call that makes all scores, [batch * next_n, the table's tokens rounded up].

    They are fp32, -inf behind a row's window. All pages of the table exist, up to the lengths,
    which are at least 1.
    """
    if folder is None:
        raise ValueError(obstacle(folder))
    rows, heads, dim = q.shape
    if heads not in HEADS or dim != DIM or next_n not in NEXT_N:
        raise ValueError(f"q: expected [M, 32 or 64, {DIM}] and next_n 1 or 2, got {[*q.shape]}")
    tensors = (q, pages, weights, seq_lens, block_table)
    dtypes = (torch.float8_e4m3fn, torch.uint8, torch.float32, torch.int32, torch.int32)
    if not all(t.dtype == d and t.is_contiguous() for t, d in zip(tensors, dtypes, strict=True)):
        raise ValueError("expected contiguous fp8 q, uint8 pages, fp32 weights, int32 tables")
    if pages.shape[1:] != (PAGE * (DIM + 4),):
        raise ValueError(f"pages: expected [P, {PAGE * (DIM + 4)}], got {[*pages.shape]}")
    batch, table_width = block_table.shape
    width = round_up(table_width * PAGE, TILE_KEYS)
    multiprocessors = count_multiprocessors(q.device)
    schedule = torch.zeros(multiprocessors + 1, 2, device=q.device, dtype=torch.int32)
    make, launch = paged_launchers(folder, q.device)
    check(make(seq_lens.data_ptr(), schedule.data_ptr(), batch, next_n))
    sizes = (batch, next_n, heads, len(pages), pages.shape[1], table_width, width)

    def scores() -> Tensor:
        logits = torch.empty(rows, width, device=q.device)
        check(launch(*(t.data_ptr() for t in (*tensors, schedule, logits)), *sizes))
        return logits

    return scores


def best_of(scores: Tensor, topk: int) -> Tensor:
    """Return the places of the best scores of each row, unsorted, -1 where they are -inf."""
    best = scores.topk(min(topk, scores.shape[1]), sorted=False)
    return best.indices.masked_fill_(best.values == -torch.inf, -1).int()


def check(error: bytes | None) -> None:
    """Raise if a launcher says that something went wrong."""
    if error is not None:
        raise RuntimeError(f"DeepGEMM: {error.decode()}")


def split(ke: Tensor) -> list[tuple[slice, int]]:
    """Cut the rows into chunks, each with the end of the keys that it may see."""
    longest = max(TILE_KEYS, round_up(int(ke.max()), TILE_KEYS))
    step = min(CHUNK_ROWS, max(1, SCORE_BYTES // (4 * longest * TILE_ROWS)) * TILE_ROWS)
    parts = [slice(start, min(start + step, len(ke))) for start in range(0, len(ke), step)]
    return [(at, int(ke[at].max())) for at in parts]


def launcher(folder: Path, device: torch.device) -> Launch:
    """Return the launcher's function, on the stream that is current whenever it is called."""
    library = load(folder, KERNEL, "deepgemm_launcher.cu", count_multiprocessors(device))
    return on_stream(library.deepgemm_logits, 7, 4, device)


def paged_launchers(folder: Path, device: torch.device) -> tuple[Launch, Launch]:
    """Return the paged launcher's functions: one that makes a schedule, and one that uses it."""
    count = count_multiprocessors(device)
    library = load(folder, PAGED_KERNEL, "deepgemm_paged_launcher.cu", count)
    schedule = on_stream(library.deepgemm_schedule, 2, 2, device)
    return schedule, on_stream(library.deepgemm_paged_logits, 7, 7, device)


def on_stream(function: Any, pointers: int, numbers: int, device: torch.device) -> Launch:
    """Return a library's function, with the current stream behind its other arguments."""
    types = [ctypes.c_void_p] * pointers + [ctypes.c_uint32] * numbers
    function.argtypes = [*types, ctypes.c_void_p]
    function.restype = ctypes.c_char_p
    return lambda *a: function(*a, torch.cuda.current_stream(device).cuda_stream)


def count_multiprocessors(device: torch.device) -> int:
    """Return how many there are; the kernels have it as a constant."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@cache
def load(folder: Path, kernel: str, source: str, multiprocessors: int) -> ctypes.CDLL:
    """Compile a launcher, if no earlier run has, and return its library."""
    includes = [folder / "deep_gemm/include", folder / "third-party/cutlass/include"]
    command = [str(nvcc()), *FLAGS, f"-DkMultiprocessors={multiprocessors}"]
    command += [f"-I{include.resolve()}" for include in includes]
    here = Path(__file__).parent
    files = (folder / kernel, here / source, here / "deepgemm_maps.h")
    content = b"".join(file.read_bytes() for file in files) + repr(command).encode()
    cached = Path(tempfile.gettempdir()) / f"hisa-deepgemm-{os.getuid()}"
    cached.mkdir(mode=0o700, exist_ok=True)
    if cached.stat().st_uid != os.getuid():
        raise RuntimeError(f"{cached} belongs to somebody else")
    library = cached / f"{hashlib.sha256(content).hexdigest()[:16]}.so"
    if not library.exists():
        half_done = library.with_suffix(f".{os.getpid()}")
        subprocess.run([*command, "-o", str(half_done), str(here / source)], check=True)
        half_done.rename(library)
    return ctypes.CDLL(str(library))


def nvcc() -> str | None:
    """Return where CUDA's compiler is."""
    home = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin"
    return shutil.which("nvcc", path=os.pathsep.join([str(home), os.environ.get("PATH", "")]))


def round_up(value: int, step: int) -> int:
    """Return the next multiple."""
    return -(-value // step) * step
