"""The generic attention processor: runs the stock processor unchanged and answers only its attention call.

The stock processor's projections, norms and rotary embedding run as they are, in any order of LoRA, fused projections or
offloading (``hooks/attention_rebinding.py``). Where the family has fused kernels for that part, and they can run, they stand in
for it; the attention call is the same.
"""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Callable
from typing import Any, Protocol

import torch

from tilewise.plugins.diffusers_compat import call_with_sdpa
from tilewise.plugins.errors import TilewiseError
from tilewise.plugins.hooks.attention_rebinding import attention_form, rebind, stock_attention
from tilewise.plugins.hooks.stand_in import StandIn
from tilewise.plugins.runtime.attention_request import AttentionRequest, is_autocast
from tilewise.plugins.runtime.custom_ops import attend, handle_for
from tilewise.plugins.runtime.plan_cache import Order
from tilewise.plugins.torch_compat import in_backward, is_tracing, outside_graphs, overriding_mode

NO_BACKWARD = "a patched denoiser is for inference: its attention has no backward pass. Call tilewise.unpatch first"


class Calls(Protocol):
    """What a processor asks of the patch that it belongs to: ``attention_call.AttentionCalls``."""

    removed: bool  # whether the patch is off: a processor of it that is still called runs stock
    ticket: torch.Tensor  # see custom_ops
    tracing: Any  # the processor whose stock code torch.compile is tracing

    def answer(self, number: int, request: AttentionRequest, stock: Callable[..., torch.Tensor]) -> torch.Tensor:
        """The output of one attention call of layer ``number``; ``stock``: what would answer it without the patch."""

    def fused_here(self, x: torch.Tensor) -> bool:
        """Whether the family's fused kernels may run on hidden states like ``x``."""

    def order_here(self, number: int, x: torch.Tensor) -> Order | None:
        """The token order that layer ``number``'s call over ``x`` (B, S, C) will need, if it is to be sparse."""


def why_not(processor: Any) -> str | None:
    """Why a processor cannot be taken over, or None if it can: it must call diffusers' attention dispatcher by its name, or
    PyTorch's attention as ``F.scaled_dot_product_attention``, and must not be a module: the denoiser would lose its weights from
    its own modules, and what is set on it, such as an IP-Adapter's scale, would not reach it."""
    if isinstance(processor, torch.nn.Module):
        return f"its processor, {type(processor).__name__}, has weights of its own"
    if isinstance(processor, TilewiseProcessor) or attention_form(call_with_sdpa(type(processor))):
        return None
    return f"its processor, {type(processor).__name__}, cannot be taken over"


class ForwardOnly(torch.autograd.Function):
    """The first argument, with gradients that raise on their way to the others, where kernels would leave none without a word."""

    @staticmethod
    def forward(ctx: Any, out: torch.Tensor, *inputs: torch.Tensor) -> torch.Tensor:
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        raise TilewiseError(NO_BACKWARD)


