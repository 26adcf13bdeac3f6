"""The models and sizes of ``benchmarks.highres``, each with a forward's inputs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from benchmarks.family_inputs import WORKS, Call, Inputs, Work
from benchmarks.step import CONFIGS, SHARED, build

MODELS: dict[str, dict[str, Any]] = {**CONFIGS, "Wan2.1-14B": CONFIGS["Wan2.1-14B, 10 layers"]}
TEXT = 512  # tokens of Wan's prompts


@dataclass(frozen=True)
class Size:
    """A model, tokens (t, h, w), native tokens (h, w), how many layers the whole model has and how many of them are run.

    forwards: of a step; 2 are of the prompt and the negative prompt. work: the row of ``family_inputs`` whose model and inputs
    these are; None is Wan.
    """

    model: str
    pixels: str
    tokens: tuple[int, int, int]
    native: tuple[int, int]
    whole: int
    layers: int
    forwards: int = 2
    work: Work | None = None

    @property
    def name(self) -> str:
        return f"{self.model} {self.pixels}" + (", all layers" if self.layers >= self.whole else "")

    @property
    def is_wan(self) -> bool:
        return self.work is None

    def prepared(self, device: torch.device, dtype: torch.dtype) -> tuple[Any, Inputs]:
        """The denoiser with the layers that are run, weights random, and what its forward is given."""
        if self.work is not None:
            model = self.work.build(device, dtype)
            return model, self.work.inputs(Call(device, dtype, self.tokens, self.work.text, model))
        config = {**MODELS[self.model], "num_layers": self.layers}
        model = build(config, device, dtype)
        call = Call(device, dtype, self.tokens, TEXT, model)
        (pt, ph, pw), (t, h, w) = model.config.patch_size, self.tokens
        return model, {
            "hidden_states": call.normal(1, 16, t * pt, h * ph, w * pw),
            "timestep": call.full(500.0),
            "encoder_hidden_states": call.normal(1, TEXT, {**SHARED, **config}["text_dim"]),
        }


def _of(name: str) -> Work:
    """A row of ``family_inputs``."""
    (work,) = [work for work in WORKS if work.name == name]
    return work


def _tiny(name: str, **config: Any) -> Work:
    """A row at a size for a CPU, with another number of layers for instance."""
    work = _of(name).smaller()
    return replace(work, config={**work.config, **config})


SIZES = {
    "1.3B-1080p": Size("Wan2.1-1.3B", "1088×1920×81", (21, 68, 120), (30, 52), 30, 30),
    "1.3B-4K": Size("Wan2.1-1.3B", "2160×3840×81", (21, 135, 240), (30, 52), 30, 2),
    "14B-1080p": Size("Wan2.1-14B", "1088×1920×81", (21, 68, 120), (45, 80), 40, 4),
    "14B-4K": Size("Wan2.1-14B", "2160×3840×81", (21, 135, 240), (45, 80), 40, 2),
    # From 544×960, the smaller of the two sizes that it was trained at; guidance is an input.
    "HunyuanVideo-1080p": Size(
        "HunyuanVideo", "1088×1920×85", (22, 68, 120), (34, 60), 60, 6, 1, _of("HunyuanVideo 117×768×1280")
    ),
    "LTX": Size("LTX-Video", "1024×1408×161", (21, 32, 44), (16, 22), 28, 28, 2, _of("LTX-Video 161×704×1216")),
    "Flux-2048": Size("Flux.1", "2048²", (1, 128, 128), (64, 64), 57, 57, 1, _of("Flux.1 2048²")),
    "Flux-4096": Size("Flux.1", "4096²", (1, 256, 256), (64, 64), 57, 57, 1, _of("Flux.1 4096²")),
    "tiny": Size("tiny", "160×128×5", (3, 10, 8), (5, 4), 4, 2),
    "tiny-joint": Size(
        "tiny joint", "12×10 tokens", (1, 12, 10), (6, 5), 8, 4, 1,
        _tiny("Flux.1 2048²", num_layers=2, num_single_layers=2),
    ),
    "tiny-LTX": Size("tiny LTX", "3×8×10 tokens", (3, 8, 10), (4, 5), 2, 2, 2, _tiny("LTX-Video 161×704×1216")),
}  # fmt: skip
