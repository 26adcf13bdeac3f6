"""The generic attention processor: runs the stock processor unchanged and answers only its attention call.

diffusers' processors compute q, k and v (projections, norms, rotary embedding) and hand them to ``dispatch_attention_fn``, or,
in older ones, to ``F.scaled_dot_product_attention``. A copy of the processor's ``__call__`` that finds another function there
keeps everything the stock one does, and in any order of LoRA, fused projections or offloading, without touching the class, the
module or the library. Where the family has fused kernels for what the stock processor does, and they can run, they stand in
for it; the attention call is the same.
"""

from __future__ import annotations

import copy
import inspect
import types
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from tilewise.plugins.diffusers_compat import DISPATCH
from tilewise.plugins.errors import TilewiseError
from tilewise.plugins.hooks.stand_in import StandIn
from tilewise.plugins.runtime.custom_ops import attend, handle_for

if TYPE_CHECKING:
    from tilewise.plugins.runtime.patched_denoiser import Patch

SDPA = "scaled_dot_product_attention"


def _form(call: Any) -> str | None:
    """How a processor's ``__call__`` asks for attention: by the name ``DISPATCH``, by "F" (as ``F.SDPA``), or in no way that a
    copy could find another function for."""
    if not isinstance(call, types.FunctionType):
        return None
    names, module = call.__code__.co_names, call.__globals__
    if DISPATCH in names and DISPATCH in module:
        return DISPATCH
    if "F" in names and SDPA in names and module.get("F") is torch.nn.functional:
        return "F"
    return None


def why_not(processor: Any) -> str | None:
    """Why a processor cannot be taken over, or None if it can: it must call diffusers' attention dispatcher by its name, or
    PyTorch's attention as ``F.scaled_dot_product_attention``, and must not be a module: the denoiser would lose its weights from
    its own modules, and what is set on it, such as an IP-Adapter's scale, would not reach it."""
    if isinstance(processor, torch.nn.Module):
        return f"its processor, {type(processor).__name__}, has weights of its own"
    if isinstance(processor, TilewiseProcessor) or _form(type(processor).__dict__.get("__call__")):
        return None
    return f"its processor, {type(processor).__name__}, cannot be taken over"


class Functional:
    """``torch.nn.functional`` with another attention: what a rebound processor finds under the name ``F``."""

    def __init__(self, dispatch: Callable[..., torch.Tensor]) -> None:
        self.dispatch = dispatch

    def scaled_dot_product_attention(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        """(B, H, S, D), as PyTorch has it, where diffusers' dispatcher has (B, S, H, D)."""
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        return self.dispatch(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa).transpose(1, 2)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.nn.functional, name)


def _plain(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    attention_kwargs: dict[str, Any] | None = None,
    *,
    backend: Any = None,
    parallel_config: Any = None,
) -> torch.Tensor:
    """The stock attention of a processor that calls PyTorch's, in the shapes of diffusers' dispatcher."""
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    out = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )
    return out.transpose(1, 2)


def stock_attention(call: types.FunctionType) -> Callable[..., torch.Tensor]:
    """What answers the attention calls of a stock ``__call__``."""
    return call.__globals__[DISPATCH] if _form(call) == DISPATCH else _plain


def rebind(call: types.FunctionType, dispatch: Callable[..., Any]) -> types.FunctionType:
    """A copy of a stock processor's ``__call__`` that finds ``dispatch`` where the stock one finds its attention.

    Two things are for torch.compile's tracer, Dynamo. It looks a function's globals up in the module that they name, and in
    the dictionary itself only where they name none. And it keeps compiled code by code object, which the copy must not share
    with the stock processor.
    """
    names = {key: value for key, value in call.__globals__.items() if key != "__name__"}
    found: dict[str, Any] = {DISPATCH: dispatch} if _form(call) == DISPATCH else {"F": Functional(dispatch)}
    for name in call.__code__.co_names:  # functions beside the processor that ask for attention on its behalf
        helper: Any = names.get(name)
        if name != DISPATCH and _form(helper) == DISPATCH and helper.__globals__ is call.__globals__:
            found[name] = rebind(helper, dispatch)
    rebound = types.FunctionType(
        call.__code__.replace(), names | found, call.__name__, call.__defaults__, call.__closure__
    )
    rebound.__kwdefaults__ = call.__kwdefaults__
    rebound.__annotations__ = call.__annotations__
    rebound.__module__ = call.__module__
    return rebound


class ForwardOnly(torch.autograd.Function):
    """The first argument, with gradients that raise on their way to the others, where kernels would leave none without a word."""

    @staticmethod
    def forward(ctx: Any, out: torch.Tensor, *inputs: torch.Tensor) -> torch.Tensor:
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        raise TilewiseError(
            "a patched denoiser is for inference: its attention has no backward pass. Call tilewise.unpatch first"
        )


