"""What accelerate's hooks do to a module's forward, for tests on machines without accelerate.

The same steps as `accelerate.hooks.add_hook_to_module` and `remove_hook_from_module`, 1.x.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import nn


class CountingHook:
    """Counts what passes through it."""

    def __init__(self) -> None:
        self.before = self.after = 0

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        self.before += 1
        return args, kwargs

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        self.after += 1
        return output


def add_hook(module: Any, hook: CountingHook) -> None:
    """Replace the instance's forward, keeping the one it has in `_old_forward`."""
    if hasattr(module, "_hf_hook") and hasattr(module, "_old_forward"):
        old_forward = module._old_forward
    else:
        old_forward = module.forward
        module._old_forward = old_forward
    module._hf_hook = hook

    def new_forward(module: Any, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = module._hf_hook.pre_forward(module, *args, **kwargs)
        output = module._old_forward(*args, **kwargs)
        return module._hf_hook.post_forward(module, output)

    module.forward = functools.update_wrapper(functools.partial(new_forward, module), old_forward)


def remove_hook(module: Any) -> None:
    """Put `_old_forward` back."""
    del module._hf_hook
    module.forward = module._old_forward
    del module._old_forward
