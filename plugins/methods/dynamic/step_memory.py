"""What dynamic methods remember between denoising steps: one dictionary for each layer and branch, never a stale one.

    run      one call of the pipeline        new: another set of timesteps, or a step that goes back
    tick     one denoising step              forwards at the same step share it
    branch   one of a step's forwards        the first, the second, …: conditional and unconditional, where a pipeline runs both

Branches are told apart by their order, which every pipeline keeps; where their number changes, guidance came or went, and what
had been kept is forgotten as soon as that shows, at the step after. The two denoisers of a pipeline each have a state of their
own; one that has had its part of the run is forgotten while the other runs. After the last forward of a run nothing is kept: maps
are large, and the VAE comes next.
"""

from __future__ import annotations

import weakref
from typing import Any

MAX_KEPT = 4096  # dictionaries; ever new shapes within one run would pile up
MAX_BRANCHES = 8  # of one step; more are no branches, but a denoiser that is called again and again at one timestep


class Memories:
    """The memories of one denoiser, and where in a run it is."""

    def __init__(self) -> None:
        self.tick = 0
        self.branch = 0
        self._step: int | None = None
        self._run: Any = None
        self._branches: int | None = None  # of the last whole step
        self._kept: dict[tuple, dict[str, Any]] = {}

    def begin(self, step: int | None, run: Any = None) -> None:
        """A forward begins at ``step`` of ``run`` (compared by identity; None: unknown). step None: nothing may be kept."""
        if step is None or run is not self._run or self._step is None or step < self._step:
            self.forget()
            self._step, self._run = step, run
        elif step == self._step:
            self.branch += 1
        else:
            if self._branches is not None and self._branches != self.branch + 1:
                self._kept.clear()
            self._branches = self.branch + 1
            self._step = step
            self.tick += 1
            self.branch = 0
        self._forget_others(behind=2)  # by one step they may be: two denoisers that take turns within a step

    def end(self, last: bool) -> None:
        """A forward is over; last: of a run's last step."""
        if not last:
            return
        self._forget_others(behind=1)
        if self.branch + 1 == self._branches:
            self.forget()
        else:  # in a run of one step, nobody knows whether another branch follows; this one is read no more
            for key in [key for key in self._kept if key[0] == self.branch]:
                del self._kept[key]

    def _forget_others(self, behind: int) -> None:
        """Forget what other denoisers keep whose last forward was ``behind`` steps ago or earlier in this run."""
        if self._run is None or self._step is None:
            return
        for other in list(_keeping):
            if other is not self and other._run is self._run and (other._step or 0) + behind <= self._step:
                other.forget()

    def forget(self) -> None:
        """Begin anew."""
        self.tick = self.branch = 0
        self._step = self._run = self._branches = None
        self._kept.clear()
        _keeping.discard(self)

    def of(self, *call: Any) -> dict[str, Any]:
        """The memory of a call in the branch under way. call: the layer, and all that the shape of its memory depends on."""
        if self.branch >= MAX_BRANCHES:
            return {}
        key = (self.branch, *call)
        if key not in self._kept:
            if len(self._kept) >= MAX_KEPT:
                del self._kept[next(iter(self._kept))]
            self._kept[key] = {}
            _keeping.add(self)
        return self._kept[key]

    def __len__(self) -> int:
        return len(self._kept)


_keeping: weakref.WeakSet[Memories] = weakref.WeakSet()  # those that may hold anything
