"""LTX-Video from a picture: the clip's first latent frame is the picture's, and stays as it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tilewise.pipelines.latent_spaces.ltx import LTXLatents


class LTXImageLatents(LTXLatents):
    pipelines = ("LTXImageToVideoPipeline",)
    mixes = True

    def begun(
        self, pipe: Any, prepare: Callable[..., Any], latents: torch.Tensor, /, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        tokens, mask = prepare(*args, **kwargs)  # (1, N, C), and (1, N): 1 where the picture is
        return torch.where(mask[..., None] > 0, tokens, self.packed(pipe, latents).to(tokens)), mask


SPACE = LTXImageLatents()
