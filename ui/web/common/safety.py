"""Limits of the page: no public interface without a password, no work that is too large, no queue that is too long."""

from __future__ import annotations

import dataclasses
import ipaddress
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tilewise.pipelines.conditioning.inputs import files_of
from tilewise.pipelines.generation.settings import MAX_PROMPT, GenerateSettings
from tilewise.plugins.errors import ConfigError, TilewiseError

MAX_WORK = 10**10  # pixels x frames x steps: 81 frames of 1080 x 1920 in 50 steps are 8.4e9
MAX_WAITING = 8
# Even the plan of a clip takes long if it is long or wide enough, whatever the product is.
MAX_FRAMES = 1025
MAX_SIDE = 8192  # pixels
MAX_STEPS = 1000  # as many as schedulers are trained with
MAX_TEXT_TOKENS = 1024
AUTH_VARIABLE = "TILEWISE_UI_AUTH"


class RefusedError(TilewiseError):
    """The page will not do what was asked for, although it could."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """work: most pixels x frames x steps of one clip. waiting: jobs that may wait for the device, of all visitors together.
    inputs: absolute; the folder of the files that clips are made from, None where they are made from text alone."""

    work: int = MAX_WORK
    waiting: int = MAX_WAITING
    inputs: Path | None = None

    def __post_init__(self) -> None:
        if self.work < 1 or self.waiting < 1:
            raise ConfigError(f"the caps of the page must be at least 1, not {self.work} and {self.waiting}")

    def check(self, settings: GenerateSettings, clips: int = 1) -> None:
        """Raises RefusedError for a clip that is too large or long, or its prompt; `clips` of it count together."""
        self.check_work(settings.height, settings.width, settings.frames, settings.steps, clips)
        self.check_text_tokens(settings.max_sequence_length)
        if len(settings.prompt) > MAX_PROMPT or len(settings.negative) > MAX_PROMPT:
            raise RefusedError(f"a prompt has at most {MAX_PROMPT:,} characters")
        self.check_files(vars(settings))

    def check_files(self, said: Mapping[str, Any]) -> None:
        """Raises RefusedError for settings, by name, that are to be made from other files than those that were uploaded here."""
        for role, files in files_of(said).items():
            if any(file.path.resolve().parent != self.inputs for file in files):
                raise RefusedError(
                    f"{role.replace('_', ' ')} is no file that was uploaded to this page; files of its machine are for "
                    "`tilewise generate`"
                )

    def check_work(self, height: int, width: int, frames: int, steps: int, clips: int = 1) -> None:
        """`check` for bare numbers."""
        for name, value, most in (
            ("pixels in height", height, MAX_SIDE),
            ("pixels in width", width, MAX_SIDE),
            ("frames", frames, MAX_FRAMES),
            ("steps", steps, MAX_STEPS),
        ):
            if value > most:
                raise RefusedError(f"a clip of this page has at most {most:,} {name}")
        work = height * width * frames * steps * clips
        if work > self.work:
            many = f" x {clips} clips" if clips > 1 else ""
            raise RefusedError(
                f"{height} x {width} pixels x {frames} frames x {steps} steps{many} are {work / self.work:.1f} times what this "
                f"page was started for ({self.work:.3g}); take a smaller size, fewer frames or fewer steps"
            )

    def check_text_tokens(self, count: int | None) -> None:
        """Raises RefusedError for more text than an encoder should be asked to read; None is the model's own number."""
        if count is not None and count > MAX_TEXT_TOKENS:
            raise RefusedError(f"a prompt is read up to {MAX_TEXT_TOKENS:,} text tokens on this page, no further")


@dataclasses.dataclass(frozen=True)
class Address:
    """Where the page listens. auth: (user, password) that it asks for, or None."""

    host: str = "127.0.0.1"
    port: int = 7860
    auth: tuple[str, str] | None = None
    force: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"--port takes a number from 0 to 65535 (0: any that is free), not {self.port}")
        if not self.is_local and self.auth is None and not self.force:
            raise ConfigError(
                f"--host {self.host} lets other machines use this one's GPU and see its clips; give --auth USER:PASSWORD "
                f"(or {AUTH_VARIABLE}), or --force if the network is yours alone"
            )

    @property
    def is_local(self) -> bool:
        """Whether only this machine can reach it."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host.strip("[]")).is_loopback
        except ValueError:
            return False


def parse_auth(text: str | None) -> tuple[str, str] | None:
    """(user, password) of "user:password"; None of nothing. Raises ConfigError for one without both. Never echoes it."""
    if not text:
        return None
    user, _, password = text.partition(":")
    if not user or not password:
        raise ConfigError("--auth takes USER:PASSWORD, both of at least one character")
    return user, password


def check_outputs(folder: Path) -> Path:
    """The folder as an absolute path: everything in it can be fetched from the page, so it must hold nothing but clips.

    Raises ConfigError for one that certainly holds more: the working directory, a home, a root, or a folder of those.
    """
    path = folder.expanduser().resolve()
    for private in (Path.cwd(), Path.home(), Path("/")):
        if private.resolve().is_relative_to(path):
            raise ConfigError(
                f"--outputs {folder} holds {private}, and whoever opens the page can fetch every file below it; give a "
                "folder of its own, such as outputs"
            )
    if (path / "model_index.json").exists():
        raise ConfigError(f"--outputs {folder} is a model; give a folder of its own, such as outputs")
    return path
