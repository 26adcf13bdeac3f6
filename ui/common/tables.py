"""Tables for the terminal: what will run, what ran, how it compares."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from tilewise.pipelines.generation.compare import Comparison
from tilewise.pipelines.generation.generate import Clip
from tilewise.pipelines.generation.settings import GenerateSettings, TinyChoice
from tilewise.pipelines.memory.units import amount
from tilewise.pipelines.quality.content_score import parse_prompt
from tilewise.pipelines.streaming.record import Recorded
from tilewise.pipelines.streaming.windows.recipe import WindowRecipe
from tilewise.plugins.additions.base import additions_text
from tilewise.plugins.config import Config
from tilewise.plugins.schedule.steps import steps_words
from tilewise.plugins.text_format import counted
from tilewise.ui.common.shares import DENSITY, shares
from tilewise.ui.common.terminal import say, standard_output


def print_settings(settings: GenerateSettings, device: str, dtype: str, files: list[Path]) -> None:
    """The settings as a table, for a dry run."""
    table = _pairs("dry run: nothing is generated or written")
    for name, value in settings.to_dict().items():
        table.add_row(name, method_words(settings.method) if name == "method" else _text(value))
    table.add_row("device", f"{device}, {dtype}")
    table.add_row("would write", "\n".join(str(file) for file in files))
    standard_output().print(table)


def print_result(result: Clip | Comparison) -> None:
    """What ran, where it was sparse, how long it took and, for a comparison, against what."""
    clip = result.sparse if isinstance(result, Comparison) else result
    out = standard_output()
    if clip.summary is not None:
        say(clip.summary)
    table = _pairs("result")
    settings = clip.settings
    frames, height, width = clip.frames.shape[:3]
    table.add_row(
        "clip",
        f"{counted(frames, 'frame')} of {height}x{width}, {settings.fps:g} fps, {counted(settings.steps, 'step')}",
    )
    table.add_row("model, method, seed", f"{settings.model}, {method_words(settings.method)}, {settings.seed}")
    _add_decoder(table, settings)
    if clip.summary is not None:
        if clip.summary.ran:
            for name, value in shares(clip.summary.density, clip.summary.cost):
                table.add_row(name, f"{value:.3f}")
        else:
            table.add_row(DENSITY, "the method never ran")
        for row in clip.summary.cache:
            table.add_row("step cache", f"{row.denoiser}: {row.reused} of {counted(row.forwards, 'forward')} reused")
        reasons = "\n".join(f"{counted(count, 'call')}: {reason}" for reason, count in clip.summary.fallbacks.items())
        table.add_row("fallbacks to dense", reasons or "none")
    table.add_row("seconds", _seconds(clip))
    if clip.content is not None:
        table.add_row("prompt shown", content_words(clip.content, settings.prompt))
    if isinstance(result, Comparison):
        if result.dense.content is not None:
            table.add_row("prompt shown, dense", content_words(result.dense.content, settings.prompt))
        table.add_row("seconds, dense", _seconds(result.dense))
        words = f"{result.speedup_words('denoise')} denoising, {result.speedup_words('total')} in all"
        table.add_row("speed-up over dense", words)
        same = "identical" if math.isinf(result.psnr) else f"PSNR {result.psnr:.1f} dB"
        table.add_row("closeness to dense", same + ("" if result.ssim is None else f", SSIM {result.ssim:.3f}"))
    out.print(table)


def print_stream(made: Recorded) -> None:
    """What was streamed, how fast, and where attention was sparse."""
    if made.summary is not None:
        say(made.summary)
    settings, recipe = made.work.settings, made.work.recipe
    table = _pairs("result")
    length = (
        f"{counted(made.frames, 'frame')} of {settings.height}x{settings.width}, {made.frames / settings.fps:.2f} s"
    )
    table.add_row("video", f"{length} at {settings.fps:g} fps")
    table.add_row("model, method, seed", f"{settings.model}, {method_words(settings.method)}, {settings.seed}")
    _add_decoder(table, settings)
    if isinstance(recipe, WindowRecipe):
        kept = f"windows of {recipe.window} latent frames in {settings.steps} steps, {recipe.overlap} of the one before"
        table.add_row("way", f"{recipe.way}: {kept}")
    else:
        kept = (
            f"window {recipe.window}, sink {recipe.sink}, policy {recipe.policy}, stored as {made.work.options.storage}"
        )
        table.add_row("recipe", f"{recipe.name}: chunks of {recipe.chunk} in {settings.steps} passes, {kept}")
    seconds = made.seconds
    table.add_row("seconds", f"{seconds['total']:.2f}, the first frames after {seconds['first']:.2f}")
    table.add_row("frames a second", f"{made.fps:.2f}")
    if "latency" in seconds:
        table.add_row(
            "video in", f"strength {settings.strength:g}, latency of a chunk at most {seconds['latency']:.2f} s"
        )
    if made.cache["total"]:
        table.add_row(
            "keys of earlier windows" if isinstance(recipe, WindowRecipe) else "KV cache", cache_words(made.cache)
        )
    standard_output().print(table)


def cache_words(cache: Mapping[str, int]) -> str:
    """Memory of a KV cache; cache: bytes, "latent" and "total"."""
    return f"{amount(cache['total'])}, {amount(cache['latent'])} a latent frame"


def print_files(files: list[Path]) -> None:
    """One line each, never wrapped, so that they can be copied."""
    for file in files:
        say(f"wrote {file}")


def _pairs(title: str) -> Table:
    table = Table(title=title, title_justify="left", show_header=False, show_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    return table


def _add_decoder(table: Table, settings: GenerateSettings) -> None:
    """What made the frames, where it was not the model's own VAE."""
    if (tiny := TinyChoice.parse(settings.decode)) is not None:
        table.add_row("decoded by", f"{tiny.path}, SHA-256 {tiny.sha256[:12]}…")


def content_words(content: Mapping[str, bool | None], prompt: str) -> str:
    """What the detector found of the prompt, leaving out what the prompt does not say; "unknown" where it was not understood."""
    found = {name: "yes" if right else "no" for name, right in content.items() if right is not None}
    if content.get("count") is None:
        unread = ", ".join(parse_prompt(prompt).unread)
        found["count"] = (
            f"unknown ({f'not understood: {unread}' if unread else 'more objects of a colour than are told apart'})"
        )
    return ", ".join(f"{name.replace('_', ' ')} {word}" for name, word in found.items())


def method_words(config: Config) -> str:
    """The method with its options and schedule, in one line."""
    options = {key: value for key, value in config.method.brief().items() if key != "name" and value is not None}
    words = [config.method.name, *(f"{key}={_text(value)}" for key, value in options.items())]
    if config.method.name != "dense":  # which has no schedule
        words.append(f"steps {steps_words(config.steps)}, blocks {config.blocks}")
    if config.cache is not None:
        words.append(f"cache {config.cache}")
    if config.add is not None:
        words.append(f"with {additions_text(config.additions)}")
    return " ".join(words)


def _seconds(clip: Clip) -> str:
    phases = ", ".join(f"{name} {clip.seconds[name]:.2f}" for name in ("encode", "denoise", "decode"))
    return f"{clip.seconds['total']:.2f} ({phases})"


def _text(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        return ",".join(_text(item) for item in value)
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_text(item)}" for key, item in value.items())
    return str(value)
