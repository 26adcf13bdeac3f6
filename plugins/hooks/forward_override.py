"""Another ``forward`` for one module: put on inside whatever hooks wrap it, and taken off without a trace, in any order.

accelerate and diffusers hook a module by replacing ``module.forward`` and keeping what was there:

    called →  module.forward: a hook →  … →  the innermost: the class's own forward

The innermost is what is replaced, wherever it is kept. So hooks that load weights, move inputs or skip the whole call run around
the new forward as they ran around the old one, and may come and go while it is on.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from tilewise.plugins.diffusers_compat import kept_forwards
from tilewise.plugins.torch_compat import has_forward_hooks


class ForwardOverride:
    """``function(override, *args, **kwargs)`` in place of one module's forward; ``remove()`` takes it off.

    stock: the module's own forward, for calls that are not for the function.
    state: what the function goes by; None once it was removed. A caller that nobody can find may still hold the function
    then, and it has to pass everything on to ``stock``.
    """

    def __init__(self, module: nn.Module, function: Callable[..., Any], state: Any) -> None:
        self.module = module
        self.state: Any = state
        self.stock = types.MethodType(type(module).forward, module)
        self.forward = functools.update_wrapper(functools.partial(function, self), self.stock)
        self._was_own = "forward" in module.__dict__  # where hooks have been, they leave the class's forward there

    def remove(self) -> None:
        self.state = None
        for holder, name in _places(self.module):
            if getattr(holder, name, None) is not self.forward:
                continue
            if holder is self.module and name == "forward" and not self._was_own:
                del self.module.forward
            else:
                setattr(holder, name, self.stock)


def override_forward(module: nn.Module, function: Callable[..., Any], state: Any) -> ForwardOverride | None:
    """Put ``function`` in place of a module's own forward; None, and nothing done, where something else replaced it."""
    override = ForwardOverride(module, function, state)
    for holder, name in _places(module):
        found = getattr(holder, name, None)
        if isinstance(found, types.MethodType) and found == override.stock:
            setattr(holder, name, override.forward)
            return override
    return None


def can_override(module: nn.Module) -> bool:
    """Whether ``override_forward`` would find a module's own forward, or an override that is in its place."""
    for holder, name in _places(module):
        found = getattr(holder, name, None)
        if isinstance(found, types.MethodType) and found == types.MethodType(type(module).forward, module):
            return True
        if isinstance(found, functools.partial) and any(isinstance(arg, ForwardOverride) for arg in found.args[:1]):
            return True
    return False


def has_own_forward(module: nn.Module) -> bool:
    """Whether calling a module runs its class's forward and nothing else: no hook of any library, no replacement."""
    replaced = module.__dict__.get("forward")
    if replaced is not None and getattr(replaced, "__func__", None) is not type(module).forward:
        return False
    return not has_forward_hooks(module)


def _places(module: nn.Module) -> Iterator[tuple[Any, str]]:
    """Where a module's forward may be kept: by hooks of diffusers and accelerate, and on the module."""
    yield from kept_forwards(module)
    yield module, "forward"
