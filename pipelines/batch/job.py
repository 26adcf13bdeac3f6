"""One job of a batch: its key and its file name.

    key  = SHA-256 of {settings without the model's name, dtype, model revision, package version} as canonical JSON
    file = {index:05d}-{slug}-{seed}-{first 8 hex digits of the key}.mp4      (or .png, for one frame)

A clip that is made by two stages (``highres``) is known by both: its settings are the target's, and its native stage lies beside
it as {file's name}-native. A stream is known by its recipe and cache too, and by its causal checkpoint's content.

The key says what is to be made, not in which order or under which name: a job that moves to another line of the input, or
runs on another machine, keeps it. The model counts by its revision, a tiny autoencoder, a LoRA
and the files that a clip is made from by their SHA-256, because a name does not say what it stands for.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import unicodedata
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from tilewise import __version__
from tilewise.pipelines.batch.stream_jobs import Streamed
from tilewise.pipelines.conditioning.files import ROLES
from tilewise.pipelines.conditioning.inputs import files_of
from tilewise.pipelines.generation.settings import GenerateSettings, TinyChoice
from tilewise.pipelines.highres.settings import HighresSettings
from tilewise.pipelines.loading.loras import LoraChoice
from tilewise.pipelines.media.files import suffix_of
from tilewise.plugins.config import Config
from tilewise.plugins.errors import ConfigError

SLUG_BYTES = (
    60  # 60 letters of English, 20 of Japanese: with what else is in a name below the 143 of encrypted file systems
)


def slug(text: str) -> str:
    """The words of a text as a piece of a file name: letters and digits of any script, in lower case, and "-" between words; at
    most 60 bytes of UTF-8, "clip" if nothing is left."""
    known = unicodedata.normalize("NFC", text[: 20 * SLUG_BYTES]).lower()
    # L, M and N: letters, marks on letters (vowels of Hindi and Thai are such) and digits.
    words = "".join(c if unicodedata.category(c)[0] in "LMN" else " " for c in known).split()
    return "-".join(words).encode()[:SLUG_BYTES].decode(errors="ignore").rstrip("-") or "clip"


@dataclasses.dataclass(frozen=True)
class Stages:
    """How a clip past the training size is made, beside its settings: what `prepare` takes.

    height, width: of the native stage, pixels. method: its attention. options: of the second stage, the model's own filled in.
    """

    height: int
    width: int
    method: Config
    options: HighresSettings

    def to_dict(self) -> dict[str, Any]:
        """What decides the clip, as JSON values, in the form of `HighresClip.to_dict`. The memory to stay within is left out: it
        says where a clip fits, not what it shows, and a batch that is resumed elsewhere keeps its clips."""
        options = {name: value for name, value in self.options.to_dict().items() if name != "max_memory"}
        native = {"height": self.height, "width": self.width, "method": self.method.to_dict()}
        return {"native": native, "options": options}

    @classmethod
    def from_dict(cls, told: Mapping[str, Any]) -> Stages:
        """What `to_dict` or `HighresClip.to_dict` wrote. Raises ConfigError for anything else."""
        native, options = (told.get(name) if isinstance(told, Mapping) else None for name in ("native", "options"))
        if not isinstance(native, Mapping) or not isinstance(options, Mapping) or {"height", "width"} - native.keys():
            raise ConfigError("what the clip says of its two stages (highres) is incomplete, or of another kind")
        method = Config.from_dict(native.get("method"))
        return cls(native["height"], native["width"], method, HighresSettings.from_dict(options))


@dataclasses.dataclass(frozen=True)
class Job:
    """A clip to make.

    index: place in the batch, from 0. lines: where in the input it was asked for; several lines may ask for the same. ids: the
    input's own names for it, one for each of those lines that has one. settings: all resolved. dtype: of the weights,
    "float32" and the like. revision: of the model, as `model_revision` gives it. flop: estimated floating-point operations of
    the denoising. highres: for a clip of two stages, whose target `settings` are then. stream: for a stream.
    """

    index: int
    lines: tuple[int, ...]
    ids: tuple[str, ...]
    settings: GenerateSettings
    dtype: str
    revision: str
    flop: float
    highres: Stages | None = None
    stream: Streamed | None = None

    @cached_property
    def key(self) -> str:
        """64 hex digits; equal for jobs that make the same clip."""
        settings = {
            name: value
            for name, value in self.settings.to_dict().items()
            if name not in ("model", "decode", "lora", *ROLES, "strength")
        }
        identity = {**settings, "tilewise": __version__, "dtype": self.dtype, "revision": self.revision}
        if self.highres is not None:
            identity["highres"] = self.highres.to_dict()
        if self.stream is not None:
            identity["stream"] = self.stream.to_dict()
        if (tiny := TinyChoice.parse(self.settings.decode)) is not None:
            identity["decode"] = tiny.sha256
        if self.settings.lora:
            identity["lora"] = [(one.sha256, one.weight) for one in map(LoraChoice.parse, self.settings.lora)]
        # Left out where there are none: clips of earlier versions keep their keys.
        if files := files_of(vars(self.settings)):
            identity["files"] = {role: [file.sha256 for file in several] for role, several in files.items()}
        if self.settings.strength is not None:
            identity["strength"] = self.settings.strength
        text = json.dumps(identity, sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()

    @cached_property
    def shape(self) -> str:
        """Equal for jobs that differ in prompt, seed and files only: what holds for one of them holds for all."""
        return repr((self.settings.of_any_content(), self.highres, self.stream))

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """(height, width) of each clip that is written: of the target, and of the native stage if there is one."""
        own = [(self.settings.height, self.settings.width)]
        return own if self.highres is None else [*own, (self.highres.height, self.highres.width)]

    @property
    def file(self) -> str:
        """Name of the clip within the batch's folder."""
        words = slug(self.ids[0] if self.ids else self.settings.prompt)
        suffix = suffix_of(self.settings.frames) if self.stream is None else ".mp4"  # a picture cannot grow
        return f"{self.index:05d}-{words}-{self.settings.seed}-{self.key[:8]}{suffix}"

    @property
    def loaded(self) -> tuple[Any, ...]:
        """Equal for jobs that one loaded pipeline makes."""
        return self.settings.model, self.dtype, self.settings.lora, self.stream and self.stream.loaded

    def to_dict(self) -> dict[str, Any]:
        """What the clip's metadata says about its place in the batch."""
        return {
            "key": self.key,
            "index": self.index,
            "ids": list(self.ids),
            "lines": list(self.lines),
            "revision": self.revision,
            "flop": self.flop,
        }


def merge_equal(jobs: Sequence[Job]) -> list[Job]:
    """The jobs without repetition, counted anew: of those with the same key the first, with the lines and ids of all."""
    first: dict[str, Job] = {}
    for job in jobs:
        before = first.get(job.key)
        if before is None:
            first[job.key] = job
        else:
            lines = tuple(dict.fromkeys([*before.lines, *job.lines]))
            first[job.key] = dataclasses.replace(before, lines=lines, ids=tuple(dict.fromkeys([*before.ids, *job.ids])))
    return [dataclasses.replace(job, index=index) for index, job in enumerate(first.values())]
