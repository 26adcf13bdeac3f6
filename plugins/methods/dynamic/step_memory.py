"""What dynamic methods remember between denoising steps: one dictionary for each layer and branch, never a stale one.

    run      one call of the pipeline        new: another set of timesteps, or a step that goes back
    tick     one denoising step              forwards at the same step share it
    branch   one of a step's forwards        the first, the second, …: conditional and unconditional, where a pipeline runs both

Branches are told apart by their order, which every pipeline keeps; where their number changes, guidance came or went, and what
had been kept is forgotten as soon as that shows, at the step after. The two denoisers of a pipeline each have a state of their
own; one that has had its part of the run is forgotten while the other runs. At the last step of a run nothing is kept: maps are
large, and the VAE comes next. (Not after the step's last forward: torch.compile would trace that.)

Each thread and each run has its own, so that runs that interleave are as each would be alone. What a run had kept when it was
cancelled is freed with its timesteps, which its scheduler holds, or when its thread ends.
"""

from __future__ import annotations

import threading
import weakref
from typing import Any

MAX_KEPT = 4096  # dictionaries; ever new shapes within one run would pile up
MAX_BRANCHES = 8  # of one step; more are no branches, but a denoiser that is called again and again at one timestep
MAX_RUNS = 2  # of one denoiser in one thread: a run, and one that its callback makes


class RunMemory:
    """The memories of one run of one denoiser, and where in the run it is. run: its timesteps; None: unknown."""

    def __init__(self, run: Any = None) -> None:
        self.tick = 0
        self.branch = 0
        self._step: int | None = None
        self._last = False
        self._branches: int | None = None  # of the last whole step
        kept: dict[tuple, dict[str, Any]] = {}
        self._kept = kept
        # The callback holds the dictionary alone: with ``self`` it would make a cycle, which is freed late.
        self._run = None if run is None else weakref.ref(run, lambda _: kept.clear())

    def of_run(self, run: Any) -> bool:
        """Whether it is that of ``run`` (compared by identity; None: unknown)."""
        return self._run is None if run is None else self._run is not None and self._run() is run

    @property
    def is_known(self) -> bool:
        """Whether it is that of a run whose timesteps are there."""
        return self._run is not None and self._run() is not None

    def begin(self, step: int, last: bool = False) -> None:
        """A forward begins at ``step``; last: of the run."""
        if self._step is None or step < self._step:
            self.forget()
        elif step == self._step:
            self.branch += 1
        else:
            if self._branches is not None and self._branches != self.branch + 1:
                self._kept.clear()
            self._branches = self.branch + 1
            self.tick += 1
            self.branch = 0
        self._step, self._last = step, last
        # By one step they may be behind: two denoisers that take turns within a step.
        self._forget_others(behind=1 if last else 2)

    def _forget_others(self, behind: int) -> None:
        """Forget what other denoisers keep whose last forward was ``behind`` steps ago or earlier in this run."""
        run = None if self._run is None else self._run()
        if run is None or self._step is None:
            return
        for other in list(_keeping.memories):
            if other is not self and other.of_run(run) and (other._step or 0) + behind <= self._step:
                other.forget()

    def forget(self) -> None:
        """Begin anew."""
        self.tick = self.branch = 0
        self._step = self._branches = None
        self._kept.clear()
        _keeping.memories.discard(self)

    def free(self) -> None:
        """Forget what was kept, but not where the run is."""
        self._kept.clear()

    def of(self, *call: Any) -> dict[str, Any]:
        """The memory of a call in the branch under way. call: the layer, and all that the shape of its memory depends on."""
        if self.branch >= MAX_BRANCHES:
            return {}
        key = (self.branch, *call)
        if self._last:  # read for the last time
            return self._kept.pop(key, {})
        found = self._kept.get(key)
        if found is None:
            if len(self._kept) >= MAX_KEPT:
                del self._kept[next(iter(self._kept))]
            found = self._kept[key] = {}
            _keeping.memories.add(self)
        return found

    def of_branch(self, *samples: Any) -> dict[str, Any]:
        """What all layers share in the branch under way. samples: what tells a group of a batch from others."""
        if self._last:  # read by each layer for the last time
            return self._kept.get((self.branch, "all layers", *samples), {})
        return self.of("all layers", *samples)

    def __len__(self) -> int:
        return len(self._kept)


class Memories(threading.local):
    """The memories of one denoiser: in each thread, those of the runs that it has under way.

    Attributes:
        now: of the run that the thread's last forward was in.
    """

    def __init__(self) -> None:
        self.now = RunMemory()
        self._runs: list[RunMemory] = []  # the one that was used last comes last

    def begin(self, step: int | None, run: Any = None, last: bool = False) -> None:
        """A forward begins at ``step`` of ``run`` (its timesteps; None: unknown). step None: nothing may be kept."""
        if step is None:
            if self._runs:
                self._runs, self.now = [], RunMemory()
            return
        if not self._runs or not self.now.of_run(run):
            found = [memory for memory in self._runs if memory.of_run(run)] or [RunMemory(run)]
            # An unknown run has ended, for all that anybody knows.
            others = [memory for memory in self._runs if memory.is_known and memory not in found]
            self._runs = [*others, *found][-MAX_RUNS:]
            self.now = self._runs[-1]
        self.now.begin(step, last)

    def __len__(self) -> int:
        """Dictionaries that this thread keeps."""
        return sum(len(memory) for memory in self._runs)


class _Keeping(threading.local):
    """The memories of a thread that may hold anything, of all denoisers."""

    def __init__(self) -> None:
        self.memories: weakref.WeakSet[RunMemory] = weakref.WeakSet()


_keeping = _Keeping()
