"""A stock attention processor whose attention calls somebody else answers: for layers beside those that a method runs on.

The stock processor's projections and norms run as they are (``attention_rebinding.py``). In a copy of the layer the processor is
a stock one again.
"""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Callable
from typing import Any

import torch

from tilewise.plugins.diffusers_compat import call_with_sdpa
from tilewise.plugins.hooks.attention_rebinding import attention_form, rebind, stock_attention
from tilewise.plugins.hooks.stand_in import StandIn

Answer = Callable[..., torch.Tensor]
"""Called as answer(stock, query, key, value, …): what would have answered, then the arguments of diffusers' dispatcher, whose
tensors are (B, S, H, D)."""


class AnsweringProcessor(StandIn):
    """Stands in for ``original``. Made by ``answer_calls``."""

    def __init__(self, original: Any) -> None:
        self.original = original

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self.original, memo)


class AnsweredCalls:
    """The change of one layer's processor; ``remove()`` puts the stock one back, unless it was replaced since."""

    def __init__(self, module: Any, processor: AnsweringProcessor) -> None:
        self.module, self.processor = module, processor
        module.set_processor(processor)

    def remove(self) -> None:
        if self.module.processor is self.processor:
            self.module.set_processor(self.processor.original)


def answer_calls(module: Any, answer: Answer) -> AnsweredCalls | None:
    """Have ``answer`` answer the attention calls of a layer; None, and nothing done, where its processor asks for attention in no
    way that could be answered."""
    original = module.processor
    stock_call = call_with_sdpa(type(original))
    if isinstance(original, torch.nn.Module) or attention_form(stock_call) is None:
        return None
    dispatch = functools.partial(answer, stock_attention(stock_call))
    rebound = types.MethodType(rebind(stock_call, dispatch), original)

    def call(self: AnsweringProcessor, *args: Any, **kwargs: Any) -> Any:
        return rebound(*args, **kwargs)

    # diffusers' Attention drops every keyword argument that inspect.signature(processor.__call__) does not name.
    call.__wrapped__ = stock_call  # type: ignore[attr-defined]
    kind = type(f"Answering{type(original).__name__}", (AnsweringProcessor,), {"__call__": call})
    return AnsweredCalls(module, kind(original))
