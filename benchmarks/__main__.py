"""``python -m benchmarks``: measure on this machine, write benchmarks/results/<device>-<date>.json, print the tables."""

from __future__ import annotations

import datetime
import json
import platform
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import diffusers
import torch
import triton
import typer

import tilewise
from benchmarks import attention, launch, render, step

SECTIONS: dict[str, Callable[[torch.device, float], Any]] = {
    "attention": attention.run,
    "step": step.run,
    "launch": launch.run,
}


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"


def main(
    only: Annotated[str, typer.Option(help="comma-separated sections: " + ", ".join(SECTIONS))] = ",".join(SECTIONS),
    device: Annotated[str, typer.Option(help="cuda or cpu; default: cuda if there is one")] = "",
    seconds: Annotated[float, typer.Option(help="time spent on each measurement")] = 1.0,
    out: Annotated[Path, typer.Option(help="folder of result files")] = Path(__file__).parent / "results",
) -> None:
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    chosen = only.split(",")
    if unknown := set(chosen) - set(SECTIONS):
        raise typer.BadParameter(f"unknown sections {sorted(unknown)}; there are {', '.join(SECTIONS)}")
    name = device_name(where)
    result: dict[str, Any] = {
        "device": name,
        "date": datetime.date.today().isoformat(),
        "command": "python -m benchmarks " + " ".join(sys.argv[1:]),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": triton.__version__,
            "diffusers": diffusers.__version__,
            "tilewise": tilewise.__version__,
        },
    }
    for section in chosen:
        result[section] = SECTIONS[section](where, seconds)
    out.mkdir(parents=True, exist_ok=True)
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    path = out / f"{slug}-{result['date']}.json"
    path.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print(render.tables(result))
    print(f"written: {path}")


typer.run(main)
