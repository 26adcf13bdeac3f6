"""`tilewise env`: installed versions, devices, and their attention backends."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess

import torch
from rich.console import Console
from rich.table import Table

from tilewise.kernels.attention.backends.tiles import TILES
from tilewise.kernels.attention.dispatch import available_backends
from tilewise.kernels.chips import chip_name, chip_of
from tilewise.kernels.device import triton_unavailable
from tilewise.pipelines.errors import FFmpegError
from tilewise.pipelines.loading.model_folder import DEMO_FOLDER
from tilewise.pipelines.media.video import ffmpeg_path
from tilewise.plugins.tuning.in_use import words_of
from tilewise.plugins.tuning.record import UnusableError, file_of, read
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
    for name in devices:
        out.print(f"{name}: {_chip(torch.device(name))}", soft_wrap=True)
        out.print(f"{name}: {_tuned(torch.device(name))}", soft_wrap=True)


def _chip(device: torch.device) -> str:
    """What is known of our kernels on a device's chip: compiled and checked, or run as well."""
    if device.type != "cuda":
        return "computed by PyTorch; our kernels are tested here in Triton's interpreter"
    if why := triton_unavailable(device):
        return f"attention is dense, our kernels do not run here: {why}"
    chip = chip_of(device)
    own = chip.name == chip_name(device)
    rules = f"tiles of {chip.name}" if own else f"no tiles of its own, runs with those of {chip.name}"
    known = f"compiled ahead of time and checked for spills and shared memory ({', '.join(TILES)}; docs/tiles.md)"
    run = (
        f"run and measured on {chip.run}" if chip.run and own else "never run on such a card by us: tell us how it goes"
    )
    return f"{rules}, {known}; {run}"


def _tuned(device: torch.device) -> str:
    """What was tuned on a device, or why that is not used."""
    try:
        found = read(device)
    except UnusableError as error:
        return f"{file_of(device)} is not used: {error}"
    if found is None:
        return "not tuned: `tilewise tune` measures which backends and tiles are fastest here, and from which length methods pay"
    return f"{words_of(found)} ({file_of(device)})"


def _ffmpeg() -> str:
    try:
        exe = ffmpeg_path()
    except FFmpegError as error:
        return f"missing: {error}"
    first = subprocess.run([exe, "-version"], capture_output=True, text=True, check=False).stdout.splitlines()[:1]
    return f"{first[0].split(' Copyright')[0] if first else 'unknown version'} ({exe})"
