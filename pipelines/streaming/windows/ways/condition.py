"""``condition``: the last frame of a window is the picture that the next one begins with, for models that take one.

Each window is a clip of its own, whose first frame the video has already. This is the one way in which pixels are encoded again:
the model was trained with a picture.
"""

from __future__ import annotations

from typing import Any

import torch

from tilewise.pipelines.streaming.windows.spaces import ALIKE
from tilewise.pipelines.streaming.windows.ways.base import Way, register


@register
class Condition(Way):
    name = "condition"
    restarts = True

    def refuses(self, pipe: Any) -> str | None:
        return None if type(pipe).__name__ in ALIKE else f"only {', '.join(ALIKE)} begins with a picture here"

    def usual(self, pipe: Any) -> bool:
        return True

    def usual_overlap(self, pipe: Any, window: int) -> int:
        return 1

    def level(self, sigma: float, prefix_noise: float) -> float:
        return sigma

    def shares(self, overlap: int) -> torch.Tensor:
        return torch.zeros(overlap)
