"""Parse options: methods, windows, file names."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tilewise.pipelines.batch.job import slug
from tilewise.pipelines.generation.settings import GenerateSettings
from tilewise.pipelines.highres.settings import TWO_STAGE_OPTIONS
from tilewise.pipelines.media.files import STILL, is_still, suffix_of
from tilewise.pipelines.streaming.settings import STREAM_OPTIONS
from tilewise.plugins.config import Config, load_config, resolve
from tilewise.plugins.errors import ConfigError
from tilewise.plugins.methods.sta import STA

ONE_STAGE_OPTIONS = ("window", "density")  # of the method, which clips of two stages do not have


def method_config(
    method: str | Mapping[str, Any] | Config, window: str | None = None, density: float | None = None
) -> Config:
    """The config of --method, with --window or --density in place of its own.

    method: a name, a preset, a .json file, a config as `Config.to_dict` makes it, or a config.
    Raises ConfigError for unknown names, files that cannot be read, and options that the method does not have.
    """
    config = method if isinstance(method, Config) else _named(method)
    if window is None and density is None:
        return config
    if not isinstance(config.method, STA):
        raise ConfigError(f"--window and --density are options of method sta, not of {config.method.name}")
    if window is not None and density is not None:
        raise ConfigError("give --window or --density, not both: the density picks the window")
    options: dict[str, Any] = {"window": None if window is None else parse_window(window), "density": density}
    return dataclasses.replace(config, method=dataclasses.replace(config.method, **options))


def parse_window(text: str) -> tuple[int, ...]:
    """Whole numbers from "3,3,3"; the method itself checks how many and how large."""
    try:
        return tuple(int(word) for word in text.split(","))
    except ValueError as error:
        raise ConfigError(f"--window takes three whole numbers t,h,w such as 3,3,3, not {text!r}") from error


def default_out(prompt: str, seed: int, frames: int) -> Path:
    """outputs/<the prompt's words>-<seed>.mp4, or .png for one frame"""
    return Path("outputs") / f"{slug(prompt)}-{seed}{suffix_of(frames)}"


def out_suffix(file: Path, settings: GenerateSettings) -> str:
    """What the name of a clip must end in: a clip of one frame may be a png."""
    return STILL if settings.frames == 1 and is_still(file) else ".mp4"


def config_file(method: str) -> Path | None:
    """The file that --method names; None for a method or preset."""
    path = Path(method)
    return path if path.suffix.lower() == ".json" else None


def _named(method: str | Mapping[str, Any]) -> Config:
    if isinstance(method, Mapping):
        return Config.from_dict(dict(method))
    path = config_file(method)
    if path is None:
        return resolve(method)
    try:
        return load_config(path)
    except OSError as error:
        raise ConfigError(f"cannot read the config {method}: {error.strerror or error}") from error


def refuse_stream_options(given: Mapping[str, Any]) -> None:
    """Raises ConfigError for options of streams without --stream, where they would have no effect."""
    if names := [name for name in STREAM_OPTIONS if name in given]:
        name = names[0].replace("_", "-")
        raise ConfigError(f"--{name} is an option of --stream, which makes a video of any length: give --stream too")


def refuse_two_stage_options(given: Mapping[str, Any]) -> None:
    """Raises ConfigError for options of clips of two stages without --highres, where they would have no effect."""
    names = [name for name in TWO_STAGE_OPTIONS if name in given]
    if names and not given.get("highres"):
        name = names[0].replace("_", "-")
        raise ConfigError(
            f"--{name} is an option of --highres, which makes a clip past its model's own size: give --highres too"
        )
