"""summary: what the attention calls of a patched target really did."""

from __future__ import annotations

import dataclasses
import datetime
import math
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from tilewise.plugins.autoencoders.patched_vae import patch_on, vae_of
from tilewise.plugins.context_parallel.report import RankRow, rank_row
from tilewise.plugins.errors import ConfigError
from tilewise.plugins.patching import denoisers_of, patches_of
from tilewise.plugins.runtime.call_stats import FALLBACK, OTHER_REASONS, SPARSE, CallKind, CallRecord
from tilewise.plugins.runtime.patched_denoiser import Patch
from tilewise.plugins.step_caches.support import foreign_note
from tilewise.plugins.text_format import counted, ranges, render
from tilewise.plugins.tuning.in_use import words as tuned_words

ALIKE = 0.02  # heads whose densities differ by less need no words


@dataclass(frozen=True)
class SummaryRow:
    """Attention calls of one kind in a group of layers that did the same."""

    denoiser: str
    layers: str  # block numbers, such as "0-29"
    kind: str  # "sparse", "dense step", "dense layer", "global path", "short" or "fallback"
    calls: int
    queries: int  # query rows of all these calls, once for all heads: Σ batch · queries
    pairs: int  # token pairs of all these calls, the same way: Σ batch · queries · keys
    density: float  # kept ÷ all token pairs; nan where every call was captured into a CUDA graph, and chose its own
    backend: str
    seconds: float
    reason: str = ""
    fused: bool = False  # whether fused kernels made the queries and keys of these calls
    recall: float | None = None  # attention mass kept, as a dynamic method estimates it
    probe: float | None = None  # the same, measured exactly on the method's probe rows
    cost: float = math.nan  # as density, with the pairs of a query and a mean that stands for keys
    broken: int = 0  # lists of key blocks that kept everything, because queries or keys were not finite


@dataclass(frozen=True)
class HeadsRow:
    """What each head of a layer kept in its sparse calls, of a method that plans for each: kept ÷ all token pairs."""

    denoiser: str
    layer: str
    block: int
    density: tuple[float, ...]


@dataclass(frozen=True)
class VaeRow:
    """Calls of a patched VAE's decoder or encoder, each of one latent frame (or of one tile of it)."""

    part: str  # "decoder" or "encoder"
    calls: int
    fused: bool
    reason: str = ""  # why the stock code ran


@dataclass(frozen=True)
class CacheRow:
    """What a step cache reused in the forwards of a denoiser.

    reused: forwards in which anything was. modules: blocks or attention layers of all forwards; skipped: those that did not run.
    mag_ratios: what MagCache measured, with ``calibrate``.
    """

    denoiser: str
    cache: str  # with its options, as ``patch`` takes it
    forwards: int
    reused: int
    modules: int
    skipped: int
    skips: str  # "blocks" or "attention layers"
    mag_ratios: tuple[float, ...] = ()

    def __str__(self) -> str:
        said = f"cache {self.cache}, {self.denoiser}: {self.reused} of {counted(self.forwards, 'forward')} reused"
        said += f", {self.skipped} of {self.modules} {self.skips} skipped"
        if self.mag_ratios:
            said += "\nmag_ratios=" + ",".join(f"{ratio:.5g}" for ratio in self.mag_ratios)
        return said


