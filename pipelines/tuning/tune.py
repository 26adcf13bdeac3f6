"""Times the backends, tiles and methods that run on a device, against PyTorch's own attention on the same tensors.

For each shape, with plans of whole blocks (windows of tiles) and with partial ones (windows of tokens):

    backend   every one that takes the call; a portable kernel with each tile of its chip; those in 8 bits for comparison
    method    the whole call of a method: tokens reordered, planned, run, put back. From the shape downwards, until it is not
              faster than stock: the shortest call that was is what ``min_tokens`` becomes

What differs from the first result by more than rounding is told as wrong, and never chosen.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from tilewise.kernels.attention import tuned
from tilewise.kernels.attention.backends.tiles import TILES, Tile, no_tile, tiles_of, width_of
from tilewise.kernels.attention.dispatch import BACKENDS, available_backends, block_sparse_attention
from tilewise.kernels.attention.dispatch_8bit import (
    block_sparse_attention_8bit,
    takes_hopper_8bit,
    unavailable_8bit,
    unsupported_8bit,
)
from tilewise.kernels.attention.tuned import TunedKernels
from tilewise.kernels.chips import chip_of
from tilewise.kernels.errors import UnsupportedPlanError
from tilewise.kernels.fused.reorder import reorder_tokens
from tilewise.kernels.plans.block_plan import BlockPlan
from tilewise.kernels.plans.layout import Layout, cached_layout
from tilewise.kernels.plans.tiling import choose_tile_for_window
from tilewise.kernels.plans.window import window_plan
from tilewise.pipelines.tuning.shapes import Shape
from tilewise.pipelines.tuning.timing import Timing, measure
from tilewise.plugins.config import Config
from tilewise.plugins.errors import ConfigError
from tilewise.plugins.methods.base import DynamicMethod, Planned
from tilewise.plugins.methods.sta import STA
from tilewise.plugins.runtime.sparse_call import QKV, choose, reordered, run_planned
from tilewise.plugins.tuning.record import Tuned, chip_title, device_title, versions_here

TOLERANCE = 2e-2  # relative, between two results in 16 bits
TOLERANCE_8BIT = 6e-2  # from one in 8 bits, whose own error is about 2 %
Tell = Callable[[str], None]


@dataclass(frozen=True)
class Row:
    """One thing that was timed.

    Attributes:
        what: "stock", "backend", "tile" or "method". name: which. plan: "whole", "partial" or "" where there is none.
        ms: median. spread: see ``Timing``. stock_ms: of PyTorch on the same tensors. wrong: why it may not be chosen; "": it may.
    """

    what: str
    name: str
    shape: str
    tokens: int
    plan: str
    ms: float
    spread: float
    stock_ms: float
    wrong: str = ""

    @property
    def over_stock(self) -> float:
        """How many times as fast as stock."""
        return self.stock_ms / self.ms


@dataclass(frozen=True)
class Variant:
    """A way to run a plan. table: the kernel in the table of tiles; tile: of it. exact: in 16 bits or more."""

    name: str
    run: Callable[[], Any]
    table: str = ""
    tile: Tile | None = None
    exact: bool = True


@dataclass(frozen=True)
class Findings:
    """rows: everything that was timed. tuned: what follows from it. notes: what was not timed, and why."""

    rows: list[Row]
    tuned: Tuned
    notes: list[str]


def nothing_runs(device: torch.device) -> str | None:
    """Why nothing of ours runs on a device, so that there is nothing to tune; or None."""
    rows = available_backends(device)
    if any(usable for _, usable, _ in rows):
        return None
    return "; ".join(f"{name}: {why}" for name, _, why in rows if name != "torch")


def tune(
    shapes: list[Shape], configs: list[Config], device: torch.device, dtype: torch.dtype, seconds: float, tell: Tell
) -> Findings:
    """Time everything that runs. Kernels run by what was chosen so far while this lasts, and by nothing tuned before.

    Args:
        configs: methods with their options; each is timed with ``min_tokens`` of 0.
        seconds: about how long one thing is run.
        tell: is told what is timed now.
    """
    before = tuned.use({})
    try:
        bench = _Bench(device, dtype, seconds, tell)
        for shape in shapes:
            bench.backends(shape)
        found = {config.method.name: bench.pays_from(config, shapes) for config in configs}
        least = {name: tokens for name, tokens in found.items() if tokens is not None}
    finally:
        tuned.use(before)
    # Of calls as long as was asked for, and of kernels alone: short calls and planning take the host's time, which varies.
    asked = set(map(str, shapes))
    spread = max((row.spread for row in bench.rows if row.shape in asked and row.what != "method"), default=0.0)
    made = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    record = Tuned(
        device_title(device), chip_title(device), versions_here(), TunedKernels(bench.tiles, bench.order), least, made,
        spread, [dataclasses.asdict(row) for row in bench.rows],
    )  # fmt: skip
    return Findings(bench.rows, record, bench.notes)


class _Bench:
    def __init__(self, device: torch.device, dtype: torch.dtype, seconds: float, tell: Tell) -> None:
        self.device, self.dtype, self.seconds, self.tell = device, dtype, seconds, tell
        self.rows: list[Row] = []
        self.notes: list[str] = []
        self.tiles: dict[tuple[str, int, bool], tuple[int, int, int, int]] = {}
        self.order: dict[tuple[int, bool], tuple[str, ...]] = {}

    def backends(self, shape: Shape) -> None:
        """Each backend on a plan of whole blocks, and on one with partial blocks."""
        qkv, stock = self._stock(shape)
        for partial, plan in _plans(shape, self.device):
            kind = "partial" if partial else "whole"
            first: torch.Tensor | None = None
            best: dict[str, float] = {}
            for variant in self._variants(qkv, shape, partial, plan):
                key = (variant.table, width_of(shape.head_dim), partial)
                if variant.tile is not None:
                    self._use({**self.tiles, key: variant.tile[:4]})
                title = variant.name if variant.tile is None else f"{variant.name}, {variant.tile}"
                tolerance = TOLERANCE if variant.exact else TOLERANCE_8BIT
                out, timing, wrong = self._timed(variant.run, f"{title} on {shape}, {kind} blocks", first, tolerance)
                if timing is None:
                    continue
                first = out if first is None else first
                self._row("backend" if variant.tile is None else "tile", title, shape, kind, timing, stock, wrong)
                if not wrong and timing.median < best.get(variant.name, float("inf")):
                    best[variant.name] = timing.median
                    if variant.tile is not None:
                        self.tiles[key] = variant.tile[:4]
            self._use(self.tiles)
            exact = [name for name in best if name in {backend.name for backend in BACKENDS}]
            if len(exact) > 1:
                self.order[shape.head_dim, partial] = tuple(sorted(exact, key=best.__getitem__))

    def pays_from(self, config: Config, shapes: list[Shape]) -> int | None:
        """From how many tokens on a method's call is faster than stock, over all shapes: one more than the longest if none is.
        None: it takes none of them."""
        least = None
        for shape in shapes:
            pays = None
            for shorter in shape.shorter():
                faster = self._method(config, shorter)
                if faster is False and pays is None:
                    pays = shape.grid.tokens + 1
                if not faster:
                    break
                pays = shorter.grid.tokens
            least = pays if least is None else max(least, pays or 0)
        return least

    def _method(self, config: Config, shape: Shape) -> bool | None:
        """Whether a method's call is faster than stock; None: it does not take the shape, or leaves it dense."""
        qkv, stock = self._stock(shape)
        try:
            run = method_call(config, shape, *qkv)
        except (ConfigError, UnsupportedPlanError) as error:
            self.notes.append(f"{config.method.name} does not take {shape}: {error}")
            return None
        if run is None:
            self.notes.append(f"{config.method.name} leaves {shape} dense")
            return None
        _, timing, _ = self._timed(run, f"{config.method.name} on {shape}", None)
        if timing is None:
            return None
        return self._row("method", config.method.name, shape, "", timing, stock).over_stock > 1

    def _stock(self, shape: Shape) -> tuple[QKV, Timing]:
        """Random tensors of a call, (1, S, H, D) each, and PyTorch's time for them."""
        generator = torch.Generator(self.device).manual_seed(0)
        size = (1, shape.grid.tokens, shape.heads, shape.head_dim)
        q, k, v = (torch.randn(size, generator=generator, device=self.device, dtype=self.dtype) for _ in range(3))

        def run() -> torch.Tensor:
            query, key, value = (x.transpose(1, 2) for x in (q, k, v))
            return F.scaled_dot_product_attention(query, key, value).transpose(1, 2)

        known = next((row for row in self.rows if (row.what, row.shape) == ("stock", str(shape))), None)
        if known is not None:
            return (q, k, v), Timing(known.ms, known.ms, known.ms, 1, known.spread)
        self.tell(f"stock attention on {shape}")
        timing = measure(run, self.device, seconds=self.seconds)
        self._row("stock", "PyTorch", shape, "", timing, timing)
        return (q, k, v), timing

    def _variants(self, qkv: QKV, shape: Shape, partial: bool, plan: BlockPlan) -> Iterator[Variant]:
        """All that takes a call: backends, and then the kernels in 8 bits, which are chosen by ``precision`` and not by speed."""
        for backend in BACKENDS:
            if backend.unavailable(self.device):
                continue
            if why := backend.unsupported(*qkv, plan):
                self.notes.append(f"{backend.name} does not take {shape}: {why}")
                continue
            run = functools.partial(block_sparse_attention, *qkv, plan, backend=backend.name)
            yield from self._with_tiles(Variant(backend.name, run, backend.name), shape, partial)
        if self.device.type == "cpu" or unavailable_8bit(self.device, "int8") or unsupported_8bit(qkv[0], plan):
            return  # a CPU computes 8 bits naively
        for name, table in (("gluon", ""), ("triton", "triton-8bit")):
            if name == "gluon" and takes_hopper_8bit(qkv[0], qkv[1], plan):
                continue
            small: Callable[..., Any] = functools.partial(block_sparse_attention_8bit, *qkv, plan, backend=name)
            yield from self._with_tiles(Variant(f"int8, {name}", small, table, exact=False), shape, partial)

    def _with_tiles(self, variant: Variant, shape: Shape, partial: bool) -> Iterator[Variant]:
        """A variant with each tile that the chip's table has for it; as it is, where it has no table."""
        chip = chip_of(self.device)
        if variant.table not in TILES or self.dtype == torch.float32 or no_tile(variant.table, chip, shape.head_dim):
            yield variant
            return
        for tile in tiles_of(variant.table, chip, shape.head_dim, partial):
            yield dataclasses.replace(variant, tile=tile)

    def _use(self, tiles: dict[tuple[str, int, bool], tuple[int, int, int, int]]) -> None:
        tuned.use({tuned.device_key(self.device): (chip_title(self.device), TunedKernels(tiles, self.order))})

    def _timed(
        self,
        run: Callable[[], torch.Tensor],
        what: str,
        first: torch.Tensor | None,
        tolerance: float = TOLERANCE,
    ) -> tuple[torch.Tensor | None, Timing | None, str]:
        """One result, its time, and what is wrong with it; a call that fails is told and has no time."""
        self.tell(what)
        try:
            out = run()
            timing = measure(run, self.device, seconds=self.seconds)
        except Exception as error:  # of other people's kernels too, and out of memory: a fact about this call
            self.notes.append(f"{what} failed: {str(error).splitlines()[0] if str(error) else type(error).__name__}")
            return None, None, ""
        if first is None:
            return out, timing, ""
        error_ = float((out.float() - first.float()).norm() / first.float().norm())
        return out, timing, "" if error_ < tolerance else f"differs by {error_:.1%}"

    def _row(
        self, what: str, name: str, shape: Shape, plan: str, timing: Timing, stock: Timing, wrong: str = ""
    ) -> Row:
        row = Row(what, name, str(shape), shape.grid.tokens, plan, timing.median, timing.spread, stock.median, wrong)
        self.rows.append(row)
        return row


