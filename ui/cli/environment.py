"""`tilewise env`: installed versions, devices, and their attention backends."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess

import torch
from rich.console import Console
from rich.table import Table

from tilewise.kernels.attention.dispatch import available_backends
from tilewise.pipelines.errors import FFmpegError
from tilewise.pipelines.loading.model_folder import DEMO_FOLDER
from tilewise.pipelines.media.video import ffmpeg_path
from tilewise.ui.common.terminal import standard_output

LIBRARIES = ("tilewise", "torch", "triton", "diffusers", "transformers", "accelerate", "safetensors", "imageio-ffmpeg")


def environment_command() -> None:
    """Prints versions, devices and backends."""
    out = standard_output()
    out.print(_versions())
    _print_devices(out)
    out.print(f"demo model: {'bundled' if DEMO_FOLDER.is_dir() else 'missing'} ({DEMO_FOLDER})", soft_wrap=True)


def _versions() -> Table:
    table = Table("library", "version")
    table.add_row("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    for name in LIBRARIES:
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            version = "not installed"
        table.add_row(name, version)
    table.add_row("cuda", torch.version.cuda or "PyTorch is built without it")
    table.add_row("ffmpeg", _ffmpeg())
    return table


def _print_devices(out: Console) -> None:
    devices = {"cpu": f"{os.cpu_count()} cores, {torch.get_num_threads()} threads"}
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            p = torch.cuda.get_device_properties(i)
            devices[f"cuda:{i}"] = f"{p.name}, {p.total_memory / 2**30:.0f} GiB, compute capability {p.major}.{p.minor}"
    table = Table("device", "backend", "usable", "why")
    for device, description in devices.items():
        rows = available_backends(device)
        chosen = next((name for name, usable, _ in rows if usable), None)
        table.add_row(device, "", "", description)
        for name, usable, reason in rows:
            table.add_row("", name, "chosen" if name == chosen else ("yes" if usable else "no"), reason)
    out.print(table)


def _ffmpeg() -> str:
    try:
        exe = ffmpeg_path()
    except FFmpegError as error:
        return f"missing: {error}"
    first = subprocess.run([exe, "-version"], capture_output=True, text=True, check=False).stdout.splitlines()[:1]
    return f"{first[0].split(' Copyright')[0] if first else 'unknown version'} ({exe})"
