"""One patched denoiser: what is put on it, and how it comes off again. What forwards decide is in ``forward_state.py``."""

from __future__ import annotations

import copy
import functools
import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from tilewise.plugins.additions.base import Report, additions_text
from tilewise.plugins.autoencoders.patched_vae import VaePatch
from tilewise.plugins.config import Config, select_blocks
from tilewise.plugins.context_parallel.checks import check_sharded, is_divided, why_dense, why_halves_are_dense
from tilewise.plugins.context_parallel.halves import halves_of
from tilewise.plugins.diffusers_compat import SAVED_PROCESSORS, is_sharded
from tilewise.plugins.errors import FallbackError, TilewiseError
from tilewise.plugins.hooks.deepcopy import COPIER, STATE, copy_patched, shallow_state
from tilewise.plugins.hooks.stand_in import stock_processor
from tilewise.plugins.methods.dense import Dense
from tilewise.plugins.models.common.denoisers import ATTRIBUTE
from tilewise.plugins.models.common.family import AttentionLayer, Family, UnreadableGridError
from tilewise.plugins.models.common.registry import family_of
from tilewise.plugins.runtime import custom_ops
from tilewise.plugins.runtime.attention_call import AttentionCalls
from tilewise.plugins.runtime.attention_processor import TilewiseProcessor, processor_class, why_not
from tilewise.plugins.runtime.forward_state import ForwardState
from tilewise.plugins.runtime.step_index import StepIndex
from tilewise.plugins.step_caches.driver import CacheDriver
from tilewise.plugins.step_caches.support import check_cache
from tilewise.plugins.torch_compat import outside_graphs


