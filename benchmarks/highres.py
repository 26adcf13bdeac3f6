"""A step past the training size: dense, FreeSwim as published, and ours. Real architecture, random weights.

    python -m benchmarks.highres --size 1.3B-1080p

A step is two forwards, of the prompt and the negative prompt, or one where guidance is an input. What differs from step to step
(refresh or reuse) is timed by kind and averaged as a run of k steps has it:  step(k) = (refresh + (k − 1) · reuse) / k, over the
step's forwards. Where the whole model would take too long, ``layers`` of its blocks run, and the rest is added by what a block
takes:  forward(L) = forward(l) + (L − l) · (forward(l) − forward(l/2)) / (l/2).

"cache on the host" is ``cache_bytes=0``: all that is kept between refreshes lies in pinned host memory.
"""

from __future__ import annotations

import contextlib
import gc
import json
import math
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch.nn.attention import sdpa_kernel

import tilewise
from benchmarks import results
from benchmarks.families import CUDNN_FIRST
from benchmarks.freeswim import REFRESH, REUSE, WINDOW, FreeSwim, raster_mask
from benchmarks.header import header
from benchmarks.highres_sizes import SIZES, Size
from benchmarks.layers import fewest, first_layers
from benchmarks.peers import reason
from tilewise.kernels.plans.layout import Grid
from tilewise.plugins.guidance.dual_path import two_paths
from tilewise.plugins.methods.inward import Inward
from tilewise.plugins.models.common.registry import streams_of

EVERY = (1, 2, 5)  # steps from one refresh to the next
CUDNN = "_native_cudnn"


@dataclass(frozen=True)
class Way:
    """One of ours: the full path's attention, the precision of the products of all attention that is not dense, and whether the
    cache is kept in host memory."""

    global_path: Any = "dense"
    precision: str | None = None
    on_host: bool = False

    @property
    def label(self) -> str:
        words = [] if self.global_path == "dense" else [self.global_path]
        words += [self.precision] if self.precision else []
        return ", ".join(["ours", *words, *(["cache on the host"] if self.on_host else [])])

    @property
    def window(self) -> str:
        """The forward without a full path."""
        return f"{Way(precision=self.precision).label} {WINDOW}"


WAYS = [Way(path, precision) for precision in (None, "int8") for path in ("dense", "pooled", "draft")]
WAYS.insert(1, Way(on_host=True))