class TilewiseProcessor(StandIn):
    """Stands in for ``original`` on layer ``number`` of a patched denoiser. Made from a class of ``processor_class``.

    fused, replacement: the family's ``self_attention`` and ``replace_processor`` of the layer, see ``Family``.
    """

    traced: Callable[..., Any]  # the stock __call__ as torch.compile sees it, one for all layers of a patch
    original_class: type

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        # diffusers makes new processors of the class that it finds on a layer, as when an IP-Adapter comes or goes.
        return super().__new__(cls) if args or kwargs else cls.original_class()

    def __init__(
        self,
        original: Any,
        patch: Patch,
        number: int,
        fused: Callable[..., Any] | None = None,
        replacement: Callable[..., Any] | None = None,
    ) -> None:
        self.original = original
        self.patch = patch
        self.number = number
        self.handle = handle_for(self)
        call: Any = type(original).__call__
        self.stock = stock_attention(call)
        self._fused = fused
        self._replacement = replacement
        self._rebound = types.MethodType(rebind(call, self.dispatch), original)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """Copied with its denoiser it becomes stock's, which is what ``copies.copy_patched`` goes on from."""
        if id(self.patch) not in memo and not self.patch.step.removed:
            copy.deepcopy(self.patch, memo)  # raises, and says why
        return copy.deepcopy(self.original, memo)

    def run(self, attn: torch.nn.Module, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """What ``__call__`` does."""
        if self.patch.step.removed:
            return self.original(attn, hidden_states, *args, **kwargs)
        if self._fused is not None and self.patch.fused_here(hidden_states):
            out = self._fused(self.original, self._dispatch_fused, attn, hidden_states, *args, **kwargs)
            if out is not None:
                return out
        if self._replacement is not None:
            return self._replacement(self.original, self.dispatch, attn, hidden_states, *args, **kwargs)
        if not torch.compiler.is_compiling():
            return self._rebound(attn, hidden_states, *args, **kwargs)
        self.patch.tracing = self
        out = self.traced(self.original, attn, hidden_states, *args, **kwargs)
        self.patch.tracing = None
        return out

    def dispatch(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
        attention_kwargs: dict[str, Any] | None = None,
        *,
        backend: Any = None,
        parallel_config: Any = None,
        fused: bool = False,
    ) -> torch.Tensor:
        """In place of diffusers' ``dispatch_attention_fn``. fused: whether fused kernels made the query and key."""
        plain = attn_mask is None or isinstance(attn_mask, torch.Tensor)  # and not FlexAttention's block mask
        if torch.compiler.is_compiling() and plain and not attention_kwargs and parallel_config is None:
            return attend(
                self.patch.ticket, query, key, value, attn_mask, self.handle, dropout_p, is_causal, scale, enable_gqa,
                getattr(backend, "value", backend), fused,
            )  # fmt: skip
        return self.attend(
            query, key, value, attn_mask=attn_mask, dropout_p=dropout_p, is_causal=is_causal, scale=scale,
            enable_gqa=enable_gqa, backend=backend, fused=fused, attention_kwargs=attention_kwargs,
            parallel_config=parallel_config,
        )  # fmt: skip

    def _dispatch_fused(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.dispatch(*args, **kwargs, fused=True)

    # What an operator cannot carry, a processor's own options or a device mesh, costs a graph break.
    @torch.compiler.disable
    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options: Any) -> torch.Tensor:
        """Answer one attention call now; options by name as for ``dispatch``."""
        out = self.patch.step.attend(self, query, key, value, **options)
        if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
            return ForwardOnly.apply(out.detach(), query, key, value)
        return out

    # diffusers sets these two on processors (and skips those that lack them, as it does ours where the original does): they
    # belong to the original, which reads them, and keeps them when the patch is gone.
    @property
    def _attention_backend(self) -> Any:
        return self.original._attention_backend

    @_attention_backend.setter
    def _attention_backend(self, value: Any) -> None:
        self.original._attention_backend = value

    @property
    def _parallel_config(self) -> Any:
        return self.original._parallel_config

    @_parallel_config.setter
    def _parallel_config(self, value: Any) -> None:
        self.original._parallel_config = value


def processor_class(original: type, patch: Patch) -> type[TilewiseProcessor]:
    """The class of the processors that stand in for those of class ``original`` in one patch."""
    stock_call: Any = original.__call__

    # The rebound copy that torch.compile traces is told which layer it serves: a copy a layer would make a graph a layer.
    def dispatch(*args: Any, **kwargs: Any) -> torch.Tensor:
        assert patch.tracing is not None
        return patch.tracing.dispatch(*args, **kwargs)

    def call(self: TilewiseProcessor, *args: Any, **kwargs: Any) -> Any:
        return self.run(*args, **kwargs)

    # diffusers' Attention drops every keyword argument that inspect.signature(processor.__call__) does not name.
    call.__signature__ = inspect.signature(stock_call)  # type: ignore[attr-defined]
    members = {
        "__call__": call,
        "__doc__": original.__doc__,
        "traced": staticmethod(rebind(stock_call, dispatch)),
        "original_class": original,
    }
    return type(f"Tilewise{original.__name__}", (TilewiseProcessor,), members)
