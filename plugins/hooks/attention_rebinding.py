"""Another attention function for a stock processor, without touching the processor, its class or the library.

diffusers' processors compute query, key and value and hand them to ``dispatch_attention_fn``, or, in older ones, to
``F.scaled_dot_product_attention``. Both are found by name among the globals of the processor's ``__call__``. A copy of that
function with other globals finds another function there and keeps everything else that the stock one does.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch

from tilewise.plugins.diffusers_compat import DISPATCH

SDPA = "scaled_dot_product_attention"


def attention_form(call: Any) -> str | None:
    """How a processor's ``__call__`` asks for attention: ``DISPATCH``, "F" (``F.scaled_dot_product_attention``), or None: in no
    way that a copy could find another function for."""
    if not isinstance(call, types.FunctionType):
        return None
    names, module = call.__code__.co_names, call.__globals__
    if DISPATCH in names and DISPATCH in module:
        return DISPATCH
    if "F" in names and SDPA in names and module.get("F") is torch.nn.functional:
        return "F"
    return None


class Functional:
    """``torch.nn.functional`` with another attention: what a rebound processor finds under the name ``F``."""

    def __init__(self, dispatch: Callable[..., torch.Tensor]) -> None:
        self.dispatch = dispatch

    def scaled_dot_product_attention(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """(B, H, S, D), as PyTorch has it, where diffusers' dispatcher has (B, S, H, D); the other arguments are in the same
        order and have the same names in both."""
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        return self.dispatch(query, key, value, *args, **kwargs).transpose(1, 2)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.nn.functional, name)


def stock_attention(call: types.FunctionType) -> Callable[..., torch.Tensor]:
    """What answers the attention calls of a stock ``__call__``, to be called with the arguments of diffusers' dispatcher."""
    return call.__globals__[DISPATCH] if attention_form(call) == DISPATCH else _sdpa


def _sdpa(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    **diffusers_only: Any,
) -> torch.Tensor:
    """PyTorch's attention in the shapes of diffusers' dispatcher, (B, S, H, D)."""
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    out = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )
    return out.transpose(1, 2)


def rebind(call: types.FunctionType, dispatch: Callable[..., Any]) -> types.FunctionType:
    """A copy of a stock processor's ``__call__`` that finds ``dispatch`` where the stock one finds its attention.

    Two things are for torch.compile's tracer, Dynamo. It looks a function's globals up in the module that they name, and in
    the dictionary itself only where they name none. And it keeps compiled code by code object, which the copy must not share
    with the stock processor.
    """
    names = {key: value for key, value in call.__globals__.items() if key != "__name__"}
    found: dict[str, Any] = {DISPATCH: dispatch} if attention_form(call) == DISPATCH else {"F": Functional(dispatch)}
    for name in call.__code__.co_names:  # functions beside the processor that ask for attention on its behalf
        helper: Any = names.get(name)
        if name != DISPATCH and attention_form(helper) == DISPATCH and helper.__globals__ is call.__globals__:
            found[name] = rebind(helper, dispatch)
    rebound = types.FunctionType(
        call.__code__.replace(), names | found, call.__name__, call.__defaults__, call.__closure__
    )
    rebound.__kwdefaults__ = call.__kwdefaults__
    rebound.__annotations__ = call.__annotations__
    rebound.__module__ = call.__module__
    return rebound
