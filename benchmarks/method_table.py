"""Every method at equal kept pairs, without and with summary rows, between the bound and the floor: the table of methods.

    oracle   the key blocks that hold the most attention mass, exactly, row by row: what choosing whole blocks can reach
    random   any blocks: what choosing is worth

``python -m benchmarks.quality --table`` makes clips with each, ``python -m benchmarks.attention_error --table`` looks at calls.
Density counts exact pairs; cost also those of a query and a mean, and those that a method computes beside its plan.

"MEANS" stands for summary rows: a mean in the place of each block that is not kept, or of each tile outside of a fixed pattern.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from tilewise.kernels.plans.layout import Layout
from tilewise.plugins.methods.base import Method, about_methods, make_method, method_class
from tilewise.plugins.methods.dynamic.base import BlockSelectionMethod, DraftMap
from tilewise.plugins.methods.dynamic.block_logits import per_query_head
from tilewise.plugins.methods.dynamic.density_method import DensityMethod
from tilewise.plugins.methods.published.delta import Delta

DENSITIES = (0.5, 0.25, 0.1, 0.05)
MEANS = ", means"
DELTA_EVERY = 64
CHUNK_BYTES = 1 << 28  # of scores that are made at once
WINDOWS = ("sta", "power")  # fixed patterns that take a density


@dataclass(frozen=True)
class RandomBlocks(BlockSelectionMethod):
    """Any blocks, beside each block's own: what choosing is worth. Other ones at each call, the same in each run."""

    name: ClassVar[str] = "random"

    def draft(
        self, layout: Layout, query: torch.Tensor, key: torch.Tensor, scale: float, key_layout: Layout | None = None
    ) -> DraftMap:
        size = (query.shape[0], query.shape[2], layout.blocks, (key_layout or layout).blocks)
        generator = torch.Generator(query.device).manual_seed(0)
        return DraftMap(torch.randn(size, generator=generator, device=query.device))


@dataclass(frozen=True)
class OracleBlocks(BlockSelectionMethod):
    """The blocks that hold the most attention mass: mass[i, j] = mean over q in i of Σ_{k in j} softmax(scale · q·k)."""

    name: ClassVar[str] = "oracle"

    def draft(
        self, layout: Layout, query: torch.Tensor, key: torch.Tensor, scale: float, key_layout: Layout | None = None
    ) -> DraftMap:
        B, S, H, _ = query.shape
        rows, key_rows = (table.block_table(query.device)[1].long() for table in (layout, key_layout or layout))
        of_query = torch.repeat_interleave(rows, output_size=S)
        of_key = torch.repeat_interleave(key_rows, output_size=key.shape[1])
        keys = per_query_head(key, H).float().transpose(2, 3)
        mass = torch.zeros(B, H, len(rows), len(key_rows), device=query.device)
        for at in torch.arange(S, device=query.device).split(max(1, CHUNK_BYTES // (4 * B * H * key.shape[1]))):
            share = (scale * (query[:, at].float().transpose(1, 2) @ keys)).softmax(-1)
            by_block = torch.zeros(*share.shape[:3], len(key_rows), device=query.device).index_add_(3, of_key, share)
            mass.index_add_(2, of_query[at], by_block)
        mass = mass / rows[:, None]
        return DraftMap(mass.clamp_min(torch.finfo(torch.float32).tiny).log())


def table(density: float) -> dict[str, Method]:
    """Name → method at a density: the bound and the floor, ours, and the published ones. None stays dense for being short."""
    common: dict[str, Any] = {"density": density, "min_tokens": 0}
    found: dict[str, Method] = {}
    for cls in (OracleBlocks, RandomBlocks):
        found[cls.name] = cls(**common, rank="mass", compensate=False)
        found[cls.name + MEANS] = cls(**common, rank="mass")
    for about in about_methods():
        cls = method_class(about.name)
        if about.name in WINDOWS:
            found[about.name] = make_method(about.name, {"density": density})
            found[about.name + MEANS] = make_method(about.name, {"density": density, "far": "tiles"})
        elif issubclass(cls, DensityMethod):
            found[about.name] = make_method(about.name, {**common, "compensate": False})
            found[about.name + MEANS] = make_method(about.name, common)
    found[f"auto{MEANS}"] = make_method("auto", common)
    # What is computed for the correction counts: the base keeps as much less.
    less = {**common, "density": density - 1 / DELTA_EVERY}
    for name, options in {"delta of draft": {"compensate": False}, f"delta of draft{MEANS}": {}}.items():
        found[name] = Delta(make_method("draft", {**less, **options}), DELTA_EVERY)
    return found


def beside_draft(rows: list[dict[str, Any]], density: float) -> list[str]:
    """Lines: each variant at a density against draft with means, the best first: mean of the pairs' differences in PSNR, its
    standard error, and its cost."""
    found = {row["variant"]: row for row in rows if row["density_asked"] == density}
    ours = found.get(f"draft{MEANS}")
    if ours is None:
        return []
    lines = []
    for name, row in sorted(found.items(), key=lambda item: -item[1]["psnr"]["mean"]):
        more = torch.tensor(row["psnr"]["pairs"]) - torch.tensor(ours["psnr"]["pairs"])
        error = float(more.std()) / len(more) ** 0.5 if len(more) > 1 else 0.0
        lines.append(f"density {density}, cost {row['cost']:.3f}: {name} {float(more.mean()):+.2f} ± {error:.2f} dB")
    return lines
