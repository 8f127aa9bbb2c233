"""From the host to a device, and back."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def upload(numbers: Tensor, device: torch.device) -> Tensor:
    """Bring numbers from the host to a device, without waiting for it."""
    if device.type == "cuda":
        return numbers.pin_memory().to(device, non_blocking=True)
    return numbers.to(device)


def download(numbers: Tensor) -> Callable[[], list[int]]:
    """Begin to bring integers to the host; what is returned waits for them, and returns them."""
    if not numbers.is_cuda:
        found: Callable[[], list[int]] = numbers.tolist
        return found
    there = torch.empty(numbers.shape, dtype=numbers.dtype, device="cpu", pin_memory=True)
    there.copy_(numbers, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record(torch.cuda.current_stream(numbers.device))

    def wait() -> list[int]:
        arrived.synchronize()
        listed: list[int] = there.tolist()
        return listed

    return wait
