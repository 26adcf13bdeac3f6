"""What an attention call of a patched denoiser runs by: its token order, groups of samples, plans and backends."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from tilewise.kernels.attention.dispatch import Choice
from tilewise.kernels.errors import UnsupportedPlanError
from tilewise.kernels.plans.layout import Layout
from tilewise.plugins.masks.padding_mask import Group
from tilewise.plugins.methods.base import DynamicMethod, Planned
from tilewise.plugins.models.common.family import AttentionLayer
from tilewise.plugins.runtime.attention_request import AttentionRequest
from tilewise.plugins.runtime.call_stats import DENSE_LAYER, FALLBACK, SHORT, SPARSE, CallKind
from tilewise.plugins.runtime.forward_state import ForwardState
from tilewise.plugins.runtime.plan_cache import Order
from tilewise.plugins.runtime.sparse_call import QKV, Part, choose, mean_cost, mean_density, reordered


@dataclass(frozen=True)
class Prepared:
    """What one sparse call runs by.

    layout: the token order of its plans. order: (permutation, inverse) into it from the order that the tokens are in.
    groups: of samples, by the tokens that the mask leaves them. parts: their static plans; None: planned at each call.
    kind, density, cost: what the call counts as; None: known when it has run.
    """

    layout: Layout
    order: Order
    groups: list[Group]
    scale: float | None
    parts: list[Part] | None = None
    kind: CallKind | None = None
    density: float | None = None
    cost: float | None = None


class CallPlanner:
    """Finds what the calls of one denoiser run by."""

    def __init__(self, state: ForwardState) -> None:
        self.state = state

    def prepare(self, layer: AttentionLayer, request: AttentionRequest) -> Prepared | CallKind:
        """What a call runs by; or what it counts as, where it runs dense although its step and block run the method."""
        state, method = self.state, self.state.config.method
        layout = self._layout(layer, request)
        if isinstance(layout, CallKind):
            return layout
        query = request.query
        if isinstance(method, DynamicMethod) and (short := method.stays_dense(query.shape[1], query.device)):
            return CallKind(SHORT, reason=short)
        reason = _refusal(layout, request)
        if reason is None and isinstance(method, DynamicMethod):
            reason = method.refuses_call(layout)
        if reason is None and state.forward.heads is not None:
            reason = method.refuses_some_heads()
        if reason is not None:
            return CallKind(FALLBACK, reason=reason)
        own = state.plans.order(layout, query.device)
        order = state.plans.order_from(request.rank_order, layout, query.device)
        groups = state.forward.masks.groups(request.attn_mask, layout.grid, query, own[0])
        if isinstance(groups, str):
            return CallKind(FALLBACK, reason=groups)
        prepared = Prepared(layout, order, groups, self.scale(layout, request))
        masked = request.attn_mask is not None  # such a call is not kept: its parts are found when it runs
        if isinstance(method, DynamicMethod) or masked or (state.guide is not None and layout.grid.text):
            return prepared
        whole = reordered(request.qkv, order[0])
        taken: list[Any] = [group.take(*whole) for group in groups]
        layouts = [layout.with_text(group.text) for group in groups]
        planned = [Planned(state.plan(own, query.shape[2], query.device)) for own in layouts]
        try:
            parts, kind = self.parts_of(groups, layouts, planned, taken, request.fused)
        except UnsupportedPlanError as error:
            return CallKind(FALLBACK, reason=str(error))
        batch = query.shape[0]
        return replace(
            prepared, parts=parts, kind=kind, density=mean_density(parts, batch), cost=mean_cost(parts, batch)
        )

    def parts_of(
        self, groups: list[Group], layouts: list[Layout], planned: list[Planned], taken: list[QKV], fused: bool
    ) -> tuple[list[Part], CallKind]:
        """Each group with its plan and what runs it, and what such a call counts as. taken: the groups' tensors.

        Raises:
            UnsupportedPlanError: where no kernel takes one of them.
        """
        chosen, in_16_bits = self.choose_backends(taken, planned)
        parts = [Part(*each) for each in zip(groups, layouts, planned, chosen, strict=True)]
        backends = ", ".join(dict.fromkeys(choice.backend for choice in chosen))
        return parts, CallKind(SPARSE, backends, in_16_bits, fused)

    def _layout(self, layer: AttentionLayer, request: AttentionRequest) -> Layout | CallKind:
        """The token order of a call; or what it counts as, where there is none."""
        forward, config = self.state.forward, self.state.config
        own = layer.downsample is not None  # a map of its own
        if own:
            layout = self.state.map_layout(layer)
        else:
            layout = with_text_of(forward.layout, request)
        if layout is None:
            return CallKind(DENSE_LAYER)
        short = config.too_few(request.query.shape[1], own, request.query.device)
        return layout if short is None else CallKind(SHORT, reason=short)

    def scale(self, layout: Layout | None, request: AttentionRequest) -> float | None:
        """The attention scale of the method, or else the call's own."""
        chosen = None if layout is None else self.state.config.method.scale(layout, request.query.shape[-1])
        return request.scale if chosen is None else chosen

    def choose_backends(self, taken: list[QKV], planned: list[Planned]) -> tuple[list[Choice], str]:
        """What runs each plan, and why not in the 8 bits that were asked for.

        Raises:
            UnsupportedPlanError: where nothing may.
        """
        config = self.state.config
        found = [choose(qkv, p.plan, config.precision) for qkv, p in zip(taken, planned, strict=True)]
        in_16_bits = next((why for _, why in found if why), "")
        if in_16_bits and config.strict:
            raise UnsupportedPlanError(in_16_bits)
        return [choice for choice, _ in found], in_16_bits


def with_text_of(layout: Layout | None, request: AttentionRequest) -> Layout | None:
    """The layout of the forward for a call over the video tokens and only some of the text.

    For blocks with an attention over the image alone beside the joint one, and refiners that run before the text is joined.
    """
    queries, keys = request.query.shape[1], request.key.shape[1]
    if layout is None or not layout.grid.video <= queries == keys < layout.grid.tokens:
        return layout
    return layout.with_text(queries - layout.grid.video)


def _refusal(layout: Layout, request: AttentionRequest) -> str | None:
    """Why an attention call cannot run sparse although step and layer should, whatever its mask, or None."""
    tokens, queries, keys = layout.grid.tokens, request.query.shape[1], request.key.shape[1]
    if queries != tokens or keys != tokens:
        return f"{queries} queries and {keys} keys are not the {tokens} tokens of the grid {layout.grid}"
    if request.is_causal:
        return "the call is causal"
    if request.dropout_p:
        return "the call has dropout"
    return None
