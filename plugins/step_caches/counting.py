"""What forwards of a denoiser with a step cache reused, read off the state of diffusers' hooks after each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tilewise.plugins.step_caches import diffusers_compat as compat
from tilewise.plugins.step_caches.options import FirstBlock, MagCache, PyramidAttention, SeaCache, StepCache, TaylorSeer


@dataclass
class CacheCounts:
    """Counts of one denoiser.

    Attributes:
        forwards: all. reused: those in which anything was reused.
        modules: blocks or attention layers of all forwards. skipped: those of them that did not run.
        ratios: what MagCache measured, with ``calibrate``.
    """

    forwards: int = 0
    reused: int = 0
    modules: int = 0
    skipped: int = 0
    ratios: tuple[float, ...] = ()

    def restart(self) -> None:
        self.forwards = self.reused = self.modules = self.skipped = 0


class Reuse:
    """Base class: reads the state of the hooks around a forward, in the cache context that is set."""

    def __init__(self, hooks: list[Any]) -> None:
        self.hooks = hooks
        self.modules = len(hooks)  # that could be skipped
        self.manager = next(manager for hook in hooks for manager in compat.state_managers(hook))

    @property
    def state(self) -> Any:
        return self.manager.get_state()

    def begin(self, step: int | None) -> None:
        """A forward begins. step: of the schedule; None: not known."""

    def forget(self, new: bool) -> None:
        """The hooks' states are about to be dropped. new: as a run begins."""

    def skipped(self) -> int:
        """How many of the hooked modules did not run in this forward."""
        raise NotImplementedError

    def end(self, counts: CacheCounts) -> None:
        skipped = self.skipped()
        counts.forwards += 1
        counts.reused += skipped > 0
        counts.modules += self.modules
        counts.skipped += skipped


class _FirstBlockReuse(Reuse):
    def skipped(self) -> int:
        return 0 if self.state.should_compute else len(self.hooks) - 1


class _MagReuse(Reuse):
    """The hook counts the steps of its state; its ratios are those of a schedule, wherever the state began."""

    _at = 0  # steps before the state began

    def begin(self, step: int | None) -> None:
        if step is not None:
            self.state.step_index = step
        elif self.state.step_index == 0:
            self.state.step_index = self._at

    def forget(self, new: bool) -> None:
        self._at = 0 if new else max((state.step_index for state in compat.states_of(self.manager)), default=0)

    def skipped(self) -> int:
        return 0 if self.state.should_compute else len(self.hooks)

    def end(self, counts: CacheCounts) -> None:
        super().end(counts)
        if found := self.state.calibration_ratios:
            counts.ratios = tuple(found)


class _SeaReuse(Reuse):
    def __init__(self, hooks: list[Any]) -> None:
        super().__init__(hooks)
        self.modules -= 1  # one hook is the denoiser's own

    def begin(self, step: int | None) -> None:
        self._before = self.state.consecutive_cached

    def skipped(self) -> int:
        return self.modules if self.state.consecutive_cached > self._before else 0


class _TaylorReuse(Reuse):
    def skipped(self) -> int:
        return 0 if self.state.last_update_step == self.state.current_step else len(self.hooks)


class _PyramidReuse(Reuse):
    """A layer that computes makes a new output while the last one is still kept."""

    def begin(self, step: int | None) -> None:
        self._before = [id(hook.state.cache) if hook.state.cache is not None else None for hook in self.hooks]

    def skipped(self) -> int:
        now = [id(hook.state.cache) for hook in self.hooks]
        return sum(one == other for one, other in zip(now, self._before, strict=True))


def reuse_of(cache: StepCache, hooks: list[Any]) -> Reuse:
    kinds: dict[type[StepCache], type[Reuse]] = {
        FirstBlock: _FirstBlockReuse,
        TaylorSeer: _TaylorReuse,
        MagCache: _MagReuse,
        SeaCache: _SeaReuse,
        PyramidAttention: _PyramidReuse,
    }
    return kinds[type(cache)](hooks)
