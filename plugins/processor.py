"""The generic attention processor: runs the stock processor unchanged and answers only its attention call.

diffusers' processors compute q, k and v (projections, norms, rotary embedding) and hand them to ``dispatch_attention_fn``. A
copy of the processor's ``__call__`` that sees another function under that name keeps everything the stock one does, and in
any order of LoRA, fused projections or offloading, without touching the class, the module or the library.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch

DISPATCH = "dispatch_attention_fn"


def why_not(processor: Any) -> str | None:
    """Why a processor cannot be taken over, or None if it can: it must call diffusers' attention dispatcher by its name."""
    if isinstance(processor, TilewiseProcessor):
        return None
    call = type(processor).__dict__.get("__call__")
    if isinstance(call, types.FunctionType) and DISPATCH in call.__code__.co_names and DISPATCH in call.__globals__:
        return None
    return f"its processor, {type(processor).__name__}, cannot be taken over"


class TilewiseProcessor:
    """Stands in for ``original`` on one attention module.

    ``answer(stock, query, key, value, **options)`` is called in place of ``dispatch_attention_fn``; ``stock`` is that
    function, for calls that stay dense.
    """

    def __init__(self, original: Any, answer: Callable[..., Any]) -> None:
        self.original = original
        stock_call = type(original).__call__
        stock_dispatch = stock_call.__globals__[DISPATCH]

        def dispatch(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
            return answer(stock_dispatch, query, key, value, *args, **kwargs)

        rebound = types.FunctionType(
            stock_call.__code__,
            {**stock_call.__globals__, DISPATCH: dispatch},
            stock_call.__name__,
            stock_call.__defaults__,
            stock_call.__closure__,
        )
        rebound.__kwdefaults__ = stock_call.__kwdefaults__
        rebound.__annotations__ = stock_call.__annotations__
        # On the instance, so that inspect.signature(processor.__call__) shows the stock signature: diffusers' Attention
        # drops every keyword argument that the signature does not name.
        self.__dict__["__call__"] = types.MethodType(rebound, original)

    # Left out of torch.compile's graphs: Dynamo keeps compiled code by code object, which the copy shares with the stock
    # processor while its globals differ; and the books kept in ``answer`` are Python. The rest of the model is compiled.
    @torch.compiler.disable
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.__dict__["__call__"](*args, **kwargs)

    # diffusers sets these two on processors (and skips those that lack them): they belong to the original, which reads
    # them, and keeps them when the patch is gone.
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
