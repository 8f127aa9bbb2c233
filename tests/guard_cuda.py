"""Every CUDA tensor of a process between addresses that nobody may touch, for T4 and T5.

Memory comes from the driver, a mapping of its own for each allocation: inputs, outputs, workspace,
all that torch asks for. With `after` a tensor ends exactly where its mapping ends, with `before` it
begins where its mapping begins; behind, and in front, no address is mapped, so a stray access there
is an illegal one. On the other side lie at least 4 KiB of canary, looked at when the tensor is
freed. All of it, the tensor included, is filled with -777 before it is handed out, which is NaN to
a reader of fp32, and NaN or garbage to one of 16 or 8 bits.

    python -m tests.guard_cuda after fp8              a digest of the results of each call
    python -m tests.guard_cuda after fp8 stray-read   or another fault: has to fail

`--shapes` is the suite's.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import torch
from torch import Tensor

import hisa
from tests import builders
from tests.builders import exact_case, int32, random_case
from tests.case import Case
from tests.families import CUDA
from tests.numeric import DTYPES, short_name
from tests.test_cuda_dispatch import KERNELS

CANARY = 4096  # bytes
SENTINEL = (-777).to_bytes(4, "little", signed=True)
EXACT = 25  # calls of random small sizes
# keys, topk, heads, head dimension: at once, in chunks of all sizes, in the workspace; for Hopper
LAYOUTS = [
    (5003, 700, 1, 16), (30001, 2048, 1, 16), (40003, 9001, 1, 16), (60001, 25000, 1, 16),
    (70001, 65001, 1, 16), (9001, 600, 16, 64), (20001, 9001, 16, 64),
]  # fmt: skip


class Location(ctypes.Structure):
    """CUmemLocation: a device by its number."""

    _fields_ = [("type", ctypes.c_int), ("id", ctypes.c_int)]


class Properties(ctypes.Structure):
    """CUmemAllocationProp."""

    _fields_ = [
        ("type", ctypes.c_int),
        ("handle_types", ctypes.c_int),
        ("location", Location),
        ("meta_data", ctypes.c_void_p),
        ("flags", ctypes.c_ubyte * 8),
    ]


class Access(ctypes.Structure):
    """CUmemAccessDesc."""

    _fields_ = [("location", Location), ("flags", ctypes.c_int)]


PINNED, ON_DEVICE, READ_WRITE = 1, 1, 3
Address, Size = ctypes.c_uint64, ctypes.c_size_t


class GuardedMemory:
    """An allocator for device 0, of which `after` says on which side nothing is mapped."""

    def __init__(self, after: bool) -> None:
        self.after = after
        self.mappings: dict[int, tuple[int, int]] = {}  # by tensor: address of the mapping, bytes
        self.driver = ctypes.CDLL("libcuda.so.1")
        device, context, step = ctypes.c_int(), ctypes.c_void_p(), Size()
        self.call("cuInit", ctypes.c_uint(0))
        self.call("cuDeviceGet", ctypes.byref(device), ctypes.c_int(0))
        self.call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        self.call("cuCtxSetCurrent", context)
        location = Location(ON_DEVICE, device.value)
        self.properties = Properties(type=PINNED, location=location)
        self.access = Access(location, READ_WRITE)
        minimum = ctypes.c_int(0)
        self.call("cuMemGetAllocationGranularity", ctypes.byref(step),
                  ctypes.byref(self.properties), minimum)  # fmt: skip
        self.step = step.value

    def call(self, name: str, *arguments: Any) -> None:
        """Call the driver; leave the process if it reports an error, of a kernel before too."""
        error = getattr(self.driver, name)(*arguments)
        if error != 0:
            text = ctypes.c_char_p()
            self.driver.cuGetErrorString(ctypes.c_int(error), ctypes.byref(text))
            leave(f"{name}: error {error}, {(text.value or b'unknown').decode()}")

    def allocate(self, size: int, device: int, stream: int | None) -> int | None:
        """Return the address of `size` bytes, or None if there are none."""
        if size == 0:
            return None
        room = -(-(size + CANARY) // self.step) * self.step
        base, handle = Address(), Address()
        none = ctypes.c_ulonglong(0)
        self.call("cuMemAddressReserve", ctypes.byref(base), Size(room + 2 * self.step), Size(0),
                  Address(0), none)  # fmt: skip
        self.call("cuMemCreate", ctypes.byref(handle), Size(room), ctypes.byref(self.properties),
                  none)  # fmt: skip
        start = base.value + self.step
        self.call("cuMemMap", Address(start), Size(room), Size(0), handle, none)
        self.call("cuMemRelease", handle)  # it goes with its mapping
        self.call("cuMemSetAccess", Address(start), Size(room), ctypes.byref(self.access), Size(1))
        word = ctypes.c_uint(int.from_bytes(SENTINEL, "little"))
        self.call("cuMemsetD32_v2", Address(start), word, Size(room // 4))
        self.call("cuCtxSynchronize")
        tensor = start + (room - size if self.after else 0)
        self.mappings[tensor] = (start, room)
        return tensor

    def free(self, tensor: int, size: int, device: int, stream: int | None) -> None:
        """Look at the canary, and unmap the memory."""
        self.call("cuCtxSynchronize")
        start, room = self.mappings.pop(tensor)
        canary = tensor - CANARY if self.after else tensor + size
        found = ctypes.create_string_buffer(CANARY)
        self.call("cuMemcpyDtoH_v2", found, Address(canary), Size(CANARY))
        phase = (canary - start) % 4
        if found.raw != (SENTINEL * (CANARY // 4 + 1))[phase : phase + CANARY]:
            leave(f"canary overwritten beside a tensor of {size} bytes")
        self.call("cuMemUnmap", Address(start), Size(room))
        self.call("cuMemAddressFree", Address(start - self.step), Size(room + 2 * self.step))

    def install(self) -> None:
        """Have torch take all its CUDA memory from here, from the first byte on."""
        take = ctypes.CFUNCTYPE(
            ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int, ctypes.c_void_p
        )(self.allocate)  # fmt: skip
        give = ctypes.CFUNCTYPE(
            None, ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int, ctypes.c_void_p
        )(self.free)  # fmt: skip
        self.kept = (take, give)
        allocator = torch._C._cuda_customAllocator(
            *(ctypes.cast(function, ctypes.c_void_p).value or 0 for function in self.kept)
        )
        torch.cuda.memory.change_current_allocator(torch.cuda.memory._CUDAAllocator(allocator))


def leave(message: str) -> NoReturn:
    """End the process at once: an exception would be lost in the allocator's callers."""
    print(message, file=sys.stderr, flush=True)
    os._exit(3)


