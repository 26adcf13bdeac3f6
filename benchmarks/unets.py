"""``python -m benchmarks.unets``: SDXL past its training size, stock against the preset ``hidiffusion``. Random weights (GPU).

A forward (two samples) is measured in each state that RAU-Net can be in, with shifted windows and without. A run of 50 steps is
the sum of its forwards, in the states of the published schedule.
"""

from __future__ import annotations

import collections
import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import tilewise
from benchmarks import results
from benchmarks.family_inputs import SDXL, Call, Work, sdxl
from benchmarks.header import header
from benchmarks.peers import reason
from benchmarks.timing import measure
from tilewise.plugins.additions.raunet import RAUNet

SECTION = "unets"
STEPS = 50
TEXT = 77
TINY = {
    "sample_size": 8, "block_out_channels": (8, 16, 16), "attention_head_dim": 4, "norm_num_groups": 4,
    "transformer_layers_per_block": 1, "cross_attention_dim": 16, "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 64,
}  # fmt: skip
METHODS = {"dense": "dense", "windows": "hidiffusion"}
State = tuple[bool, bool]  # coarse conv, coarse level
WORDS: dict[State, str] = {
    (False, False): "usual",
    (True, False): "coarse conv",
    (False, True): "coarse level",
    (True, True): "coarse both",
}


def states(side: int) -> collections.Counter[State]:
    """How many of the steps of a run at side × side latents are in each state."""
    addition = RAUNet(variant="sdxl")
    return collections.Counter(addition.coarse((side, side), step, STEPS, False, False) for step in range(STEPS))


def row_of(
    side: int, device: torch.device, dtype: torch.dtype, seconds: float, config: dict[str, Any]
) -> dict[str, Any]:
    """The measurements of one size. Keys: "stock", and "dense" and "windows" in each state; ms of a forward."""
    work = Work(f"SDXL {8 * side}²", "UNet2DConditionModel", "all", (1, side, side), TEXT, tilewise.STA(), sdxl, config)
    model = work.build(device, dtype)
    inputs = sdxl(Call(device, dtype, work.size, TEXT, model))
    found: dict[str, Any] = {}
    missing: dict[str, str] = {}

    def timed(name: str) -> None:
        try:
            with torch.no_grad():
                run = measure(lambda: model(**inputs, return_dict=False)[0], device, seconds=seconds, flush=False)
            found[name] = run.to_dict()
        except Exception as error:
            missing[name] = reason(error)

    timed("stock")
    schedule = states(side)
    for name, method in METHODS.items():
        for state in {(False, False): 1, **schedule}:
            conv, level = state
            add = RAUNet(variant="sdxl", t1=float(level), t2=float(conv))
            with tilewise.patched(model, method, add=add):
                timed(f"{name}, {WORDS[state]}")
    return {
        "name": work.name, "order": side, "forwards": found, "missing": missing,
        "states": {WORDS[state]: count for state, count in schedule.items()},
        "runs": runs(found, {WORDS[state]: count for state, count in schedule.items()}),
    }  # fmt: skip


def runs(found: dict[str, Any], schedule: dict[str, int]) -> dict[str, float]:
    """Seconds of the forwards of a run, by what is on; only those of which every part was measured."""
    ways = {
        "stock": {"stock": STEPS},
        "tilewise, dense": {"dense, usual": STEPS},
        "shifted windows": {"windows, usual": STEPS},
        "RAU-Net": {f"dense, {state}": count for state, count in schedule.items()},
        "hidiffusion": {f"windows, {state}": count for state, count in schedule.items()},
    }
    return {
        way: sum(found[name]["ms"] * count for name, count in parts.items()) / 1000
        for way, parts in ways.items()
        if all(name in found for name in parts)
    }


def main(
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    sides: Annotated[str, typer.Option(help="pixels, comma-separated")] = "2048,4096",
    seconds: Annotated[float, typer.Option(help="time spent on each forward")] = 4.0,
    tiny: Annotated[bool, typer.Option(help="a tiny UNet at 256 pixels: shows that it runs")] = False,
    out: Annotated[Path, typer.Option(help="folder of result files")] = results.FOLDER,
) -> None:
    """Measure, write the result file, print a line a way of running."""
    where = torch.device(device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if where.type == "cuda" else torch.float32
    config = {**SDXL, **TINY} if tiny else SDXL
    for side in ["256"] if tiny else sides.split(","):
        row = row_of(int(side) // 8, where, dtype, 0.01 if tiny else seconds, config)
        result = {**header(where, "benchmarks.unets", sys.argv[1:], tiny), "sections": {SECTION: [row]}}
        path = results.write(result, out)
        for name, taken in row["runs"].items():
            print(f"{row['name']}: {name}, {STEPS} steps: {taken:.1f} s, {row['runs']['stock'] / taken:.2f} × stock")
        for name, why in row["missing"].items():
            print(f"{row['name']}: {name}: not run: {why}")
        print(f"written: {path}")


if __name__ == "__main__":
    typer.run(main)
