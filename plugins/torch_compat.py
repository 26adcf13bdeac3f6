"""What the plugins use of PyTorch that is no public API, one function or constant each; see ``diffusers_compat.py``.

Seen in PyTorch 2.13; pyproject.toml has no upper bound, as these have been the same for years. The kernels' own are in
``kernels/device.py``.
"""

from __future__ import annotations

import torch
from torch import nn

FORWARD_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)
"""The dictionaries in which ``nn.Module`` keeps forward hooks and their options, by ``RemovableHandle.id``. If one is added, a
copy of a patched denoiser keeps entries of hooks that are gone."""


def has_forward_hooks(module: nn.Module) -> bool:
    """Whether calling a module runs hooks around its forward: ``_forward_hooks`` and ``_forward_pre_hooks``."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def uncompiled(module: nn.Module) -> nn.Module:
    """The module inside what ``torch.compile(module)`` returned: its ``_orig_mod``. If that is renamed, ``patch`` does not know
    compiled denoisers, and refuses them."""
    return getattr(module, "_orig_mod", module)


def is_compiled_module(module: object) -> bool:
    """Whether ``torch.compile(module)`` returned this."""
    return getattr(module, "_orig_mod", None) is not None


def runs_compiled(module: nn.Module) -> bool:
    """Whether calling a module runs compiled code: after ``module.compile()``, which sets ``_compiled_call_impl``, or with a
    ``forward`` from ``torch.compile(function)``, which has ``_torchdynamo_orig_callable``. If these are renamed, compiled code of
    an earlier patch may go on running after ``patch`` and ``unpatch``."""
    forward = module.__dict__.get("forward")
    return getattr(module, "_compiled_call_impl", None) is not None or hasattr(forward, "_torchdynamo_orig_callable")


def version_of(x: torch.Tensor) -> int | None:
    """How often a tensor was written to, its ``_version``; None for tensors made in inference mode, which do not count it.

    If it goes away, tensors of positions are read at every step, which waits for the GPU.
    """
    return None if x.is_inference() else x._version
