"""LTX-Video from pictures and videos at places of the clip, mixed into the latents that it begins with or put before them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tilewise.pipelines.latent_spaces.ltx import LTXLatents


class LTXConditionLatents(LTXLatents):
    pipelines = ("LTXConditionPipeline",)
    mixes = True

    def begun(
        self, pipe: Any, prepare: Callable[..., Any], latents: torch.Tensor, /, *args: Any, **kwargs: Any
    ) -> tuple[Any, ...]:
        # Its own way to begin with somebody's latents: noised to ``sigma`` by it, here by nothing more.
        return prepare(*args, **{**kwargs, "latents": latents, "sigma": latents.new_zeros(1)})


SPACE = LTXConditionLatents()
