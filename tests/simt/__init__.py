"""The CUDA kernels that score and select on a CPU, thread by thread: see scheduler.h.

`build` compiles them with the wrappers of this folder in place of csrc/cuda/ptx; `Hopper` calls
those of csrc/cuda/sm90, and `Portable` the others. What it cannot show: swizzles, descriptors,
registers, fences, and anything about time.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import torch
from torch import Tensor

import hisa
from tests.case import Case
from tests.checker import Result
from tests.numeric import FP8

ROOT = Path(__file__).resolve().parents[2]
TYPES = (torch.float32, torch.bfloat16, torch.float16, FP8)  # as ElementType has them
FLAGS = "-std=c++20 -O2 -w -fPIC -shared -fno-stack-protector -U_FORTIFY_SOURCE"


POINTERS = (
    "q", "k", "pooled", "weights", "k_scale", "pooled_scale", "ks", "ke", "cu_seqlens",
)  # fmt: skip
SIZES = (
    "rows", "keys", "heads", "dim", "segments", "type", "block_size", "block_topk", "topk",
    "multiprocessors", "shared", "split",
)  # fmt: skip


class Call(ctypes.Structure):
    """The struct of call.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in POINTERS),
        *((name, ctypes.c_int64) for name in SIZES),
        ("seed", ctypes.c_uint64),
        ("indices", ctypes.c_void_p),
        ("scores", ctypes.c_void_p),
    ]


def build(folder: Path) -> ctypes.CDLL:
    """Compile the emulator in a folder and open it."""
    here = Path(__file__).parent
    source = folder / "csrc"
    shutil.copytree(ROOT / "csrc", source)
    for wrapper in (here / "ptx").iterdir():
        shutil.copy(wrapper, source / "cuda" / "ptx")
    library = folder / "emulate.so"
    subprocess.run(
        [os.environ.get("CXX", "c++"), *FLAGS.split(), f"-I{here / 'include'}", f"-I{source}",
         *map(str, here.glob("*.cpp")), "-o", str(library)],
        check=True,
    )  # fmt: skip
    return ctypes.CDLL(str(library))


class Emulated:
    """One build, called with a seed for the order of its threads."""

    entry: str  # of the library

    def __init__(
        self, library: ctypes.CDLL, shared: int = 232448, multiprocessors: int = 2,
        split: int = 0, return_scores: bool = True,
    ) -> None:  # fmt: skip
        self.emulate = getattr(library, self.entry)
        self.shared = shared  # bytes of memory that a block can have: fewer, other layouts
        self.multiprocessors = multiprocessors
        self.split = split  # see call.h
        self.return_scores = return_scores  # else they stay 77

    def index(self, case: Case, seed: int = 0) -> Result:
        """Run hisa.index, with pooled keys from the CPU unless there are some."""
        pooled, scale = case.pooled or hisa.pool_keys(
            case.k, k_scale=case.k_scale, cu_seqlens_k=case.cu_seqlens_k,
            block_size=case.block_size, pooling=case.pooling,
        )  # fmt: skip
        sizes = {"block_size": case.block_size, "block_topk": case.block_topk}
        return self._run(case, seed, pooled=pooled, pooled_scale=scale, **sizes)

    def flat_index(self, case: Case, seed: int = 0) -> Result:
        """Run hisa.flat_index."""
        return self._run(case.replace(cu_seqlens_k=None), seed)

    def _run(self, case: Case, seed: int, **more: Tensor | int) -> Result:
        rows, keys, heads, dim = case.shape
        indices = torch.full((rows, case.topk), 77, dtype=torch.int32)
        scores = torch.full((rows, case.topk), 77.0)
        tensors = {
            "q": case.q, "k": case.k, "weights": case.weights, "k_scale": case.k_scale,
            "ks": case.ks, "ke": case.ke, "cu_seqlens": case.cu_seqlens_k,
        }  # fmt: skip
        tensors |= {name: x for name, x in more.items() if isinstance(x, Tensor)}
        held = {name: aligned(x) for name, x in tensors.items() if x is not None}
        call = Call(
            rows=rows, keys=keys, heads=heads, dim=dim, topk=case.topk, seed=seed,
            segments=0 if case.cu_seqlens_k is None else len(case.cu_seqlens_k) - 1,
            type=TYPES.index(case.q.dtype), shared=self.shared,
            multiprocessors=self.multiprocessors, split=self.split,
            indices=indices.data_ptr(), scores=scores.data_ptr() if self.return_scores else None,
            **{name: x.data_ptr() for name, x in held.items()},
            **{name: x for name, x in more.items() if isinstance(x, int)},
        )  # fmt: skip
        text = ctypes.create_string_buffer(500)
        if self.emulate(ctypes.byref(call), text, len(text)):
            raise RuntimeError(text.value.decode())
        return Result(indices, scores)


class Hopper(Emulated):
    """The kernels of csrc/cuda/sm90."""

    entry = "emulate"


class Portable(Emulated):
    """Those for all GPUs; `split` is 1 for several blocks a row, 2 if these are for the call."""

    entry = "emulate_portable"


def aligned(tensor: Tensor) -> Tensor:
    """Return a contiguous copy that begins at a multiple of 64 bytes, which torch's own do."""
    return tensor.contiguous().clone()


def select_best(
    library: ctypes.CDLL, scores: Tensor, count: int, *, chunk: int, capacity: int, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Run the portable kernels' selection: positions, ascending, and their scores."""
    positions = torch.full((count,), -7, dtype=torch.int32)
    chosen = torch.empty(count)
    text = ctypes.create_string_buffer(500)
    failed = library.select_best(
        ctypes.c_void_p(scores.data_ptr()), ctypes.c_int64(len(scores)), ctypes.c_int64(count),
        ctypes.c_int64(chunk), ctypes.c_int64(capacity), ctypes.c_uint64(seed),
        ctypes.c_void_p(positions.data_ptr()), ctypes.c_void_p(chosen.data_ptr()),
        text, ctypes.c_int64(len(text)),
    )  # fmt: skip
    if failed:
        raise RuntimeError(text.value.decode())
    return positions, chosen


def pairs_pay(library: ctypes.CDLL, blocks: Tensor, keys: int, block_size: int) -> bool:
    """Whether the GPU refines by pairs rows that keep these blocks: first tokens, [rows, kept]."""
    text = ctypes.create_string_buffer(500)
    pay = library.pairs_pay(
        ctypes.c_void_p(blocks.data_ptr()), ctypes.c_int64(blocks.shape[0]), ctypes.c_int64(keys),
        ctypes.c_int64(blocks.shape[1]), ctypes.c_int64(block_size),
        text, ctypes.c_int64(len(text)),
    )  # fmt: skip
    if pay < 0:
        raise RuntimeError(text.value.decode())
    return bool(pay)
