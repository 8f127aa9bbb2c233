"""Where a forward is put on one module instance, and how it is taken off again.

A module's forward is looked up on the instance first, so an instance attribute `forward` replaces
the class's. accelerate's hooks (`device_map`, offload) do the same: they keep what they found in
`_old_forward` and call it. A replacement goes under such a hook, and is found there if the hook
came later; either way the hook goes on working.
"""

from __future__ import annotations

import logging
import types
import weakref
from typing import Any

from torch import nn

logger = logging.getLogger(__name__)

HOOKED, PLAIN = "_old_forward", "forward"  # instance attributes that may hold a forward
_ABSENT = object()


class Replacement:
    """A callable that stands in for the forward of one module.

    It refers to its module weakly, so a patched model is freed as promptly as any other. A copied
    or unpickled model gets its own forward back: a patch covers the instances it was applied to,
    and files contain nothing of it.

    NOTE: Without a `__dict__`, because a hook that wraps this with `functools.update_wrapper` would
    copy its entries, and copying the model would then copy them too.
    """

    __slots__ = ("__weakref__", "_module", "_previous", "installed")

    def __init__(self, module: nn.Module) -> None:
        self._module = weakref.ref(module)
        self._previous: Any = _ABSENT  # what the slot held before
        self.installed = False

    @property
    def module(self) -> nn.Module:
        """The module whose forward this is."""
        module = self._module()
        if module is None:
            raise ReferenceError("the module of this hisa patch no longer exists")
        return module

    def original(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module's own forward."""
        return type(self.module).forward(self.module, *args, **kwargs)

    def clear(self) -> None:
        """Forget what was kept for later calls; there will be none."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run in place of the module's forward."""
        raise NotImplementedError

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return _own_forward(memo.get(id(self.module), self.module))

    def __reduce__(self) -> tuple[Any, ...]:
        # While the module is being unpickled it has no instance attributes yet, so this gives the
        # forward of its class.
        return getattr, (self.module, PLAIN)


def check(name: str, module: nn.Module) -> None:
    """Raise TypeError if the module already has a forward that is neither its class's nor ours."""
    forward = _current(module, _slot(module))
    if not (forward in (_ABSENT, _own_forward(module)) or isinstance(forward, Replacement)):
        raise TypeError(
            f"{name or 'the model itself'}: expected the forward of {type(module).__name__}, found "
            f"{forward!r}. Another patch is in place; remove it first"
        )


def install(replacement: Replacement) -> None:
    """Put a replacement in its module's slot, in place of any earlier one."""
    module = replacement.module
    slot = _slot(module)
    earlier = _current(module, slot)
    if isinstance(earlier, Replacement):
        uninstall(earlier)
        earlier = _current(module, slot)
    replacement._previous = earlier
    replacement.installed = True
    setattr(module, slot, replacement)


def uninstall(replacement: Replacement) -> None:
    """Restore what the slot held before. Nothing happens if the replacement is not installed."""
    module = replacement._module()
    if module is None or not replacement.installed:
        return
    replacement.installed = False
    replacement.clear()
    # A hook may have come or gone since, and moved the replacement to the other slot.
    slot = next((s for s in (HOOKED, PLAIN) if vars(module).get(s) is replacement), None)
    if slot is None:
        logger.warning(
            "the forward of a %s was wrapped after hisa.patch: hisa is off, the wrapper stays",
            type(module).__name__,
        )
    elif replacement._previous is not _ABSENT:
        setattr(module, slot, replacement._previous)
    elif slot == PLAIN:
        delattr(module, slot)
    else:
        setattr(module, slot, _own_forward(module))  # what the hook would have found


def _slot(module: nn.Module) -> str:
    return HOOKED if HOOKED in vars(module) else PLAIN


def _current(module: nn.Module, slot: str) -> Any:
    """Return what the slot holds, if it is not what a shallow copy took over from its original."""
    forward = vars(module).get(slot, _ABSENT)
    if isinstance(forward, Replacement) and forward._module() is not module:
        return _ABSENT
    return forward


def _own_forward(module: nn.Module) -> types.MethodType:
    return types.MethodType(type(module).forward, module)
