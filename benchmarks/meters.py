"""Time and peak memory of one call. One class per kind of device; `METERS` names them.

On a GPU, time is taken by events on the device, and memory from torch's allocator, which counts
every tensor.

Memory is what a call takes beyond its inputs, its result included: the highest resident size during
the call less the resident size before it. The kernel keeps that maximum (VmHWM) and resets it on
request, so nothing has to be sampled. Each measurement has a process of its own: memory that an
earlier call freed, but that the allocator kept, would hide what the next one needs.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import time
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

import torch

Call = Callable[[], object]
Shape = Mapping[str, int | str]
Build = Callable[..., Call]  # build(peer, **shape)


class Meter(Protocol):
    """How one kind of device is measured."""

    def seconds(self, call: Call) -> float:
        """Run the call and return the time until its result is there."""
        ...

    def peak_bytes(self, call: Call) -> int:
        """Run the call and return the most memory that it held beyond what was there before."""
        ...


class CpuMeter:
    """Wall clock and resident memory of this process (Linux)."""

    def seconds(self, call: Call) -> float:
        """Run the call and return its wall time."""
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    def peak_bytes(self, call: Call) -> int:
        """Run the call and return by how much resident memory rose."""
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # give back what building the inputs left over
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM := VmRSS
        before = _status_bytes("VmHWM")
        result = call()
        peak = _status_bytes("VmHWM")
        del result
        return max(0, peak - before)


class CudaMeter:
    """Events on the device, and the bytes of all tensors on it."""

    AHEAD = 1_000_000  # cycles, about half a millisecond

    def seconds(self, call: Call) -> float:
        """Run the call and return the time that it keeps the device busy.

        The device sleeps first, so that the time that the host takes to launch does not count.
        """
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        torch.cuda._sleep(self.AHEAD)
        start.record()
        call()
        end.record()
        end.synchronize()
        milliseconds: float = start.elapsed_time(end)
        return milliseconds / 1e3

    def peak_bytes(self, call: Call) -> int:
        """Run the call and return by how much the allocated bytes rose."""
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = call()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated()
        del result
        return peak - before


METERS: dict[str, Meter] = {"cpu": CpuMeter(), "cuda": CudaMeter()}


def peak_bytes(device: str, build: Build, peer: str, shape: Shape) -> int | None:
    """Measure a call's peak memory, on the CPU in a fresh process; None if the system killed it.

    Raises:
        RuntimeError: the call failed; its traceback is on standard error.
    """
    if device == "cuda":  # counts tensors, so that what the allocator keeps does not matter
        torch.cuda.empty_cache()
        return METERS[device].peak_bytes(build(peer, **shape))
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measure, args=(sender, device, build, peer, dict(shape)))
    process.start()
    sender.close()
    try:
        peak: int | None = receiver.recv()
    except EOFError:
        peak = None
    process.join()
    if peak is None and (process.exitcode or 0) >= 0:  # below 0: a signal, such as out of memory
        raise RuntimeError(f"{peer} failed while its memory was measured; see the traceback above")
    return peak


def available_bytes() -> int:
    """Return the memory that this machine could give to a process now."""
    return _field_bytes(Path("/proc/meminfo"), "MemAvailable")


def _measure(
    sender: Connection, device: str, build: Build, peer: str, shape: dict[str, Any]
) -> None:
    sender.send(METERS[device].peak_bytes(build(peer, **shape)))


def _status_bytes(field: str) -> int:
    return _field_bytes(Path("/proc/self/status"), field)


def _field_bytes(file: Path, field: str) -> int:
    for line in file.read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"{file} has no field {field}")
