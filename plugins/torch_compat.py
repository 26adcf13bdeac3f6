"""What the plugins use of PyTorch that is no public API, one function or constant each; see ``diffusers_compat.py``.

Seen in PyTorch 2.13; pyproject.toml has no upper bound, as these have been the same for years. The kernels' own are in
``kernels/device.py``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from types import CodeType
from typing import Any

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


COMPILED_PREFIX = "_orig_mod."
"""Stands in names of weights where a module was saved that ``torch.compile(module)`` returned. If it is renamed, checkpoints
saved so are refused, with the names that are too many."""


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


def before_calls(module: nn.Module, function: Callable[[], None]) -> Callable[[], None]:
    """Have ``function`` called before each call of a module, outside of what is compiled; returns what takes that off again.

    After ``module.compile()`` calls go to ``_compiled_call_impl``, which hooks are part of. If that is renamed, a function is
    compiled into a module's code, and may not be called again.
    """
    compiled = getattr(module, "_compiled_call_impl", None)
    if compiled is None:
        return module.register_forward_pre_hook(lambda *_: function()).remove

    def called(*args: Any, **kwargs: Any) -> Any:
        function()
        return compiled(*args, **kwargs)

    def remove() -> None:
        if module.__dict__.get("_compiled_call_impl") is called:  # else it was compiled anew
            module.__dict__["_compiled_call_impl"] = compiled

    module.__dict__["_compiled_call_impl"] = called
    return remove


def is_tracing() -> bool:
    """Whether torch.compile's tracer, Dynamo, is looking at Python objects now: there is a ``torch._guards.CompileContext``. (It
    replaces ``torch.compiler.is_compiling`` in what it traces, and only there.) If that is renamed, patching fails."""
    return torch._guards.CompileContext.try_get() is not None


def outside_graphs(function: Callable[..., Any]) -> Callable[..., Any]:
    """``torch.compiler.disable(function)``, but Dynamo, whose import takes a second, is imported when it is first called:
    ``torch._disable_dynamo``. Where that is not there, it is imported at once."""
    disable: Callable[..., Any] = getattr(torch, "_disable_dynamo", torch.compiler.disable)
    return disable(function)


def constant_in_graphs(function: Callable[..., Any]) -> Callable[..., Any]:
    """``torch.compiler.assume_constant_result(function)``, which imports Dynamo to set ``_dynamo_marked_constant``. If that is
    renamed, Dynamo traces the function."""
    function.__dict__["_dynamo_marked_constant"] = True
    return function


def overriding_mode() -> str | None:
    """The class of a torch function mode in force, which may answer ``F.scaled_dot_product_attention`` itself, or None.

    diffusers' perturbed-attention guidance is such a mode. ``torch.device`` as a context is one that does not. That one's
    class is ``torch.utils._device.DeviceContext``. Modes are on ``torch.overrides._get_current_function_mode_stack()``, which has
    ``torch._C._len_torch_function_stack()`` entries. If these are renamed, attention calls fail.
    """
    if not torch._C._len_torch_function_stack():
        return None
    for mode in torch.overrides._get_current_function_mode_stack():
        if not isinstance(mode, torch.utils._device.DeviceContext):
            return type(mode).__name__
    return None


def without_subclasses() -> AbstractContextManager[Any]:
    """A context in which subclasses of tensors are handled as plain tensors: ``torch._C.DisableTorchFunctionSubclass``, which
    PyTorch's notes on extending it name. If it is renamed, CFG parallelism fails at its first step."""
    context: AbstractContextManager[Any] = torch._C.DisableTorchFunctionSubclass()
    return context


def in_backward() -> bool:
    """Whether autograd runs a backward pass in this thread: ``torch._C._current_graph_task_id()``, -1 outside of one. If it is
    renamed, attention calls with gradients fail."""
    return torch._C._current_graph_task_id() != -1


def forget_compiled(denoiser: nn.Module) -> None:
    """Drop compiled code of a module and everything in it, but of nothing else in the process.

    torch.compile keeps compiled code by the code object that it was made from, and drops it for one of these with
    ``torch._C._dynamo.eval_frame.reset_code``. Code objects belong to classes, so other models of the same class compile again
    too. Without that function ``torch.compiler.reset()`` drops everything.
    """
    reset = getattr(getattr(torch._C, "_dynamo", None), "eval_frame", None)
    reset_code = getattr(reset, "reset_code", None)
    if reset_code is None:
        torch.compiler.reset()
        return
    for code in set(_code_of(denoiser)):
        reset_code(code)


def _code_of(denoiser: nn.Module) -> Iterator[CodeType]:
    """The code objects that a call of a module may enter first: forwards, and hooks around them."""
    for module in denoiser.modules():
        functions: list[Any] = [type(module).forward, module.__dict__.get("forward")]
        for name in ("_forward_hooks", "_forward_pre_hooks"):
            functions += getattr(module, name).values()
        for function in functions:
            while isinstance(function, functools.partial):
                function = function.func
            function = getattr(function, "_torchdynamo_orig_callable", function)
            code = getattr(getattr(function, "__func__", function), "__code__", None)
            if isinstance(code, CodeType):
                yield code


def version_of(x: torch.Tensor) -> int | None:
    """How often a tensor was written to, its ``_version``; None for tensors made in inference mode, which do not count it.

    If it goes away, tensors of positions are read at every step, which waits for the GPU.
    """
    return None if x.is_inference() else x._version
