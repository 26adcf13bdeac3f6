"""``diagonal``: a queue of latent frames, each noisier than the one in front of it. Experimental.

FIFO-Diffusion (arXiv 2405.11473) with its latent partitioning and lookahead denoising: every round takes each frame of the
queue one noise level down, hands out the first and puts noise at the end. The queue is as long as the schedule has steps, in
parts of the window's new frames; each part is denoised behind an overlap of frames that are cleaner, which for the first one are
finished. The levels of a window are close to each other, yet not equal: in distribution only for weights that were trained with a
level for each frame.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from tilewise.pipelines.streaming.windows.noise import is_diffusion
from tilewise.pipelines.streaming.windows.spaces import window_spaces
from tilewise.pipelines.streaming.windows.ways.base import register
from tilewise.pipelines.streaming.windows.ways.prefix import Prefix
from tilewise.plugins.patching import denoisers_of


@register
class Diagonal(Prefix):
    name = "diagonal"
    queued = True
    per_frame = False  # its frames have levels of their own, and no noise on a prefix
    experimental = "denoises frames of different noise levels at once, which few models were trained for"

    def refuses(self, pipe: Any) -> str | None:
        if len(denoisers_of(pipe)) > 1:
            return "its denoisers are for different noise levels, which the frames of one window have"
        if is_diffusion(pipe.scheduler):
            return f"its {type(pipe.scheduler).__name__} is none of flow matching"
        space = window_spaces().get(type(pipe).__name__)
        if space is not None and space.left_out:
            return f"it makes {space.left_out.partition(',')[0]} too, by the same schedule"
        return super().refuses(pipe)

    def usual(self, pipe: Any) -> bool:
        return False

    def usual_overlap(self, pipe: Any, window: int) -> int:
        return max(1, window // 2)

    def usual_steps(self, steps: int, chunk: int) -> int:
        return -(-steps // chunk) * chunk

    def refuses_steps(self, steps: int, chunk: int) -> str | None:
        if steps % chunk == 0:
            return None
        return (
            f"a queue of {steps} steps is not in parts of {chunk} new latent frames; give {self.usual_steps(steps, chunk)} "
            "steps, or another window or overlap"
        )

    def matrix(self, sigmas: Sequence[float], window: int, overlap: int, prefix_noise: float = 0.0) -> torch.Tensor:
        """Of the first part of the queue, which all rounds leave as they find it."""
        chunk = window - overlap
        row = torch.tensor([0.0] * overlap + list(sigmas)[-1 - chunk : -1][::-1], dtype=torch.float32)
        return row.repeat(len(sigmas), 1)