class TilewiseProcessor(StandIn):
    """Stands in for ``original`` on layer ``number`` of a patched denoiser. Made from a class of ``processor_class``.

    fused, replacement: the family's ``self_attention`` and ``replace_processor`` of the layer, see ``Family``.
    """

    stock_call: Any  # the original's __call__, or its like with an attention call to answer
    traced: Callable[..., Any]  # stock_call as torch.compile sees it, one for all layers of a patch
    original_class: type

    def __init__(
        self,
        original: Any,
        calls: Calls,
        number: int,
        fused: Callable[..., Any] | None = None,
        replacement: Callable[..., Any] | None = None,
    ) -> None:
        self.original = original
        self.calls = calls
        self.number = number
        self.handle = handle_for(self)
        self.stock = stock_attention(self.stock_call)
        self.fused = fused
        self.replacement = replacement
        self._rebound = types.MethodType(rebind(self.stock_call, self.dispatch), original)

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        """The original's class: diffusers goes by it when it makes new processors, as when an IP-Adapter comes or goes, when it
        resets them, and when it hangs hooks on a layer. ``isinstance`` knows both classes, and ``type`` gives this one. Dynamo
        looks attributes up in ``__class__``, and must be told the truth."""
        return type(self) if is_tracing() else self.original_class

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """Copied with its denoiser it becomes stock's, which is what ``deepcopy.copy_patched`` goes on from."""
        if id(self.calls) not in memo and not self.calls.removed:
            copy.deepcopy(self.calls, memo)  # raises, and says why
        return copy.deepcopy(self.original, memo)

    def __reduce__(self) -> Any:
        raise TilewiseError(
            "a patched denoiser cannot be pickled or saved with torch.save: its attention processors belong to the patch. Call "
            "tilewise.unpatch first, or save the weights alone with save_pretrained or state_dict"
        )

    def run(self, attn: torch.nn.Module, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """What ``__call__`` does."""
        if self.calls.removed:
            return self.original(attn, hidden_states, *args, **kwargs)
        if self.fused is not None and self.calls.fused_here(hidden_states):
            # A graph serves all steps, of which some are dense.
            order = None if torch.compiler.is_dynamo_compiling() else self.calls.order_here(self.number, hidden_states)
            dispatch = functools.partial(self.dispatch, fused=True, qk_order=order)
            there = None if order is None else order[0]
            out = self.fused(self.original, dispatch, attn, hidden_states, *args, order=there, **kwargs)
            if out is not None:
                return out
        if self.replacement is not None:
            return self.replacement(self.original, self.dispatch, attn, hidden_states, *args, **kwargs)
        if not torch.compiler.is_dynamo_compiling():
            return self._rebound(attn, hidden_states, *args, **kwargs)
        self.calls.tracing = self
        out = self.traced(self.original, attn, hidden_states, *args, **kwargs)
        self.calls.tracing = None
        return out

    def dispatch(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """In place of diffusers' ``dispatch_attention_fn``, with its arguments."""
        request = AttentionRequest(*args, **kwargs).autocast()
        if not torch.compiler.is_dynamo_compiling():
            return self.answer(request)
        plain = request.attn_mask is None or isinstance(request.attn_mask, torch.Tensor)  # no FlexAttention block mask
        # The patch knows how tokens are split; what the processor says of it is for stock attention.
        if plain and not request.attention_kwargs and overriding_mode() is None:
            return attend(
                self.calls.ticket, request.query, request.key, request.value, request.attn_mask, self.handle,
                request.dropout_p, request.is_causal, request.scale, request.enable_gqa,
                getattr(request.backend, "value", request.backend), request.fused,
            )  # fmt: skip
        return self.answer_outside_graph(request)

    def answer(self, request: AttentionRequest) -> torch.Tensor:
        """Answer one attention call now."""
        device = request.query.device.type
        if is_autocast(device):  # the request has its dtype: scores and sums in here are in float32 on purpose
            with torch.autocast(device, enabled=False):
                return self.answer(request)
        qkv = request.query, request.key, request.value
        if not torch.is_grad_enabled() or not (qkv[0].requires_grad or qkv[1].requires_grad or qkv[2].requires_grad):
            return self.calls.answer(self.number, request, self.stock)
        if in_backward():  # gradient checkpointing runs the block again, before the gradients come here
            raise TilewiseError(NO_BACKWARD)
        out = self.calls.answer(self.number, request, self.stock)
        return ForwardOnly.apply(out.detach(), *qkv)

    # What an operator cannot carry, a processor's own options, a device mesh or a torch function mode, costs a graph break.
    answer_outside_graph = outside_graphs(answer)

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


def processor_class(original: type, calls: Calls) -> type[TilewiseProcessor]:
    """The class of the processors that stand in for those of class ``original`` in one patch."""
    stock_call = call_with_sdpa(original)

    # The rebound copy that torch.compile traces is told which layer it serves: a copy a layer would make a graph a layer.
    def dispatch(*args: Any, **kwargs: Any) -> torch.Tensor:
        assert calls.tracing is not None
        return calls.tracing.dispatch(*args, **kwargs)

    def call(self: TilewiseProcessor, *args: Any, **kwargs: Any) -> Any:
        return self.run(*args, **kwargs)

    # diffusers' Attention drops every keyword argument that inspect.signature(processor.__call__) does not name; that follows
    # __wrapped__. (torch.compile reads it too, and refuses a __signature__.)
    call.__wrapped__ = stock_call  # type: ignore[attr-defined]
    members = {
        "__call__": call,
        "__doc__": original.__doc__,
        "stock_call": staticmethod(stock_call),
        "traced": staticmethod(rebind(stock_call, dispatch)),
        "original_class": original,
    }
    return type(f"Tilewise{original.__name__}", (TilewiseProcessor,), members)
