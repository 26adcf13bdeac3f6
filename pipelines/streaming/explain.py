"""What a stream would do, before anything runs: its window, where attention is sparse and why not, and its memory."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table

from tilewise.kernels.plans.layout import Grid
from tilewise.pipelines.generation.settings import OWN_VAE
from tilewise.pipelines.memory.stream_plan import StreamMemory
from tilewise.pipelines.memory.units import amount
from tilewise.pipelines.streaming.checks import cache_of, check_stream
from tilewise.pipelines.streaming.choice import choose_recipe
from tilewise.pipelines.streaming.memory import cache_plans, denoisers_used, memory_of
from tilewise.pipelines.streaming.recipe import CausalRecipe
from tilewise.pipelines.streaming.windows.explain import WindowExplanation, explain_windows
from tilewise.pipelines.streaming.windows.recipe import WindowRecipe
from tilewise.plugins.config import Config, MethodLike, resolve, select_blocks
from tilewise.plugins.explain import expected_backend, expected_device
from tilewise.plugins.methods.base import DynamicMethod
from tilewise.plugins.methods.dense import Dense
from tilewise.plugins.models.common.registry import family_of
from tilewise.plugins.patching import check_config, patches_of
from tilewise.plugins.streaming.cache_plan import CachePlan
from tilewise.plugins.streaming.kv_cache import KVCache
from tilewise.plugins.streaming.sparse_window import SparseWindow
from tilewise.plugins.text_format import counted, ranges, render


@dataclass(frozen=True)
class StreamRow:
    """What one denoiser would do with a chunk, once the window is full.

    tokens: queries, of a chunk. keys: of memory and window. tile, options: of a sparse method. density, work: kept and computed
    pairs ÷ all; nan where only a call decides. sparse_blocks, dense_blocks: of the transformer. why_dense: of those that are
    dense. sparse_passes, passes: of a chunk, the one that writes the cache included. lanes: caches of its own, 2 with guidance.
    cache: bytes (`CachePlan.to_dict`).
    """

    denoiser: str
    model: str
    grid: str
    tokens: int
    keys: int
    tile: tuple[int, int, int] | None
    options: dict[str, Any]
    density: float
    work: float
    sparse_blocks: str
    dense_blocks: str
    why_dense: str
    sparse_passes: int
    passes: int
    backend: str
    backend_reason: str
    lanes: int
    cache: dict[str, int]


@dataclass(frozen=True)
class StreamExplanation:
    """What a stream would do: nothing has run.

    Lengths of recipe and cache are in latent frames. cache: options, with the frames of memory that the policy keeps. size:
    height and width in pixels. chunk: latent frames, those of the first one, and frames of the video that it makes. dtype: of
    keys and values. latent, total: bytes of the KV caches of all denoisers: of one latent frame of the window, and of all.
    """

    recipe: str
    method: dict[str, Any]
    size: dict[str, int]
    chunk: dict[str, int]
    cache: dict[str, Any]
    dtype: str
    rows: list[StreamRow]
    memory: StreamMemory

    @property
    def latent(self) -> int:
        return sum(row.cache["latent"] for row in self.rows)

    @property
    def total(self) -> int:
        return sum(row.cache["total"] for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """For JSON: numbers that only a call decides are None."""
        rows = [dataclasses.asdict(row) for row in self.rows]
        for row in rows:
            row |= {name: None for name in ("density", "work") if math.isnan(row[name])}
        return {
            "recipe": self.recipe,
            "method": self.method,
            "size": self.size,
            "chunk": self.chunk,
            "cache": self.cache,
            "dtype": self.dtype,
            "cache_bytes": {"latent": self.latent, "total": self.total},
            "denoisers": rows,
            "memory": self.memory.to_dict(),
        }

    def __str__(self) -> str:
        table = Table("", *(row.denoiser for row in self.rows), title=f"stream of {self.recipe}", show_lines=False)

        def line(label: str, value: Any) -> None:
            table.add_row(label, *(str(value(row)) for row in self.rows))

        def share(value: float) -> str:
            return "decided at each call" if math.isnan(value) else f"{value:.3f}"

        cache, sink = self.cache, self.cache["sink"]
        where = f" ({cache['sink_position']})" if sink else ""
        kept = f"sink {sink}{where}, memory {cache['memory']}"
        line("model", lambda row: row.model)
        line("chunk (t×h×w tokens)", lambda row: f"{row.grid} = {row.tokens}: {counted(self.chunk['frames'], 'frame')}")
        line("window in latent frames", lambda row: f"{cache['window']}, {kept}, policy {cache['policy']}")
        line("keys of a full window", lambda row: row.keys)
        if any(row.sparse_blocks for row in self.rows):
            line("tile in tokens", lambda row: "–" if row.tile is None else "×".join(map(str, row.tile)))
            for key in dict.fromkeys(key for row in self.rows for key in row.options):
                line(key, lambda row: row.options.get(key, "–"))  # noqa: B023
            line("density (kept pairs)", lambda row: share(row.density))
            line("work (computed pairs)", lambda row: share(row.work))
        line("passes of a chunk", lambda row: f"{row.sparse_passes} sparse, {row.passes - row.sparse_passes} dense")
        line("sparse blocks", lambda row: row.sparse_blocks or "none")
        line(
            "dense blocks",
            lambda row: f"{row.dense_blocks}: {row.why_dense}" if row.why_dense else row.dense_blocks or "none",
        )
        line("backend", lambda row: f"{row.backend}: {row.backend_reason}" if row.backend_reason else row.backend)
        stored = self.dtype if cache["storage"] == "model" else cache["storage"]
        line("cache: a latent frame", lambda row: f"{amount(row.cache['latent'])}, {stored}, {_lanes(row.lanes)}")
        line("cache: memory and window", lambda row: amount(row.cache["frames"]))
        if cache["storage"] != "model":
            line(f"cache: one layer in {self.dtype}", lambda row: amount(row.cache["one_layer"]))
        line("cache: keys to turn anew", lambda row: amount(row.cache["masters"]))
        line("cache", lambda row: amount(row.cache["total"]))
        told = f"memory: {self.memory}" + ("" if self.memory.fits else ": it does not fit")
        return "\n".join([render(table), told, *self.memory.notes])


def explain_stream(
    pipe: Any,
    *,
    recipe: CausalRecipe | WindowRecipe | None = None,
    method: MethodLike = "dense",
    cache: KVCache | None = None,
    chunk: int | None = None,
    height: int | None = None,
    width: int | None = None,
    decode: str = OWN_VAE,
    decode_device: str | torch.device | None = None,
    device: str | torch.device | None = None,
    edits: bool = False,
    **windows: Any,
) -> StreamExplanation | WindowExplanation:
    """What ``tilewise.stream`` would do with the same arguments: window, density, what stays dense and why, and memory.

    Nothing runs; the pipeline is not changed. It may be a skeleton without weights, which are counted then. A stream of windows
    gives a ``WindowExplanation``.

    Args:
        device: of a skeleton: where it would be loaded. Default: where the pipeline is, or a GPU if there is one.
        edits: whether it changes a video.
        windows: way, window, overlap, steps, guidance, adain, prefix_noise, sink and previous of ``stream``.

    Raises:
        ConfigError, UnsupportedModelError: as ``stream`` does. A stream without room is told, not refused
            (``StreamExplanation.memory``).
    """
    recipe = choose_recipe(pipe, recipe, cache=cache, chunk=chunk, **windows)
    if isinstance(recipe, WindowRecipe):
        sized = recipe.replace(height=height or recipe.height, width=width or recipe.width)
        return explain_windows(pipe, sized, method, decode=decode, decode_device=decode_device, device=device)
    cache = cache or cache_of(recipe)
    chunk = recipe.chunk if chunk is None else chunk
    height, width = recipe.height if height is None else height, recipe.width if width is None else width
    space, grid = check_stream(pipe, recipe, cache, chunk=chunk, height=height, width=width, edits=edits)
    size = (height, width)
    patches = patches_of(pipe)
    config = next(iter(patches.values())).config if patches else resolve(method)
    plans = cache_plans(pipe, recipe, cache, grid)
    used = denoisers_used(pipe, recipe)
    configs = {name: config.prepare(pipe, denoiser) for name, denoiser in used.items()}
    for name, denoiser in used.items():
        check_config(name, denoiser, configs[name])
    rows = [
        _row(name, denoiser, configs[name], plans[name], cache, grid, _passes(recipe, number), recipe)
        for number, (name, denoiser) in enumerate(used.items())
    ]
    first = next(iter(plans.values()))
    return StreamExplanation(
        recipe=recipe.name,
        method=config.to_dict(),
        size={"height": height, "width": width},
        chunk={"latents": chunk, "first": recipe.first_chunk or chunk, "frames": chunk * space.factors(pipe)[1]},
        cache={**cache.to_dict(), "memory": first.memory},
        dtype=str(first.shape.dtype).removeprefix("torch."),
        rows=rows,
        memory=memory_of(
            pipe,
            space,
            recipe,
            cache,
            grid,
            size,
            device=device,
            decode_device=decode_device,
            own_vae=decode == OWN_VAE,
        ),
    )


def _row(
    name: str,
    denoiser: torch.nn.Module,
    config: Config,
    plan: CachePlan,
    cache: KVCache,
    grid: Grid,
    passes: list[int],
    recipe: CausalRecipe,
) -> StreamRow:
    family = family_of(denoiser)
    assert family is not None
    layers = family.layers(denoiser)
    blocks = sorted({layer.block for layer in layers})
    selected = set(select_blocks(config.blocks, 1 + blocks[-1]))
    keys = (plan.memory + cache.window) * plan.shape.tokens
    window = None if isinstance(config.method, Dense) else SparseWindow(config.method, grid, cache, plan.memory)
    why = _why_dense(window, config, keys, denoiser, grid, recipe)
    sparse = [] if why else [block for block in blocks if block in selected]
    runs = sum(config.runs_at(step, len(recipe.timesteps)) for step in passes) if sparse else 0
    density = work = 1.0
    options: dict[str, Any] = {}
    backend, reason = "dense", ""
    if window is not None and window.layout is not None and sparse:
        density, work = window.expected(layers[0].heads)
        options = config.method.describe(window.full.layout)
        backend, reason = expected_backend(denoiser, layers[0])
    return StreamRow(
        denoiser=name,
        model=type(denoiser).__name__,
        grid=str(grid),
        tokens=grid.tokens,
        keys=keys,
        tile=window.layout.tile if window is not None and window.layout is not None and sparse else None,
        options=options,
        density=density,
        work=work,
        sparse_blocks=ranges(sparse),
        dense_blocks=ranges([block for block in blocks if block not in sparse]),
        why_dense=why or ("" if len(sparse) == len(blocks) else f"blocks={config.blocks!r}"),
        sparse_passes=runs,
        passes=len(passes),
        backend=backend,
        backend_reason=reason,
        lanes=plan.shape.lanes,
        cache=plan.to_dict(),
    )


def _why_dense(
    window: SparseWindow | None,
    config: Config,
    keys: int,
    denoiser: torch.nn.Module,
    grid: Grid,
    recipe: CausalRecipe,
) -> str:
    """Why all calls over the window are dense; "": they are not. In the order of the calls' own reasons (``window_call``)."""
    if window is None:
        return "the method is dense"
    short = config.too_few(keys, False)
    if short is None and isinstance(config.method, DynamicMethod):
        short = config.method.stays_dense(keys, expected_device(denoiser))
    if short is not None:
        return short
    if not window.reason and recipe.first_chunk not in (None, grid.t):
        return f"a first chunk of {recipe.first_chunk} latent frames among chunks of {grid.t}"
    return window.reason


def _passes(recipe: CausalRecipe, number: int) -> list[int]:
    """Denoising steps of a chunk that run on the denoiser with this number; the pass that writes the cache counts as the last."""
    own = [
        step
        for step, sigma in enumerate(recipe.sigmas())
        if recipe.boundary is None or (sigma >= recipe.boundary) == (number == 0)
    ]
    return [*own, len(recipe.timesteps) - 1]


def _lanes(lanes: int) -> str:
    return "one lane" if lanes == 1 else f"{lanes} lanes"
