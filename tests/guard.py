"""Tensors that end, or begin, exactly at a page nobody may touch."""

from __future__ import annotations

import ctypes
import mmap

import torch
from torch import Tensor

PAGE = mmap.PAGESIZE
PROT_NONE = 0


def guarded(tensor: Tensor, after: bool = True) -> Tensor:
    """Return a copy of a contiguous tensor whose memory touches an unmapped page.

    With `after` the page follows the last byte, else it precedes the first. Reading past the tensor
    on that side kills the process.
    """
    size = tensor.numel() * tensor.element_size()
    room = -(-max(size, 1) // PAGE) * PAGE
    area = mmap.mmap(-1, room + 2 * PAGE)
    base = ctypes.addressof(ctypes.c_char.from_buffer(area))
    libc = ctypes.CDLL(None, use_errno=True)
    for page in (base, base + PAGE + room):
        if libc.mprotect(ctypes.c_void_p(page), ctypes.c_size_t(PAGE), PROT_NONE) != 0:
            raise OSError(ctypes.get_errno(), "mprotect failed")
    offset = PAGE + (room - size if after else 0)
    if size == 0:
        return tensor.clone()
    raw = torch.frombuffer(area, dtype=torch.uint8, offset=offset, count=size)
    copy = raw.view(tensor.dtype).view(tensor.shape)
    copy.copy_(tensor)
    return copy