def calls(dtype: torch.dtype) -> Iterator[Case]:
    """Calls of all sizes, for all kernels, in all layouts of memory."""
    for seed in range(EXACT):
        yield exact_case(seed, dtype=dtype, budget=2e5)
    for seed, (heads, depth, _) in enumerate(KERNELS):
        n = 203 + seed
        yield random_case(seed, dtype, M=4, N=n, H=heads, D=depth, topk=21, block_topk=5,
                          ks=int32([0, 13, 101, n - 1]), ke=int32([13, n, n - 1, n]),
                          cu_seqlens_k=int32([0, 13, n]))  # fmt: skip
    for seed, (n, topk, heads, depth) in enumerate(LAYOUTS):
        yield random_case(seed, dtype, M=2, N=n, H=heads, D=depth, topk=topk, block_size=256,
                          block_topk=max(20, -(-topk // 256)), ks=int32([0, 77]))  # fmt: skip


def digest(case: Case) -> str:
    """Run every op and hash the results, which have passed the checker of outputs."""
    pooled = CUDA.pool_keys(case)
    results = [*pooled, *CUDA.index(case), *CUDA.flat_index(case)]
    results += CUDA.index(case, pooled=pooled)
    hashed = hashlib.sha256()
    for result in results:
        hashed.update(result.contiguous().view(torch.uint8).numpy().tobytes())
    return hashed.hexdigest()


def bytes_at(address: int, size: int) -> Tensor:
    """Return `size` bytes from an address on as a tensor, whatever is there."""
    make = torch._C._construct_storage_from_data_pointer
    storage = make(address, torch.device("cuda", 0), size)
    return torch.empty(0, dtype=torch.uint8, device="cuda").set_(storage)


def stray_read(after: bool, dtype: torch.dtype) -> None:
    """Have the kernels read one key more than there are, behind the last or before the first."""
    case = random_case(0, dtype, M=2, N=64, H=2, D=64, topk=21).replace(k_scale=None).to("cuda")
    row = 64 * dtype.itemsize
    start = case.k.data_ptr() - (0 if after else row)
    k = bytes_at(start, 65 * row).view(dtype).view(65, 64)
    hisa.flat_index(case.q, k, case.weights, topk=21)
    torch.cuda.synchronize()


def stray_write(after: bool, dtype: torch.dtype) -> None:
    """Write the four bytes on the mapped side of a tensor."""
    tensor = torch.zeros(1000, device="cuda")
    start = tensor.data_ptr() + (-4 if after else tensor.numel() * 4)
    bytes_at(start, 4).zero_()


def unwritten(after: bool, dtype: torch.dtype) -> None:
    """Look at what a kernel that writes nothing would return."""
    left = torch.empty(5, dtype=torch.int32, device="cuda").tolist()
    if left == [-777] * 5:
        leave("fresh memory holds -777")


FAULTS: dict[str, Callable[[bool, torch.dtype], None]] = {
    "stray-read": stray_read,
    "stray-write": stray_write,
    "unwritten": unwritten,
}


def main() -> None:
    """Run all calls of a dtype, or one fault."""
    dtypes = {short_name(dtype): dtype for dtype in DTYPES}
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("side", choices=["after", "before"])
    parser.add_argument("dtype", choices=dtypes)
    parser.add_argument("fault", nargs="?", choices=FAULTS)
    parser.add_argument("--shapes", default=builders.shapes, choices=builders.SHAPES)
    options = parser.parse_args()
    builders.shapes = options.shapes
    after, dtype = options.side == "after", dtypes[options.dtype]
    memory = GuardedMemory(after)  # referred to until the end: torch calls into it
    memory.install()
    if options.fault:
        FAULTS[options.fault](after, dtype)
    else:
        for case in calls(dtype):
            print(digest(case), case.describe())
    print("done", flush=True)
    os._exit(0)  # the allocator must outlive all tensors


if __name__ == "__main__":
    main()
