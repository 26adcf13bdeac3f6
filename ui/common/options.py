"""Parse options: methods, windows, file names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tilewise.pipelines.batch.job import slug
from tilewise.pipelines.generation.method_options import flag, is_method_option, method_options
from tilewise.pipelines.generation.settings import GenerateSettings
from tilewise.pipelines.highres.settings import TWO_STAGE_OPTIONS
from tilewise.pipelines.media.files import STILL, is_still, suffix_of
from tilewise.pipelines.streaming.settings import STREAM_OPTIONS
from tilewise.plugins.config import DENSE_OPTIONS, Config, load_config, resolve
from tilewise.plugins.errors import ConfigError


def method_config(method: str | Mapping[str, Any] | Config, fields: Mapping[str, Any] | None = None) -> Config:
    """The config of --method, with what the fields of a request say of the method in place of its own.

    method: a name, a preset, a .json file, a config as `Config.to_dict` makes it, or a config. fields: "window", "density",
    "set.recall" and so on (`method_options`); others are left out.
    Raises ConfigError for unknown names, files that cannot be read, and options that the method does not have.
    """
    config = method if isinstance(method, Config) else _named(method)
    options = method_options(fields or {})
    return config.with_options(options) if options else config


def first_stage_method(method: str | Mapping[str, Any] | Config, fields: Mapping[str, Any]) -> Config:
    """The config of the first of two stages: --method and its options are that stage's, the second attends to inward windows.

    Raises as `method_config`.
    """
    config = method_config(method)
    options = [name for name in fields if is_method_option(name) and name not in DENSE_OPTIONS]
    if options and config.method.name == "dense":
        raise ConfigError(
            f"{flag(options[0])} with --highres is an option of the first stage's method, which is dense: give a --method too. "
            "What the second stage's window covers is --highres-window"
        )
    return method_config(config, fields)


def default_out(prompt: str, seed: int, frames: int) -> Path:
    """outputs/<the prompt's words>-<seed>.mp4, or .png for one frame: where a clip goes if that name is free"""
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
