"""The settings that determine a clip. They can be saved and loaded."""

from __future__ import annotations

import dataclasses
import re
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tilewise import __version__
from tilewise.pipelines.conditioning.files import ONE, ROLES, InputFile
from tilewise.pipelines.generation.method_options import METHOD_OPTIONS, SET
from tilewise.pipelines.media.files import LEAST_FPS, MOST_FPS
from tilewise.pipelines.options import Option, is_number, option, options_of
from tilewise.plugins.errors import ConfigError, unknown

if TYPE_CHECKING:
    from tilewise.plugins.config import Config

MAX_SEED = 2**63 - 1
# Beyond these a value is a mistake, and takes a machine's memory or hours before anything else says so.
MAX_PROMPT = 50_000  # characters; text encoders read hundreds of tokens
MOST = {"height": 2**16, "width": 2**16, "frames": 10**7, "steps": 10**6, "max_sequence_length": 2**13}
DEFAULT_MODEL, DEFAULT_METHOD = "demo", "sta-balanced"  # of a request that names none
RANDOM_SEED = "random"
MODELS_OWN = "the model's own"
OWN_VAE = "vae"
METHOD_HELP = (
    "sta, draft, auto, xattention, inward, neighborhood, shifted-windows, dense, a rule from the literature (sol, moba, hip, "
    "less-is-more, dhsa, flexprefill, power, duo, svg2, routing, hyper, foreground, delta), a preset (sta-quality, sta-balanced, "
    "sta-fast, draft-quality, draft-balanced, draft-fast, draft-few-steps, auto-quality, auto-balanced, auto-fast, hidiffusion), "
    "or a config .json. `tilewise methods` lists them."
)


@dataclasses.dataclass(frozen=True)
class TinyChoice:
    """What `decode` says of a tiny autoencoder. sha256: of the file when it was first read; "": not read yet."""

    path: Path
    sha256: str = ""

    @classmethod
    def parse(cls, said: Any) -> TinyChoice | None:
        """From "tiny=PATH" or "tiny=PATH@sha256:HEX"; None for the model's own VAE. Raises ConfigError for anything else."""
        if said == OWN_VAE:
            return None
        found = re.fullmatch(r"\s*tiny=\s*(\S.*?)(?:@sha256:([0-9a-f]{64}))?\s*", str(said), re.DOTALL)
        if not isinstance(said, str) or found is None:
            raise ConfigError(
                f"decode takes vae, the model's own, or tiny=PATH, the file of a tiny autoencoder; not {str(said)[:80]!r}"
            )
        return cls(Path(found[1]).expanduser(), found[2] or "")

    def __str__(self) -> str:
        return f"tiny={self.path}" + (f"@sha256:{self.sha256}" if self.sha256 else "")


