"""One denoiser forward on one GPU and split over several: ``torchrun --nproc-per-node 2 -m benchmarks.context_parallel``.

Real architectures with some of their layers, random weights, the sizes of real calls. Every variant runs on one GPU (each rank by
itself, all at the same time) and then split, in the same process: stock diffusers with cuDNN's attention, by diffusers' own
Ulysses, and the patched denoiser, dense and with a method. A forward takes as long as its slowest rank.

Works with guidance run both branches of a step, one after the other on one GPU, and then by CFG parallelism, one in each half of
the processes.

    speed-up     one GPU ÷ split, the same variant
    balance      seconds in attention of the slowest rank ÷ the mean of all
    peak         most memory of a forward, weights included: of one GPU, and of each rank; all of it in rows of whole models
    exchange     seconds in exchanges ÷ seconds of the forward, of the rank with the most; waiting for the others included
    error        ‖split − one GPU‖ ÷ ‖one GPU‖
"""

from __future__ import annotations

import contextlib
import gc
import json
import math
import os
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any
from unittest import mock

import torch
import torch.distributed as dist
import typer

import tilewise
from benchmarks import family_inputs, render, results, step
from benchmarks.header import header
from benchmarks.layers import shortened
from benchmarks.peers import reason
from tilewise.plugins.context_parallel import head_dealing
from tilewise.plugins.context_parallel.ways import CFG, CONTEXT, token_parts
from tilewise.plugins.diffusers_compat import context_parallel
from tilewise.plugins.models.common.registry import attention_layers

SECTION = "context parallel"
STOCK = "stock, cuDNN"
METHODS: dict[str, Any] = {
    "tilewise, dense": "dense",
    "tilewise, STA window (3,3,3)": tilewise.STA(),
    "tilewise, draft density 0.25": tilewise.Draft(density=0.25, min_tokens=0),
    "tilewise, draft recall 0.9": tilewise.Draft(recall=0.9, min_tokens=0),
    "tilewise, draft recall 0.9, heads in order": tilewise.Draft(recall=0.9, min_tokens=0),
}
USUAL = "stock|dense|STA|density"
EXACT = (
    STOCK,
    "tilewise, dense",
    "tilewise, STA window (3,3,3)",
)  # a draft may choose otherwise where scores are all but equal
GUIDANCE = 5.0
WRONG = {torch.bfloat16: 0.05, torch.float32: 1e-4}  # a larger error is no rounding


@dataclass(frozen=True)
class Work:
    """A row: a Wan config with some of its layers, or a work of ``family_inputs``; and latent frames, height and width.

    guided: a step with both branches of guidance, by CFG parallelism. whole: all layers, for its memory: one timed forward. only:
    the variants in whose name it is found. unequal: the first heads attend to little and the last ones to much.
    """

    name: str
    model: str
    layers: int
    latents: tuple[int, int, int] = (0, 0, 0)
    config: dict[str, Any] = field(default_factory=dict)
    tiny: bool = False
    guided: bool = False
    whole: bool = False
    only: str = USUAL
    unequal: bool = False

    @property
    def of_family(self) -> family_inputs.Work | None:
        works = family_inputs.TINY if self.tiny else family_inputs.WORKS
        return next((work for work in works if work.name == self.model), None)


