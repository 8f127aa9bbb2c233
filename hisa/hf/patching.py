"""`hisa.patch`: put HISA into a model's indexers, and take it out again."""

from __future__ import annotations

import logging
import threading
import warnings
from types import TracebackType

from torch import nn

from hisa.agreement import LayerReport
from hisa.checking import check_types

from . import slots
from .audit import LayerAudit, check_share
from .exact import LayerExact
from .forward import PatchedForward, Shared
from .models import is_shared_layer, looks_like_indexer, recognise, supported
from .settings import Settings
from .status import LayerStatus, Status

logger = logging.getLogger(__name__)

_patching = threading.Lock()  # one model is patched or restored at a time


class PatchHandle:
    """A patch of one model: a context manager, or call `remove()`.

    The handle does not keep the model alive, and dropping the handle does not undo the patch.
    """

    def __init__(
        self, shared: Shared, forwards: list[PatchedForward], others: list[str], audit: float
    ) -> None:
        self._shared = shared
        self._forwards = tuple(forwards)
        self._others = tuple(others)  # attention layers that reuse an earlier layer's selection
        self._audit = audit

    @property
    def settings(self) -> Settings:
        """The options of the patch."""
        return self._shared.settings

    def remove(self) -> None:
        """Restore every original forward exactly.

        A second call does nothing, and neither does one after the model was patched again: the
        newer handle then owns the patch.
        """
        with _patching:
            removed = [forward for forward in self._forwards if forward.installed]
            for forward in removed:
                slots.uninstall(forward)
        if removed:
            logger.info("hisa removed from %d indexers", len(removed))
            self._shared.warn_if_never_pruned()

    def status(self) -> Status:
        """Return what each layer did since it was patched. `print` shows it as a table.

        Waits for the device.
        """
        patched = tuple(forward.status() for forward in self._forwards)
        shared = tuple(LayerStatus(name, "shared") for name in self._others)
        return Status(self.settings, patched + shared, self._shared.windows.scans, self._audit)

    def report(self) -> LayerReport:
        """Return how much of the flat indexer's selection each layer found, in the audited rows.

        It stays available after `remove()`. Waits for the device.

        Raises:
            RuntimeError: the model was patched without an audit.
        """
        if not self._audit:
            raise RuntimeError("no rows were audited; call hisa.patch(..., audit=0.01)")
        audits = {forward.name: forward.audit for forward in self._forwards}
        return LayerReport({name: audit.comparison() for name, audit in audits.items() if audit})

    def __enter__(self) -> PatchHandle:
        if self._forwards and not any(forward.installed for forward in self._forwards):
            raise RuntimeError("this patch was removed; call hisa.patch again")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.remove()

    def __repr__(self) -> str:
        active = sum(forward.installed for forward in self._forwards)
        return f"PatchHandle({active} of {len(self._forwards)} indexers patched, {self.settings})"


