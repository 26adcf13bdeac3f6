"""``prefix``: the last latents stay in front of the next window, clean or a little noised.

For models that were trained with clean frames in front of noisy ones: LTX-Video (arXiv 2501.00103), Wan 2.2 TI2V-5B, and
SkyReels-V2's diffusion forcing (arXiv 2504.13074), which gives them a noise level of 0.02.
"""

from __future__ import annotations

from typing import Any

import torch

from tilewise.pipelines.loading.model_defaults import model_defaults
from tilewise.pipelines.streaming.windows.ways.base import Way, needs_picture, register
from tilewise.plugins.models.common.registry import family_of
from tilewise.plugins.patching import denoisers_of

MOST = 5  # latent frames of an overlap that nobody named: more cost time, and add little


@register
class Prefix(Way):
    name = "prefix"
    per_frame = True

    def refuses(self, pipe: Any) -> str | None:
        if (needed := needs_picture(pipe)) is not None:
            return needed
        for denoiser in denoisers_of(pipe).values():
            family = family_of(denoiser)
            if family is None:
                return f"{type(denoiser).__name__} is of no family that is known here"
            if isinstance(why := family.clean_frames(denoiser, pipe), str):
                return why
        return None

    def usual(self, pipe: Any) -> bool:
        return self.trained(pipe) > 0

    def usual_overlap(self, pipe: Any, window: int) -> int:
        return max(1, min(self.trained(pipe), window // 3, MOST))

    def trained(self, pipe: Any) -> int:
        found = [model_defaults(pipe).clean_frames]
        for denoiser in denoisers_of(pipe).values():
            family = family_of(denoiser)
            assert family is not None
            told = family.clean_frames(denoiser, pipe)
            found.append(told if isinstance(told, int) else 0)
        return max(found)

    def level(self, sigma: float, prefix_noise: float) -> float:
        return prefix_noise

    def shares(self, overlap: int) -> torch.Tensor:
        return torch.ones(overlap)