@dataclasses.dataclass(frozen=True)
class GenerateSettings:
    """What to generate and how; with the same model, device and library versions it gives the same clip again.

    Args:
        prompt: what to show. negative: what to avoid; only used with guidance above 1.
        model: where the pipeline came from ("demo", a folder, a hub id); kept in the metadata.
        method: the attention method with its schedule.
        height, width: pixels. frames: length of the clip. fps: frames a second on playback.
        steps: denoising steps. guidance: classifier-free guidance scale; 1 or less runs without.
        seed: of the starting noise, which is drawn on the CPU so that every device starts alike.
        max_sequence_length: text tokens; None for the pipeline's own.
        lora: LoRAs in the model's weights, "PATH" or "PATH:WEIGHT" each; `resolve_settings` adds their SHA-256.
        decode: "vae", the model's own, or "tiny=PATH", a tiny autoencoder's file; `resolve_settings` adds its SHA-256.
        image, last_image, video, mask, reference: files that the clip is made from; `resolve_settings` adds their SHA-256.
        strength: how far it may go from them, in (0, 1]; None for the pipeline's own.

    Raises:
        ConfigError: for values that can never be right. Whether a model takes them is seen by `resolve_settings`.
    """

    prompt: str = option(help="What the clip should show.")
    negative: str = option(help="What the clip should not show.")
    model: str = option(
        help="demo (bundled), a diffusers folder, or a hub id such as org/name.", shown_default=DEFAULT_MODEL
    )
    method: Config = option(help=METHOD_HELP, kind="method", shown_default=DEFAULT_METHOD)  # noqa: RUF009
    height: int = option(help="Pixels.", shown_default=MODELS_OWN)
    width: int = option(help="Pixels.", shown_default=MODELS_OWN)
    frames: int = option(help="Frames of the clip.", shown_default=MODELS_OWN)
    steps: int = option(help="Denoising steps.", shown_default=MODELS_OWN)
    guidance: float = option(help="Guidance scale; 1 turns guidance off.", shown_default=MODELS_OWN)
    seed: int = option(help="Seed of the starting noise, a number or random.", shown_default="0")
    fps: float = option(help="Frames per second on playback.", shown_default=MODELS_OWN)
    max_sequence_length: int | None = option(None, help="Text tokens of a prompt.", shown_default=MODELS_OWN)
    decode: str = option(
        OWN_VAE, help="What makes frames of latents: vae (the model's own), or tiny=PATH (TAEHV).", names_file=True
    )

    lora: tuple[str, ...] = option(
        (),
        help="PATH or PATH:WEIGHT: a LoRA, style.safetensors:0.8 for instance. Repeatable.",
        shown_default="none",
        names_file=True,
    )
    image: str | None = option(
        None, help="Picture that the clip begins with, or that is changed.", shown_default="none", names_file=True
    )
    last_image: str | None = option(
        None, help="Picture that the clip ends with.", shown_default="none", names_file=True
    )
    video: str | None = option(None, help="Video that is changed or continued.", shown_default="none", names_file=True)
    mask: str | None = option(
        None,
        help="Picture or video: what is white in it is made anew.",
        shown_default="none",
        names_file=True,
    )
    reference: tuple[str, ...] = option(
        (),
        help="Picture of what the clip should show. Repeatable.",
        shown_default="none",
        names_file=True,
    )
    strength: float | None = option(
        None,
        help="Share of the steps that run on what the clip is made from: a picture, a video, or with --highres the first stage. "
        "With --stream: the noise level that a video is brought to. LTX: how closely it keeps to the picture or video.",
        shown_default=MODELS_OWN,
    )

    def __post_init__(self) -> None:
        for name in ("prompt", "negative", "model"):
            check_text(name, getattr(self, name))
        if not self.prompt.strip():
            raise ConfigError("the prompt is empty: say what the clip should show")
        for name in ("height", "width", "frames", "steps", "max_sequence_length"):
            value = getattr(self, name)
            if name == "max_sequence_length" and value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{name} must be a whole number of at least 1, not {_told(value)}")
            if value > MOST[name]:
                raise ConfigError(f"{name} must be at most {MOST[name]:,}, not {_told(value)}")
        if not isinstance(self.seed, int) or isinstance(self.seed, bool) or not 0 <= self.seed <= MAX_SEED:
            raise ConfigError(f"seed must be a whole number from 0 to 2^63 - 1, not {_told(self.seed)}")
        if not is_number(self.guidance) or self.guidance < 0:
            raise ConfigError(f"guidance must be a number of at least 0, not {_told(self.guidance)}")
        check_fps(self.fps)
        TinyChoice.parse(self.decode)
        if isinstance(self.lora, str) or not all(isinstance(one, str) for one in self.lora):
            raise ConfigError(f"lora must be a list of texts, not {self.lora!r}")
        object.__setattr__(self, "lora", tuple(self.lora))
        if isinstance(self.reference, str) or not isinstance(self.reference, list | tuple):
            raise ConfigError(f"reference must be a list of paths, not {self.reference!r}")
        object.__setattr__(self, "reference", tuple(self.reference))
        for role in ROLES:
            named = getattr(self, role)
            for one in named if isinstance(named, tuple) else () if named is None else (named,):
                check_text(role.replace("_", " "), one)
                InputFile.parse(role, one)
        if self.strength is not None and not (is_number(self.strength) and 0 < self.strength <= 1):
            raise ConfigError(f"strength must be a number above 0, up to 1, not {_told(self.strength)}")

    @property
    def is_dense(self) -> bool:
        """Whether this is the stock pipeline, untouched."""
        return self.method.is_stock

    def to_dict(self) -> dict[str, Any]:
        """JSON values only; "tilewise" is the version that made it. A clip's file adds "run": how it went."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        lists = {"lora": list(self.lora), "reference": list(self.reference)}
        return {"tilewise": __version__, **values, **lists, "method": self.method.to_dict()}

    def of_any_content(self) -> GenerateSettings:
        """Without what clips of one kind differ in: prompt, seed, and which files they are made from."""
        files: dict[str, Any] = {role: None if getattr(self, role) is None else "?" for role in ONE}
        references = ("?",) * len(self.reference)
        return dataclasses.replace(self, prompt="?", negative="", seed=0, **files, reference=references)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> GenerateSettings:
        """The settings that `to_dict` wrote. Raises ConfigError for unknown or missing keys."""
        from tilewise.plugins.config import Config  # needs PyTorch, which the declarations above must not

        fields = dataclasses.fields(cls)
        names = [field.name for field in fields]
        given = {key: value for key, value in values.items() if key not in ("tilewise", "run")}
        for key in given:
            if key not in names:
                raise unknown("setting", key, names)
        missing = [one.name for one in fields if one.name not in given and one.default is dataclasses.MISSING]
        if missing:
            raise ConfigError(f"settings are incomplete: {', '.join(missing)} missing")
        return cls(**{**given, "method": Config.from_dict(given["method"])})


def parse_seed(said: str | int) -> int:
    """A seed from "7", or a new one for "random"; `GenerateSettings` checks its range. Raises ConfigError for other text."""
    if isinstance(said, int):
        return said
    if said.strip().lower() == RANDOM_SEED:
        return secrets.randbelow(2**32)
    if not re.fullmatch(r"\s*[+-]?[0-9]{1,30}\s*", said):
        raise ConfigError(f"seed takes a whole number, or {RANDOM_SEED}, not {said[:80]!r}")
    return int(said)


def check_fps(fps: Any) -> None:
    """Raises ConfigError for a number of frames a second that no file can have."""
    if not is_number(fps) or not LEAST_FPS <= fps <= MOST_FPS:
        raise ConfigError(f"fps must be a number from {LEAST_FPS:g} to {MOST_FPS:g}, not {_told(fps)}")


def check_text(name: str, text: Any) -> None:
    """Raises ConfigError for what is no text, is longer than any prompt, or cannot be written as UTF-8."""
    if not isinstance(text, str):
        raise ConfigError(f"{name} must be text, not {_told(text)}")
    if len(text) > MAX_PROMPT:
        raise ConfigError(f"the {name} has {len(text):,} characters; at most {MAX_PROMPT:,} are taken")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"the {name} is no valid Unicode: {text[error.start]!a} at position {error.start + 1} is half of a character; "
            "save or type it as UTF-8"
        ) from error


def _told(value: Any) -> str:
    """A value as a message says it, however long or odd it is."""
    return ascii(value)[:80] if not isinstance(value, int) or abs(value) < 10**80 else "that many"


def _clip_options() -> dict[str, Option]:
    options = options_of(GenerateSettings)
    del options["prompt"]
    dtype = Option("dtype", "text", "auto, float32, bfloat16 or float16.", shown_default="auto")
    first = [options.pop(name) for name in ("model", "method")]
    negative, seed = options.pop("negative"), options.pop("seed")
    return {one.name: one for one in (*first, *METHOD_OPTIONS.values(), SET, *options.values(), negative, seed, dtype)}


CLIP_OPTIONS = _clip_options()
"""What a request may say of a clip beside its prompt: the fields of `GenerateSettings`, what the method has of its own, and the
dtype of the weights."""
