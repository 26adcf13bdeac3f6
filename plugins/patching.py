"""patch and unpatch: three removable parts on each denoiser, and nothing anywhere else.

1. a forward pre-hook on the denoiser reads the grid and decides whether this step runs the method;
2. the family's hooks reorder the tokens once on entry to the blocks and once on exit;
3. attention processors stand in for the stock ones and answer their attention calls.

The one attribute on the denoiser, ``_tilewise``, holds all state; ``unpatch`` removes it, the hooks and the processors.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn

from tilewise.kernels.attention import block_sparse_attention, choose_backend
from tilewise.kernels.layout import Grid, Layout
from tilewise.kernels.plan import BlockPlan
from tilewise.plugins.config import Config, MethodLike, resolve, select_blocks
from tilewise.plugins.errors import ConfigError, FallbackError, TilewiseError, UnsupportedModelError
from tilewise.plugins.ledger import DENSE_LAYER, DENSE_STEP, FALLBACK, SPARSE, Entry, Ledger
from tilewise.plugins.models.base import AttentionLayer, Family, family_of, supported_models
from tilewise.plugins.processor import TilewiseProcessor, takes_dispatch
from tilewise.plugins.schedule import step_of

ATTRIBUTE = "_tilewise"
DENOISERS = ("transformer", "transformer_2", "unet")
T = TypeVar("T")


def denoisers_of(target: Any) -> dict[str, nn.Module]:
    """The denoisers of a pipeline by attribute name, or the module itself as "denoiser".

    Raises:
        UnsupportedModelError: if there is none, or one that no family serves.
    """
    found = {name: getattr(target, name, None) for name in DENOISERS}
    denoisers = {name: _uncompiled(module) for name, module in found.items() if isinstance(module, nn.Module)}
    if isinstance(target, nn.Module) and (not denoisers or family_of(_uncompiled(target)) is not None):
        denoisers = {"denoiser": _uncompiled(target)}
    if not denoisers:
        raise UnsupportedModelError(
            f"{type(target).__name__} has no denoiser: none of {', '.join(DENOISERS)} is a module. Give a diffusers pipeline, "
            "or the denoiser itself"
        )
    for name, module in denoisers.items():
        if family_of(module) is None:
            served = "; ".join(f"{family}: {', '.join(classes)}" for family, classes in supported_models().items())
            raise UnsupportedModelError(
                f"{name} is a {type(module).__name__}, which no family adapter serves (served: {served}). Nothing was "
                "patched. To add it, write a Family (see tilewise.plugins.models.wan) and call tilewise.register_family"
            )
    return denoisers


def _uncompiled(module: nn.Module) -> nn.Module:
    """The module inside what ``torch.compile(module)`` returned."""
    return getattr(module, "_orig_mod", module)


def _forget_compiled(target: Any, denoisers: dict[str, nn.Module]) -> None:
    """Compiled code does not look for hooks that come or go later: where there may be some, it is dropped and made anew."""
    wrapped = [target, *(getattr(target, name, None) for name in denoisers)]
    compiled = any(getattr(module, "_orig_mod", None) is not None for module in wrapped)
    modules = (module for denoiser in denoisers.values() for module in denoiser.modules())
    if compiled or any(getattr(module, "_compiled_call_impl", None) is not None for module in modules):
        torch.compiler.reset()


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
                if takes_dispatch(module.processor):
                    module.set_processor(TilewiseProcessor(module.processor, self._answerer(number)))
                else:
                    self._leave_alone(layer, f"its processor, {type(module.processor).__name__}, cannot be taken over")
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


def patch(
    target: T,
    method: MethodLike,
    *,
    steps: tuple[float, float] | None = None,
    blocks: str | None = None,
    strict: bool | None = None,
) -> T:
    """Replace the attention of a pipeline's denoisers in one call. Weights and classes stay untouched.

    Args:
        target: a diffusers pipeline, anything with ``transformer``, ``transformer_2`` or ``unet``, or a denoiser module.
        method: a method name ("sta", "dense"), a preset ("sta-quality", "sta-balanced", "sta-fast"), a method object such as
            ``STA(window=(3, 3, 3))``, or a ``Config``, for instance from ``load_config``.
        steps: (from, to), the fraction of the denoising schedule that runs the method; dense outside. Default: what the
            preset or config says, otherwise (0.25, 1.0). The step is read from the pipeline's scheduler; for a bare
            denoiser, from the timestep's value (one host synchronisation a forward on a GPU).
        blocks: which transformer blocks run it, such as "2:". Default: what the preset or config says, otherwise ":".
        strict: raise ``FallbackError`` instead of falling back to dense where a call cannot run the method.

    Returns:
        ``target``. Patching a patched target replaces the earlier patch; ``unpatch`` always restores the original.

    Raises:
        ConfigError: unknown method, preset or option, or a value that cannot be.
        UnsupportedModelError: a target without a denoiser, or with one that no family serves.
        FallbackError: ``strict`` and a layer whose processor cannot be taken over.
        In each case nothing was changed.
    """
    config = resolve(method, steps=steps, blocks=blocks, strict=strict)
    denoisers = denoisers_of(target)
    for name, denoiser in denoisers.items():
        _check(name, denoiser, config)
    previous = _configs(denoisers)
    unpatch(target)
    try:
        for name, denoiser in denoisers.items():
            Patch(name, denoiser, target, config)
    except BaseException:
        unpatch(target)
        for name, old in previous.items():
            Patch(name, denoisers[name], target, old)
        raise
    _forget_compiled(target, denoisers)
    return target


def _check(name: str, denoiser: nn.Module, config: Config) -> None:
    """Refuse what would only come to light in mid-denoise."""
    family = family_of(denoiser)
    assert family is not None
    layers = family.layers(denoiser)
    blocks = {layer.block for layer in layers}
    if blocks and not blocks & set(select_blocks(config.blocks, max(blocks) + 1)):
        raise ConfigError(f"blocks={config.blocks!r} selects none of the {len(blocks)} blocks of {name}")
    for heads in sorted({layer.heads for layer in layers}):
        config.method.check(heads)


def _configs(denoisers: dict[str, nn.Module]) -> dict[str, Config]:
    return {name: d.__dict__[ATTRIBUTE].config for name, d in denoisers.items() if ATTRIBUTE in d.__dict__}


def unpatch(target: T) -> T:
    """Take the patch off: processors are put back by identity, hooks and state are removed. Harmless if there is none."""
    denoisers = denoisers_of(target)
    on = [denoiser for denoiser in denoisers.values() if ATTRIBUTE in denoiser.__dict__]
    for denoiser in on:
        denoiser.__dict__[ATTRIBUTE].remove(denoiser)
    if on:
        _forget_compiled(target, denoisers)
    return target


def is_patched(target: Any) -> bool:
    """Whether any denoiser of ``target`` is patched."""
    return any(ATTRIBUTE in denoiser.__dict__ for denoiser in denoisers_of(target).values())


def patches_of(target: Any) -> dict[str, Patch]:
    """The patches of a target's denoisers, by denoiser name."""
    return {n: d.__dict__[ATTRIBUTE] for n, d in denoisers_of(target).items() if ATTRIBUTE in d.__dict__}


@contextmanager
def patched(
    target: T,
    method: MethodLike,
    *,
    steps: tuple[float, float] | None = None,
    blocks: str | None = None,
    strict: bool | None = None,
) -> Iterator[T]:
    """``with patched(pipe, "sta"): …``: patch for the length of a block, then unpatch.

    A target that was patched before gets its earlier config back, with a new ``summary``.
    """
    denoisers = denoisers_of(target)
    before = _configs(denoisers)
    patch(target, method, steps=steps, blocks=blocks, strict=strict)
    try:
        yield target
    finally:
        unpatch(target)
        for name, config in before.items():
            Patch(name, denoisers[name], target, config)
