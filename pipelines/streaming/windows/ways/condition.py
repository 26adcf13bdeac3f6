"""``condition``: the last frames of a window are what the next one begins with, for models that take a picture or some frames.

Each window is a clip of its own, whose first frames the video has already. This is the one way in which pixels are encoded again:
the model was trained with pictures. VACE (arXiv 2503.07598, "video extension") takes several frames, which show it how things
move: the control video has them in front and grey behind, and the mask is white where frames are to be made.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from tilewise.pipelines.conditioning.roles import roles_of
from tilewise.pipelines.streaming.windows.spaces import ALIKE
from tilewise.pipelines.streaming.windows.ways.base import Way, register

FRAMES = 2  # latent frames of an overlap that nobody named, where a model takes several
GREY = 128


@register
class Condition(Way):
    name = "condition"
    restarts = True

    def refuses(self, pipe: Any) -> str | None:
        kind = type(pipe).__name__
        return None if kind in ALIKE else f"only {', '.join(ALIKE)} begin with a picture or frames here, not {kind}"

    def usual(self, pipe: Any) -> bool:
        return True

    def usual_overlap(self, pipe: Any, window: int) -> int:
        return max(1, min(FRAMES, window // 3)) if _takes_frames(pipe) else 1

    def most(self, pipe: Any) -> int | None:
        return None if _takes_frames(pipe) else 1

    def arguments(self, pipe: Any, frames: NDArray[np.uint8], length: int) -> dict[str, Any]:
        if not _takes_frames(pipe):
            return {"image": Image.fromarray(frames[-1])}
        rest = length - len(frames)
        grey = Image.fromarray(np.full(frames.shape[1:], GREY, np.uint8))
        black, white = (Image.new("L", grey.size, value) for value in (0, 255))
        return {
            "video": [*map(Image.fromarray, frames), *[grey] * rest],
            "mask": [*[black] * len(frames), *[white] * rest],
        }

    def level(self, sigma: float, prefix_noise: float) -> float:
        return sigma

    def shares(self, overlap: int) -> torch.Tensor:
        return torch.zeros(overlap)


def _takes_frames(pipe: Any) -> bool:
    return {"video", "mask"} <= roles_of(pipe).keys()
