"""The windows of attention masks, found once per model forward. Which they are: `hisa.masks`."""

from __future__ import annotations

import threading
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.multiprocessing.reductions import StorageWeakRef

from hisa.masks import Scan, begin_scan, knows, scan, trace
from hisa.windows import Windows

__all__ = ["Scan", "WindowCache", "Windows", "begin_scan", "scan", "trace"]

# NOTE: here, since `import hisa` alone is to be without torch's compiler.
torch.compiler.assume_constant_result(knows)


@dataclass
class _Scanned:
    """A scan's result and the identity of the mask it came from. Does not keep the mask alive."""

    storage: StorageWeakRef
    view: tuple[object, ...]
    result: Windows | str
    served: set[int]  # layers

    def fits(self, mask: Tensor, view: tuple[object, ...], layer: int) -> bool:
        return (
            layer not in self.served
            and not self.storage.expired()
            and self.storage == StorageWeakRef(mask.untyped_storage())
            and self.view == view
        )


class WindowCache:
    """Scans a mask once for all layers of a model forward.

    Layers get fresh views of one mask, so a scan is found again by the mask's storage. A weak
    reference is held to it, during which its address cannot be given to another. A change in place
    is seen by the tensor's version. As further protection, for what has no version (tensors made in
    inference mode, memory shared with NumPy), a scan serves each layer once: when a layer comes
    back, a new forward has begun and the mask is scanned again.

    One scan is remembered per thread, so threads that share a model do not wait for each other.
    """

    def __init__(self) -> None:
        self._local = threading.local()
        self._lock = threading.Lock()
        self._scans = 0

    @property
    def scans(self) -> int:
        """How many masks were scanned."""
        return self._scans

    def get(self, mask: Tensor | None, batch: int, queries: int, layer: int) -> Windows | str:
        """Return the windows of `mask`, or why there are none, for layer number `layer`."""
        return self.begin(mask, batch, queries, layer).wait()

    def begin(self, mask: Tensor | None, batch: int, queries: int, layer: int) -> Scan:
        """Do as `get` does, but wait for the device only when the result is asked for, once."""
        if mask is None or isinstance(mask, FakeTensor):
            return self._scan(mask, batch, queries)
        last: _Scanned | None = getattr(self._local, "last", None)
        view = (batch, queries, *_view(mask))
        if last is not None and last.fits(mask, view, layer):
            last.served.add(layer)
            result = last.result
            return Scan(lambda: result, pending=False)
        storage = StorageWeakRef(mask.untyped_storage())
        scan = self._scan(mask, batch, queries)

        def finish() -> Windows | str:
            found = scan.wait()
            self._local.last = _Scanned(storage, view, found, {layer})
            return found

        return Scan(finish, scan.pending)

    def _scan(self, mask: Tensor | None, batch: int, queries: int) -> Scan:
        with self._lock:
            self._scans += 1
        return begin_scan(mask, batch, queries)


def _view(mask: Tensor) -> tuple[object, ...]:
    version = None if mask.is_inference() else mask._version
    return (mask.dtype, mask.shape, mask.stride(), mask.storage_offset(), mask.device, version)
