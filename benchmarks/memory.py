"""``python -m benchmarks.memory``: the peak memory of a patched step on a GPU of 24 GB, against stock. Random weights (GPU).

PyTorch's allocator is held to what such a card leaves it, so that a step which needs more fails as it would there. Weights stay
on the GPU, or come leaf by leaf from the host (diffusers' group offload, as ``--offload group``). The first forward is told by
itself: it makes the plans, and compiles.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import tilewise
from benchmarks import results, step
from benchmarks.header import header
from benchmarks.peers import reason
from tilewise.pipelines.memory.limits import PeakMemory, free_memory

SECTION = "memory"
GIB = 23.5  # of a card of 24 GB, what the driver and the context leave
STOCK = "stock"
METHODS: dict[str, Any] = {
    "tilewise, dense": "dense",
    "tilewise, STA density 0.2": tilewise.STA(density=0.2),
    "tilewise, STA density 0.2, int8": tilewise.Config(tilewise.STA(density=0.2), precision="int8"),
    "tilewise, STA density 0.2, far field": tilewise.STA(density=0.2, far="cells"),
    "tilewise, draft density 0.25": tilewise.Draft(density=0.25, min_tokens=0),
}


@dataclass(frozen=True)
class Work:
    """A size, and whether weights come from the host. With offload, a layer's weights are gone before the next ones' are there:
    10 of 40 layers have the same peak as all."""

    size: step.Size
    offload: bool = False

    @property
    def name(self) -> str:
        return f"{self.size.name}{', group offload' if self.offload else ''}"


WORKS = [
    Work(step.Size("Wan2.1-1.3B", "1080×1920×81", (21, 136, 240))),
    Work(step.Size("Wan2.1-14B, 10 layers", "480×832×81", (21, 60, 104)), offload=True),
]
TINY = [Work(step.TINY[0])]


@contextmanager
def held_to(gib: float, device: torch.device) -> Iterator[None]:
    """PyTorch's allocator on a GPU refuses what goes beyond so much. Elsewhere nothing is held."""
    if device.type != "cuda":
        yield
        return
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, gib * 2**30 / total), device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)


def run_work(work: Work, device: torch.device, gib: float) -> dict[str, Any]:
    """Peaks of a size: of stock, and with each method. What runs out of memory is told by name."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = step.build(step.CONFIGS[work.size.model], device, dtype)
    if work.offload and device.type == "cuda":
        model.to("cpu")
        free_memory()
        model.enable_group_offload(onload_device=device, offload_type="leaf_level", use_stream=True)
    bench = step.Bench(work.size, model, device, 0.0, "eager")
    ways: dict[str, AbstractContextManager] = {STOCK: nullcontext()}
    for name, method in METHODS.items():
        ways[name] = tilewise.patched(model, method, steps=(0, 1))
    found, missing = [], {}
    peak = PeakMemory(device)
    with held_to(gib, device):
        for name, way in ways.items():
            free_memory()
            try:
                with way:
                    peaks = []
                    for _ in range(2):
                        peak.start()
                        bench.forward()
                        peaks.append(peak.read()["bytes"])
                    fallbacks = tilewise.summary(model).fallbacks if tilewise.is_patched(model) else {}
            except Exception as error:  # out of memory: what this is here to find
                missing[name] = reason(error)
                continue
            found.append({"name": name, "first": peaks[0], "later": peaks[1], "fallbacks": fallbacks})
    stock = next((row for row in found if row["name"] == STOCK), None)
    for row in found:
        row["over_stock"] = None if stock is None or not stock["later"] else row["later"] / stock["later"]
    return {"name": work.name, "gib": gib, "peaks": found, "missing": missing, "weights": _bytes(model)}


def _bytes(model: torch.nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def lines(row: dict[str, Any]) -> Iterator[str]:
    """A row in words."""
    yield f"{row['name']}: weights {row['weights'] / 2**30:.1f} GiB, allocator held to {row['gib']} GiB"
    for one in row["peaks"]:
        over = "" if one["over_stock"] is None else f", {one['over_stock']:.3f} × stock"
        yield f"  {one['name']}: {one['later'] / 2**30:.2f} GiB (first forward {one['first'] / 2**30:.2f}){over}"
        for why, count in one["fallbacks"].items():
            yield f"    {count} calls fell back: {why}"
    for name, why in row["missing"].items():
        yield f"  {name}: {why}"


def main(
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    gib: Annotated[float, typer.Option(help="GiB that the allocator is held to")] = GIB,
    tiny: Annotated[bool, typer.Option(help="a tiny model: shows that it runs")] = False,
    out: Annotated[Path, typer.Option(help="folder of result files")] = results.FOLDER,
) -> None:
    """Measure, write the result file, print the peaks."""
    where = torch.device(device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
    path = None
    for order, work in enumerate(TINY if tiny else WORKS):
        row = {"order": order, **run_work(work, where, gib)}
        print("\n".join(lines(row)), flush=True)
        result = {**header(where, "benchmarks.memory", sys.argv[1:], tiny), "sections": {SECTION: [row]}}
        path = results.write(result, out)
    print(f"written: {path}")


if __name__ == "__main__":
    typer.run(main)
