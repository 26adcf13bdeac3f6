"""What a patched denoiser decides anew at every forward and attention call.

torch.compile never sees this: it runs directly, or inside the operators of ``custom_ops.py`` where the denoiser is compiled.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from tilewise.kernels.attention.dispatch import Choice
from tilewise.kernels.device import capturing
from tilewise.kernels.plans.block_plan import BlockPlan
from tilewise.kernels.plans.layout import Grid, Layout, cached_layout
from tilewise.plugins.config import Config
from tilewise.plugins.diffusers_compat import is_sharded
from tilewise.plugins.errors import FallbackError, TilewiseError
from tilewise.plugins.masks.padding_mask import Group, Masks
from tilewise.plugins.methods.base import DynamicMethod, Planned
from tilewise.plugins.methods.dynamic.step_memory import Memories
from tilewise.plugins.models.common.family import AttentionLayer
from tilewise.plugins.runtime import dense_backend
from tilewise.plugins.runtime.attention_call import (
    QKV,
    AttentionCall,
    attend_groups,
    choose,
    mean_density,
    measured,
    part_of,
    with_text,
)
from tilewise.plugins.runtime.attention_processor import TilewiseProcessor
from tilewise.plugins.runtime.call_stats import (
    DENSE_LAYER,
    DENSE_STEP,
    FALLBACK,
    GLOBAL_PATH,
    SHORT,
    SPARSE,
    Call,
    CallKind,
    CallStats,
)
from tilewise.plugins.runtime.joint_text import TextGuide, attend_guided, guided_density, pictures_of, told_by_text
from tilewise.plugins.runtime.plan_cache import Kept, Order
from tilewise.plugins.runtime.step_index import StepIndex

MIN_OWN_TOKENS = (
    4096  # below, reordering at each call and the launches cost more than sparse attention saves (SDXL at 1024²)
)


class Step:
    """The forward that is under way, and what is kept from one to the next: plans, token orders and call stats.

    Args:
        name: the denoiser's, for messages.
        steps: tells which step a forward is.
        layers, selected: the self-attention layers, and the numbers of the blocks that run the method.
        reorders: whether any forward may reorder tokens.
        leave_alone: called with a layer whose processor somebody replaced after the patch, and the reason to report.
        take_back: called with one that had been left alone and has our processor again.
    """

    def __init__(
        self,
        name: str,
        config: Config,
        steps: StepIndex,
        layers: list[AttentionLayer],
        selected: set[int],
        reorders: bool,
        leave_alone: Callable[[AttentionLayer, str], None],
        take_back: Callable[[AttentionLayer], None] = lambda layer: None,
    ) -> None:
        self.name = name
        self.config = config
        self.steps = steps
        self.pipe = steps.pipe
        self.layers = layers
        self.selected = selected
        self.reorders = reorders
        self.leave_alone = leave_alone
        self.take_back = take_back
        self.removed = False  # whether the patch is off: a processor of it that is still called runs stock
        self.call_stats = CallStats()
        self.grid: Grid | None = None  # of the last forward
        self._layout: Layout | None = None  # the token order in force during a forward; None: the model's own
        self._runs = False  # whether the method runs at this step
        self._refused: str | None = None  # why it cannot in this forward, although it should
        self._full_path = False  # whether calls are dense just now, on purpose: see full_path
        self.kept = Kept(name, config.method)
        self._masks = Masks()  # of this forward
        self.watchers: list[Callable[[AttentionCall], None]] = []  # told of every attention call
        self.guide: TextGuide | None = None  # beside a full path, where text is part of the sequence
        self._memories = Memories()  # of a dynamic method
        self._position: int | None = None  # the step of this forward, if anybody wants to know
        self._is_last = False  # whether that is the last one of its run

    def begin(self, grid: Grid, timestep: torch.Tensor, refused: str | None = None) -> None:
        """Decide what a forward over ``grid`` at ``timestep`` does; ``refused``: why its family says it cannot be sparse."""
        self.grid = grid
        self._masks.clear()
        self._runs = self._runs_at(timestep)
        self._follow(timestep)
        self._refused = refused
        for layer in self.layers:
            module: Any = layer.module
            if isinstance(module.processor, TilewiseProcessor):
                if layer.name in self.call_stats.skipped_layers:
                    self.take_back(layer)
                if is_sharded(module.processor):
                    self._refused = "context parallelism is enabled, and shards the tokens before they can be reordered"
            else:
                self.leave(layer)
        if self._refused and self._runs and self.config.strict:
            raise FallbackError(f"strict: {self.name} cannot run {self.config.method.name}: {self._refused}")
        # The order is in force in dense steps too: caches that keep tensors from one step to the next, as some of diffusers'
        # do, must find them in the same order.
        usable = self.reorders and self._refused is None
        self._layout = self.config.method.layout(grid) if usable else None

    @contextmanager
    def full_path(self) -> Iterator[None]:
        """Attention calls in here are dense on purpose, in whatever order the tokens are: the full path beside a sparse one."""
        before, self._full_path = self._full_path, True
        try:
            yield
        finally:
            self._full_path = before

    def end(self) -> None:
        """The forward is over: outside one, tokens are in the model's own order."""
        self._memories.end(self._is_last)
        self._layout = None
        self._masks.clear()

    def _runs_at(self, timestep: torch.Tensor) -> bool:
        low, high = self.config.steps
        if (low, high) == (0.0, 1.0) or low == high:  # always or never: a timestep's value need not be read
            return low != high
        try:
            at = self.steps.of(timestep)
        except RuntimeError as error:
            if not capturing(timestep.device):
                raise
            raise TilewiseError(
                f"{self.name}: steps={self.config.steps} of a denoiser without a scheduler in use needs the timestep's value, "
                "which cannot be read while a CUDA graph is being captured. Patch the pipeline, or give steps=(0, 1), or "
                "steps=(0, 0) for the dense steps' graph"
            ) from error
        return self.config.runs_at(at.step, at.total)

    def _follow(self, timestep: torch.Tensor) -> None:
        """Keep count of runs, steps and branches, where somebody goes by them; a bare denoiser's timestep is read for it."""
        method = self.config.method
        wanted = self.watchers or (isinstance(method, DynamicMethod) and method.keeps_memory)
        if not wanted or capturing(timestep.device):  # a captured call plans for itself at every replay
            self._position, self._is_last = None, False
            self._memories.begin(None)
            return
        at = self.steps.of(timestep)
        self._position, self._is_last = at.step, at.is_last
        self._memories.begin(at.step, at.run)

    def leave(self, layer: AttentionLayer) -> None:
        """Report a layer whose processor is not ours, once; what replaced ours may do attention its own way."""
        if layer.name not in self.call_stats.skipped_layers:
            self._leave(layer)

    @torch.compiler.disable
    def _leave(self, layer: AttentionLayer) -> None:
        module: Any = layer.module
        kind = type(module.processor).__name__
        self.leave_alone(layer, f"its processor was replaced by {kind} after the patch")

    def order(self, device: torch.device) -> Order | None:
        """(permutation, inverse), (S,) int64 on ``device``, or None while the model's own order is in force."""
        return None if self._layout is None else self.kept.order(self._layout, device)

    def indices(self, tokens: int, device: torch.device, inverse: bool) -> torch.Tensor:
        """One of ``order``, or the identity, for an axis of ``tokens`` tokens; the caller must not write to it."""
        order = self.order(device)
        if order is None:
            order = self.kept.identity(tokens, device)
        elif self._layout is not None and tokens == self._layout.grid.video != self._layout.grid.tokens:
            order = self.kept.video_order(self._layout, device)  # a stream of video tokens alone, beside one of text
        if len(order[0]) != tokens:
            raise TilewiseError(
                f"{self.name}: cannot reorder {tokens} tokens, the grid {self.grid} has {len(order[0])}"
            )
        return order[inverse]

    def _own_layout(self, layer: AttentionLayer) -> Layout | None:
        """The layout of a layer with a feature map of its own; None where the method is dense or the map too small to pay."""
        assert self.grid is not None
        grid = layer.grid(self.grid)
        if self._refused is not None or grid.tokens < MIN_OWN_TOKENS:
            return None
        return self.config.method.layout(grid)

    def _scale(self, layout: Layout | None, query: torch.Tensor, scale: float | None) -> float | None:
        """The attention scale of the method, or else the call's own."""
        chosen = None if layout is None else self.config.method.scale(layout, query.shape[-1])
        return scale if chosen is None else chosen

    def _attend_sparse(
        self,
        call: Call,
        number: int,
        layout: Layout,
        groups: list[Group],
        parts: list[QKV],
        whole: QKV,
        scale: float | None,
        fused: bool,
    ) -> torch.Tensor | str:
        """The output of a call by the method's plans, and what ``call`` was; or why no kernel takes it."""
        query = whole[0]
        if self.guide is not None and layout.grid.text and (told := self.guide.given(query.device)) is not None:
            return self._attend_guided(call, number, layout, groups, parts, whole, told, scale)
        if isinstance(self.config.method, DynamicMethod):
            planned = [
                self._plan_call(number, n, layout, group, part, scale)
                for n, (group, part) in enumerate(zip(groups, parts, strict=True))
            ]
        else:
            heads, device = query.shape[2], query.device
            planned = [
                (group, Planned(self.kept.plan(with_text(layout, group.text), heads, device))) for group in groups
            ]
        found = self._chosen(parts, [p.plan for _, p in planned])
        if isinstance(found, str):
            return found
        chosen, in_16_bits = found
        out = attend_groups(layout, planned, parts, chosen, whole, scale)
        dynamic = isinstance(self.config.method, DynamicMethod)
        call.density = None if dynamic else mean_density(planned, query)
        call.kind = CallKind(SPARSE, ", ".join(dict.fromkeys(choice.backend for choice in chosen)), in_16_bits, fused)
        if dynamic:
            call.values = measured(planned, query)
        for (group, p), part in zip(planned, parts, strict=True):
            self._tell(number, SPARSE, part, with_text(layout, group.text), p.plan, p.draft)
        return out

    def _chosen(self, parts: list[QKV], plans: list[BlockPlan]) -> tuple[list[Choice], str] | str:
        """What runs each part's plan, and why not in the 8 bits that were asked for; or why nothing may."""
        try:
            found = [choose(part, plan, self.config.precision) for part, plan in zip(parts, plans, strict=True)]
        except (TypeError, ValueError, RuntimeError) as error:
            return str(error)
        in_16_bits = next((why for _, why in found if why), "")
        if in_16_bits and self.config.strict:
            return in_16_bits
        return [choice for choice, _ in found], in_16_bits

    def _attend_guided(
        self,
        call: Call,
        number: int,
        layout: Layout,
        groups: list[Group],
        parts: list[QKV],
        whole: QKV,
        told: tuple[torch.Tensor, torch.Tensor],
        scale: float | None,
    ) -> torch.Tensor | str:
        """As ``_attend_sparse``, with what a full path's text told the picture."""
        query, alone = whole[0], with_text(layout, 0)
        plan = self.kept.plan(alone, query.shape[2], query.device)
        pictures = pictures_of(layout, groups, parts)
        found = self._chosen(pictures[:1], [plan])
        if isinstance(found, str):
            return found
        (choice,), in_16_bits = found
        out = attend_guided(layout, groups, parts, pictures, whole, plan, choice, told, scale)
        call.density = guided_density(layout, groups, plan, query)
        call.kind = CallKind(SPARSE, choice.backend, in_16_bits)
        for picture in pictures:
            self._tell(number, SPARSE, picture, alone, plan)
        return out

    def _stays_dense(self, query: torch.Tensor) -> str | None:
        method = self.config.method
        return method.stays_dense(query.shape[1], query.device) if isinstance(method, DynamicMethod) else None

    def _refuses_call(self, layout: Layout) -> str | None:
        method = self.config.method
        return method.refuses_call(layout) if isinstance(method, DynamicMethod) else None

    def _plan_call(
        self, number: int, place: int, layout: Layout, group: Group, part: QKV, scale: float | None
    ) -> tuple[Group, Planned]:
        """A dynamic method's plan for the ``place``-th group of samples of a layer's call."""
        method, query = self.config.method, part[0]
        assert isinstance(method, DynamicMethod)
        layout = with_text(layout, group.text)
        memory: dict[str, Any] = {}
        if method.keeps_memory and not capturing(query.device):
            memory = self._memories.of(number, place, layout, query.shape, part[1].shape, query.dtype, query.device)
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        return group, method.plan_call(layout, *part, scale, memory, self._memories.tick)

    def _tell(
        self,
        number: int,
        kind: str,
        tensors: QKV,
        layout: Layout | None = None,
        plan: BlockPlan | None = None,
        draft: torch.Tensor | None = None,
    ) -> None:
        """Tell the watchers of a call that ran."""
        if not self.watchers:
            return
        layer = self.layers[number]
        told = AttentionCall(
            self.name,
            layer.name,
            layer.block,
            self._position,
            self._memories.branch,
            kind,
            layout,
            plan,
            draft,
            *tensors,
        )
        for watcher in list(self.watchers):
            watcher(told)

    def attend(
        self,
        processor: TilewiseProcessor,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        attn_mask: torch.Tensor | None,
        dropout_p: float,
        is_causal: bool,
        scale: float | None,
        enable_gqa: bool,
        backend: Any,
        fused: bool,
        attention_kwargs: dict[str, Any] | None = None,
        parallel_config: Any = None,
    ) -> torch.Tensor:
        """Answer one attention call in place of diffusers' dispatcher, sparse or dense, and count it."""
        number = processor.number
        layer = self.layers[number]
        layout = _shortened(self._layout, query, key) if layer.downsample is None else self._own_layout(layer)
        if self._full_path:
            kind = CallKind(GLOBAL_PATH, fused=fused)
            scale = self._scale(layout, query, scale)
            guide = self.guide if layer.block in self.selected else None
            if guide is not None and (self._runs or guide.keeps) and layout is not None and layout.grid.text:
                groups = self._masks.groups(attn_mask, layout.grid, query)
                guide.keep(told_by_text(layout, groups, (query, key, value), scale))
        elif not self._runs:
            kind = CallKind(DENSE_STEP, fused=fused)
        elif layer.block not in self.selected or (layout is None and self._refused is None):
            kind = CallKind(DENSE_LAYER, fused=fused)
        elif layout is not None and (short := self._stays_dense(query)) is not None:
            kind = CallKind(SHORT, reason=short, fused=fused)
        else:
            reason = self._refused
            if layout is not None:
                reason = _refusal(layout, query, key, dropout_p, is_causal) or self._refuses_call(layout)
                groups = self._masks.groups(attn_mask, layout.grid, query) if reason is None else reason
                if not isinstance(groups, str):
                    ordered, back = (query, key, value), None
                    if layer.downsample is not None:
                        there, back = self.kept.order(layout, query.device)
                        ordered = (
                            query.index_select(1, there),
                            key.index_select(1, there),
                            value.index_select(1, there),
                        )
                    parts = [part_of(group, *ordered) for group in groups]
                    with self.call_stats.record(number, None, query, key) as call:
                        found = self._attend_sparse(
                            call, number, layout, groups, parts, ordered, self._scale(layout, query, scale), fused
                        )
                    if isinstance(found, torch.Tensor):
                        return found if back is None else found.index_select(1, back)
                    groups = found
                reason = groups
            if self.config.strict:
                raise FallbackError(f"strict: {self.name}.{layer.name} cannot run {self.config.method.name}: {reason}")
            kind = CallKind(FALLBACK, reason=reason or "", fused=fused)
        if self.config.fuse and dense_backend.takes(
            query,
            key,
            value,
            dropout_p=dropout_p,
            is_causal=is_causal,
            backend=backend,
            parallel_config=parallel_config,
        ):
            shown = self._masks.shown(attn_mask, self.grid, query)
            with self.call_stats.record(number, None, query, key) as call:
                exactly = shown and dense_backend.attend(shown, query, key, value, scale, self.kept.exact_plan)
                if isinstance(exactly, torch.Tensor):
                    call.kind = dataclasses.replace(kind, backend=dense_backend.HOPPER.name)
            if isinstance(exactly, torch.Tensor):
                self._tell(number, kind.kind, (query, key, value))
                return exactly
        if layer.downsample is None and layout is not None and attn_mask is not None:
            attn_mask = _reorder_mask(attn_mask, layout, self.kept.order(layout, attn_mask.device))
        with self.call_stats.record(number, kind, query, key):
            out = processor.stock(
                query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, attention_kwargs,
                backend=backend, parallel_config=parallel_config,
            )  # fmt: skip
        self._tell(number, kind.kind, (query, key, value))
        return out


