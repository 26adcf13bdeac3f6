"""A global path that looks less closely: what its self-attention does in place of dense attention. Each call is counted."""

from __future__ import annotations

import functools
import types
from typing import Any

import torch

from tilewise.kernels.errors import UnsupportedPlanError
from tilewise.kernels.fused.reorder import reorder_tokens
from tilewise.kernels.plans.layout import Layout
from tilewise.plugins.errors import FallbackError, TilewiseError
from tilewise.plugins.guidance.global_path import drafting
from tilewise.plugins.guidance.pooled_attention import Patches, pooled_attention, pooling_of
from tilewise.plugins.hooks.attention_rebinding import rebind
from tilewise.plugins.hooks.forward_override import ForwardOverride
from tilewise.plugins.masks.padding_mask import Group
from tilewise.plugins.runtime.attention_processor import TilewiseProcessor
from tilewise.plugins.runtime.call_stats import GLOBAL_PATH, Call, CallKind
from tilewise.plugins.runtime.patched_denoiser import Patch
from tilewise.plugins.runtime.sparse_call import QKV, Part, choose, measured, reordered, run_part
from tilewise.plugins.torch_compat import overriding_mode


class CoarseGlobalPath:
    """The self-attention of one denoiser's global path.

    Args:
        kind: "draft", by the draft method over the blocks of the window's layout, with summary rows; or "pooled", over the means
            of patches of ``pool`` (h, w) tokens.
    """

    def __init__(self, patch: Patch, kind: str, pool: tuple[int, int]) -> None:
        self.patch, self.kind, self.pool = patch, kind, pool
        self._draft = drafting()
        self._patches: tuple[Any, Patches] | None = None

    def layer(self, override: ForwardOverride, args: tuple, kwargs: dict[str, Any]) -> torch.Tensor:
        """A layer's forward: its own processor, with another attention."""
        module: Any = override.module
        processor = module.processor
        if not isinstance(processor, TilewiseProcessor):  # left alone by the patch
            return override.stock(*args, **kwargs)
        original: Any = processor.original
        dispatch = functools.partial(self._dispatch, processor.number)
        hidden = args[0] if args else kwargs["hidden_states"]
        if processor.fused is not None and self.patch.calls.fused_here(hidden):
            out = processor.fused(original, dispatch, module, *args, **kwargs)
            if out is not None:
                return out
        return types.MethodType(rebind(processor.stock_call, dispatch), original)(module, *args, **kwargs)

    def _dispatch(
        self, number: int, query: Any, key: Any, value: Any, attn_mask: Any = None, *_: Any, **__: Any
    ) -> torch.Tensor:
        """In place of diffusers' attention dispatcher."""
        if attn_mask is not None:
            raise TilewiseError(
                f"two paths: a global path that is {self.kind} cannot follow an attention mask; use global_path='dense'"
            )
        if mode := overriding_mode():
            raise TilewiseError(
                f"two paths: a global path that is {self.kind} cannot follow {mode}, which changes what stock attention "
                "computes; use global_path='dense'"
            )
        layout = self.patch.state.forward.layout
        scale = None if layout is None else self.patch.config.method.scale(layout, query.shape[-1])
        attend = self._drafted if self.kind == "draft" else self._pooled
        with self.patch.state.call_stats.record(number, None, query, key) as call:
            return attend(call, (query, key, value), layout, scale)

    def _pooled(self, call: Call, qkv: QKV, layout: Layout | None, scale: float | None) -> torch.Tensor:
        device, grid = qkv[0].device, self.patch.state.forward.grid
        if grid is None:
            raise TilewiseError(
                f"two paths: no pooled attention of the global path: {self.patch.state.forward.refused}. Use global_path='dense'"
            )
        known = (grid, device)
        kept = self._patches  # another thread may put others there
        if kept is None or kept[0] != known:
            kept = self._patches = known, pooling_of(grid, self.pool, device)
        patches = kept[1]
        call.density = len(patches.count) / grid.tokens
        call.kind = CallKind(GLOBAL_PATH, "pooled")
        return pooled_attention(*qkv, patches, scale)

    def _drafted(self, call: Call, qkv: QKV, layout: Layout | None, scale: float | None) -> torch.Tensor:
        refused = self.patch.state.forward.refused if layout is None else self._draft.refuses_call(layout)
        if layout is None or refused is not None:
            raise TilewiseError(
                f"two paths: no draft of the global path: {refused}. Use global_path='pooled' or 'dense'"
            )
        scale = qkv[0].shape[-1] ** -0.5 if scale is None else scale
        there, back = self.patch.state.plans.order(layout, qkv[0].device)
        qkv = reordered(qkv, there)
        planned = self._draft.plan_call(layout, *qkv, scale, {}, 0)
        try:
            choice, in_16_bits = choose(qkv, planned.plan, self.patch.config.precision)
        except UnsupportedPlanError as error:
            raise TilewiseError(f"two paths: no kernel takes the draft of the global path: {error}") from error
        if in_16_bits and self.patch.config.strict:
            raise FallbackError(f"strict: the global path of {self.patch.name}: {in_16_bits}")
        call.density = None
        call.kind = CallKind(GLOBAL_PATH, f"{choice.backend}, draft", in_16_bits)
        part = Part(Group(None, None, layout.grid.text), layout, planned, choice)
        found = measured([part], qkv[0].shape[0])
        call.values = {name: found[name] for name in ("density", "broken") if name in found}
        return reorder_tokens([run_part(qkv, part, scale)], back)[0]