class Patch:
    """Everything that tilewise holds about one patched denoiser."""

    def __init__(self, name: str, denoiser: nn.Module, pipe: Any, config: Config) -> None:
        family = family_of(denoiser)
        assert family is not None
        self.name = name
        self.config = config
        self.family: Family = family
        self.layers: list[AttentionLayer] = family.layers(denoiser)
        blocks = 1 + max((layer.block for layer in self.layers), default=-1)
        selected = set(select_blocks(config.blocks, blocks))
        one_sequence = any(layer.downsample is None for layer in self.layers)
        self.sparse = bool(selected) and one_sequence and not isinstance(config.method, Dense)
        owner = _reference(pipe) if pipe is not denoiser else lambda: None
        self.state = ForwardState(
            name, config, StepIndex(owner, denoiser), self.layers, selected, self.sparse, family.masks_per_layer,
            family.text_per_sample, family.one_tensor, _parallel_of(denoiser),
        )  # fmt: skip
        self.handle = custom_ops.handle_for(self.state)
        self._resting = custom_ops.new_ticket()
        self.calls = AttentionCalls(self.state, self._resting)
        self._classes: dict[type, type[TilewiseProcessor]] = {}  # by the class that they stand in for
        self._handles: list[Any] = []
        self._replacing = threading.Lock()
        self.cache: CacheDriver | None = None
        self.reports: list[Report] = []  # of the method and the additions
        self.left_alone: dict[str, Any] = {}  # processors that are not taken over, by layer name
        # What the pipeline's VAE got with it, and that VAE; it is not kept alive.
        self.vae: tuple[VaePatch, weakref.ref[nn.Module]] | None = None
        self._install(denoiser)

    # ── putting on and taking off ────────────────────────────────────────────────────────────────────────────────

    def _install(self, denoiser: nn.Module) -> None:
        try:
            for number in range(len(self.layers)):
                self._adopt(number)
            self._handles.append(denoiser.register_forward_pre_hook(self._before, with_kwargs=True))
            self._handles.append(denoiser.register_forward_hook(self._after, always_call=True))
            self._handles += self.family.hooks(denoiser)
            if self.config.fuse:
                self._handles += self.family.fuse(denoiser, self.calls)
            if (report := self.config.method.put_on(self.state, denoiser, self._handles)) is not None:
                self.reports.append(report)
            self.reports += [one.put_on(self.state, denoiser, self._handles) for one in self.config.additions]
            if self.config.step_cache is not None:  # last: its hooks wrap what is on the blocks
                names = [layer.name for layer in self.layers]
                self.cache = CacheDriver(self.name, denoiser, self.config.step_cache, names)
        except BaseException:
            self._take_off(denoiser)
            raise
        setattr(denoiser, ATTRIBUTE, self)
        setattr(denoiser, COPIER, functools.partial(copy_patched, self, denoiser, {ATTRIBUTE, COPIER, STATE}))
        setattr(denoiser, STATE, functools.partial(shallow_state, self, denoiser))

    def _adopt(self, number: int, after: str = "") -> None:
        """Stand in for the processor that is on layer ``number`` now; or leave the layer alone, where that cannot be.

        after: what a report says of a processor that came after the patch.
        """
        layer = self.layers[number]
        module: Any = layer.module
        while isinstance(module.processor, TilewiseProcessor):  # another's, put here by who had saved it
            _set_processor(module, module.processor.original)
        self._take_back(layer)
        if reason := why_not(module.processor):
            self._leave_alone(layer, reason + after)
        else:
            _set_processor(module, self._stand_in(module.processor, number, layer))

    def _leave_alone(self, layer: AttentionLayer, reason: str) -> None:
        """A layer with a processor of its own stays dense, and is reported."""
        if self.config.strict:
            raise FallbackError(f"strict: {self.name}.{layer.name} would stay dense: {reason}")
        module: Any = layer.module
        self.left_alone[layer.name] = module.processor
        self.state.call_stats.skipped_layers[layer.name] = reason

    def _take_back(self, layer: AttentionLayer) -> None:
        """A layer is not left alone, or not any more."""
        self.left_alone.pop(layer.name, None)
        self.state.call_stats.skipped_layers.pop(layer.name, None)

    def _stand_in(self, original: Any, number: int, layer: AttentionLayer) -> TilewiseProcessor:
        kind = type(original)
        if kind not in self._classes:
            self._classes[kind] = processor_class(kind, self.calls)
        fused = self.family.self_attention(layer) if self.config.fuse else None
        return self._classes[kind](original, self.calls, number, fused, self.family.replace_processor(layer))

    def remove(self, denoiser: nn.Module) -> None:
        self._take_off(denoiser)
        delattr(denoiser, ATTRIBUTE)
        for name in (COPIER, STATE):  # a shallow copy may lack the latter
            denoiser.__dict__.pop(name, None)

    def _take_off(self, denoiser: nn.Module) -> None:
        self.calls.removed = True
        if self.cache is not None:
            self.cache.remove(denoiser)
            self.cache = None
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for layer in self.layers:
            module: Any = layer.module
            # One that was replaced since by somebody else is theirs to keep.
            if isinstance(module.processor, TilewiseProcessor):
                _set_processor(module, module.processor.original)
        saved = denoiser.__dict__.get(SAVED_PROCESSORS) or {}
        saved.update({name: stock_processor(processor) for name, processor in saved.items()})

    @property
    def handles(self) -> list[Any]:
        """Everything that is on the denoiser's modules now."""
        return list(self._handles)

    def __deepcopy__(self, memo: dict) -> Any:
        return copy.deepcopy(self.calls, memo)  # raises, and says why

    # ── during a forward; torch.compile traces all of it, so nothing here may go by the step ─────────────────────

    def _before(self, denoiser: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if denoiser.training:
            raise TilewiseError(
                f"{self.name} is in training mode, and patched, which is for inference: attention has no backward pass. Call its "
                "eval() to sample, or tilewise.unpatch before training"
            )
        timestep = self.family.timestep(args, kwargs)
        grid, refused = self._grid(denoiser, args, kwargs)
        self._look_at_processors()
        if is_sharded(denoiser):
            if self.config.add is not None:  # context parallelism came after the patch
                raise TilewiseError(
                    f"{self.name}: context parallelism was enabled after a patch with "
                    f"add={additions_text(self.config.additions)}, which changes forwards of whole sequences; patch again "
                    "without it"
                )
            refused = why_dense(denoiser) or refused
            check_sharded(self.name, denoiser, self.layers, grid, self.family.one_tensor)
            if self.family.split_needs_patch and self.left_alone:
                raise TilewiseError(
                    f"{self.name}: context parallelism needs every layer patched, and {', '.join(self.left_alone)} keeps a "
                    "processor of its own, which does not exchange tokens with the other ranks"
                )
        refused = why_halves_are_dense(denoiser, self.config.method) or refused
        if self.config.step_cache is not None and is_divided(denoiser):  # since the patch, perhaps
            check_cache(self.name, denoiser, self.config.step_cache, None if self.cache is None else self.cache.config)
        if not torch.compiler.is_dynamo_compiling():
            self.state.begin(grid, timestep, refused)
        else:
            shape = (0, 0, 0, 0, False, 0)
            if grid is not None:
                shape = (grid.t, grid.h, grid.w, grid.text, grid.text_first, grid.opposite)
            self.calls.ticket = custom_ops.begin(timestep, self.handle, *shape, refused)
        halves = halves_of(denoiser)
        if self.cache is not None and (halves is None or not halves.sits_out):
            self._begin_cache(timestep)

    @outside_graphs  # as the cache's own decisions are
    def _begin_cache(self, timestep: torch.Tensor) -> None:
        assert self.cache is not None
        steps = self.state.steps
        at = steps.of(timestep)
        runs = self.sparse and self.state.forward.runs
        self.cache.begin(at.step, at.total, at.run, runs, lambda: steps.timestep_at(at, timestep))

    @outside_graphs
    def _end_cache(self, finished: bool) -> None:
        assert self.cache is not None
        self.cache.end(finished=finished)

    def _grid(self, denoiser: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[Any, str | None]:
        """The grid of a forward; or None, and why it has none that can be read."""
        refused = self.family.refuses(denoiser, args, kwargs)
        if refused is not None:
            return None, refused
        if torch.compiler.is_dynamo_compiling():
            return self.family.grid(denoiser, args, kwargs), None
        try:
            return self.family.grid(denoiser, args, kwargs), None
        except UnreadableGridError as error:
            return None, str(error)

    def _look_at_processors(self) -> None:
        """Follow what others did to the layers' processors since the patch."""
        for number, layer in enumerate(self.layers):
            module: Any = layer.module
            if not self._knows(number):
                self._replaced(number)
            elif isinstance(module.processor, TilewiseProcessor) and layer.name in self.left_alone:
                self._take_back(layer)

    def _knows(self, number: int) -> bool:
        """Whether the processor that is on layer ``number`` is ours for that layer, or one that we left alone."""
        layer = self.layers[number]
        module: Any = layer.module
        processor = module.processor
        if isinstance(processor, TilewiseProcessor):
            return processor.calls is self.calls and processor.number == number
        return self.left_alone.get(layer.name) is processor

    @outside_graphs
    def _replaced(self, number: int) -> None:
        """Somebody set another processor on a layer. The patch stays on: it is taken over like the one before, or left alone."""
        with self._replacing:
            if not self._knows(number):  # another thread may have been first
                self._adopt(number, after=" (it was set after the patch)")

    def _after(self, denoiser: nn.Module, args: tuple, output: Any) -> None:
        if self.cache is not None:
            self._end_cache(output is not None)
        self.state.end()
        self.calls.ticket = self._resting


def _parallel_of(denoiser: nn.Module) -> Callable[[], Any]:
    """Gives what context parallelism set on a denoiser, which is not kept alive."""
    reference = weakref.ref(denoiser)
    return lambda: getattr(reference(), "_parallel_config", None)


def _reference(pipe: Any) -> Callable[[], Any]:
    """Gives ``pipe`` for as long as there is one. A patch must not keep a pipeline alive, if that can be helped."""
    try:
        return weakref.ref(pipe)
    except TypeError:
        return lambda: pipe


def _set_processor(module: Any, processor: Any) -> None:
    if hasattr(module, "set_processor"):
        module.set_processor(processor)
    else:  # Mochi's attention has a processor, but no such method
        module.processor = processor
