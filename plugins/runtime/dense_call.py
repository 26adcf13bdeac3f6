"""Dense attention calls of a patched denoiser, by our own kernel or the stock function; and where ``strict`` forbids them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from tilewise.plugins.errors import FallbackError
from tilewise.plugins.models.common.family import AttentionLayer
from tilewise.plugins.runtime import dense_backend
from tilewise.plugins.runtime.attention_request import AttentionRequest
from tilewise.plugins.runtime.call_stats import DENSE_LAYER, DENSE_STEP, FALLBACK, SHORT, CallKind
from tilewise.plugins.runtime.forward_state import ForwardState
from tilewise.plugins.torch_compat import overriding_mode

ON_PURPOSE = (DENSE_STEP, DENSE_LAYER)  # what a method leaves dense

Stock = Callable[..., torch.Tensor]


def forbid(state: ForwardState, layer: AttentionLayer, request: AttentionRequest, kind: CallKind) -> None:
    """Raise where ``strict`` forbids a dense call: a map that is too small by our default, which nobody chose, is one too.

    Raises:
        FallbackError: with the layer and the reason.
    """
    config, own_map = state.config, layer.downsample is not None
    if not config.strict:
        return
    by_default = own_map and config.min_tokens is None and config.too_few(request.query.shape[1], own_map)
    if kind.kind == FALLBACK or (kind.kind == SHORT and by_default):
        raise FallbackError(f"strict: {state.name}.{layer.name} cannot run {config.method.name}: {kind.reason}")


def attend_dense(
    state: ForwardState, number: int, kind: CallKind, request: AttentionRequest, stock: Stock
) -> torch.Tensor:
    """The output (B, Sq, H, D) of a dense call of layer ``number``, whose tokens are in the model's own order."""
    precision = state.config.precision_of_dense
    if precision is not None and kind.kind in ON_PURPOSE:
        out = _in_8_bits(state, number, kind, request, precision)
        if isinstance(out, torch.Tensor):
            return out
        kind = replace(kind, reason=f"not in {precision}: {out}")
    if state.config.fuse and dense_backend.takes(request) and overriding_mode() is None:
        groups = state.forward.masks.shown(request.attn_mask, state.forward.grid, request.query)
        with state.call_stats.record(number, None, request.query, request.key) as call:
            out = dense_backend.attend(groups, request, request.scale, state.plans.dense_plan) if groups else "a mask"
            if isinstance(out, torch.Tensor):
                call.kind = replace(kind, backend=dense_backend.HOPPER.name)
        if isinstance(out, torch.Tensor):
            state.observe(number, kind.kind, request.qkv)
            return out
    with state.call_stats.record(number, kind, request.query, request.key):
        out = stock(
            *request.qkv, request.attn_mask, request.dropout_p, request.is_causal, request.scale, request.enable_gqa,
            attention_kwargs=request.attention_kwargs, backend=request.backend, parallel_config=request.parallel_config,
        )  # fmt: skip
    state.observe(number, kind.kind, request.qkv)
    return out


def _in_8_bits(
    state: ForwardState, number: int, kind: CallKind, request: AttentionRequest, precision: str
) -> torch.Tensor | str:
    """The output of a dense call in 8 bits, or why it cannot run so."""
    if (why := dense_backend.not_in_8_bits(request)) is not None:
        return why
    if (mode := overriding_mode()) is not None:
        return f"a torch function mode, {mode}, may answer the call itself"
    groups = state.forward.masks.shown(request.attn_mask, state.forward.grid, request.query)
    if not groups:
        return "its mask does more than hide padding"
    with state.call_stats.record(number, None, request.query, request.key) as call:
        out = dense_backend.attend(groups, request, request.scale, state.plans.dense_plan, precision)
        if isinstance(out, torch.Tensor):
            call.kind = replace(kind, backend=precision)
    if isinstance(out, torch.Tensor):
        state.observe(number, kind.kind, request.qkv)
    return out


def attend_dense_window(
    state: ForwardState, number: int, kind: CallKind, request: AttentionRequest, stock: Stock
) -> torch.Tensor:
    """The same for a call with more keys than queries, of a window of frames."""
    takes = request.attn_mask is None and dense_backend.takes(request, window=True)
    if state.config.fuse and takes and overriding_mode() is None:
        with state.call_stats.record(number, None, request.query, request.key) as call:
            out = dense_backend.attend_window(request, state.plans.dense_plan)
            if out is not None:
                call.kind = replace(kind, backend=dense_backend.HOPPER.name)
        if out is not None:
            state.observe(number, kind.kind, request.qkv)
            return out
    return attend_dense(state, number, kind, request, stock)
