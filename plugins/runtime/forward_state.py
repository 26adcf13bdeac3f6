"""The forward that a patched denoiser is in, and what it keeps from one forward to the next.

``begin`` decides once a forward what all its attention calls go by: which step of the schedule this is, whether the method runs
there, and over which layout. ``attention_call.py`` answers the calls.

torch.compile never sees this: it runs directly, or inside the operators of ``custom_ops.py`` where the denoiser is compiled.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from tilewise.kernels.device import capturing
from tilewise.kernels.plans.block_plan import BlockPlan
from tilewise.kernels.plans.layout import Grid, Layout
from tilewise.plugins.config import Config
from tilewise.plugins.context_parallel.head_dealing import HeadDealer
from tilewise.plugins.diffusers_compat import ContextParallel, context_parallel
from tilewise.plugins.errors import FallbackError, TilewiseError
from tilewise.plugins.masks.padding_mask import Masks
from tilewise.plugins.methods.base import DynamicMethod, Method, of_heads
from tilewise.plugins.methods.dynamic.step_memory import Memories
from tilewise.plugins.methods.head_part import Heads
from tilewise.plugins.models.common.family import AttentionLayer
from tilewise.plugins.runtime.call_stats import CallStats
from tilewise.plugins.runtime.earlier_keys import EarlierKeys
from tilewise.plugins.runtime.joint_text import TextGuide
from tilewise.plugins.runtime.key_value_window import KeyValueWindow
from tilewise.plugins.runtime.observers import ObservedCall, Observer
from tilewise.plugins.runtime.plan_cache import PlanCache
from tilewise.plugins.runtime.step_index import StepIndex
from tilewise.plugins.schedule.steps import in_any_run


class Forward(threading.local):
    """What one forward goes by. Each thread has its own: two threads may run one denoiser at the same time.

    Attributes:
        grid: of the tokens; None where it could not be read.
        whole: the same before ``Config.keep`` took frames out of it: of the model's own sequence.
        layout: the method's token order for this grid, which its calls reorder to; None: none of them can be sparse.
        runs: whether the method runs at this step.
        refused: why the method cannot run in this forward although it should; None: it can.
        global_path: whether calls are dense just now, on purpose; see ``ForwardState.global_path``.
        masks: the attention masks that were read.
        step: of the denoising schedule, if anybody wants to know it.
        noise: the noise level, from 1 to 0, if the method goes by it.
        dealt: of the call under way, the heads of each rank and this process's rank, where context parallelism splits heads.
        map: (h, w) of the feature map of the layer under way, where an addition says it; None: the model's usual.
        asked: by layer, how many calls asked the other ranks for their number of tokens.
    """

    def __init__(self, masks_per_layer: bool) -> None:
        self.grid: Grid | None = None
        self.whole: Grid | None = None
        self.layout: Layout | None = None
        self.runs = False
        self.refused: str | None = None
        self.global_path = False
        self.masks = Masks(masks_per_layer)
        self.step: int | None = None
        self.noise: float | None = None
        self.dealt: tuple[tuple[Heads, ...], int] | None = None
        self.map: tuple[int, int] | None = None
        self.asked: dict[int, int] = {}

    @property
    def heads(self) -> Heads | None:
        """Of the call under way, those that this process computes; None: all."""
        return None if self.dealt is None else self.dealt[0][self.dealt[1]]


class ForwardState:
    """The state of one patched denoiser.

    Args:
        name: the denoiser's, for messages.
        steps: tells which step a forward is.
        layers, selected: the self-attention layers, and the numbers of the blocks that run the method.
        sparse: whether any call over the denoiser's own token sequence may be sparse.
        masks_per_layer, text_per_sample, one_tensor: see ``Family``.
        parallel: gives what context parallelism set on the denoiser, its ``_parallel_config``, now.

    Attributes:
        grid: of the last forward. forward: what the one under way goes by. call_stats: what every attention call did.
        plans: token orders and plans on the device. observers: called after every attention call.
        edits: of additions, each given a layer's number, the values and the output of its call; they return another output.
        guide: beside a global path, where text is part of the sequence. memories: of a dynamic method.
        window: of a KV cache, while a denoiser makes a video chunk by chunk. earlier: while it makes one window after another.
        head_dealer: deals heads to the ranks of context parallelism.
    """

    def __init__(
        self,
        name: str,
        config: Config,
        steps: StepIndex,
        layers: list[AttentionLayer],
        selected: set[int],
        sparse: bool,
        masks_per_layer: bool = False,
        text_per_sample: bool = False,
        one_tensor: bool = False,
        parallel: Callable[[], Any] = lambda: None,
    ) -> None:
        self.name = name
        self.config = config
        self.steps = steps
        self.pipe = steps.pipe
        self.layers = layers
        self.selected = selected
        self.sparse = sparse
        self.grid: Grid | None = None
        self.forward = Forward(masks_per_layer)
        self.call_stats = CallStats()
        self.plans = PlanCache(name, config.method)
        self.observers: list[Observer] = []
        self.edits: list[Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor]] = []
        self.guide: TextGuide | None = None
        self.memories = Memories()
        self.window: KeyValueWindow | None = None
        self.earlier: EarlierKeys | None = None
        self.head_dealer = HeadDealer()
        self.text_per_sample = text_per_sample
        self.one_tensor = one_tensor
        self._parallel = parallel
        self._sharding: tuple[Any, ContextParallel | None] = (None, None)

    def sharding(self) -> ContextParallel | None:
        """How the denoiser's tokens are split over processes now, or None."""
        config = self._parallel()
        if config is not self._sharding[0]:
            self._sharding = config, context_parallel(config)
        return self._sharding[1]

    @property
    def parallel_config(self) -> Any:
        """What diffusers' own attention is given under context parallelism."""
        return self._parallel()

    def begin(self, grid: Grid | None, timestep: torch.Tensor, refused: str | None = None) -> None:
        """Begin a forward over ``grid`` at ``timestep``; ``refused``: why no call of it can be sparse."""
        forward = self.forward
        if self.earlier is not None:
            self.earlier.begin()
        forward.whole = grid
        forward.asked.clear()
        self.head_dealer.begin()
        forward.map = None
        grid = None if grid is None else self.config.kept(grid)
        forward.grid = self.grid = grid
        forward.masks.clear()
        forward.runs = self._runs_at(timestep)
        forward.noise = self._noise_at(timestep) if forward.runs else None
        self._follow(timestep)
        forward.refused = refused
        if refused and forward.runs and self.config.strict:
            raise FallbackError(f"strict: {self.name} cannot run {self.config.method.name}: {refused}")
        usable = self.sparse and refused is None and grid is not None
        forward.layout = self.config.method.layout(grid) if usable else None  # type: ignore[arg-type]

    def end(self) -> None:
        """The forward is over."""
        self.forward.layout = None
        self.forward.map = None
        self.forward.masks.clear()

    @contextmanager
    def global_path(self) -> Iterator[None]:
        """Attention calls in here are dense on purpose, in whatever order the tokens are: the global path beside a sparse one."""
        before, self.forward.global_path = self.forward.global_path, True
        try:
            yield
        finally:
            self.forward.global_path = before

    def observe(
        self, number: int, kind: str, qkv: tuple[torch.Tensor, torch.Tensor, torch.Tensor], **sparse: Any
    ) -> None:
        """Tell the observers of a call of layer ``number`` that ran. sparse: see ``ObservedCall``."""
        if not self.observers:
            return
        layer = self.layers[number]
        where = self.name, layer.name, layer.block, self.forward.step, self.memories.now.branch
        observed = ObservedCall(*where, kind, *qkv, **sparse)
        for observer in list(self.observers):
            observer(observed)

    @contextmanager
    def some_heads(self, dealt: tuple[Heads, ...], rank: int) -> Iterator[None]:
        """The attention call in here is over some heads of its layer alone. dealt: those of each rank."""
        self.forward.dealt = dealt, rank
        try:
            yield
        finally:
            self.forward.dealt = None

    # ── which step ───────────────────────────────────────────────────────────────────────────────────────────────

    def _runs_at(self, timestep: torch.Tensor) -> bool:
        always = in_any_run(self.config.steps)
        if always is not None:  # a timestep's value need not be read
            return always
        if self.window is not None:
            return self.config.runs_at(self.window.step, self.window.steps)
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
        if at.run is None and isinstance(self.config.steps, str):
            raise TilewiseError(
                f"{self.name}: steps={self.config.steps!r} counts the steps of a run, and no diffusers pipeline with a scheduler "
                "in use runs this denoiser. Patch the pipeline, or give steps as fractions such as (0.25, 1.0)"
            )
        return self.config.runs_at(at.step, at.total)

    def _noise_at(self, timestep: torch.Tensor) -> float | None:
        method = self.config.method
        if not isinstance(method, DynamicMethod) or not method.needs_noise:
            return None
        if capturing(timestep.device):
            raise TilewiseError(
                f"{self.name}: {method.name} goes by the noise level, which cannot be read while a CUDA graph is being captured"
            )
        return self.steps.noise(timestep)

    def map_layout(self, layer: AttentionLayer) -> Layout | None:
        """The token order of a layer with a feature map of its own; None: its calls are dense."""
        forward = self.forward
        assert forward.grid is not None
        grid = layer.grid(forward.grid)
        if forward.map is not None:
            grid = dataclasses.replace(grid, h=forward.map[0], w=forward.map[1])
        return self.config.method.map_layout(grid, layer, forward.step)

    def method_of(self, number: int) -> Method | None:
        """The method of layer ``number`` in this forward; None: its calls are dense."""
        method: Method | None = self.config.method
        if isinstance(method, DynamicMethod):
            method = method.at(number, self.forward.noise)
        return method if method is None else of_heads(method, self.forward.heads)

    def plan(self, layout: Layout, heads: int, device: torch.device) -> BlockPlan:
        """The static method's plan for a call over so many heads, which may be some of a layer's."""
        return self.plans.plan(layout, heads, device, self.forward.heads)

    def _follow(self, timestep: torch.Tensor) -> None:
        """Keep count of runs, steps and branches, where somebody goes by them; a bare denoiser's timestep is read for it."""
        forward, method = self.forward, self.config.method
        wanted = self.observers or method.needs_step or method.follows_runs
        wanted = wanted or (isinstance(method, DynamicMethod) and method.keeps_memory)
        if self.window is not None:
            forward.step = self.window.step
            self.memories.begin(None)
            return
        if not wanted or capturing(timestep.device):  # a captured call plans for itself at every replay
            forward.step = None
            self.memories.begin(None)
            return
        at = self.steps.of(timestep)
        forward.step = at.step
        self.memories.begin(at.step, at.run, at.is_last)
        if not forward.runs:  # not yet, or not again in this run
            self.memories.now.free()
