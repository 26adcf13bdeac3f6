"""``renoised``: the last latents are put back in front of the next window at every pass, at the window's own noise level.

Any model can go this way, as all its latents have one timestep (RePaint, arXiv 2201.09865, along time). The shares of the overlap
fall linearly, so that one window is faded over into the other; its frames come out when the next window has changed them.
"""

from __future__ import annotations

from typing import Any

import torch

from tilewise.pipelines.streaming.windows.ways.base import Way, needs_picture, register


@register
class Renoised(Way):
    name = "renoised"
    holds_back = True

    def refuses(self, pipe: Any) -> str | None:
        return needs_picture(pipe)

    def usual(self, pipe: Any) -> bool:
        return True

    def usual_overlap(self, pipe: Any, window: int) -> int:
        return max(1, min(window - 1, -(-window // 3)))

    def level(self, sigma: float, prefix_noise: float) -> float:
        return sigma

    def shares(self, overlap: int) -> torch.Tensor:
        return 1 - torch.arange(overlap) / overlap
