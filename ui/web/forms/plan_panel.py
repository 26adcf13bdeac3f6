"""The plan, updated while the controls change: grid, tiles, density, dense layers and steps, memory. Runs no weights."""

from __future__ import annotations

import math
from html import escape

import torch

from tilewise.pipelines.generation.resolve import explain_settings
from tilewise.pipelines.generation.settings import GenerateSettings
from tilewise.pipelines.loading.device import resolve_dtype
from tilewise.pipelines.memory.estimate import MemoryEstimate, estimate_memory
from tilewise.pipelines.memory.plan import device_bytes
from tilewise.plugins.explain import ExplainRow, Explanation
from tilewise.ui.common.shares import DENSITY
from tilewise.ui.web.common.media import bar, share_rows, size, table
from tilewise.ui.web.jobs.models import Models


def plan_html(models: Models, settings: GenerateSettings) -> str:
    """The panel for settings that were checked."""
    skeleton = models.skeleton(settings.model)
    explanation = explain_settings(skeleton, settings)
    memory = estimate_memory(skeleton, settings, explanation, resolve_dtype(models.dtype, models.device))
    rows: list[tuple[str, str]] = []
    for row in explanation.rows:
        prefix = f"{row.denoiser}: " if len(explanation.rows) > 1 else ""
        rows += [(prefix + name, value) for name, value in _of_denoiser(row)]
    rows += [("steps", f"{explanation.sparse_steps} sparse, {explanation.dense_steps} dense")]
    share = overall(explanation)
    if not math.isnan(share):
        rows += [("attention of the whole clip", bar(share, f"{share:.0%} of dense"))]
    rows += [("memory, estimated", _memory(memory, models.device))]
    notes = "".join(f"<p>{escape(note)}</p>" for note in (*explanation.notes, *memory.notes))
    return f'<div class="tw-plan">{table(rows)}{notes}</div>'


def overall(explanation: Explanation) -> float:
    """Token pairs that attention computes over all steps and layers, those with means too, ÷ those of dense attention; nan where
    calls decide."""
    steps = explanation.sparse_steps + explanation.dense_steps
    done = whole = 0.0
    for row in explanation.rows:
        sparse, dense = count(row.sparse_blocks), count(row.dense_blocks)
        pairs = float(row.tokens) ** 2
        whole += pairs * (sparse + dense) * steps
        done += pairs * (explanation.sparse_steps * (sparse * row.cost + dense))
        done += pairs * explanation.dense_steps * (sparse + dense)
    return done / whole if whole else 1.0


def count(ranges: str) -> int:
    """How many numbers "0-3,5" names."""
    total = 0
    for word in filter(None, ranges.split(",")):
        low, _, high = word.partition("-")
        total += int(high or low) - int(low) + 1
    return total


def _of_denoiser(row: ExplainRow) -> list[tuple[str, str]]:
    def triple(value: tuple[int, int, int] | None) -> str:
        return "none: dense" if value is None else "×".join(map(str, value))

    cells = [("grid", f"{escape(row.grid)} = {row.tokens:,} tokens"), ("tile", triple(row.tile))]
    if row.tiles is not None:
        cells += [("tiles", triple(row.tiles))]
    cells += [(name, escape(_plain(value))) for name, value in row.options.items()]
    if math.isnan(row.density):
        cells += [(DENSITY, "decided at each call")]
    else:
        cells += share_rows(row.density, row.cost)
    blocks = f"{row.sparse_blocks or 'none'} sparse, {row.dense_blocks or 'none'} dense"
    cells += [("blocks", escape(blocks)), ("backend", escape(f"{row.backend}: {row.backend_reason}"))]
    return cells


def _plain(value: object) -> str:
    if isinstance(value, list | tuple):
        return ("×" if all(isinstance(item, int) for item in value) else ", ").join(map(_plain, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _memory(memory: MemoryEstimate, device: torch.device) -> str:
    decode = "?" if memory.decode is None else size(memory.decode)
    words = f"{size(memory.total)}: weights {size(memory.weights)}, then {size(memory.denoise)} denoising, {decode} decoding"
    there = device_bytes(device)
    warning = ": more than there is, so it will not be started" if memory.total > there else ""
    return bar(memory.total / there, f"{words}; there are {size(there)}{warning}")
