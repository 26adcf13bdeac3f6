"""Past the training size in one stage: UNets, by the preset ``hidiffusion`` (arXiv 2311.17528).

A UNet's deeper levels get maps of the usual size in the first steps, which settle what the picture shows; so there is no native
stage to begin from, and the stock pipeline runs once, at the target's size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilewise.pipelines.generation.generate import Clip, Progress, generate
from tilewise.pipelines.generation.resolve import resolve_settings
from tilewise.pipelines.generation.settings import GenerateSettings
from tilewise.pipelines.loading.model_defaults import takes_hidiffusion
from tilewise.plugins.config import MethodLike
from tilewise.plugins.errors import ConfigError

METHOD = "hidiffusion"


@dataclasses.dataclass(frozen=True)
class OneStageClip:
    """A clip that was made at the target's size at once."""

    clip: Clip

    @property
    def frames(self) -> NDArray[np.uint8]:
        """uint8 (T, H, W, 3)."""
        return self.clip.frames

    def to_dict(self) -> dict[str, Any]:
        """JSON values only, without frames."""
        return {"settings": self.clip.settings.to_dict(), "seconds": self.clip.seconds}


def in_one_stage(pipe: Any) -> bool:
    """Whether ``highres`` makes a pipeline's clips in one stage: its denoiser is the UNet of SD 1.5, SD 2.1 or SDXL."""
    return takes_hidiffusion(pipe)


def refuse_stages(given: Sequence[str], *, flags: bool = False) -> None:
    """Raises ConfigError for options that two stages have. flags: name them as the command line does."""
    if given:
        names = [f"--{name.replace('_', '-')}" if flags else name for name in given]
        raise ConfigError(
            f"{', '.join(names)}: a UNet's picture is made in one stage, by the preset {METHOD}, which has no such option. Leave "
            "it out; thresholds are options of raunet, such as add='raunet:t1=0.5'"
        )


def one_stage(
    pipe: Any, prompt: str, height: int, width: int, method: MethodLike | None, shared: dict[str, Any]
) -> GenerateSettings:
    """The settings of a clip at the target's size. method: None: the preset ``hidiffusion``.

    Raises as `resolve_settings`.
    """
    return resolve_settings(pipe, prompt, method=method or METHOD, height=height, width=width, **shared)


def make_in_one_stage(pipe: Any, settings: GenerateSettings, progress: Progress | None = None) -> OneStageClip:
    """Raises as `generate`."""
    return OneStageClip(generate(pipe, settings, progress))