def _plans(shape: Shape, device: torch.device) -> Iterator[tuple[bool, BlockPlan]]:
    """(whether it has partial blocks, plan): windows of 3 tiles an axis, and of half the frame's tokens."""
    sta = STA()
    yield False, sta.plan(sta.layout(shape.grid), shape.heads, device)
    window = (shape.grid.t, max(1, shape.grid.h // 2), max(1, shape.grid.w // 2))
    layout: Layout = cached_layout(shape.grid, choose_tile_for_window(shape.grid, window))
    plan = window_plan(layout, [window], unit="token", device=device)
    if plan.row_encoding is not None:
        yield True, plan


def method_call(
    config: Config, shape: Shape, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> Callable[[], torch.Tensor] | None:
    """A method's whole call as a patched layer makes it: tokens into its order, the plan, attention, and back. None: it is dense.

    Raises:
        ConfigError: the method does not take the shape. UnsupportedPlanError: no kernel does.
    """
    method, device = config.method, q.device
    layout = method.layout(config.kept(shape.grid))
    if layout is None:
        return None
    scale = method.scale(layout, shape.head_dim)
    scale = shape.head_dim**-0.5 if scale is None else scale
    there, back = layout.permutation.to(device), layout.inverse.to(device)
    if isinstance(method, DynamicMethod):
        if why := method.refuses_call(layout):
            raise ConfigError(why)
        fixed = None
    else:
        fixed = Planned(method.plan(layout, shape.heads, device))
        choose((q, k, v), fixed.plan, None)
    tick, memory = 0, dict[str, Any]()

    def run() -> torch.Tensor:
        nonlocal tick
        tick += 1
        qkv = reordered((q, k, v), there)
        planned: Any = fixed
        if planned is None:
            assert isinstance(method, DynamicMethod)
            planned = method.plan_call(layout, *qkv, scale, memory, tick)
        choice, _ = choose(qkv, planned.plan, config.precision)
        return reorder_tokens([run_planned(qkv, planned, choice, layout, scale)], back)[0]

    return run
