"""summary: what the attention calls of a patched target really did."""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from tilewise.plugins.errors import ConfigError
from tilewise.plugins.patching import patches_of
from tilewise.plugins.runtime.call_stats import FALLBACK, SPARSE, Entry, Tally
from tilewise.plugins.text_format import ranges, render


@dataclass(frozen=True)
class SummaryRow:
    """Attention calls of one kind in a group of layers that did the same."""

    denoiser: str
    layers: str  # block numbers, such as "0-29"
    kind: str  # "sparse", "dense step", "dense layer", "full path", "short" or "fallback"
    calls: int
    density: float  # nan where every call was captured into a CUDA graph, and chose its own
    backend: str
    seconds: float
    reason: str = ""
    fused: bool = False  # whether fused kernels made the queries and keys of these calls
    recall: float | None = None  # attention mass kept, as a dynamic method estimates it
    probe: float | None = None  # the same, measured exactly on the method's probe rows
    broken: int = 0  # lists of key blocks that kept everything, because queries or keys were not finite


@dataclass(frozen=True)
class Summary:
    """What the attention calls of a patched target did since it was patched."""

    method: dict[str, Any]
    rows: list[SummaryRow]
    grids: dict[str, str]
    skipped_layers: dict[str, str]

    @property
    def calls(self) -> int:
        return sum(row.calls for row in self.rows)

    @property
    def fused_calls(self) -> int:
        """Attention calls around which the model family's fused kernels ran: all, where nothing stood in their way."""
        return sum(row.calls for row in self.rows if row.fused)

    @property
    def density(self) -> float:
        """Kept ÷ all token pairs over the sparse calls; 1.0 if none was sparse."""
        sparse = [row for row in self.rows if row.kind == SPARSE and not math.isnan(row.density)]
        calls = sum(row.calls for row in sparse)
        return sum(row.density * row.calls for row in sparse) / calls if calls else 1.0

    @property
    def overall_density(self) -> float:
        """Kept ÷ all token pairs over every call, dense ones included."""
        known = [row for row in self.rows if not math.isnan(row.density)]
        calls = sum(row.calls for row in known)
        return sum(row.density * row.calls for row in known) / calls if calls else 1.0

    @property
    def fallbacks(self) -> dict[str, int]:
        """Reason → calls that ran dense although the method should have run."""
        found: dict[str, int] = defaultdict(int)
        for row in self.rows:
            if row.kind == FALLBACK:
                found[row.reason] += row.calls
        return dict(found)

    def _mean(self, name: str) -> float | None:
        found = [(getattr(row, name), row.calls) for row in self.rows if getattr(row, name) is not None]
        return sum(value * calls for value, calls in found) / sum(calls for _, calls in found) if found else None

    @property
    def recall(self) -> float | None:
        """Share of the attention mass that dynamic calls kept, as their method estimates it; None if there were none."""
        return self._mean("recall")

    @property
    def probe(self) -> float | None:
        """The same, measured exactly on probe rows; None if the method was not asked for any."""
        return self._mean("probe")

    @property
    def broken(self) -> int:
        """Lists of key blocks that kept everything, because queries or keys were not finite."""
        return sum(row.broken for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """JSON values; null for a number that is not known, or is none (the probe of activations that are not finite)."""
        return {
            "method": self.method,
            "grids": self.grids,
            "density": self.density,
            "overall_density": self.overall_density,
            "fallbacks": self.fallbacks,
            "fused_calls": self.fused_calls,
            "recall": _finite(self.recall),
            "probe": _finite(self.probe),
            "broken": self.broken,
            "skipped_layers": self.skipped_layers,
            "rows": [{k: _finite(v) for k, v in dataclasses.asdict(row).items()} for row in self.rows],
        }

    def __str__(self) -> str:
        table = Table("denoiser", "blocks", "kind", "calls", "density", "backend", "seconds", title="attention calls")
        for r in self.rows:
            kind = f"{r.kind}: {r.reason}" if r.reason else r.kind
            table.add_row(r.denoiser, r.layers, kind, str(r.calls), f"{r.density:.3f}", r.backend, f"{r.seconds:.2f}")
        lines = [render(table) if self.rows else "no attention call yet: run the pipeline first"]
        if self.fused_calls:
            lines.append(f"fused kernels ran around {self.fused_calls} of {self.calls} attention calls")
        if self.recall is not None:
            probed = "" if self.probe is None else f"; measured on probe rows: {self.probe:.3f}"
            lines.append(f"attention mass kept by sparse calls, estimated: {self.recall:.3f}{probed}")
        if self.broken:
            lines.append(f"queries or keys were not finite: {self.broken} lists of key blocks kept everything")
        lines += [f"{name} stays dense: {reason}" for name, reason in self.skipped_layers.items()]
        return "\n".join(lines)


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _row(denoiser: str, entry: Entry, found: list[tuple[int, Tally]]) -> SummaryRow:
    """One row of the layers (block, tally) that did the same."""
    tallies = [tally for _, tally in found]

    def mean(name: str) -> float | None:
        totals = [tally.measured.total(name) for tally in tallies]
        calls = sum(count for _, count in totals)
        return sum(total for total, _ in totals) / calls if calls else None

    measured = mean("density")
    density = entry.density if entry.density is not None else math.nan if measured is None else measured
    return SummaryRow(
        denoiser=denoiser,
        layers=ranges([block for block, _ in found]),
        kind=entry.kind,
        calls=sum(tally.calls for tally in tallies),
        density=density,
        backend=entry.backend,
        seconds=sum(tally.seconds() for tally in tallies),
        reason=entry.reason,
        fused=entry.fused,
        recall=mean("recall"),
        probe=mean("probe"),
        broken=round(sum(tally.measured.total("broken")[0] for tally in tallies)),
    )


def summary(target: Any) -> Summary:
    """What ran since ``target`` was patched: per group of layers its calls, density, backend, seconds and fallbacks.

    Seconds are spent inside attention calls: wall clock on a CPU, device time on a GPU (waits for the GPU to finish).

    Raises:
        ConfigError: if the target is not patched.
    """
    patches = patches_of(target)
    if not patches:
        raise ConfigError("summary: the target is not patched; call tilewise.patch(target, method) and run it first")
    rows: list[SummaryRow] = []
    skipped: dict[str, str] = {}
    for name, patch in patches.items():
        per_entry: dict[Entry, list[tuple[int, Tally]]] = defaultdict(list)
        for (layer, entry), tally in patch.step.ledger.tallies.items():
            per_entry[entry].append((patch.layers[layer].block, tally))
        rows += [_row(name, entry, found) for entry, found in per_entry.items()]
        skipped |= {f"{name}.{layer}": reason for layer, reason in patch.step.ledger.skipped_layers.items()}
    config = next(iter(patches.values())).config
    grids = {name: str(patch.step.grid) for name, patch in patches.items() if patch.step.grid is not None}
    return Summary(config.to_dict(), rows, grids, skipped)
