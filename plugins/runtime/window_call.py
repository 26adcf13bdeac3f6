"""Answering the attention calls of a chunk of frames over a KV cache: queries of the chunk, keys and values of the whole window.

write keys and values into the window → why dense? ──→ dense: our kernel, or the stock function
                                      → plan:  static, made once for a turn of the ring;
                                               dynamic, from the chunk's queries and the window's keys → sparse
"""

from __future__ import annotations

from dataclasses import replace

import torch

from tilewise.kernels.errors import UnsupportedPlanError
from tilewise.kernels.fused.reorder import reorder_tokens
from tilewise.kernels.plans.window_keys import WindowKeys
from tilewise.plugins.errors import TilewiseError
from tilewise.plugins.masks.padding_mask import Group
from tilewise.plugins.methods.base import DynamicMethod, Method, Planned
from tilewise.plugins.runtime.attention_request import AttentionRequest
from tilewise.plugins.runtime.call_stats import (
    DENSE_LAYER,
    DENSE_STEP,
    FALLBACK,
    SHORT,
    SPARSE,
    WINDOW,
    CallKind,
)
from tilewise.plugins.runtime.dense_call import Stock, attend_dense_window, forbid
from tilewise.plugins.runtime.forward_state import ForwardState
from tilewise.plugins.runtime.key_value_window import KeyValueWindow
from tilewise.plugins.runtime.sparse_call import QKV, Part, choose, means_for_key, measured, reordered, run_part


def attend_window(
    state: ForwardState, number: int, window: KeyValueWindow, request: AttentionRequest, stock: Stock
) -> torch.Tensor:
    """The output (B, Sq, H, D) of a chunk's call of layer ``number``, in the model's order. Its keys and values are written into
    the window, which its queries attend to.

    Raises:
        TilewiseError: the call has a mask, or is causal.
        FallbackError: with ``strict``, where it cannot run the method although its step and layer should.
    """
    layer = state.layers[number]
    if request.attn_mask is not None or request.is_causal:
        raise TilewiseError(
            f"{state.name}.{layer.name}: a KV cache needs an attention call without a mask, as the window says what is seen"
        )
    whole = _over_window(number, window, request)
    out, kind = None, _why_dense(state, number, window, whole)
    if kind is None:
        try:
            out = _sparse(state, number, window, whole)
        except UnsupportedPlanError as error:
            kind = CallKind(FALLBACK, reason=str(error))
    if out is None:
        assert kind is not None
        forbid(state, layer, whole, kind)
        out = attend_dense_window(state, number, replace(kind, fused=request.fused), whole, stock)
    return out if window.order is None else reorder_tokens([out], window.order[1])[0]


def _over_window(number: int, window: KeyValueWindow, request: AttentionRequest) -> AttentionRequest:
    """The call with its queries in the window's order and the window's keys and values, its own among them."""
    query, key, value = request.qkv
    if window.order is not None:
        there = window.order[0]
        if request.qk_order is None:
            query, key, value = reordered(request.qkv, there)
        else:
            value = reorder_tokens([value], there)[0]
    keys, values = window.extend(number, key, value)
    return request.replace(query=query, key=keys, value=values, qk_order=None)


def _why_dense(state: ForwardState, number: int, window: KeyValueWindow, request: AttentionRequest) -> CallKind | None:
    """What a call counts as that is dense; None: it is sparse."""
    config, keys = state.config, request.key.shape[1]
    if not state.sparse:
        return CallKind(WINDOW)
    if not state.forward.runs:
        return CallKind(DENSE_STEP)
    if state.layers[number].block not in state.selected:
        return CallKind(DENSE_LAYER)
    short = config.too_few(keys, False)
    if short is None and isinstance(config.method, DynamicMethod):
        short = config.method.stays_dense(keys, request.query.device)
    if short is not None:
        return CallKind(SHORT, reason=short)
    reason = window.reason or ("the call has dropout" if request.dropout_p else "")
    return CallKind(FALLBACK, reason=reason) if reason else None


def _sparse(state: ForwardState, number: int, window: KeyValueWindow, request: AttentionRequest) -> torch.Tensor:
    """The output, in the window's order.

    Raises:
        UnsupportedPlanError: no kernel takes the call; or none in the precision that was asked for, with ``strict``.
    """
    method, qkv, keys = state.config.method, request.qkv, window.keys()
    query = request.query
    own = method.scale(keys.layout, query.shape[3])
    scale = request.scale if own is None else own
    with state.call_stats.record(number, None, query, request.key) as call:
        planned = _plan(method, keys, qkv, scale)
        choice, in_16_bits = choose(qkv, planned.plan, state.config.precision)
        if in_16_bits and state.config.strict:
            raise UnsupportedPlanError(in_16_bits)
        part = Part(Group(None, None, 0), keys.chunk, planned, choice)
        out = run_part(qkv, part, scale)
        if isinstance(method, DynamicMethod):
            call.density, call.cost, call.values = None, None, measured([part], query.shape[0])
            call.means = means_for_key([part], query.shape[0])
        else:
            call.density, call.cost = planned.plan.density, planned.plan.cost
        call.kind = CallKind(SPARSE, choice.backend, in_16_bits, request.fused)
    state.observe(number, SPARSE, qkv, plan=planned.plan, draft=planned.draft)
    return out


def _plan(method: Method, keys: WindowKeys, qkv: QKV, scale: float | None) -> Planned:
    """A static method's plan is kept with the keys; a dynamic one keeps nothing from one pass of a chunk to the next."""
    query = qkv[0]
    if isinstance(method, DynamicMethod):
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        return method.plan_call(keys.chunk, *qkv, scale, {}, 0, keys)
    heads, device = query.shape[2], query.device
    return keys.cached(("plan", method, heads, device), lambda: Planned(method.window_plan(keys, heads, device)))
