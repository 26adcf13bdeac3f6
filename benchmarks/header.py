"""What stands at the top of every result file: the machine, the day, the command that repeats the run, and the versions."""

from __future__ import annotations

import datetime
import platform
import re
import shlex
from collections.abc import Sequence
from typing import Any

import diffusers
import torch
import triton

import tilewise
from benchmarks import peers, results


def header(device: torch.device, program: str, arguments: Sequence[str], tiny: bool) -> dict[str, Any]:
    """A result without its sections. program, arguments: ``python -m program arguments``."""
    return {
        "format": results.FORMAT,
        "device": device_name(device),
        "date": datetime.date.today().isoformat(),
        "tiny": tiny,
        "commands": [command(program, arguments)],
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": triton.__version__,
            "diffusers": diffusers.__version__,
            "tilewise": tilewise.__version__,
            **peers.versions(),
        },
    }


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"


def command(program: str, arguments: Sequence[str]) -> str:
    """The command line as others can repeat it: without the folder that the results went to."""
    text = shlex.join(["python", "-m", program, *arguments])
    return re.sub(r" --out[ =](?:'[^']*'|\S+)", "", text)