def _shortened(layout: Layout | None, query: torch.Tensor, key: torch.Tensor) -> Layout | None:
    """The layout in force for a call over the video tokens and only some of the text, in the same order.

    For blocks with an attention over the image alone beside the joint one, and refiners that run before the text is joined.
    """
    if layout is None or not layout.grid.video <= query.shape[1] == key.shape[1] < layout.grid.tokens:
        return layout
    grid = dataclasses.replace(layout.grid, text=query.shape[1] - layout.grid.video)
    return cached_layout(grid, layout.tile, layout.max_block_rows)


def _refusal(layout: Layout, query: torch.Tensor, key: torch.Tensor, dropout_p: float, is_causal: bool) -> str | None:
    """Why an attention call cannot run sparse although step and layer should, whatever its mask, or None."""
    tokens = layout.grid.tokens
    if query.shape[1] != tokens or key.shape[1] != tokens:
        return f"{query.shape[1]} queries and {key.shape[1]} keys are not the {tokens} tokens of the grid {layout.grid}"
    if is_causal:
        return "the call is causal"
    if dropout_p:
        return "the call has dropout"
    return None


def _reorder_mask(mask: torch.Tensor, layout: Layout, order: Order | None) -> torch.Tensor:
    """A mask over raster tokens, brought into the order that queries and keys are in."""
    assert order is not None
    for dim in (-2, -1):
        if mask.ndim >= -dim and mask.shape[dim] == layout.grid.tokens:
            mask = mask.index_select(dim, order[0])
    return mask