def patch(
    model: nn.Module,
    *,
    block_size: int = 128,
    block_topk: int = 64,
    topk: int | None = None,
    pooling: str = "mean",
    precision: str = "model",
    power_of_two: bool = False,
    hadamard: bool = False,
    audit: float = 0.0,
    exact: bool = False,
) -> PatchHandle:
    """Replace the flat indexers in a Hugging Face model by HISA.

    Patched indexers take the same arguments and return the same kind of result, [B, S, min(topk,
    T)] int32 distinct positions of the T keys. A query that sees no more than `block_topk` blocks
    gets the flat indexer's selection. Everything that `generate` does works as before. A call whose
    mask is not one range of keys per query is left to the model's own indexer, with one warning.
    Under a sliding-window mask, which no supported model has, a token generated alone and the same
    token in a longer prefill can get different selections, since their blocks begin elsewhere.

    Beside a layer of transformers' own caches a patched indexer keeps the pooled keys, and with
    "fp8" the quantised ones, so that a step prepares only what is new. It looks at whether the
    cache still has the keys of before; where that is not certain, it prepares all of them again,
    as it does in inference mode and with `hadamard`. Selections are the same either way. Keys that
    are changed through `.data` or by NumPy go unnoticed, as torch does not notice that either; then
    patch again. This takes 1 / block_size of the memory of the cached keys, with "fp8" another byte
    for each of their values, and goes when the cache or the patch goes.

    Only the given instances change. Patching again replaces the settings; `remove()` then restores
    the true originals. state_dict, `save_pretrained`, pickling and deepcopy see an unpatched model.

    A compiled model has the patched indexers in its graph, if its cache is static or it has none.
    There all keys are pooled in each step, with "fp8" quantised too; calls are not counted; and no
    call is left to the model's own indexer: under a mask that is not one range of keys per query,
    a query chooses among all keys from its first to its last, of which attention then sees those
    that the mask has. With a growing cache, `audit` or `exact` the graph breaks at each indexer.

    Args:
        model: Any module that contains supported indexers, or is one.
        block_size: Tokens per block: 8, 16, 32, 64, 128 or 256.
        block_topk: Blocks kept per query, at least 2. `block_topk * block_size` is the budget: the
            number of tokens that are scored exactly.
        topk: Tokens selected per query; None means each indexer's own `index_topk`. At most the
            budget.
        pooling: How a block's keys become the one that is scored first, "mean" or "max".
        precision: In which dtype queries and keys are scored: "model", theirs, or "fp8", one scale
            per token and head. Then even a budget that covers all tokens may select others than the
            model's own indexer. The cache keeps the model's dtype.
        power_of_two: With "fp8", round each scale up to a power of two.
        hadamard: With "fp8", rotate queries and keys by a Hadamard matrix first, as DeepSeek-V3.2's
            own code does. Needs a `head_dim` that is a power of two.
        audit: Share of the rows, 0 to 1, that the flat indexer answers too, for the same queries,
            keys and weights in the same precision. The handle's `report()` says how well the two
            agree; what the model returns does not change. Costs flat twice for these rows. A layer
            keeps 20 bytes for each of them, and 32768 of them at most: then half are dropped at
            random, and the share of later rows is halved. The same calls audit the same rows.
        exact: Run flat for every row for which it is not proved that HISA selects the same, as
            `hisa.exact_index` does. The selection then is always flat's; how often flat had to run
            is in `status()`. With keys that prove little it takes longer than flat alone.

    Returns:
        A handle with `remove()`, `status()` and `report()`, which is also a context manager.

    Raises:
        TypeError: if `model` is not a module, an option has the wrong type, the model contains an
            indexer that is not known, or an indexer's forward was replaced by something else.
        ValueError: if an option or an indexer's shape is not supported, or the budget is smaller
            than topk.
        RuntimeError: if hisa's extension is not built; the message says what to run.

    Warns:
        UserWarning: if there is nothing to patch; later, once each, if a mask makes a call fall
            back, and, during generation or on removal, if the budget has covered all tokens so far.

    Example:
        >>> with hisa.patch(model, block_size=128, block_topk=64) as handle:
        ...     model.generate(**inputs)
        ...     print(handle.status())
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    check_share(audit)
    check_types(bool, exact=exact)
    shared = Shared(
        Settings(block_size, block_topk, topk, pooling, precision, power_of_two, hadamard)
    )
    found = [(name, m) for name, m in model.named_modules() if looks_like_indexer(name, m)]
    with _patching:
        forwards = []
        for layer, (name, module) in enumerate(found):  # nothing changes until all are checked
            spec = recognise(name, module)
            slots.check(name, module)
            shared.settings.check(spec.class_name, module)
            proved = LayerExact(module) if exact else None
            audited = (
                LayerAudit(shared.settings, module, audit, seed=layer, index=proved)
                if audit
                else None
            )
            forwards.append(PatchedForward(name, layer, module, spec, shared, proved, audited))
        for forward in forwards:
            slots.install(forward)
            logger.info("hisa patched %s (%s)", forward.name, forward.spec.model_type)
    if not forwards:
        warnings.warn(
            f"hisa: {type(model).__name__} contains no indexer, so nothing was patched. "
            f"Supported: {supported()}",
            UserWarning,
            stacklevel=2,
        )
    reusing = [name for name, module in model.named_modules() if is_shared_layer(module)]
    return PatchHandle(shared, forwards, reusing, audit)