@dataclass(frozen=True)
class Summary:
    """What the attention calls of a patched target did. since: when it was patched, or its summary reset (UTC, ISO 8601)."""

    method: dict[str, Any]
    rows: list[SummaryRow]
    grids: dict[str, str]
    skipped_layers: dict[str, str]
    notes: tuple[str, ...] = ()  # what the model's family has to say, such as where its fused kernels stay off
    vae: tuple[VaeRow, ...] = ()  # empty if it is not patched, or was not called
    cache: tuple[CacheRow, ...] = ()  # of each denoiser, where the patch has a step cache
    ranks: tuple[RankRow, ...] = ()  # of each denoiser under context parallelism: this process's part
    since: str = dataclasses.field(default="", compare=False)
    heads: tuple[HeadsRow, ...] = ()  # of each layer, where a method plans for each head

    @property
    def calls(self) -> int:
        return sum(row.calls for row in self.rows)

    @property
    def ran(self) -> bool:
        """Whether any call ran the method. The method dense has none to run: then it is True."""
        return self.method["method"]["name"] == "dense" or any(row.kind == SPARSE for row in self.rows)

    @property
    def fused_calls(self) -> int:
        """Attention calls around which the model family's fused kernels ran: all, where nothing stood in their way."""
        return sum(row.calls for row in self.rows if row.fused)

    @property
    def density(self) -> float:
        """Kept ÷ all token pairs over the sparse calls; 1.0 if none was sparse."""
        return _density([row for row in self.rows if row.kind == SPARSE])

    @property
    def cost(self) -> float:
        """The same, with the pairs of a query and a mean that stands for keys which it does not see."""
        return _density([row for row in self.rows if row.kind == SPARSE], "cost")

    @property
    def overall_density(self) -> float:
        """Kept ÷ all token pairs over every call, dense ones included."""
        return _density(self.rows)

    @property
    def fallbacks(self) -> dict[str, int]:
        """Reason → calls that ran dense although the method should have run."""
        found: dict[str, int] = defaultdict(int)
        for row in self.rows:
            if row.kind == FALLBACK:
                found[row.reason] += row.calls
        return dict(found)

    @property
    def recall(self) -> float | None:
        """Share of the attention mass that dynamic calls kept, as their method estimates it; None if there were none."""
        return _mean(self.rows, "recall", "queries")

    @property
    def probe(self) -> float | None:
        """The same, measured exactly on probe rows; None if the method was not asked for any."""
        return _mean(self.rows, "probe", "queries")

    @property
    def broken(self) -> int:
        """Lists of key blocks that kept everything, because queries or keys were not finite."""
        return sum(row.broken for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """JSON values; null for a number that is not known, or is none (the probe of activations that are not finite)."""
        return {
            "method": self.method,
            "since": self.since,
            "grids": self.grids,
            "density": self.density,
            "cost": self.cost,
            "overall_density": self.overall_density,
            "fallbacks": self.fallbacks,
            "fused_calls": self.fused_calls,
            "recall": _finite(self.recall),
            "probe": _finite(self.probe),
            "broken": self.broken,
            "skipped_layers": self.skipped_layers,
            "notes": list(self.notes),
            "vae": [dataclasses.asdict(row) for row in self.vae],
            "cache": [{**dataclasses.asdict(row), "mag_ratios": list(row.mag_ratios)} for row in self.cache],
            "ranks": [dataclasses.asdict(row) for row in self.ranks],
            "heads": [{**dataclasses.asdict(row), "density": list(row.density)} for row in self.heads],
            "rows": [{k: _finite(v) for k, v in dataclasses.asdict(row).items()} for row in self.rows],
        }

    def __str__(self) -> str:
        means = any(f"{r.cost:.3f}" != f"{r.density:.3f}" for r in self.rows)  # whether there are any to count
        shares = ("density", "cost") if means else ("density",)
        table = Table("denoiser", "blocks", "kind", "calls", *shares, "backend", "seconds", title="attention calls")
        for r in self.rows:
            kind = f"{r.kind}: {r.reason}" if r.reason else r.kind
            numbers = [f"{getattr(r, share):.3f}" for share in shares]
            table.add_row(r.denoiser, r.layers, kind, str(r.calls), *numbers, r.backend, f"{r.seconds:.2f}")
        lines = [render(table) if self.rows else "no attention call yet: run the pipeline first"]
        if self.rows and not self.ran:
            lines.append(f"{self.method['method']['name']} never ran: every call was dense, as the kinds above say")
        if self.fused_calls:
            lines.append(f"fused kernels ran around {self.fused_calls} of {self.calls} attention calls")
        if self.recall is not None:
            probed = "" if self.probe is None else f"; measured on probe rows: {self.probe:.3f}"
            lines.append(f"attention mass kept by sparse calls, estimated: {self.recall:.3f}{probed}")
        if self.broken:
            lines.append(f"queries or keys were not finite: {self.broken} lists of key blocks kept everything")
        lines += _heads_lines(self.heads)
        lines += [f"{name} stays dense: {reason}" for name, reason in self.skipped_layers.items()]
        lines += map(str, self.cache)
        lines += map(str, self.ranks)
        for row in self.vae:
            how = "fused" if row.fused else f"stock code ({row.reason})"
            lines.append(f"vae.{row.part}: {row.calls} calls, {how}")
        if self.since:
            lines.append(f"counted since {self.since.removesuffix('+00:00').replace('T', ' ')} UTC")
        return "\n".join([*lines, *self.notes])


def _heads_lines(rows: tuple[HeadsRow, ...]) -> list[str]:
    """Of each denoiser the range over heads, and the mean of each block; nothing where all heads keep alike."""
    lines = []
    for name in dict.fromkeys(row.denoiser for row in rows):
        own = [row for row in rows if row.denoiser == name]
        everywhere = [value for row in own for value in row.density]
        if max(everywhere) - min(everywhere) < ALIKE:
            continue
        means = ", ".join(f"{row.block}: {sum(row.density) / len(row.density):.2f}" for row in own)
        lines.append(f"{name}: heads keep {min(everywhere):.3f} to {max(everywhere):.3f}; their mean by block: {means}")
    return lines


def _heads_rows(name: str, patch: Patch) -> list[HeadsRow]:
    found: dict[int, tuple[Any, int]] = {}
    for (number, _), record in patch.state.call_stats.records.items():
        if record.heads is not None:  # of one kind of sparse call; the last counts, where there are several
            found[number] = record.heads
    layers = patch.layers
    return [
        HeadsRow(name, layers[number].name, layers[number].block, tuple((sums / pairs).tolist()))
        for number, (sums, pairs) in sorted(found.items())
    ]


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _mean(rows: list[SummaryRow], name: str, weight: str) -> float | None:
    """Σ weight · value ÷ Σ weight over the rows that have the value; None if none has."""
    found = [(getattr(row, name), getattr(row, weight)) for row in rows if getattr(row, name) is not None]
    return sum(value * w for value, w in found) / sum(w for _, w in found) if found else None


def _density(rows: list[SummaryRow], name: str = "density") -> float:
    """Kept ÷ all token pairs of rows whose density is known; 1.0 if there is none.

    By pairs and not by calls: the layers of a UNet attend over maps of different sizes.
    """
    mean = _mean([row for row in rows if not math.isnan(row.density)], name, "pairs")
    return 1.0 if mean is None else mean


def _row(denoiser: str, kind: CallKind, found: list[tuple[int, CallRecord]]) -> SummaryRow:
    """One row of the layers (block, record) that did the same."""
    records = [record for _, record in found]

    def mean(name: str) -> float | None:
        totals = [record.measurements.total(name) for record in records]
        weight = sum(weight for _, weight in totals)
        return sum(total for total, _ in totals) / weight if weight else None

    kept, known = (sum(numbers) for numbers in zip(*(record.kept_pairs() for record in records), strict=True))
    reason = kind.reason
    if reason != OTHER_REASONS and any(record.reasons_differ for record in records):
        reason = f"{reason} (and others that differ in their numbers alone)"
    return SummaryRow(
        denoiser=denoiser,
        layers=ranges([block for block, _ in found]),
        kind=kind.kind,
        calls=sum(record.calls for record in records),
        queries=sum(record.queries for record in records),
        pairs=sum(record.pairs for record in records),
        density=kept / known if known else math.nan,
        cost=sum(record.cost_pairs() for record in records) / known if known else math.nan,
        backend=kind.backend,
        seconds=sum(record.seconds() for record in records),
        reason=reason,
        fused=kind.fused,
        recall=mean("recall"),
        probe=mean("probe"),
        broken=round(sum(record.measurements.total("broken")[0] for record in records)),
    )


def _groups(patch: Patch) -> list[tuple[CallKind, list[tuple[int, CallRecord]]]]:
    """The (block, record) of layers that did the same: calls of one kind, and over one density where it was known before."""
    found: dict[tuple[CallKind, float | None], list[tuple[int, CallRecord]]] = defaultdict(list)
    for (layer, kind), record in patch.state.call_stats.records.items():
        density = record.kept / record.known if record.known else None
        found[kind, density].append((patch.layers[layer].block, record))
    return [(kind, records) for (kind, _), records in found.items()]


def summary(target: Any, *, reset: bool = False) -> Summary:
    """What ran since ``target`` was patched, or the last reset: per group of layers its calls, density, backend, seconds and
    fallbacks. reset: begin to count anew after this, for one run of several for instance.

    Seconds are spent inside attention calls: wall clock on a CPU, device time on a GPU (waits for the GPU to finish).

    Raises:
        ConfigError: if the target is not patched.
    """
    patches = patches_of(target)
    if not patches:
        raise ConfigError("summary: the target is not patched; call tilewise.patch(target, method) and run it first")
    rows: list[SummaryRow] = []
    skipped: dict[str, str] = {}
    ranks: list[RankRow | None] = []
    heads: list[HeadsRow] = []
    since = datetime.datetime.now(datetime.UTC)
    denoisers = denoisers_of(target)
    for name, patch in patches.items():
        with patch.state.call_stats.lock:  # another thread may be in a forward
            rows += [_row(name, kind, found) for kind, found in _groups(patch)]
            heads += _heads_rows(name, patch)
            since = min(since, patch.state.call_stats.since)
            done = patch.state.call_stats.exchanges
            dealer = patch.state.head_dealer
            ranks.append(
                rank_row(name, denoisers[name], patch.layers, patch.config.method, dealer, done.calls, done.seconds())
            )
            if reset:
                patch.state.call_stats.restart()
                dealer.restart()
        skipped |= {f"{name}.{layer}": reason for layer, reason in patch.state.call_stats.skipped_layers.items()}
    config = next(iter(patches.values())).config
    grids = {name: str(patch.state.grid) for name, patch in patches.items() if patch.state.grid is not None}
    notes = tuple(
        f"{name}: {note}"
        for name, patch in patches.items()
        for note in patch.family.notes(
            denoisers[name], fuse=patch.config.fuse, dense=patch.state.call_stats.skipped_layers
        )
    )
    for name, patch in patches.items():
        notes += tuple(f"{name}: {told}" for report in patch.reports if (told := report()) is not None)
        notes += tuple(foreign_note(name, denoisers[name], patch.config))
    notes += tuple(
        filter(None, map(tuned_words, {next(denoiser.parameters()).device for denoiser in denoisers.values()}))
    )
    cache = tuple(row for name, patch in patches.items() if (row := _cache(name, patch, reset)) is not None)
    vae, more = _vae(target, reset)
    begun = since.isoformat(timespec="seconds")
    split = tuple(filter(None, ranks))
    return Summary(config.to_dict(), rows, grids, skipped, notes + more, vae, cache, split, begun, tuple(heads))


def _cache(name: str, patch: Patch, reset: bool) -> CacheRow | None:
    """What a patch's step cache reused."""
    if patch.cache is None:
        return None
    cache, counts = patch.cache.cache, patch.cache.counts
    row = CacheRow(
        name, str(cache), counts.forwards, counts.reused, counts.modules, counts.skipped, cache.skips, counts.ratios
    )
    if reset:
        counts.restart()
    return row


def _vae(target: Any, reset: bool) -> tuple[tuple[VaeRow, ...], tuple[str, ...]]:
    """What a patched VAE's calls did, and which of its modules stay stock."""
    patch = patch_on(vae_of(target))
    if patch is None:
        return (), ()
    with patch.lock:
        rows = [VaeRow(kind.what, calls, kind.fused, kind.reason) for kind, calls in patch.calls.items()]
        if reset:
            patch.calls.clear()
    left = tuple(f"vae.{name} runs stock code: {reason}" for name, reason in patch.left_alone.items())
    return tuple(sorted(rows, key=lambda row: (row.part, row.reason))), left
