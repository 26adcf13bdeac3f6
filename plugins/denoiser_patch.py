"""One patched denoiser: what is put on it, what its forwards are told, and how it comes off again."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import nn

from tilewise.kernels.attention import block_sparse_attention, choose_backend
from tilewise.kernels.layout import Grid, Layout
from tilewise.kernels.plan import BlockPlan
from tilewise.plugins.config import Config, select_blocks
from tilewise.plugins.errors import FallbackError, TilewiseError
from tilewise.plugins.ledger import DENSE_LAYER, DENSE_STEP, FALLBACK, SPARSE, Entry, Ledger
from tilewise.plugins.models.base import AttentionLayer, Family, family_of
from tilewise.plugins.processor import TilewiseProcessor, why_not
from tilewise.plugins.schedule import step_of

ATTRIBUTE = "_tilewise"  # the one attribute that a patch adds to a denoiser


class Patch:
    """Everything that tilewise holds about one patched denoiser."""

    def __init__(self, name: str, denoiser: nn.Module, pipe: Any, config: Config) -> None:
        family = family_of(denoiser)
        assert family is not None
        self.name = name
        self.config = config
        self.family: Family = family
        self.pipe = weakref.ref(pipe) if pipe is not denoiser else lambda: None
        self.ledger = Ledger()
        self.layers: list[AttentionLayer] = family.layers(denoiser)
        blocks = 1 + max((layer.block for layer in self.layers), default=-1)
        self.selected = set(select_blocks(config.blocks, blocks))
        self.grid: Grid | None = None  # of the last forward
        self._layout: Layout | None = None  # the token order in force during a forward; None: the model's own
        self._runs = False  # whether the method runs at this step
        self._refused: str | None = None  # why it cannot in this forward, although it should
        self._orders: dict[tuple[Layout, torch.device], tuple[torch.Tensor, torch.Tensor]] = {}
        self._plans: dict[tuple[Layout, int, torch.device], BlockPlan] = {}
        self._handles: list[Any] = []
        self._install(denoiser)

    # ── putting on and taking off ────────────────────────────────────────────────────────────────────────────────

    def _install(self, denoiser: nn.Module) -> None:
        try:
            for number, layer in enumerate(self.layers):
                module: Any = layer.module
                if reason := why_not(module.processor):
                    self._leave_alone(layer, reason)
                else:
                    module.set_processor(TilewiseProcessor(module.processor, self._answerer(number)))
            self._handles.append(denoiser.register_forward_pre_hook(self._begin, with_kwargs=True))
            self._handles.append(denoiser.register_forward_hook(self._end, always_call=True))
            self._handles += self.family.reorder_hooks(denoiser, self)
        except BaseException:
            self._take_off()
            raise
        setattr(denoiser, ATTRIBUTE, self)

    def _leave_alone(self, layer: AttentionLayer, reason: str) -> None:
        """A layer with a processor of its own stays dense, is reported, and gets its tokens in the model's own order."""
        if self.config.strict:
            raise FallbackError(f"strict: {self.name}.{layer.name} would stay dense: {reason}")
        self.ledger.skipped_layers[layer.name] = reason
        self._handles += self.family.raster_hooks(layer.module, self)

    def remove(self, denoiser: nn.Module) -> None:
        self._take_off()
        delattr(denoiser, ATTRIBUTE)

    def _take_off(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for layer in self.layers:
            module: Any = layer.module
            # One that was replaced since by somebody else is theirs to keep.
            if isinstance(module.processor, TilewiseProcessor):
                module.set_processor(module.processor.original)

    def __deepcopy__(self, memo: dict) -> Patch:
        raise TilewiseError(
            f"{self.name} is patched: a copy would share its hooks. Call tilewise.unpatch before copying"
        )

    # ── during a forward ─────────────────────────────────────────────────────────────────────────────────────────

    @torch.compiler.disable
    def _begin(self, denoiser: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self.grid = self.family.grid(denoiser, args, kwargs)
        step, total = step_of(self.pipe(), self.family.timestep(args, kwargs))
        self._runs = self.config.runs_at(step, total)
        self._refused = None
        for layer in self.layers:
            module: Any = layer.module
            if isinstance(module.processor, TilewiseProcessor):
                if module.processor._parallel_config is not None:
                    self._refused = "context parallelism is enabled, and shards the tokens before they can be reordered"
            elif layer.name not in self.ledger.skipped_layers:
                kind = type(module.processor).__name__
                self._leave_alone(layer, f"its processor was replaced by {kind} after the patch")
        if self._refused and self._runs and self.config.strict:
            raise FallbackError(f"strict: {self.name} cannot run {self.config.method.name}: {self._refused}")
        # The order is in force in dense steps too: caches that keep tensors from one step to the next, as some of diffusers'
        # do, must find them in the same order.
        usable = self.selected and self._refused is None
        self._layout = self.config.method.layout(self.grid) if usable else None

    @torch.compiler.disable
    def _end(self, denoiser: nn.Module, args: tuple, output: Any) -> None:
        self._layout = None

    @torch.compiler.disable
    def order(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The token order in force, for the family's hooks (the ``Reorder`` protocol)."""
        if self._layout is None:
            return None
        key = (self._layout, device)
        if key not in self._orders:
            self._orders[key] = self._layout.permutation.to(device), self._layout.inverse.to(device)
        return self._orders[key]

    def plan(self, layout: Layout, heads: int, device: torch.device) -> BlockPlan:
        """The method's plan, made once for a layout, number of heads and device."""
        key = (layout, heads, device)
        if key not in self._plans:
            self._plans[key] = self.config.method.plan(layout, heads, device)
        return self._plans[key]

    def _answerer(self, number: int) -> Any:
        """The function that answers the attention calls of one layer, in place of diffusers' dispatcher."""
        layer = self.layers[number]

        def answer(
            stock: Any,
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
            layout = self._layout
            if not self._runs:
                entry = Entry(DENSE_STEP)
            elif layer.block not in self.selected or (layout is None and self._refused is None):
                entry = Entry(DENSE_LAYER)
            else:
                reason = self._refused
                if layout is not None:
                    reason = _refusal(layout, query, key, attn_mask, dropout_p, is_causal)
                if reason is None and layout is not None:
                    plan = self.plan(layout, query.shape[2], query.device)
                    try:
                        chosen = choose_backend(query, key, value, plan)
                    except (TypeError, ValueError, RuntimeError) as error:
                        reason = str(error)
                    else:
                        entry = Entry(SPARSE, plan.density, chosen.backend)
                        with self.ledger.record(number, entry, query.device):
                            return block_sparse_attention(query, key, value, plan, scale=scale, backend=chosen.backend)
                if self.config.strict:
                    raise FallbackError(
                        f"strict: {self.name}.{layer.name} cannot run {self.config.method.name}: {reason}"
                    )
                entry = Entry(FALLBACK, reason=reason or "")
            if layout is not None and attn_mask is not None:
                attn_mask = _reorder_mask(attn_mask, layout, self.order(attn_mask.device))
            with self.ledger.record(number, entry, query.device):
                return stock(
                    query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, attention_kwargs,
                    backend=backend, parallel_config=parallel_config,
                )  # fmt: skip

        return answer


def _refusal(
    layout: Layout,
    query: torch.Tensor,
    key: torch.Tensor,
    attn_mask: torch.Tensor | None,
    dropout_p: float,
    is_causal: bool,
) -> str | None:
    """Why an attention call cannot run sparse although step and layer should, or None."""
    tokens = layout.grid.tokens
    if query.shape[1] != tokens or key.shape[1] != tokens:
        return f"{query.shape[1]} queries and {key.shape[1]} keys are not the {tokens} tokens of the grid {layout.grid}"
    if attn_mask is not None:
        return "the call has an attention mask"
    if is_causal:
        return "the call is causal"
    if dropout_p:
        return "the call has dropout"
    return None


def _reorder_mask(mask: torch.Tensor, layout: Layout, order: tuple[torch.Tensor, torch.Tensor] | None) -> torch.Tensor:
    """A mask over raster tokens, brought into the order that queries and keys are in."""
    assert order is not None
    for dim in (-2, -1):
        if mask.ndim >= -dim and mask.shape[dim] == layout.grid.tokens:
            mask = mask.index_select(dim, order[0])
    return mask
