"""The picture of `tilewise explain --plot`: what the draft expects, which blocks are kept, and what one query sees."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tilewise.kernels.plans.block_plan import BlockPlan
from tilewise.kernels.plans.cells import CellLayout
from tilewise.kernels.plans.layout import Layout
from tilewise.kernels.plans.query_visibility import cells_of_query, region_of_query
from tilewise.pipelines.media.files import check_writable, replacing
from tilewise.pipelines.media.output_names import Outputs

FORMATS = (".png", ".svg", ".pdf")
MOST_FRAMES = 6  # of a clip that are drawn


@dataclass(frozen=True)
class Drawn:
    """What is drawn. draft: (N, N) share of attention mass of one head, or None. where: words for the title."""

    layout: Layout
    plan: BlockPlan
    head: int
    draft: torch.Tensor | None
    where: str


def check_plot(out: Path, *, force: bool = False) -> None:
    """Find out before any work whether the picture can be drawn and written.

    Raises ImportError where matplotlib is missing, OutputPathError for a file that cannot be written, has another ending, or is
    there and not to be replaced (`force`).
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        hint = "pip install 'tilewise[plot]', or in a clone of it pip install '.[plot]'"
        raise ImportError(f"{error}; --plot needs Matplotlib: {hint}") from error
    check_writable(out, suffix=out.suffix if out.suffix in FORMATS else FORMATS[0])
    Outputs(out, given=True, force=force, settings=False).check()


def kept_blocks(plan: BlockPlan, head: int) -> torch.Tensor:
    """(N, N) float: 1 where a query block sees a key block, ½ where it sees part of it. Sample 0."""
    g = int(plan.sets_of_heads(head + 1)[head]) if plan.head_set is None else int(plan.head_set[head])
    found = torch.zeros(len(plan.q_start), len(plan.k_start))
    for i, (_, full, total) in enumerate(plan.ends[0, g].tolist()):
        found[i, plan.index[0, g, i, full:total].long()] = 0.5
        found[i, plan.index[0, g, i, :full].long()] = 1.0
    return found


def _shades(cells: torch.Tensor) -> torch.Tensor:
    """A pale shade for each cell, none where there is none; neighbors differ, so that cells are seen."""
    return torch.where(cells > 0, 0.15 + 0.2 * (cells * 0.6180339887 % 1), 0.0)


def plot(drawn: Drawn, out: Path) -> None:
    """Write the picture to ``out``; complete or not at all."""
    from matplotlib.figure import Figure  # without pyplot: no window system, no global state

    grid = drawn.layout.grid
    frames = torch.linspace(0, grid.t - 1, min(grid.t, MOST_FRAMES)).round().long().unique().tolist()
    position = (frames[len(frames) // 2], grid.h // 2, grid.w // 2)
    region = region_of_query(drawn.plan, drawn.layout, position, drawn.head)
    means = (
        cells_of_query(drawn.plan, drawn.layout, position, drawn.head) if isinstance(drawn.layout, CellLayout) else None
    )
    shades = region.float() if means is None else region + _shades(means)
    maps: list[tuple[str, Any, dict[str, Any]]] = []
    if drawn.draft is not None:
        maps.append(("expected share of attention, log", drawn.draft.clamp_min(1e-6).log10(), {"cmap": "magma"}))
    maps.append(("kept blocks", kept_blocks(drawn.plan, drawn.head), {"cmap": "Greys", "vmin": 0, "vmax": 1}))
    figure = Figure(figsize=(2.2 * max(len(frames), 3), 7), layout="constrained")
    parts: Any = figure.subfigures(2, 1, height_ratios=(2, 1))
    top, bottom = parts
    for axis, (title, values, style) in zip(top.subplots(1, len(maps), squeeze=False)[0], maps, strict=True):
        image = axis.imshow(values.numpy(), interpolation="nearest", **style)
        axis.set(title=title, xlabel="key block", ylabel="query block")
        if title.startswith("expected"):
            top.colorbar(image, ax=axis, shrink=0.8)
    for axis, t in zip(bottom.subplots(1, len(frames), squeeze=False)[0], frames, strict=True):
        axis.imshow(shades[t].numpy(), cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
        axis.set(title=f"latent frame {t}", xticks=[], yticks=[])
        if t == position[0]:
            axis.plot(position[2], position[1], "r+", markersize=10)
    kept = region.float().mean()
    coarse = "" if means is None else f", {(means > 0).float().mean():.1%} as {len(means.unique()) - 1:,} means (pale)"
    bottom.suptitle(f"what the query at the red cross sees: {kept:.1%} of the clip's tokens{coarse}")
    figure.suptitle(drawn.where)
    with replacing(out) as part:
        figure.savefig(part, format=out.suffix[1:])
