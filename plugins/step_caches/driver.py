"""A step cache of diffusers on one patched denoiser: put on, told where each forward is, counted, taken off without a trace.

The hooks decide what is reused. What they cannot know is told here, before each forward:

    a run begins         their state is dropped: a cancelled run leaves it behind
    the method begins    or ends (``steps=``): it is dropped too, as what one kind of attention computed is no guess at the other
    which branch         conditional and unconditional forwards have a state each, by the cache context that the pipeline sets;
                         where it sets none, by their order within the step
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any

from torch import nn

from tilewise.plugins.diffusers_compat import inside_split_hooks, kept_forwards, step_cache_hooks
from tilewise.plugins.errors import ConfigError, TilewiseError
from tilewise.plugins.step_caches import diffusers_compat as compat
from tilewise.plugins.step_caches.counting import CacheCounts, reuse_of
from tilewise.plugins.step_caches.options import MagCache, PyramidAttention, SeaCache, StepCache, TaylorSeer
from tilewise.plugins.step_caches.shared_decision import share_decisions
from tilewise.plugins.step_caches.support import diffusers_config


class CacheDriver:
    """What a patch holds about the step cache of a denoiser.

    Args:
        name: the denoiser's, for messages.
        attention: names of its self-attention layers.

    Attributes:
        config: what ``enable_cache`` was given. counts: what forwards did.

    Raises:
        ConfigError: the cache finds nothing to hook. Nothing was changed.
    """

    def __init__(self, name: str, denoiser: nn.Module, cache: StepCache, attention: list[str]) -> None:
        self.name, self.cache = name, cache
        self.counts = CacheCounts()
        self._thread: int | None = None
        self._lock = threading.Lock()
        self._timestep: Callable[[], float] = lambda: 0.0
        self._step: int | None = None
        self._run: Callable[[], Any] = lambda: None
        self._runs = False
        self._count = 0  # steps of this run so far
        self._seen: dict[str, int] = {}  # forwards of this step by cache context
        # Of each module whether it had a forward and a registry of its own, which hooks leave behind.
        self._before = {
            module: ("forward" in module.__dict__, compat.REGISTRY in module.__dict__) for module in denoiser.modules()
        }
        self._had_config = compat.CACHE_CONFIG in denoiser.__dict__
        self.config = diffusers_config(cache, denoiser, attention, lambda: self._timestep())
        try:
            self._enable(denoiser)
        except BaseException:
            self.remove(denoiser)
            raise
        self._outermost = {module: module.__dict__.get("forward") for module, _, _ in self._hooks}

    def _enable(self, denoiser: Any) -> None:
        # What blocks get and give must be this process's part on both sides of a cache's hooks.
        with inside_split_hooks(denoiser):
            denoiser.enable_cache(self.config)
        self._hooks = list(step_cache_hooks(denoiser))
        if not self._hooks:
            raise ConfigError(
                f"cache {self.cache.name}: {self.name} has no layer of the kind that these options name, so that nothing would "
                f"be reused: {self.cache}"
            )
        hooks = [hook for _, _, hook in self._hooks]
        share_decisions(denoiser, hooks)
        if isinstance(self.cache, PyramidAttention):
            for hook in hooks:
                compat.branch_states(hook)
        self._managers = list({id(m): m for hook in hooks for m in compat.state_managers(hook)}.values())
        self._reuse = reuse_of(self.cache, hooks)

    def remove(self, denoiser: Any) -> None:
        """Takes the cache off. One that somebody enabled in its place since stays on."""
        outer = {
            module: module.__dict__.get("forward")
            for module, ours in getattr(self, "_outermost", {}).items()
            if module.__dict__.get("forward") is not ours
        }
        if denoiser.__dict__.get(compat.CACHE_CONFIG) is self.config:
            denoiser.disable_cache()
        else:  # hooks of a cache that could not be enabled
            mine = {id(hook) for _, _, hook in getattr(self, "_hooks", step_cache_hooks(denoiser))}
            for module, name, hook in list(step_cache_hooks(denoiser)):
                if id(hook) in mine:
                    compat.remove_hook(module, name)
        self._restore_wrapped(outer)
        compat.forget_child_registries(denoiser)
        for module, (had_forward, had_registry) in self._before.items():
            _clean(module, had_forward, had_registry)
        if not self._had_config and denoiser.__dict__.get(compat.CACHE_CONFIG, self) is None:
            del denoiser.__dict__[compat.CACHE_CONFIG]

    def _restore_wrapped(self, outer: dict[nn.Module, Any]) -> None:
        """Hooks of accelerate that came after the cache wrap its hook; diffusers would take them off with it."""
        for module, forward in outer.items():
            for holder, name in kept_forwards(module):
                if holder is module and getattr(holder, name, None) is self._outermost[module]:
                    setattr(holder, name, module.forward)
                    module.forward = forward

    def take_off_copy(self, copied: nn.Module, memo: dict[int, Any]) -> None:
        """Takes the copied hooks off a deep copy of the denoiser. memo: of ``copy.deepcopy``."""
        for module, name, _ in list(step_cache_hooks(copied)):
            compat.remove_hook(module, name)
        for module, (_, had_registry) in self._before.items():
            if (copy := memo.get(id(module))) is not None:
                _clean(copy, False, had_registry)
        if not self._had_config:
            copied.__dict__.pop(compat.CACHE_CONFIG, None)

    # ── during a forward ─────────────────────────────────────────────────────────────────────────────────────────

    def begin(self, step: int, total: int, run: Any, runs: bool, timestep: Callable[[], float]) -> None:
        """A forward begins: at ``step`` of ``total`` of ``run`` (its timesteps; None: unknown).

        runs: whether the method runs at this step. timestep: gives its timestep, as the scheduler counts.

        Raises:
            TilewiseError: another thread is in a forward of this denoiser, or the number of steps is not known.
        """
        self._enter()
        try:
            self._begin(step, total, run, runs, timestep)
        except BaseException:
            self._thread = None
            raise

    def _begin(self, step: int, total: int, run: Any, runs: bool, timestep: Callable[[], float]) -> None:
        new = self._step is None or step < self._step or run is not self._run()
        if new:
            self._count = 0
            self._run = (lambda: None) if run is None else weakref.ref(run)
        elif step != self._step:
            self._count += 1
        if new or step != self._step:
            self._seen = {}
        if new or runs != self._runs:
            self._reuse.forget(new)
            self.forget()
            self._begin_states(total, run)
        self._step, self._runs, self._timestep = step, runs, timestep
        self._set_context(step, total, run)
        self._reuse.begin(step if run is not None else None)

    def _enter(self) -> None:
        with self._lock:
            if self._thread not in (None, threading.get_ident()):
                raise TilewiseError(
                    f"cache {self.cache.name}: {self.name} is in a forward in another thread. A step cache holds what one run "
                    "computed: let one thread use the pipeline at a time, or patch without cache="
                )
            self._thread = threading.get_ident()

    def forget(self) -> None:
        """Drop what the hooks keep. The cache context under way stays."""
        contexts = [compat.context_of(manager) for manager in self._managers]
        for module, _, hook in self._hooks:
            if compat.is_stateful(hook):
                hook.reset_state(module)
        for manager, context in zip(self._managers, contexts, strict=True):
            manager.set_context(context)

    def _begin_states(self, total: int, run: Any) -> None:
        """What hooks count from the start of a run, as their states begin at this step."""
        cache = self.cache
        if isinstance(cache, MagCache):
            steps = cache.num_inference_steps or (total if run is not None else None)
            if steps is None:
                raise TilewiseError(
                    f"cache mag: {self.name} runs without a diffusers pipeline that says how many steps there are; give "
                    "num_inference_steps, as in mag:num_inference_steps=50"
                )
            config = cache.for_steps(steps)
            for _, _, hook in self._hooks:
                hook.config = config
        elif isinstance(cache, TaylorSeer) and cache.disable_cache_after_step is not None:
            after = max(cache.disable_cache_after_step - self._count, 0)
            for _, _, hook in self._hooks:
                hook.disable_cache_after_step = after

    def _set_context(self, step: int, total: int, run: Any) -> None:
        context = compat.context_of(self._managers[0])
        self._theirs = context is not None
        # A pipeline that sets none, or one name for several branches: the order tells them apart. Without a pipeline, forwards at
        # one step may be different steps to the caller, who alone knows.
        name = "forward" if context is None else context.name
        number = self._seen[name] = self._seen.get(name, 0) + 1
        changed = None
        if context is None or (number > 1 and run is not None):
            changed = name if number == 1 else f"{name} {number}"
        where: dict[str, Any] = {}
        if isinstance(self.cache, SeaCache) and run is not None and getattr(context, "step_index", None) is None:
            where = {"step_index": step, "num_inference_steps": total, "sigma": self._timestep() / 1000}
        if changed is not None or where:
            new = compat.new_context(changed or name, **where)
            for manager in self._managers:
                manager.set_context(new)

    def end(self, *, finished: bool) -> None:
        """The forward is over. finished: it gave an output."""
        if self._thread != threading.get_ident():
            return
        if finished:
            self._reuse.end(self.counts)
        if not self._theirs:
            for manager in self._managers:
                manager.set_context(None)
        self._thread = None


def _clean(module: nn.Module, had_forward: bool, had_registry: bool) -> None:
    """Takes off a module what hooks leave behind: an empty registry, and the class's own forward as an attribute."""
    if not had_registry:
        compat.drop_empty_registry(module)
    replaced = module.__dict__.get("forward")
    if not had_forward and getattr(replaced, "__func__", None) is type(module).forward:
        del module.__dict__["forward"]