HD, FULL_HD = (21, 90, 160), (21, 136, 240)  # 720 × 1280 and 1080 × 1920 pixels, 81 frames
WORKS = [
    Work("Wan2.1-1.3B 720×1280×81", "Wan2.1-1.3B", 10, HD),
    Work("Wan2.1-1.3B 1080×1920×81", "Wan2.1-1.3B", 4, FULL_HD),
    Work("Wan2.1-14B 720×1280×81", "Wan2.1-14B", 4, HD),
    Work("Wan2.1-14B 1080×1920×81", "Wan2.1-14B", 2, FULL_HD),
    Work("HunyuanVideo 768×1280×117", "HunyuanVideo 117×768×1280", 0),
    Work("Wan2.1-1.3B 720×1280×81, guidance", "Wan2.1-1.3B", 10, HD, guided=True),
    Work("Wan2.1-14B 720×1280×81, guidance", "Wan2.1-14B", 4, HD, guided=True),
    Work("Wan2.1-14B 720×1280×81, unequal heads", "Wan2.1-14B", 2, HD, only="recall", unequal=True),
    Work("Wan2.1-1.3B 720×1280×81, whole", "Wan2.1-1.3B", 30, HD, whole=True, only="dense|STA"),
    Work("Wan2.1-14B 720×1280×81, whole", "Wan2.1-14B", 40, HD, whole=True, only="dense|STA"),
    Work("Wan2.1-14B 1080×1920×81, whole", "Wan2.1-14B", 40, FULL_HD, whole=True, only="STA"),
]
TINY = [
    Work("tiny Wan", "tiny", 2, (5, 14, 16), {"num_attention_heads": 3}, tiny=True),
    Work("tiny HunyuanVideo", "tiny HunyuanVideo 117×768×1280", 0, tiny=True),
    Work("tiny Wan, guidance", "tiny", 2, (5, 14, 16), {"num_attention_heads": 3}, tiny=True, guided=True),
    Work(
        "tiny Wan, unequal heads", "tiny", 2, (5, 14, 16), {"num_attention_heads": 4}, True, only="recall", unequal=True
    ),
    Work("tiny Wan, whole", "tiny", 3, (5, 14, 16), {"num_attention_heads": 3}, tiny=True, whole=True, only="STA"),
]


class Ranks:
    """The processes: this one's device, and what all of them say."""

    def __init__(self) -> None:
        cuda = torch.cuda.is_available()
        self.device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
        if cuda:
            torch.cuda.set_device(self.device)
        dist.init_process_group("nccl" if cuda else "gloo", **({"device_id": self.device} if cuda else {}))
        self.rank, self.count = dist.get_rank(), dist.get_world_size()

    def all(self, value: Any) -> list[Any]:
        found: list[Any] = [None] * self.count
        dist.all_gather_object(found, value)
        return found

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def timed(self, run: Callable[[], Any], runs: int) -> tuple[list[float], Any]:
        """Milliseconds of each run, of the slowest rank, and the last result. All ranks begin together."""
        took, out = [], None
        for _ in range(runs):
            out = None
            self.synchronize()
            dist.barrier()
            begin = time.perf_counter()
            out = run()
            self.synchronize()
            took.append((time.perf_counter() - begin) * 1e3)
        return [max(each) for each in zip(*self.all(took), strict=True)], out