class Bench:
    """One size: its inputs, and forwards timed at two depths."""

    def __init__(self, size: Size, device: torch.device, runs: int) -> None:
        self.size, self.device, self.runs = size, device, runs
        self.model, self.inputs = size.prepared(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
        streams = streams_of(self.model)
        assert streams is not None
        self.joint = streams.joint
        self.forwards: dict[str, dict[str, float]] = {}
        self.missing: dict[str, str] = {}

    def forward(self) -> None:
        self.model(**self.inputs, return_dict=False)

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def time(
        self,
        names: list[str],
        forward: Callable[[], Any],
        around: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
        pin: bool = False,
    ) -> None:
        """Seconds of a forward at the model's depth: measured, or from runs at ``layers`` and half of them.

        names: of forwards that take turns. around: entered at each depth, as patches hold on to the blocks. pin: the first turn
        pins host memory, and is not timed.
        """
        size, whole = self.size, self.size.layers >= self.size.whole
        few, many = (fewest(self.model) if whole else size.layers // 2), size.layers
        seconds: list[dict[str, float]] = []
        for last, count in ((False, few), (True, many)):
            warms_up = pin or not last
            timed = self.runs if last or not whole else 0
            with first_layers(self.model, count), around():
                turns = [[self._seconds(forward) for _ in names] for _ in range(warms_up + timed)][warms_up:]
            if turns:
                seconds.append({name: min(times) for name, times in zip(names, zip(*turns, strict=True), strict=True)})
        for name, measured in seconds[-1].items():
            found = {"seconds": measured, "measured": measured}
            if not whole:
                found["a block"] = (measured - seconds[0][name]) / (many - few)
                found["seconds"] += (size.whole - many) * found["a block"]
            self.forwards[name] = found
            told = f"{many} of {size.whole} layers in {measured:.3f} s"
            print(f"  {name}: {found['seconds']:.3f} s a forward ({told})", flush=True)

    def _seconds(self, forward: Callable[[], Any]) -> float:
        self.synchronize()
        start = time.perf_counter()
        forward()
        self.synchronize()
        return time.perf_counter() - start

    def variant(self, name: str, run: Callable[[], None]) -> float | None:
        """Run a measurement; its peak memory in GiB. What fails is kept, by name."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
        try:
            with torch.no_grad():
                run()
        except Exception as error:
            self.missing[name] = reason(error)
            print(f"  not run: {name}: {self.missing[name]}", flush=True)
            return None
        return torch.cuda.max_memory_allocated(self.device) / 2**30 if self.device.type == "cuda" else None


def _stock(bench: Bench, backend: str) -> None:
    if not bench.size.is_wan and backend == CUDNN:  # around the call: some processors ask for no backend of diffusers'
        with sdpa_kernel(CUDNN_FIRST, set_priority=True):
            return bench.time(["stock dense"], bench.forward)
    bench.model.set_attention_backend(backend)
    try:
        bench.time(["stock dense"], bench.forward)
    finally:
        bench.model.reset_attention_backend()


def _freeswim(bench: Bench, compiled: bool) -> None:
    mask = raster_mask(Grid(*bench.size.tokens), bench.size.native, bench.device)
    paths = FreeSwim(bench.model, mask, bench.size.native, compiled)
    try:
        for mode in (REFRESH, REUSE, WINDOW):
            paths.mode = mode
            bench.time([f"FreeSwim {mode}"], lambda: paths.forward(*bench.inputs.values()))
    finally:
        paths.remove()


def _ours(bench: Bench, way: Way) -> None:
    """A refresh, a reuse, and the window alone."""
    method = Inward(native=bench.size.native)

    def window() -> Any:
        return tilewise.patched(bench.model, method, steps=(0, 1), strict=True, precision=way.precision)

    @contextlib.contextmanager
    def paths() -> Iterator[None]:
        budget = 0 if way.on_host else None
        with window(), two_paths(bench.model, refresh=2, global_path=way.global_path, cache_bytes=budget):
            yield

    bench.time([f"{way.label} {REFRESH}", f"{way.label} {REUSE}"], bench.forward, paths, way.on_host)
    if way.window not in bench.forwards:
        bench.time([way.window], bench.forward, window)


def steps_of(forwards: dict[str, dict[str, float]], each: int = 2) -> list[dict[str, Any]]:
    """Seconds of a step of so many forwards each, averaged over k of them, for what was measured."""
    at = {name: found["seconds"] for name, found in forwards.items()}
    rows: list[dict[str, Any]] = []
    if "stock dense" in at:
        rows.append({"name": "stock dense", "k": None, "seconds": each * at["stock dense"]})

    def average(first: float, later: float, k: int) -> float:
        return (first + (k - 1) * later) / k

    rows += [
        {"name": f"{way.label}, window alone", "k": None, "seconds": each * at[way.window]}
        for way in dict.fromkeys(Way(precision=way.precision) for way in WAYS)
        if way.window in at
    ]
    for name, alone in (("FreeSwim", f"FreeSwim {WINDOW}"), *((way.label, way.window) for way in WAYS)):
        parts = [at.get(f"{name} {kind}") for kind in (REFRESH, REUSE)]
        window = at.get(alone)
        if None in parts or window is None:
            continue
        refresh, reuse = parts
        assert refresh is not None
        assert reuse is not None
        for k in EVERY:
            guided = average(refresh, reuse, k)
            if each == 1:
                rows.append({"name": f"{name}, guided", "k": k, "seconds": guided})
                continue
            if name != "FreeSwim" or k == 1:  # its cached code guides the prompt's forward alone
                rows.append({"name": f"{name}, both guided", "k": k, "seconds": 2 * guided})
            rows.append({"name": f"{name}, prompt guided", "k": k, "seconds": guided + window})
    return rows


def run(
    size: Size, device: torch.device, runs: int, backend: str, peers: tuple[str, ...], compiled: bool, ways: str
) -> Iterator[dict[str, Any]]:
    """Everything of one size, or of ours the ways in whose label ``ways`` is found: what there is after each variant."""
    bench = Bench(size, device, runs)
    variants: dict[str, Callable[[], None]] = {}
    if "stock" in peers:
        variants["stock dense"] = lambda: _stock(bench, backend)
    if "FreeSwim" in peers and size.is_wan:
        variants["FreeSwim"] = lambda: _freeswim(bench, compiled)
    for way in WAYS if device.type == "cuda" else [way for way in WAYS if way.precision is None]:
        if re.search(ways, way.label) and (way.global_path == "dense" or not bench.joint):
            variants[way.label] = lambda way=way: _ours(bench, way)  # type: ignore[misc]
    peak: dict[str, float | None] = {}
    for name, measured in variants.items():
        peak[name] = bench.variant(name, measured)
        yield _result(bench, peak)


def _result(bench: Bench, peak: dict[str, float | None]) -> dict[str, Any]:
    size = bench.size
    weights = sum(p.numel() * p.element_size() for p in bench.model.parameters()) / 2**30
    config = bench.model.config
    numbers = config.num_attention_heads * (config.attention_head_dim + (2 if bench.joint else 0))  # of 16 bits
    cache = math.prod(size.tokens) * numbers * 2 / 2**30
    return {
        "name": size.name, "grid": list(size.tokens), "native": list(size.native), "layers": size.whole,
        "layers_run": size.layers, "forwards_a_step": size.forwards, "forwards": bench.forwards,
        "steps": compared(bench.forwards, size.forwards), "peak_gib": peak,
        "weights_gib": weights, "cache_gib_a_layer": cache, "missing": bench.missing,
        "order": list(SIZES.values()).index(size),
    }  # fmt: skip


def compared(forwards: dict[str, dict[str, float]], each: int = 2) -> list[dict[str, Any]]:
    """``steps_of``, beside dense and beside FreeSwim."""
    rows = steps_of(forwards, each)
    named = {(row["name"], row["k"]): row["seconds"] for row in rows}
    for row in rows:
        for name, key in (
            ("over dense", ("stock dense", None)),
            ("over FreeSwim", ("FreeSwim, prompt guided", row["k"])),
        ):
            row[name] = named[key] / row["seconds"] if key in named else None
    return rows


def joined(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """A row with what an earlier run of the same layers measured and this one did not."""
    forwards = {**old["forwards"], **new["forwards"]}
    missing = {name: why for name, why in old["missing"].items() if name not in new["peak_gib"]} | new["missing"]
    both = {"peak_gib": {**old["peak_gib"], **new["peak_gib"]}, "missing": missing}
    return {**new, **both, "forwards": forwards, "steps": compared(forwards, new["forwards_a_step"])}


def table(result: dict[str, Any]) -> str:
    depth = f"{result['layers_run']} of {result['layers']} layers measured"
    forwards = f"{result['forwards_a_step']} forward{'s' * (result['forwards_a_step'] > 1)}"
    lines = [f"{result['name']}, {depth}; seconds a step ({forwards}). FreeSwim: cached, at the same k"]
    for row in result["steps"]:
        k = "" if row["k"] is None else f" k={row['k']}"
        over = [
            f"{row[key]:5.2f} × {what}"
            for key, what in (("over dense", "dense"), ("over FreeSwim", "FreeSwim"))
            if row[key]
        ]
        lines.append(f"  {row['name'] + k:34} {row['seconds']:8.2f} s   {'   '.join(over)}")
    peaks = ", ".join(f"{name} {gib:.1f}" for name, gib in result["peak_gib"].items() if gib is not None)
    lines.append(
        f"  peak GiB of the layers run: {peaks}; cache a layer and guided text {result['cache_gib_a_layer']:.3f}"
    )
    lines += [f"  not run: {name}: {why}" for name, why in result["missing"].items()]
    return "\n".join(lines)


def main(
    size: Annotated[str, typer.Option(help="comma-separated: " + ", ".join(SIZES))] = "1.3B-1080p",
    device: Annotated[str, typer.Option(help="cuda or cpu; default: cuda if there is one")] = "",
    layers: Annotated[int, typer.Option(help="how many layers to run; default: the size's own")] = 0,
    runs: Annotated[int, typer.Option(help="timed forwards of each kind and depth")] = 1,
    backend: Annotated[str, typer.Option(help="diffusers' attention backend of the stock forward")] = CUDNN,
    peers: Annotated[bool, typer.Option(help="stock dense and FreeSwim too")] = True,
    freeswim: Annotated[bool, typer.Option(help="of these, FreeSwim")] = True,
    ways: Annotated[str, typer.Option(help="regular expression: of ours, only those in whose label it is found")] = "",
    eager: Annotated[bool, typer.Option("--eager", help="FlexAttention as separate operations (for tests)")] = False,
    out: Annotated[Path | None, typer.Option(help="folder of result files; default: nothing is written")] = None,
) -> None:
    """Measure steps at sizes past the training one."""
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    for name in size.split(","):
        if name not in SIZES:
            raise typer.BadParameter(f"unknown size {name!r}; there are {', '.join(SIZES)}")
        chosen = SIZES[name]
        if layers and not chosen.is_wan:
            raise typer.BadParameter(f"--layers is for Wan's sizes, not {name}")
        if layers:
            pixels = chosen.pixels if layers in (chosen.layers, chosen.whole) else f"{chosen.pixels}, {layers} layers"
            chosen = replace(chosen, pixels=pixels, layers=layers)
            SIZES[name] = chosen
        result: dict[str, Any] = {}
        others = (("stock", "FreeSwim") if freeswim else ("stock",)) if peers else ()
        kind = backend if where.type == "cuda" else "native"
        for result in run(chosen, where, runs, kind, others, not eager, ways):
            if out is not None:
                _write(result, where, out, name)
        if not result:
            raise typer.BadParameter(f"nothing to measure: no way has {ways!r} in its label")
        print(table(result), flush=True)


def _write(row: dict[str, Any], device: torch.device, out: Path, size: str) -> Path:
    result = header(device, "benchmarks.highres", sys.argv[1:], size.startswith("tiny"))
    path = results.path_of(result, out)
    if path.exists():
        there = json.loads(path.read_text(encoding="utf-8"))["sections"].get("highres", [])
        same = [old for old in there if old["name"] == row["name"] and old["layers_run"] == row["layers_run"]]
        row = joined(same[0], row) if same else row
    return results.write({**result, "sections": {"highres": [json.loads(json.dumps(row))]}}, out)


if __name__ == "__main__":
    typer.run(main)
