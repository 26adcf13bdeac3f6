"""Answering the attention calls of a patched denoiser: sparse or dense, and counted.

    answer → sharded? ──── sharded_call.py: all tokens of some heads, what follows for those, and back
           → a KV cache? ─────────────────────────────→ window_call.py
           → why dense? ──────────────────────────────→ dense_call.py: our kernel for dense attention, or the stock function
           → prepare: layout, groups, plans, backend → sparse: q, k, v into tile order, kernels/attention/dispatch.py, and back

Tokens are in tile order within a sparse call and nowhere else. Whatever stands outside of it, modules, hooks of others, caches
and control networks, finds them in the model's own order.

What ``prepare`` finds depends on shapes alone where the plan is static and there is no mask. It is kept, and later layers and
steps only run the kernel.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import torch

from tilewise.kernels.attention.dispatch import DTYPES, available_backends, block_sparse_attention
from tilewise.kernels.device import capturing
from tilewise.kernels.errors import UnsupportedPlanError
from tilewise.kernels.fused.reorder import reorder_tokens
from tilewise.kernels.plans.layout import Layout
from tilewise.plugins.context_parallel.token_shares import RankOrder
from tilewise.plugins.errors import TilewiseError
from tilewise.plugins.methods.base import DynamicMethod, Planned
from tilewise.plugins.models.common.family import AttentionLayer
from tilewise.plugins.runtime.attention_request import AttentionRequest
from tilewise.plugins.runtime.call_planner import CallPlanner, Prepared, with_text_of
from tilewise.plugins.runtime.call_stats import (
    DENSE_LAYER,
    DENSE_STEP,
    FALLBACK,
    GLOBAL_PATH,
    SPARSE,
    Call,
    CallKind,
)
from tilewise.plugins.runtime.dense_call import Stock, attend_dense, attend_dense_window, forbid
from tilewise.plugins.runtime.earlier_keys import KV, seen_besides
from tilewise.plugins.runtime.forward_state import ForwardState
from tilewise.plugins.runtime.joint_text import (
    attend_with_text_partial,
    density_with_text_partial,
    pictures_of,
    text_partial,
)
from tilewise.plugins.runtime.plan_cache import LRU, Order
from tilewise.plugins.runtime.sharded_call import attend_by_diffusers, head_part, sharding_of, whole_call
from tilewise.plugins.runtime.sparse_call import (
    PRECISIONS,
    QKV,
    Part,
    density_of_heads,
    extra_pairs,
    mean_cost,
    mean_density,
    means_for_key,
    measured,
    reordered,
    run_parts,
)
from tilewise.plugins.runtime.window_call import attend_window
from tilewise.plugins.torch_compat import constant_in_graphs, overriding_mode

MAX_PREPARED = 64  # they hold plans


class AttentionCalls:
    """Answers the attention calls of one denoiser; what its processors are given as their patch.

    Attributes:
        removed: whether the patch is off. ticket, tracing: for torch.compile, see ``custom_ops.py`` and ``TilewiseProcessor``.
    """

    def __init__(self, state: ForwardState, ticket: torch.Tensor) -> None:
        self.state = state
        self.planner = CallPlanner(state)
        self.removed = False
        self.ticket = ticket
        self.tracing: Any = None
        self._prepared = LRU(MAX_PREPARED)

    def answer(self, number: int, request: AttentionRequest, stock: Stock) -> torch.Tensor:
        """The output (B, Sq, H, D) of an attention call of layer ``number``. stock: what would answer it without the patch.

        Raises:
            FallbackError: with ``strict``, where a call cannot run the method although its step and layer should.
        """
        state = self.state
        at = state.sharding()
        if at is None:
            out = self._answer(number, request, stock)
            for edit in state.edits:
                out = edit(number, request.value, out)
            return out
        beside = {
            "a KV cache": state.window is not None,
            "keys of earlier windows": state.earlier is not None,
            "an addition that changes what attention gives": bool(state.edits),
            "a global path of text in the sequence": state.guide is not None,
            "a global path": state.forward.global_path and at.ring > 1,
        }
        if what := next((name for name, there in beside.items() if there), None):
            raise TilewiseError(
                f"{state.name}: {what} does not run under context parallelism; give a denoiser without it"
            )
        if at.ring > 1:
            return self._answer(number, request, stock)
        request = _in_model_order(request)
        sharding = sharding_of(state, number, request, at)
        if isinstance(sharding, str):
            return attend_by_diffusers(state, number, request, stock, sharding)
        whole, back = whole_call(state, number, request, sharding)
        with state.some_heads(sharding.heads, at.rank):
            return back(self._answer(number, whole, stock))

    def _answer(self, number: int, request: AttentionRequest, stock: Stock) -> torch.Tensor:
        """The output of a call over all tokens of a sequence."""
        state, layer = self.state, self.state.layers[number]
        forward = state.forward
        if state.window is not None:
            return attend_window(state, number, state.window, request, stock)
        earlier = None
        if state.earlier is not None and layer.downsample is None:
            earlier = state.earlier.of_call(number, request, forward.whole)
        if forward.global_path:
            kind, request = self._beside_global_path(layer, request)
        elif not forward.runs:
            kind = CallKind(DENSE_STEP)
        elif layer.block not in state.selected or state.method_of(number) is None:
            kind = CallKind(DENSE_LAYER)
        elif mode := overriding_mode():
            kind = CallKind(
                FALLBACK, reason=f"a torch function mode, {mode}, may answer the call itself, as some guidance does"
            )
            forbid(state, layer, request, kind)
        else:
            prepared = self._prepare(layer, request)
            if isinstance(prepared, Prepared):
                out = self._sparse(number, prepared, request, earlier)
                if isinstance(out, torch.Tensor):
                    return out
                prepared = out
            kind = prepared
            forbid(state, layer, request, kind)
        request, rank_order = self._for_dense(_in_model_order(request))
        kind = replace(kind, fused=request.fused)
        if earlier is not None:
            return attend_dense_window(state, number, kind, seen_besides(request, earlier), stock)
        out = attend_dense(state, number, kind, request, stock)
        return out if rank_order is None else reorder_tokens([out], rank_order.inverse)[0]

    def _for_dense(self, request: AttentionRequest) -> tuple[AttentionRequest, RankOrder | None]:
        """A request whose tokens are in the model's order where that matters, and the order that its output is to go back to."""
        order = request.rank_order
        if order is None or (request.attn_mask is None and not request.is_causal and not self.state.observers):
            return request, None
        query, key, value = reordered(request.qkv, order.order)
        return request.replace(query=query, key=key, value=value, rank_order=None), order

    # ── what a call runs by ──────────────────────────────────────────────────────────────────────────────────────

    def _prepare(self, layer: AttentionLayer, request: AttentionRequest) -> Prepared | CallKind:
        """What a call runs by; or what it counts as, where it runs dense."""
        forward, query, key, value = self.state.forward, request.query, request.key, request.value
        if forward.refused is not None:
            return CallKind(FALLBACK, reason=forward.refused)
        if request.attn_mask is not None or self.state.guide is not None:
            return self.planner.prepare(layer, request)
        # Strides too: some kernels take some layouts in memory alone.
        shapes = (query.shape, query.stride(), key.shape, key.stride(), value.shape, value.stride())
        own = None if layer.downsample is None else self.state.map_layout(layer)
        known = (forward.grid, forward.layout, layer.downsample, own, shapes, query.dtype, key.dtype, value.dtype, query.device,
                 request.dropout_p, request.is_causal, request.scale, request.fused, self._heads_of_plans(),
                 request.rank_order and request.rank_order.parts)  # fmt: skip
        return self._prepared.lookup(known, lambda: self.planner.prepare(layer, request))

    def _heads_of_plans(self) -> range | tuple[int, ...] | bool | None:
        """What a kept call depends on of the heads that it is over: with a dynamic method, only whether they are some or all."""
        heads = self.state.forward.heads
        return heads is None if isinstance(self.state.config.method, DynamicMethod) else heads

    # ── sparse ───────────────────────────────────────────────────────────────────────────────────────────────────

    def _sparse(
        self, number: int, prepared: Prepared, request: AttentionRequest, earlier: KV | None
    ) -> torch.Tensor | CallKind:
        """The output; or what the call counts as, where no kernel takes it. earlier: what all queries see besides."""
        state, (there, back) = self.state, prepared.order
        try:
            with state.call_stats.record(number, prepared.kind, request.query, request.key) as call:
                if request.qk_order is None:
                    whole = reordered(request.qkv, there)
                else:
                    whole = request.query, request.key, reorder_tokens([request.value], there)[0]
                call.density, call.cost = prepared.density, prepared.cost
                if prepared.parts is None:
                    out = self._planned_now(call, number, prepared, whole, request.fused, earlier)
                else:
                    out = self._run(number, prepared.parts, whole, prepared.scale, earlier)
                if earlier is not None:
                    call.extra += earlier[0].shape[1] / request.key.shape[1]
                return reorder_tokens([out], back)[0]
        except UnsupportedPlanError as error:
            return CallKind(FALLBACK, reason=str(error))

    def _run(
        self, number: int, parts: list[Part], whole: QKV, scale: float | None, earlier: KV | None = None
    ) -> torch.Tensor:
        first = parts[0]
        beside = first.planned.compensation, first.planned.around, first.plan.far, earlier
        alone = first.group.tokens is first.group.samples is None and beside == (None, None, None, None)
        if alone:  # one plan, and nothing beside it
            taken: list[Any] = [whole]
            if first.choice.backend in PRECISIONS:
                out = run_parts(parts, taken, whole, scale)
            else:
                out = block_sparse_attention(*whole, first.planned.plan, scale=scale, backend=first.choice)
        else:
            taken = [part.group.take(*whole) for part in parts]
            out = run_parts(parts, taken, whole, scale, earlier)
        if self.state.observers:
            for part, qkv in zip(parts, taken, strict=True):
                shown = part.planned.around is None or not part.planned.around.moves_tokens
                plan, draft = (part.plan, part.planned.draft) if shown else (None, None)
                self.state.observe(number, SPARSE, qkv, layout=part.layout, plan=plan, draft=draft)
        return out

    def _planned_now(
        self, call: Call, number: int, prepared: Prepared, whole: QKV, fused: bool, earlier: KV | None
    ) -> torch.Tensor:
        """A call whose plan is made from its queries and keys, or that a global path's text takes part in."""
        state, groups, layout, scale = self.state, prepared.groups, prepared.layout, prepared.scale
        query = whole[0]
        taken: list[Any] = [group.take(*whole) for group in groups]
        method = state.config.method
        if state.guide is not None and layout.grid.text and (partial := state.guide.given(query.device)) is not None:
            return self._guided(call, number, prepared, taken, whole, partial)
        layouts = [layout.with_text(group.text) for group in groups]
        if isinstance(method, DynamicMethod):
            planned = [
                self._plan_call(number, n, *each, scale) for n, each in enumerate(zip(layouts, taken, strict=True))
            ]
        else:
            planned = [Planned(state.plan(own, query.shape[2], query.device)) for own in layouts]
        parts, kind = self.planner.parts_of(groups, layouts, planned, taken, fused)
        out = self._run(number, parts, whole, scale, earlier)
        if isinstance(method, DynamicMethod):
            call.values, call.means = measured(parts, query.shape[0]), means_for_key(parts, query.shape[0])
            kept = density_of_heads(parts, query.shape[0])
            if state.forward.dealt is None:
                call.heads = kept
            elif not method.heads_alike:
                state.head_dealer.tell(number, *state.forward.dealt, kept)
            call.extra = extra_pairs(parts, query.shape[0])
        else:
            call.density, call.cost = mean_density(parts, query.shape[0]), mean_cost(parts, query.shape[0])
        call.kind = kind
        return out

    def _plan_call(self, number: int, place: int, layout: Layout, qkv: QKV, scale: float | None) -> Planned:
        """A dynamic method's plan for the ``place``-th group of samples of a layer's call."""
        method, query, memories = self.state.method_of(number), qkv[0], self.state.memories.now
        assert isinstance(method, DynamicMethod)
        memory: dict[str, Any] = {}
        if method.keeps_memory:
            kept = not capturing(query.device)
            if kept:
                memory = memories.of(number, place, layout, query.shape, qkv[1].shape, query.dtype, query.device)
            shared = functools.partial(memories.of_branch, place, len(query)) if kept else dict
            method = method.in_run(self.state.layers[number], shared, head_part(self.state))
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        return method.plan_call(layout, *qkv, scale, memory, memories.tick)

    # ── beside a global path, where text is part of the sequence ─────────────────────────────────────────────────

    def _beside_global_path(
        self, layer: AttentionLayer, request: AttentionRequest
    ) -> tuple[CallKind, AttentionRequest]:
        """What a global path's call counts as, and the call with the method's scale. What its text gives is handed on."""
        state = self.state
        layout = with_text_of(state.forward.layout, request) if layer.downsample is None else None
        request = request.replace(scale=self.planner.scale(layout, request))
        guide = state.guide if layer.block in state.selected else None
        if guide is not None and (state.forward.runs or guide.keeps) and layout is not None and layout.grid.text:
            there, _ = state.plans.order(layout, request.query.device)
            groups = state.forward.masks.groups(request.attn_mask, layout.grid, request.query, there)
            guide.keep(text_partial(layout, groups, reordered(request.qkv, there), request.scale))
        return CallKind(GLOBAL_PATH), request

    def _guided(
        self, call: Call, number: int, prepared: Prepared, taken: list[QKV], whole: QKV, partial: tuple
    ) -> torch.Tensor:
        """A call of the window path, with the global path's text partial."""
        layout, groups, query = prepared.layout, prepared.groups, whole[0]
        alone = layout.with_text(0)
        plan = self.state.plans.plan(alone, query.shape[2], query.device)
        pictures = pictures_of(layout, groups, taken)
        (choice,), in_16_bits = self.planner.choose_backends(pictures[:1], [Planned(plan)])
        out = attend_with_text_partial(layout, groups, taken, pictures, whole, plan, choice, partial, prepared.scale)
        call.density = density_with_text_partial(layout, groups, plan.density, query)
        call.cost = density_with_text_partial(layout, groups, plan.cost, query)
        call.kind = CallKind(SPARSE, choice.backend, in_16_bits)
        for picture in pictures:
            self.state.observe(number, SPARSE, picture, layout=alone, plan=plan)
        return out

    def fused_here(self, x: torch.Tensor) -> bool:
        """Whether the family's fused kernels may run on ``x``: wanted, a GPU that Triton serves, no gradients."""
        if not x.is_cuda or not self.state.config.fuse or torch.is_grad_enabled() or x.dtype not in DTYPES:
            return False
        return _triton_runs(x.device)

    def order_here(self, number: int, x: torch.Tensor) -> Order | None:
        """The token order that layer ``number``'s call over ``x`` (B, S, C) will need, if it is to be sparse."""
        state, forward, layer = self.state, self.state.forward, self.state.layers[number]
        if state.window is not None:
            return state.window.order
        layout = forward.layout
        if layout is None or not forward.runs or forward.global_path or layer.downsample is not None:
            return None
        if layer.block not in state.selected or x.shape[1] != layout.grid.tokens or state.method_of(number) is None:
            return None
        return state.plans.order(layout, x.device)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        raise TilewiseError(
            f"{self.state.name} is patched: a copy of one of its modules would share its hooks. Copy the whole denoiser or "
            "pipeline, which gives a patched copy, or call tilewise.unpatch before copying"
        )


def _in_model_order(request: AttentionRequest) -> AttentionRequest:
    """A request for a dense call, whose query and key may have been made for a sparse one."""
    if request.qk_order is None:
        return request
    query, key = reorder_tokens([request.query, request.key], request.qk_order[1])
    return request.replace(query=query, key=key, qk_order=None)


@constant_in_graphs
def _triton_runs(device: torch.device) -> bool:
    """Whether Triton kernels run on a device: they are what families fuse with."""
    return _find_triton(device)


@functools.cache
def _find_triton(device: torch.device) -> bool:
    return any(name == "triton" and usable for name, usable, _ in available_backends(device))