class Bench:
    """One row: a model on this rank's device, and what was measured."""

    def __init__(self, work: Work, ranks: Ranks, runs: int) -> None:
        self.work, self.ranks, self.runs = work, ranks, 1 if work.whole else runs
        self.dtype = torch.bfloat16 if ranks.device.type == "cuda" else torch.float32
        self.model, self.inputs, self.layers = built(work, ranks.device, self.dtype)
        self.alone: dict[str, Any] = {}  # name → output
        self.variants: dict[str, dict[str, Any]] = {}
        self.missing: dict[str, str] = {}
        self.wrong: list[str] = []

    def forward(self) -> torch.Tensor:
        with torch.no_grad():
            first = self.model(**self.inputs, return_dict=False)[0]
            if not self.work.guided:
                return first
            prompt = self.inputs["encoder_hidden_states"]
            second = self.model(**{**self.inputs, "encoder_hidden_states": -prompt}, return_dict=False)[0]
            return second + GUIDANCE * (first - second)

    @contextlib.contextmanager
    def stock(self) -> Iterator[None]:
        """cuDNN's attention; split, diffusers' Ulysses as fast as it is: for lengths that divide it needs no sizes of others."""
        if self.ranks.device.type == "cuda":
            self.model.set_attention_backend("_native_cudnn")
        config = getattr(self.model._parallel_config, "context_parallel_config", None)
        if config is not None:
            config.ulysses_anything = any(n % self.ranks.count for n in self.lengths())
        try:
            yield
        finally:
            if self.ranks.device.type == "cuda":
                self.model.set_attention_backend("native")
            if config is not None:
                config.ulysses_anything = True

    def lengths(self) -> list[int]:
        """What the ranks have to divide: tokens of the picture, and heads."""
        config = self.model.config
        patch = config.patch_size if isinstance(config.patch_size, tuple | list) else [config.patch_size] * 3
        shape = self.inputs["hidden_states"].shape[2:]
        return [math.prod(n // p for n, p in zip(shape, patch, strict=True)), config.num_attention_heads]

    def variant(self, name: str, context: Callable[[], Any], split: bool) -> None:
        """Warm up and time within ``context()``. What fails on any rank is kept, by name."""
        ranks, label = self.ranks, f"{name}, {'split' if split else 'one GPU'}"
        facts: dict[str, Any] = {}
        out, why = None, ""
        try:
            with context():
                with shortened(self.model, lambda n: min(n, 1)):
                    self.forward()
                if not self.work.whole:
                    self.forward()
                if tilewise.is_patched(self.model):
                    tilewise.summary(self.model, reset=True)
                if ranks.device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats(ranks.device)
                took, out = ranks.timed(self.forward, self.runs)
                facts = {"ms": statistics.median(took), "ms_min": min(took), "ms_max": max(took), "runs": len(took)}
                facts |= self.facts_of_ranks(facts["ms"])
        except Exception as error:
            why = reason(error)
        if failed := next(filter(None, ranks.all(why)), ""):
            self.missing[label] = failed
            return
        assert out is not None
        of = self.variants.setdefault(name, {"name": name})
        of["split" if split else "one"] = facts
        if not split:
            self.alone[name] = out
            return
        want = self.alone.get(name)
        if want is not None:
            error = float((out.float() - want.float()).norm() / want.float().norm())
            of["error"] = max(ranks.all(error))
            of["speed_up"] = of["one"]["ms"] / facts["ms"]
            if name in EXACT and not of["error"] <= WRONG[self.dtype]:
                self.wrong.append(f"{name}: error {of['error']:.3g}")

    def facts_of_ranks(self, ms: float) -> dict[str, Any]:
        """Peak memory of each rank, and for a patched denoiser its density, balance and share of exchanges."""
        cuda = self.ranks.device.type == "cuda"
        peak = torch.cuda.max_memory_allocated(self.ranks.device) / 2**30 if cuda else 0.0
        peaks = self.ranks.all(round(peak, 3))
        found: dict[str, Any] = {"peak_gib": max(peaks), "peak_gib_of_ranks": peaks}
        if not tilewise.is_patched(self.model):
            return found
        told = tilewise.summary(self.model)
        attention = self.ranks.all(sum(row.seconds for row in told.rows))
        exchange = self.ranks.all(sum(row.seconds for row in told.ranks))
        found["density"] = statistics.mean(self.ranks.all(told.density))
        found["attention_ms"] = max(attention) / self.runs * 1e3
        found["balance"] = max(attention) / statistics.mean(attention) if max(attention) else 1.0
        found["exchange_share"] = max(exchange) / (self.runs * ms / 1e3)
        return found

    def row(self) -> dict[str, Any]:
        peer = self.variants.get(STOCK, {}).get("split", {}).get("ms")
        if self.work.guided:  # diffusers divides no guidance: its forwards were divided by tilewise
            peer = None
        for variant in self.variants.values():
            if peer and "split" in variant:
                variant["over_stock_split"] = peer / variant["split"]["ms"]
        return {
            "name": f"{self.work.name}, {self.ranks.count} GPUs",
            "gpus": self.ranks.count,
            "layers": self.layers,
            "dtype": str(self.dtype).removeprefix("torch."),
            "gpu_variants": list(self.variants.values()),
            "missing": self.missing,
            "wrong": self.wrong,
        }


def built(work: Work, device: torch.device, dtype: torch.dtype) -> tuple[Any, dict[str, Any], int]:
    """A denoiser, the same on each rank, its inputs, and its number of layers."""
    torch.manual_seed(0)
    if (family := work.of_family) is not None:
        if work.tiny:
            family = replace(family, config={**family.config, "num_attention_heads": 2})
        model = family.build(device, dtype)
        given = family.inputs(family_inputs.Call(device, dtype, family.size, family.text, model))
        return model, given, len(attention_layers(model, work.name))
    model = step.build({**step.CONFIGS[work.model], "num_layers": work.layers, **work.config}, device, dtype)
    if work.unequal:
        heads = model.config.num_attention_heads
        for block in model.blocks:
            for norm in (block.attn1.norm_q, block.attn1.norm_k):
                norm.weight.data.view(heads, -1).mul_(torch.linspace(12, 0.5, heads, device=device)[:, None])
    generator = torch.Generator(device).manual_seed(0)
    given = {
        "hidden_states": torch.randn(1, 16, *work.latents, generator=generator, device=device).to(dtype),
        "timestep": torch.tensor([500.0], device=device),
        "encoder_hidden_states": torch.randn(1, 512, model.config.text_dim, generator=generator, device=device).to(
            dtype
        ),
    }
    return model, given, work.layers


def run_work(work: Work, ranks: Ranks, runs: int, only: str = "") -> dict[str, Any]:
    """All variants of a work, on one GPU and split; or those in whose name ``only`` is found."""
    bench = Bench(work, ranks, runs)
    wanted = {name: method for name, method in METHODS.items() if re.search(only, name) and re.search(work.only, name)}
    for split in (False, True):
        if split:
            if work.guided:
                tilewise.enable_cfg_parallel(bench.model)
            else:
                tilewise.enable_context_parallel(bench.model)
            at, parts = context_parallel(bench.model), token_parts(ranks.count, CFG if work.guided else CONTEXT)
            assert parts == (1 if at is None else at.ulysses)
        if re.search(only, STOCK) and re.search(work.only, STOCK):
            bench.variant(STOCK, bench.stock, split)
        for name, method in wanted.items():
            with mock.patch.object(head_dealing, "PAYS", math.inf) if "in order" in name else contextlib.nullcontext():
                bench.variant(
                    name, lambda method=method: tilewise.patched(bench.model, method, steps=(0, 1), strict=True), split
                )  # type: ignore[misc]
    return bench.row()


def measured_on(result: dict[str, Any], folder: Path, gpus: int) -> set[str]:
    """Names of the works that the result files of this device have, of any day."""
    files = folder.glob(results.path_of({**result, "date": "*"}, folder).name)
    told = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    rows = [row["name"] for each in told for row in each["sections"].get(SECTION, [])]
    return {name.removesuffix(f", {gpus} GPUs") for name in rows if name.endswith(f", {gpus} GPUs")}


def main(
    rows: Annotated[str, typer.Option(help="regular expression: only works in whose name it is found")] = "",
    variants: Annotated[str, typer.Option(help="regular expression: only variants in whose name it is found")] = "",
    runs: Annotated[int, typer.Option(help="timed forwards of each variant")] = 3,
    tiny: Annotated[bool, typer.Option(help="tiny models: shows what runs on this machine")] = False,
    out: Annotated[Path, typer.Option(help="folder of result files")] = results.FOLDER,
) -> None:
    """Measure one forward on one GPU and split over the processes of torchrun."""
    if "LOCAL_RANK" not in os.environ:
        raise typer.BadParameter("start it with: torchrun --nproc-per-node 2 -m benchmarks.context_parallel")
    ranks = Ranks()
    every = TINY if tiny else WORKS
    works = [work for work in every if re.search(rows, work.name)]
    works = [work for work in works if not work.guided or not ranks.count % 2]
    if not works:
        raise typer.BadParameter(f"no work has {rows!r} in its name")
    wrong: list[str] = []
    result = header(ranks.device, "benchmarks.context_parallel", sys.argv[1:], tiny)
    result["commands"] = [f"torchrun --nproc-per-node {ranks.count} {result['commands'][0].removeprefix('python ')}"]
    measured = ranks.all(measured_on(result, out, ranks.count))[0]
    for work in sorted(works, key=lambda work: work.name in measured):  # what is missing comes first
        row = run_work(work, ranks, runs, variants) | {"order": every.index(work)}
        wrong += row["wrong"]
        if ranks.rank == 0:
            path = results.write({**result, "sections": {SECTION: [row]}}, out)
            print(
                render.tables({**result, "sections": {SECTION: [row]}}, header=False),
                f"written: {path}",
                sep="\n",
                flush=True,
            )
        gc.collect()
        if ranks.device.type == "cuda":
            torch.cuda.empty_cache()
    dist.barrier()
    dist.destroy_process_group()
    if wrong:
        print("WRONG RESULTS: " + "; ".join(wrong), file=sys.stderr)
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
