"""Everything that decides what a clip looks like, in one place that can be saved and read back."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from tilewise import __version__
from tilewise.pipelines.loading.model_defaults import native_size
from tilewise.plugins.config import Config, MethodLike, resolve
from tilewise.plugins.diffusers_compat import source_of
from tilewise.plugins.errors import ConfigError, unknown
from tilewise.plugins.explain import Explanation, explain

MAX_SEED = 2**63 - 1


@dataclasses.dataclass(frozen=True)
class GenerateSettings:
    """What to generate and how; with the same model, device and library versions it gives the same clip again.

    Args:
        prompt: what to show. negative: what to avoid; only used with guidance above 1.
        model: where the pipeline came from ("demo", a folder, a hub id); kept for the record.
        method: the attention method with its schedule.
        height, width: pixels. frames: length of the clip. fps: frames a second on playback.
        steps: denoising steps. guidance: classifier-free guidance scale; 1 or less runs without.
        seed: of the starting noise, which is drawn on the CPU so that every device starts alike.
        max_sequence_length: text tokens; None for the pipeline's own.

    Raises:
        ConfigError: for values that can never be right. Whether a model takes the size is seen by `resolve_settings`.
    """

    prompt: str
    negative: str
    model: str
    method: Config
    height: int
    width: int
    frames: int
    steps: int
    guidance: float
    seed: int
    fps: float
    max_sequence_length: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.prompt, str) or not self.prompt.strip():
            raise ConfigError("the prompt is empty: say what the clip should show")
        for name in ("height", "width", "frames", "steps", "max_sequence_length"):
            value = getattr(self, name)
            if name == "max_sequence_length" and value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{name} must be a whole number of at least 1, not {value!r}")
        if not isinstance(self.seed, int) or not 0 <= self.seed <= MAX_SEED:
            raise ConfigError(f"seed must be a whole number from 0 to 2^63 - 1, not {self.seed!r}")
        if not _is_number(self.guidance) or self.guidance < 0:
            raise ConfigError(f"guidance must be a number of at least 0, not {self.guidance!r}")
        if not _is_number(self.fps) or self.fps <= 0:
            raise ConfigError(f"fps must be a number above 0, not {self.fps!r}")

    @property
    def is_dense(self) -> bool:
        """Whether this is the stock pipeline, untouched."""
        return self.method.method.name == "dense"

    def to_dict(self) -> dict[str, Any]:
        """JSON values only; "tilewise" is the version that made it. A clip's file adds "run": how it went."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {"tilewise": __version__, **values, "method": self.method.to_dict()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> GenerateSettings:
        """The settings that `to_dict` wrote. Raises ConfigError for unknown or missing keys."""
        names = [field.name for field in dataclasses.fields(cls)]
        given = {key: value for key, value in values.items() if key not in ("tilewise", "run")}
        for key in given:
            if key not in names:
                raise unknown("setting", key, names)
        missing = [name for name in names if name not in given and name != "max_sequence_length"]
        if missing:
            raise ConfigError(f"settings are incomplete: {', '.join(missing)} missing")
        return cls(**{**given, "method": Config.from_dict(given["method"])})


def resolve_settings(
    pipe: Any,
    prompt: str,
    *,
    method: MethodLike = "sta-balanced",
    model: str = "",
    negative: str = "",
    height: int | None = None,
    width: int | None = None,
    frames: int | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    seed: int = 0,
    fps: float | None = None,
    max_sequence_length: int | None = None,
) -> GenerateSettings:
    """Settings for a pipeline: what is not given comes from `native_size(pipe)`, and the size is checked.

    Diffusers rounds a size that the model cannot make, with a line in the log; here it is an error, so that a clip is
    always as large as it was asked for. `pipe` may be a skeleton: no weights are run.

    Raises ConfigError for a bad value, or for a size, with the nearest one that the model takes.
    """
    native = native_size(pipe)

    def pick(given: Any, default: Any) -> Any:
        return default if given is None else given

    settings = GenerateSettings(
        prompt=prompt,
        negative=negative,
        model=model or source_of(pipe) or type(pipe).__name__,
        method=resolve(method),
        height=pick(height, native.height),
        width=pick(width, native.width),
        frames=pick(frames, native.num_frames),
        steps=pick(steps, native.steps),
        guidance=float(pick(guidance, native.guidance)),
        seed=seed,
        fps=float(pick(fps, native.fps)),
        max_sequence_length=pick(max_sequence_length, native.max_sequence_length),
    )
    explain_settings(pipe, settings)
    return settings


def explain_settings(pipe: Any, settings: GenerateSettings) -> Explanation:
    """`tilewise.explain` for these settings; raises ConfigError for a size that the model does not take."""
    return explain(
        pipe,
        height=settings.height,
        width=settings.width,
        num_frames=settings.frames,
        num_inference_steps=settings.steps,
        method=settings.method,
    )


def prompt_notes(pipe: Any, settings: GenerateSettings) -> list[str]:
    """What the text encoder will not see of the prompts: words that it does not know, and words past its limit."""
    tokenizer = getattr(pipe, "tokenizer", None)
    if tokenizer is None:
        return []
    notes = []
    for name, text in (("prompt", settings.prompt), ("negative prompt", settings.negative)):
        ids = tokenizer(text).input_ids
        limit = settings.max_sequence_length
        if limit is not None and len(ids) > limit:
            notes.append(f"the {name} has {len(ids)} tokens, the model reads the first {limit}")
        strange = _unknown_words(tokenizer, text)
        if strange:
            notes.append(f"the model does not know these words of the {name}: {', '.join(strange)}")
    return notes


def _unknown_words(tokenizer: Any, text: str) -> list[str]:
    """The pieces of a text that the tokenizer turns into its unknown token, punctuation aside, each once."""
    if tokenizer.unk_token_id is None or not tokenizer.is_fast:
        return []
    coded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    pieces = (
        text[start:end]
        for token, (start, end) in zip(coded.input_ids, coded.offset_mapping, strict=True)
        if token == tokenizer.unk_token_id
    )
    return list(dict.fromkeys(piece for piece in pieces if any(c.isalnum() for c in piece)))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
