"""explain: what a pipeline call would do, before anything runs."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import math
import warnings
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from rich.table import Table

from tilewise.kernels.attention.dispatch import available_backends, unsupported
from tilewise.kernels.plans.layout import Grid, Layout
from tilewise.plugins.config import Config, MethodLike, resolve, select_blocks
from tilewise.plugins.context_parallel.enable import check_denoiser
from tilewise.plugins.context_parallel.enable_cfg import check_cfg
from tilewise.plugins.context_parallel.report import RankPlan, rank_plan
from tilewise.plugins.context_parallel.token_shares import segments_of
from tilewise.plugins.context_parallel.ways import CFG, CONTEXT, check_way, token_parts
from tilewise.plugins.errors import ConfigError
from tilewise.plugins.methods.base import DynamicMethod, Method
from tilewise.plugins.models.common.family import AttentionLayer, Family, Size
from tilewise.plugins.models.common.native_size import usual_steps
from tilewise.plugins.models.common.registry import family_of
from tilewise.plugins.patching import check_config, denoisers_of, patches_of
from tilewise.plugins.runtime.attention_processor import why_not
from tilewise.plugins.schedule.steps import Steps, steps_words
from tilewise.plugins.step_caches.forecast import foretell
from tilewise.plugins.step_caches.support import foreign_note
from tilewise.plugins.text_format import counted, ranges, render
from tilewise.plugins.tuning.in_use import load as load_tuned

# Of a forward, 200 times those of 81 frames of 720×1280: queries, keys and values of a layer are 100 GiB or more.
MOST_TOKENS = 2**24


@dataclass(frozen=True)
class ExplainRow:
    """What one denoiser would do."""

    denoiser: str
    model: str
    grid: str
    tokens: int
    tile: tuple[int, int, int] | None
    tiles: tuple[int, int, int] | None
    options: dict[str, Any]
    density: float  # nan where it is only decided at each call, by a recall
    cost: float  # with the pairs of a query and a mean; nan likewise
    work: float  # nan where the plan is made at each call
    sparse_blocks: str
    dense_blocks: str
    backend: str
    backend_reason: str
    sparse_layers: int  # how many attention layers the sparse blocks have


@dataclass(frozen=True)
class Explanation:
    """What a call would do: nothing has run.

    ``sparse_steps`` and ``dense_steps`` count the timesteps at which the denoiser is called. Solvers of higher order have more of
    them than ``num_inference_steps``, and a ``strength`` leaves fewer.
    """

    config: dict[str, Any]
    size: dict[str, int]
    sparse_steps: int
    dense_steps: int
    rows: list[ExplainRow]
    notes: list[str]
    warnings: tuple[
        str, ...
    ] = ()  # those of the notes that say that the method changes nothing, or makes nothing faster
    ranks: tuple[RankPlan, ...] = ()  # of each denoiser, where several GPUs share its sequence
    reused_steps: int | None = None  # by the step cache; None: there is none, or only the run decides

    @property
    def density(self) -> float:
        """Kept ÷ all token pairs over the sparse calls, as in ``Summary``; 1.0 if none would be sparse.

        By pairs and not by rows: the levels of a UNet have maps of different sizes.
        """
        return self._mean("density")

    @property
    def cost(self) -> float:
        """The same, with the pairs of a query and a mean that stands for keys which it does not see."""
        return self._mean("cost")

    def _mean(self, name: str) -> float:
        rows = [(row.sparse_layers * row.tokens**2, getattr(row, name)) for row in self.rows if row.sparse_layers]
        pairs = sum(pairs for pairs, _ in rows)
        return sum(pairs * value for pairs, value in rows) / pairs if pairs else 1.0

    def to_dict(self) -> dict[str, Any]:
        """For JSON: numbers that only a call decides are None."""
        rows = [dataclasses.asdict(row) for row in self.rows]
        for row in rows:
            row |= {name: None for name in ("density", "cost", "work") if math.isnan(row[name])}
        return {
            "config": self.config,
            "size": self.size,
            "sparse_steps": self.sparse_steps,
            "dense_steps": self.dense_steps,
            "reused_steps": self.reused_steps,
            "density": None if math.isnan(self.density) else self.density,
            "cost": None if math.isnan(self.cost) else self.cost,
            "denoisers": rows,
            "notes": self.notes,
            "warnings": list(self.warnings),
            "ranks": [rank.to_dict() for rank in self.ranks],
        }

    def __str__(self) -> str:
        table = Table("", *(row.denoiser for row in self.rows), title="what would run", show_lines=False)

        def line(label: str, values: list[str]) -> None:
            table.add_row(label, *values)

        def triple(value: tuple[int, int, int] | None) -> str:
            return "–" if value is None else "×".join(map(str, value))

        line("model", [r.model for r in self.rows])
        line("grid (t×h×w tokens)", [f"{r.grid} = {r.tokens}" for r in self.rows])
        line("tile in tokens", [triple(r.tile) for r in self.rows])
        line("tiles", [triple(r.tiles) for r in self.rows])
        for key in dict.fromkeys(key for row in self.rows for key in row.options):
            line(key, [str(r.options.get(key, "–")) for r in self.rows])

        def share(value: float) -> str:
            return "decided at each call" if math.isnan(value) else f"{value:.3f}"

        line("density (kept pairs)", [share(r.density) for r in self.rows])
        if any(share(r.cost) != share(r.density) for r in self.rows):
            line("cost (means counted too)", [share(r.cost) for r in self.rows])
        line("work (computed pairs)", [share(r.work) for r in self.rows])
        line("steps", [f"{self.sparse_steps} sparse, {self.dense_steps} dense" for _ in self.rows])
        line("sparse blocks", [r.sparse_blocks or "none" for r in self.rows])
        line("dense blocks", [r.dense_blocks or "none" for r in self.rows])
        line("backend", [f"{r.backend}: {r.backend_reason}" for r in self.rows])
        return "\n".join([render(table), *map(str, self.ranks), *self.notes])


def explain(
    target: Any,
    *,
    height: int,
    width: int,
    frames: int | None = None,
    num_inference_steps: int | None = None,
    method: MethodLike | None = None,
    steps: Steps | None = None,
    blocks: str | None = None,
    strength: float = 1.0,
    gpus: int = 1,
    parallel: str = CONTEXT,
    num_frames: int | None = None,
) -> Explanation:
    """What a pipeline call of this size would do with a method: grid, tiles, density, what stays dense and why.

    Nothing runs; the target is not changed.

    Args:
        target: a pipeline or denoiser, patched or not.
        height, width: pixels. frames: of the clip; 1 for images.
        num_inference_steps: denoising steps. None: the model's own number, and a note says so.
        method, steps, blocks: as for ``patch``; default: what the target is patched with.
        strength: as the pipeline takes it, for image- and video-to-video, which enters the schedule part-way.
        gpus: how many share the work: heads, tokens and density of each.
        parallel: how: "context" splits the sequence (``enable_context_parallel``), "cfg" the two branches of guidance, and the
            sequence within each half of the GPUs (``enable_cfg_parallel``).
        num_frames: ``frames`` by its old name, until the next release.

    Raises:
        ConfigError: for an option that cannot be, a strength of a pipeline that takes none, more GPUs than heads, or a size that
            the model does not take (with the nearest one).
        UnsupportedModelError: for a target that no family serves, or that several GPUs cannot share.
    """
    if isinstance(gpus, bool) or not isinstance(gpus, int) or gpus < 1:
        raise ConfigError(f"gpus must be a whole number of at least 1, got {gpus!r}")
    check_way(parallel)
    frames = _frames(frames, num_frames)
    own_steps = num_inference_steps is None and not isinstance(
        target, torch.nn.Module
    )  # which has no number of its own
    if num_inference_steps is None:
        num_inference_steps = usual_steps(target)
    if num_inference_steps < 1:
        raise ConfigError(f"num_inference_steps must be at least 1, got {num_inference_steps}")
    load_tuned()
    denoisers = denoisers_of(target)
    patches = patches_of(target)
    if method is None:
        if not patches:
            raise ConfigError("explain: the target is not patched; give method=")
        method = next(iter(patches.values())).config
    config = resolve(method, steps=steps, blocks=blocks)
    size = Size(height, width, frames)
    rows, notes = [], []
    ranks: list[RankPlan] = []
    given = config
    for name, denoiser in denoisers.items():
        config = given.prepare(target, denoiser)
        check_config(name, denoiser, config)
        family = family_of(denoiser)
        assert family is not None
        grid = family.grid_of_size(denoiser, target, size)
        if grid.tokens > MOST_TOKENS:
            raise ConfigError(
                f"{width}×{height} pixels and {counted(frames, 'frame')} are {grid.tokens:,} tokens, which no device can "
                "hold; give a smaller size or fewer frames"
            )
        layers = family.layers(denoiser)
        for downsample in dict.fromkeys(layer.downsample for layer in layers):
            here = [layer for layer in layers if layer.downsample == downsample]
            label = name if downsample is None else f"{name}, 1/{2**downsample}"
            rows.append(_explain_row(label, denoiser, config, config.kept(here[0].grid(grid)), here))
        if gpus > 1:
            cfg, parts = parallel == CFG, token_parts(gpus, parallel)
            (check_cfg if cfg else check_denoiser)(name, denoiser, gpus)
            ranks.append(_rank_plan(name, family, layers, config, grid, gpus, parts, expected_device(denoiser)))
            why = config.method.refuses_some_heads() if parts > 1 else None
            if cfg and getattr(denoiser.config, "guidance_embeds", False):
                notes.append(
                    f"{name} takes guidance as an input: a step has one forward, and parallel=cfg nothing to divide"
                )
            if why is None and cfg and family.guidance_in_batch:
                why = config.method.refuses_some_samples()
            if why:
                notes.append(f"{name} on {gpus} GPUs: every call would fall back: {why}")
        dense: dict[str, str] = {}
        for layer in layers:
            module: Any = layer.module
            if why := why_not(module.processor):
                dense[layer.name] = why
        notes += [f"{name}.{layer} stays dense: {why}" for layer, why in dense.items()]
        notes += foreign_note(name, denoiser, config)
        notes += [f"{name}: with {one}" for one in config.additions]
        if (kept := config.kept(grid)) != grid:
            frames_kept = counted(grid.t - kept.t, "latent frame")
            notes.append(
                f"{name}: keep={config.keep}: {frames_kept} of {grid.h}×{grid.w} tokens counted as text, which all see"
            )
        notes += [f"{name}: {note}" for note in family.notes(denoiser, fuse=config.fuse, dense=dense)]
    if own_steps:
        notes.append(f"steps are counted for {num_inference_steps}, the model's own: num_inference_steps was not given")
    first, total, timesteps = _schedule(target, num_inference_steps, strength, notes)
    sparse = sum(config.runs_at(step, total) for step in range(first, total))
    if all(row.tile is None for row in rows):
        sparse = 0
    reused = None
    if config.step_cache is not None:
        never = not sparse  # then the schedule has no border
        reused, told = foretell(
            config.step_cache,
            lambda step, of: not never and config.runs_at(step, of),
            target,
            denoisers,
            first,
            total,
            timesteps,
        )
        notes += told
    shape = {"height": height, "width": width, "frames": frames, "num_inference_steps": num_inference_steps}
    useless = _warnings(config, rows, sparse, total - first)
    return Explanation(
        config.to_dict(), shape, sparse, total - first - sparse, rows, [*useless, *notes], useless, tuple(ranks), reused
    )


def _rank_plan(
    name: str,
    family: Family,
    layers: list[AttentionLayer],
    config: Config,
    grid: Grid,
    gpus: int,
    parts: int,
    device: torch.device,
) -> RankPlan:
    layout = config.method.layout(config.kept(grid))
    if layout is not None and config.too_few(grid.tokens, False, device):
        layout = None
    segments = segments_of(grid, family.one_tensor)
    return rank_plan(name, layers[0].heads, config.method, layout, parts, segments, branches=gpus // parts)


def _frames(frames: int | None, num_frames: int | None) -> int:
    """The number of frames by either name. Raises ConfigError for both or none."""
    if num_frames is not None:
        if frames is not None:
            raise ConfigError("explain: num_frames is the old name of frames: give frames alone")
        note = "explain(num_frames=…) is explain(frames=…) now; the old name goes with the next release"
        warnings.warn(note, FutureWarning, stacklevel=3)
    found = frames if num_frames is None else num_frames
    if found is None:
        raise ConfigError("explain needs frames=, the length of the clip; 1 for images")
    return found


def _warnings(config: Config, rows: list[ExplainRow], sparse: int, steps: int) -> tuple[str, ...]:
    """Where a method was asked for and does not run, or computes no less than dense attention."""
    name = config.method.name
    if name == "dense":
        return ()
    if all(row.tile is None for row in rows):
        return (f"{name} never runs: {rows[0].backend_reason}",) if rows else ()
    if not sparse:
        count = "the only step" if steps == 1 else f"none of the {steps} steps"
        verb = "is outside" if steps == 1 else "is within"
        return (f"{name} never runs: {count} {verb} {_part(config)}, so that all is dense",)
    found = [f"{row.denoiser}: {name} runs nowhere: {row.backend_reason}" for row in rows if row.tile is None]
    found += [
        f"{row.denoiser}: {row.backend_reason}" for row in rows if row.tile is not None and row.backend == "stock"
    ]
    for row in rows:
        if not row.sparse_layers:
            continue
        if row.density > 1 - 1e-9:
            work = "" if math.isnan(row.work) else f" (work {row.work:.2f})"
            found.append(
                f"{row.denoiser}: {name} leaves no token pair out{work}: method dense computes the same with less work"
            )
        elif row.work >= 1 and row.backend not in ("torch", "stock"):  # those compute no more than the kept pairs
            found.append(
                f"{row.denoiser}: {name} keeps {row.density:.3f} of the token pairs, but its kernel computes {row.work:.2f} "
                "times as many as dense attention, in blocks that are partly filled: a larger size or a smaller window is faster"
            )
    return tuple(found)


def _part(config: Config) -> str:
    words = steps_words(config.steps)
    return f"the steps {words}" if isinstance(config.steps, str) else f"the part from {words} of the schedule"


def _schedule(pipe: Any, steps: int, strength: float, notes: list[str]) -> tuple[int, int, torch.Tensor | None]:
    """(first, total, timesteps): a run of ``steps`` steps calls the denoiser at timesteps first … total − 1. Adds to ``notes``.

    timesteps: (total,), None where there is no scheduler that gives them.
    """
    if isinstance(strength, bool) or not isinstance(strength, int | float) or not 0 < strength <= 1:
        raise ConfigError(f"strength must be in (0, 1], got {strength!r}")
    enter: Any = getattr(type(pipe), "get_timesteps", None)
    own: Any = getattr(pipe, "scheduler", None)
    make: Any = getattr(type(own), "set_timesteps", None)
    if strength < 1 and (enter is None or make is None):
        raise ConfigError(
            f"{type(pipe).__name__} has no get_timesteps, so it takes no strength: it runs its whole schedule"
        )
    if make is None:
        return 0, steps, None
    scheduler = copy.deepcopy(own)  # by a copy and its class's method: the pipeline's own stays where it is
    names = inspect.signature(make).parameters
    # The shift of the noise levels by the size of the picture; how many there are does not depend on it.
    shift = {"mu": 1.0} if "mu" in names and scheduler.config.get("use_dynamic_shifting") else {}
    try:
        make(scheduler, steps, **shift)
    except Exception as error:  # whatever a scheduler may raise; the run itself may pass it more than is known here
        notes.append(f"steps are counted as {steps}: {type(own).__name__}.set_timesteps({steps}) failed with {error!r}")
        return 0, steps, None
    total = len(scheduler.timesteps)
    if total != steps:
        notes.append(f"{type(own).__name__} calls the denoiser at {total} timesteps in {steps} steps")
    if strength == 1:
        return 0, total, scheduler.timesteps
    known = {
        "num_inference_steps": steps, "strength": strength, "device": torch.device("cpu"), "timesteps": scheduler.timesteps,
        "sigmas": getattr(scheduler, "sigmas", scheduler.timesteps),
    }  # fmt: skip
    given = {name: known[name] for name in inspect.signature(enter).parameters if name in known}
    # (timesteps, count), or (sigmas, timesteps, count)
    left = [part for part in enter(SimpleNamespace(scheduler=scheduler), **given) if isinstance(part, torch.Tensor)][-1]
    notes.append(f"strength {strength} leaves {len(left)} of {total} timesteps")
    return total - len(left), total, scheduler.timesteps


def expected_device(denoiser: torch.nn.Module) -> torch.device:
    device = next(denoiser.parameters()).device
    if device.type == "meta":  # not loaded yet: where the weights would be put
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return device


def expected_backend(denoiser: torch.nn.Module, layer: AttentionLayer) -> tuple[str, str]:
    """(backend, reason) that attention calls of a denoiser would get."""
    weight = next(denoiser.parameters())
    device = expected_device(denoiser)
    if weight.device.type == "meta":
        pass
    elif unfit := unsupported(layer.head_dim, weight.dtype):
        return "stock", f"every call would fall back: {unfit}"
    for backend, usable, reason in available_backends(device):
        if usable:
            return backend, reason
    why = "; ".join(f"{name}: {reason}" for name, _, reason in available_backends(device) if name != "torch")
    return "stock", f"every call would fall back: no backend runs on {device.type}: {why}"


def family_layers(denoiser: torch.nn.Module) -> list[AttentionLayer]:
    family = family_of(denoiser)
    assert family is not None
    return family.layers(denoiser)


def _kept(method: Method, layout: Layout, heads: int) -> tuple[float, float, float]:
    """(density, cost, work) of a method on a layout, as far as they are known before anything runs."""
    if isinstance(method, DynamicMethod):
        return method.expected_density(layout, heads), method.expected_cost(layout, heads), math.nan
    plan = method.plan(layout, heads, torch.device("cpu"))
    return plan.density, plan.cost, plan.work


def _explain_row(
    name: str, denoiser: torch.nn.Module, config: Config, grid: Grid, layers: list[AttentionLayer]
) -> ExplainRow:
    everywhere = family_layers(denoiser)
    selected = set(select_blocks(config.blocks, 1 + max((layer.block for layer in everywhere), default=-1)))
    blocks = sorted({layer.block for layer in layers})
    model = type(denoiser).__name__
    own_map = layers[0].downsample is not None
    layout = config.method.map_layout(grid, layers[0], 0) if own_map else config.method.layout(grid)
    short = config.too_few(grid.tokens, own_map, expected_device(denoiser))
    if layout is not None and isinstance(config.method, DynamicMethod):
        short = short or config.method.stays_dense(grid.tokens, expected_device(denoiser))
        if why := config.method.refuses_call(layout):
            short = f"every call would fall back: {why}"
    if layout is None or short:
        everything = ranges(blocks)
        return ExplainRow(
            name,
            model,
            str(grid),
            grid.tokens,
            None,
            None,
            {},
            1.0,
            1.0,
            1.0,
            "",
            everything,
            "stock",
            short
            or ("the method is dense" if config.method.layout(grid) is None else "the method leaves this level out"),
            0,
        )
    density, cost, work = _kept(config.method, layout, layers[0].heads)
    backend, reason = expected_backend(denoiser, layers[0])
    return ExplainRow(
        denoiser=name,
        model=model,
        grid=str(grid),
        tokens=grid.tokens,
        tile=layout.tile,
        tiles=layout.tiles,
        options=config.method.describe(layout),
        density=density,
        cost=cost,
        work=work,
        sparse_blocks=ranges([b for b in blocks if b in selected]),
        dense_blocks=ranges([b for b in blocks if b not in selected]),
        backend=backend,
        backend_reason=reason,
        sparse_layers=sum(layer.block in selected for layer in layers),
    )
