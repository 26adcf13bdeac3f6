"""Settings of a stream that a request may name."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from tilewise.pipelines.generation.settings import CLIP_OPTIONS, check_text
from tilewise.pipelines.options import Option, check_choices, is_number, option, options_of
from tilewise.pipelines.streaming.recipe import CausalRecipe
from tilewise.plugins.errors import ConfigError, unknown
from tilewise.plugins.streaming.kv_cache import SINK_POSITIONS, STORAGES

# What `set_prompt` takes, and the policies. Named here too, since importing those needs PyTorch; a test holds them together.
CHANGES = ("recache", "flush", "blend")
POLICIES = ("adaptive", "dual_ema", "ema", "fixed", "reference", "shot")
MOST_SECONDS = 10**7
WAYS = ("condition", "diagonal", "prefix", "renoised")
RECIPES_OWN = "the recipe's"
LEAST = {"chunk": 1, "window": 1, "sink": 0, "memory": 0, "overlap": 1, "previous": 0, "steps": 1, "prompt_over": 1}
OF_WINDOWS = ("way", "window", "overlap", "adain", "prefix_noise", "sink", "previous", "steps")
OF_RECIPE = ("chunk", "window", "sink", "memory", "sink_position", "policy")


def check_seconds(seconds: Any) -> None:
    """Raises ConfigError for a length that no video can have."""
    if not (is_number(seconds) and seconds > 0):
        raise ConfigError(f"seconds must be a number above 0, not {seconds!r}")
    if seconds > MOST_SECONDS:
        raise ConfigError(f"seconds must be at most {MOST_SECONDS:,}, not {seconds:g}")


@dataclasses.dataclass(frozen=True)
class StreamSettings:
    """How a causal checkpoint streams, or windows of a bidirectional model. Lengths are in latent frames; None: the recipe's own.

    Args:
        causal: file or folder of the checkpoint; None: the one that comes with the model, or the model's own weights where a
            recipe is named.
        recipe: name of a published recipe; None: what the checkpoint's files say.
        seconds: length of the video.
        chunk, window, sink, memory, sink_position, policy: see ``CausalRecipe``. storage: see ``KVCache``.
        way, overlap, adain, prefix_noise, previous, steps: see ``WindowRecipe``, which has window and sink too. A way makes
            windows of any model.
        prompt_at: changes of the prompt, each "TIME=TEXT" with TIME in seconds ("10s", "1.5s", "10"), rising, within the video.
        prompt_change, prompt_over: how they are made, and in how many chunks by "blend"; see ``VideoStream.set_prompt``.
        decode_device: where frames are decoded; None: with the rest.

    Raises:
        ConfigError: for values that can never be right.
    """

    causal: str | None = option(
        None,
        help="Causal checkpoint: a file or folder.",
        names_file=True,
        shown_default="the one in the model's folder",
    )
    recipe: str | None = option(
        None, help="Name of a published recipe, self-forcing for instance.", shown_default="the checkpoint's own"
    )
    seconds: float | None = option(None, help="Length of the video.")
    chunk: int | None = option(None, help="Latent frames of a chunk.", shown_default=RECIPES_OWN)
    window: int | None = option(None, help="Latent frames that a chunk attends to.", shown_default=RECIPES_OWN)
    sink: int | None = option(
        None,
        help="First latent frames that stay in the window, or that later windows attend to.",
        shown_default=RECIPES_OWN,
    )
    memory: int | None = option(
        None, help="Latent frames beside the window, for averages of what left it.", shown_default=RECIPES_OWN
    )
    sink_position: str | None = option(
        None, help="Where the sink stands.", choices=SINK_POSITIONS, shown_default=RECIPES_OWN
    )
    policy: str | None = option(
        None, help="What becomes of frames that leave the window.", choices=POLICIES, shown_default=RECIPES_OWN
    )
    storage: str = option(
        "model", help="Keys and values of the window: in the model's dtype, or in 8 bits.", choices=STORAGES
    )
    way: str | None = option(
        None,
        help="Makes windows of a bidirectional model: how one goes on from the other.",
        choices=WAYS,
        shown_default="the model's own, without a causal checkpoint",
    )
    overlap: int | None = option(
        None, help="Latent frames that a window shares with the one before.", shown_default="the way's own"
    )
    adain: float | None = option(
        None, help="Against drift of windows: share by which latents get the first window's mean and deviation.",
        shown_default="0",
    )  # fmt: skip
    prefix_noise: float | None = option(
        None, help="Against drift of windows: noise level of the frames in front, way prefix.", shown_default="0"
    )
    previous: int | None = option(
        None, help="Latent frames of the window before, in front of the overlap, that a window attends to.",
        shown_default="0",
    )  # fmt: skip
    steps: int | None = option(None, help="Denoising steps of a window.", shown_default="the model's own")
    prompt_at: tuple[str, ...] = option(
        (),
        help='TIME=TEXT: another prompt from then on, 10s="a blue square" for instance. Repeatable.',
        shown_default="none",
    )
    prompt_change: str = option("recache", help="How the prompt changes.", choices=CHANGES)
    prompt_over: int = option(3, help="Chunks that a change by blend takes.")
    decode_device: str | None = option(None, help="Device that decodes, cuda:1 for instance.", shown_default="the same")

    def __post_init__(self) -> None:
        check_choices(self)
        for name, least in LEAST.items():
            value = getattr(self, name)
            if value is None and name != "prompt_over":
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ConfigError(f"{name} must be a whole number of at least {least}, not {value!r}")
        for name in ("adain", "prefix_noise"):
            value = getattr(self, name)
            if value is not None and not (is_number(value) and 0 <= value <= 1):
                raise ConfigError(f"{name} must be a number from 0 to 1, not {value!r}")
        if self.seconds is not None:
            check_seconds(self.seconds)
        if not isinstance(self.prompt_at, list | tuple):
            raise ConfigError(f"prompt_at must be a list of texts, not {self.prompt_at!r}")
        for said in self.prompt_at:
            check_text("text of prompt_at", said)
        object.__setattr__(self, "prompt_at", tuple(self.prompt_at))
        self._check_times()

    def _check_times(self) -> None:
        before = 0.0
        for said, (time, _) in zip(self.prompt_at, self.prompts(), strict=True):
            if time <= before:
                what = "the video begins with the first prompt" if before == 0 else f"the one before is at {before:g} s"
                raise ConfigError(f"--prompt-at {said!r}: the times of the prompts must rise, and {what}")
            if self.seconds is not None and time >= self.seconds:
                raise ConfigError(f"--prompt-at {said!r} is past the end of the video, {self.seconds:g} s")
            before = time

    def prompts(self) -> list[tuple[float, str]]:
        """The changes of the prompt: (seconds of the video, prompt)."""
        return [parse_prompt_at(said) for said in self.prompt_at]

    def windows(self) -> dict[str, Any]:
        """What these settings say of windows."""
        return {name: value for name in OF_WINDOWS if (value := getattr(self, name)) is not None}

    def refuse_others(self, *, windows: bool, why: str) -> None:
        """Raises ConfigError for options of causal checkpoints where a stream makes windows, or the other way round.

        why: what it is then.
        """
        usual = StreamSettings()
        of_causal = ("causal", "recipe", *OF_RECIPE, "storage")
        others, own = (of_causal, OF_WINDOWS) if windows else (OF_WINDOWS, of_causal)
        for name in (name for name in others if name not in own):
            if getattr(self, name) != getattr(usual, name):
                option = f"--{name.replace('_', '-')}"
                of = "causal checkpoints" if windows else "windows"
                raise ConfigError(f"{option} is an option of streams of {of}, and {why}")

    def applied(self, recipe: CausalRecipe) -> CausalRecipe:
        """A recipe with what these settings say otherwise.

        Raises:
            ConfigError: for a window without room for chunk, sink and memory.
        """
        return recipe.replace(**{name: value for name in OF_RECIPE if (value := getattr(self, name)) is not None})

    def until(self, seconds: float) -> StreamSettings:
        """For a video that was ended after so many seconds."""
        kept = tuple(said for said, (time, _) in zip(self.prompt_at, self.prompts(), strict=True) if time < seconds)
        return dataclasses.replace(self, seconds=seconds, prompt_at=kept)

    def to_dict(self) -> dict[str, Any]:
        """JSON values only."""
        return {**dataclasses.asdict(self), "prompt_at": list(self.prompt_at)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> StreamSettings:
        """What `to_dict` wrote. Raises ConfigError for unknown keys."""
        names = [field.name for field in dataclasses.fields(cls)]
        for key in values:
            if key not in names:
                raise unknown("setting of a stream", key, names)
        return cls(**values)


def parse_prompt_at(said: Any) -> tuple[float, str]:
    """(seconds, prompt) from "10s=a blue square". Raises ConfigError."""
    found = re.fullmatch(r"\s*(\d{1,9}(?:\.\d{1,9})?)\s*s?\s*=\s*(.*\S)\s*", str(said), re.DOTALL)
    if found is None:
        raise ConfigError(f'--prompt-at takes TIME=TEXT such as 10s="a blue square", not {str(said)[:80]!r}')
    return float(found[1]), found[2]


def stream_window(said: str) -> int:
    """Latent frames from what --window says, which for a clip is t,h,w of a method. Raises ConfigError."""
    if re.fullmatch(r"\s*\d{1,9}\s*", said) is None:
        raise ConfigError(
            f"--window takes one whole number with --stream, the latent frames that a chunk attends to, not {said[:80]!r}; "
            "a method with another window than its own is named by a config .json"
        )
    return int(said)


STREAM = Option(
    "stream",
    "flag",
    "A video of any length, into a file that plays while it grows.",
)
STREAM_OPTIONS = {name: one for name, one in options_of(StreamSettings).items() if name not in CLIP_OPTIONS}
"""What a request may say of a stream beside `CLIP_OPTIONS`, whose `window` counts latent frames here: the fields of
`StreamSettings`."""
NOT_OF_STREAMS = {
    "frames": "a stream's length is seconds",
    "steps": "its passes are the recipe's timesteps, but for windows, where a --way is named",
    **dict.fromkeys(
        ["last_image", "mask", "reference"], "a stream begins with a picture, --image, or changes a video, --video"
    ),
}
"""Options of clips that streams do not have, and why."""


def not_of_streams(given: Mapping[str, Any]) -> dict[str, str]:
    """`NOT_OF_STREAMS` for a request's options: windows have steps."""
    windows = given.get("way") is not None
    return {name: why for name, why in NOT_OF_STREAMS.items() if not (windows and name == "steps")}
