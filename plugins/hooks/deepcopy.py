"""``copy.deepcopy`` of a patched denoiser, alone or in a pipeline: the copy is patched alike, with a state of its own.

Hooks are functions that know the denoiser they were made for, so copying them would tie two denoisers together. The copy is made
as of a stock one, what a patch had put on it is taken off, and then it is patched with the same config. Its ``summary`` begins
empty. The original is not touched, not even for a moment.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from tilewise.plugins.errors import TilewiseError
from tilewise.plugins.hooks.forward_override import ForwardOverride
from tilewise.plugins.torch_compat import FORWARD_HOOKS

if TYPE_CHECKING:
    from tilewise.plugins.runtime.patched_denoiser import Patch

COPIER = "__deepcopy__"  # copy.deepcopy asks the object for it, before its class
STATE = "__getstate__"  # copy.copy asks for it, in the same way


def copy_patched(patch: Patch, denoiser: nn.Module, attributes: set[str], memo: dict[int, Any]) -> nn.Module:
    """What ``copy.deepcopy(denoiser, memo)`` gives.

    Args:
        attributes: what ``patch`` added to the denoiser's own attributes.
    """
    memo[id(patch)] = patch  # hooks that are its methods are copied as they are, and removed
    memo[id(patch.calls)] = patch.calls
    memo[id(patch.cache)] = patch.cache
    copied = copy_without(denoiser, patch.handles, attributes, memo)
    if patch.cache is not None:
        patch.cache.take_off_copy(copied, memo)
    pipe = patch.state.pipe()
    # A denoiser that is copied alone leaves its pipeline, whose scheduler will not count its steps.
    owner = memo.get(id(pipe), copied) if pipe is not None else copied
    type(patch)(patch.name, copied, owner, patch.config)
    return copied


def copy_without(module: nn.Module, handles: Sequence[Any], attributes: set[str], memo: dict[int, Any]) -> Any:
    """A deep copy of a module without these of its own attributes, and without what ``handles`` had put on it."""
    copied: Any = type(module).__new__(type(module))
    memo[id(module)] = copied
    kept = {name: value for name, value in module.__dict__.items() if name not in attributes}
    copied.__setstate__(copy.deepcopy(kept, memo))
    _clean(copied, handles, memo)
    return copied


def shallow_state(patch: Any, denoiser: nn.Module) -> dict[str, Any]:
    """What ``copy.copy(denoiser)`` gets. It shares modules, hooks and patch with the original, as shallow copies do, and no
    deep copy can be made of it: the patch knows the modules by the original."""

    def refuse(memo: dict[int, Any]) -> nn.Module:
        raise TilewiseError(
            f"this is a shallow copy of {patch.name}, which is patched: copy.deepcopy cannot tell the two apart. Deep-copy the "
            "original, or call tilewise.unpatch before copying"
        )

    return {**{name: value for name, value in denoiser.__dict__.items() if name != STATE}, COPIER: refuse}


def _clean(copied: nn.Module, handles: Sequence[Any], memo: dict[int, Any]) -> None:
    """Take what ``handles`` had put on the original off its copy."""
    ids = {handle.id for handle in handles if isinstance(handle, RemovableHandle)}
    for module in copied.modules():
        for name in FORWARD_HOOKS:
            hooks = getattr(module, name)
            for number in ids & hooks.keys():
                del hooks[number]
    for handle in handles:
        if isinstance(handle, ForwardOverride):
            theirs = memo.get(id(handle))
            if theirs is not None:
                theirs.remove()
