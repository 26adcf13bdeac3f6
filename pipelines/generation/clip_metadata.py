"""Metadata of a clip: its settings, and under "run" timings, device and versions. Read back, the settings reproduce the clip."""

from __future__ import annotations

import dataclasses
import datetime
import functools
import hashlib
import importlib.metadata
import platform
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tilewise.pipelines.generation.generate import Clip
from tilewise.pipelines.generation.settings import GenerateSettings
from tilewise.pipelines.loading.device import device_name
from tilewise.pipelines.media.video import read_settings
from tilewise.plugins.diffusers_compat import execution_device
from tilewise.plugins.errors import ConfigError

LIBRARIES = ("tilewise", "torch", "triton", "diffusers", "transformers", "accelerate")


@dataclasses.dataclass(frozen=True)
class ClipMetadata:
    """The settings that made a clip and its "run" part, which is empty if there is none."""

    settings: GenerateSettings
    run: dict[str, Any]
    version: str


def clip_metadata(clip: Clip, run: Mapping[str, Any]) -> dict[str, Any]:
    """The metadata of a clip: JSON values only. run: what the caller knows about the run; wins over what the clip says.
    "load", the seconds that loading took, goes to the other seconds."""
    report = clip.summary
    run = dict(run)
    told = {
        "seconds": {**({"load": run.pop("load")} if "load" in run else {}), **clip.seconds},
        "density": 1.0 if report is None else report.density,
        "cost": 1.0 if report is None else report.cost,
        "fallbacks": {} if report is None else report.fallbacks,
        "summary": None if report is None else report.to_dict(),
        "content": clip.content,
        "frames_sha256": frames_sha256(clip.frames),
    }
    return {**clip.settings.to_dict(), "run": {**told, **run}}


def cost_of(run: Mapping[str, Any]) -> float:
    """Share of the token pairs that a clip computed where it was sparse, pairs of a query and a mean too, by its "run" part; as
    its density where that is not said."""
    cost: float = run.get("cost", run["density"])
    return cost


def machine(device: torch.device, dtype: str) -> dict[str, Any]:
    """What the run was on: device, its name, dtype, versions of the libraries."""
    return {"device": str(device), "device_name": device_name(device), "dtype": dtype, "versions": versions()}


def begin_run(
    model: str, dtype: str, load: Callable[[], Any], tell: Callable[[str], None] = lambda model: None
) -> tuple[Any, dict[str, Any]]:
    """Loads a model; the pipeline, and what the metadata of its clips says of that: when, how long it took, on what.

    dtype: of the weights, by name. tell: called with the model's name before.
    """
    started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    begin = time.perf_counter()
    tell(model)
    pipe = load()
    return pipe, {
        **machine(execution_device(pipe, pipe.device), dtype),
        "started": started,
        "load": time.perf_counter() - begin,
    }


@functools.cache
def versions() -> dict[str, str]:
    """Versions of Python, CUDA and the libraries that decide what comes out."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found | ({"cuda": torch.version.cuda} if torch.version.cuda else {})


def frames_sha256(frames: NDArray[np.uint8]) -> str:
    """SHA-256 of a clip's pixels before encoding, (T, H, W, 3) uint8 in C order: whether two runs made the same."""
    return hashlib.sha256(np.ascontiguousarray(frames).data).hexdigest()


def read_clip_metadata(path: str | Path) -> ClipMetadata:
    """What a clip's metadata says. Raises ConfigError if there is no such file or it holds no settings of ours, OutputError if
    it is no clip."""
    if not Path(path).is_file():
        raise ConfigError(f"there is no clip {path}")
    metadata = read_settings(path)
    if metadata is None or "tilewise" not in metadata:
        raise ConfigError(f"{path} holds no settings of tilewise: only clips that it wrote can be made again")
    run = metadata.get("run")
    run = run if isinstance(run, dict) else {}
    try:
        settings = GenerateSettings.from_dict(metadata)
        _check_run(run)
    except ConfigError as error:
        version = str(metadata["tilewise"])[:40]
        raise ConfigError(f"{path}, written by tilewise {version}: {error}") from error
    return ClipMetadata(settings, run, str(metadata["tilewise"]))


def _check_run(run: Mapping[str, Any]) -> None:
    """Raises ConfigError for what is read of a run and has another type than `clip_metadata` writes."""
    dtype, measures = run.get("dtype"), run.get("memory_saving", [])
    if not (dtype is None or isinstance(dtype, str)):
        raise ConfigError(f"dtype must be text, not {str(dtype)[:40]!r}")
    if not (isinstance(measures, list) and all(isinstance(one, str) for one in measures)):
        raise ConfigError(f"memory_saving must be a list of texts, not {str(measures)[:40]!r}")
