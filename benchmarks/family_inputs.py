"""Denoisers of several families at the size of a real call: published configs, random weights, the inputs of one step.

Some have fewer layers than the published model, of each kind in its share, so that a forward of both fits in seconds: a layer's
time does not depend on how many there are. Each also has a tiny size, which shows that the row runs.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

import tilewise

Inputs = dict[str, Any]
SHARPER = (
    3.0  # of logits: with random weights a query would weigh all tokens alike, and any window's output be the mean
)
QUERIES = re.compile(r"norm_(added_)?q\.weight$")


@dataclass(frozen=True)
class Call:
    """Where and at what size the inputs of one forward are made.

    size: tokens (t, h, w); images: t = 1. text: tokens of a prompt.
    """

    device: torch.device
    dtype: torch.dtype
    size: tuple[int, int, int]
    text: int
    model: Any

    def normal(self, *shape: int) -> torch.Tensor:
        generator = torch.Generator(self.device).manual_seed(0)
        return torch.randn(shape, generator=generator, device=self.device).to(self.dtype)

    def full(self, value: float, samples: int = 1, dtype: torch.dtype | None = None) -> torch.Tensor:
        return torch.full((samples,), value, device=self.device, dtype=dtype)

    def kept(self, tokens: int, *lengths: int) -> torch.Tensor:
        """(B, tokens) bool: the first of each sample's text tokens, the rest is padding."""
        return torch.arange(tokens, device=self.device) < torch.tensor(lengths, device=self.device)[:, None]


@dataclass(frozen=True)
class Work:
    """One row: a model, a size of it, and the method that is measured there.

    layers: how many of how many, in words. text: tokens of a prompt. config: of the diffusers class ``model``. tiny: what a
    tiny model has instead.
    """

    name: str
    model: str
    layers: str
    size: tuple[int, int, int]
    text: int
    method: tilewise.STA
    inputs: Callable[[Call], Inputs]
    config: dict[str, Any] = field(default_factory=dict)
    tiny: dict[str, Any] = field(default_factory=dict)
    tiny_size: tuple[int, int, int] = (3, 6, 10)
    is_tiny: bool = False

    @property
    def key(self) -> tuple[str, str, bool]:
        """What rows that share a model have in common."""
        return self.model, repr(self.config), self.is_tiny

    def smaller(self) -> Work:
        """The row at a size for a CPU."""
        config = {**self.config, **self.tiny}
        method = tilewise.STA(window=(1, 2, 1), tile=(2, 3, 3))
        return Work(
            f"tiny {self.name}", self.model, "all", self.tiny_size, 20, method, self.inputs, config, is_tiny=True
        )

    def build(self, device: torch.device, dtype: torch.dtype) -> Any:
        """The denoiser, in the dtypes that ``from_pretrained(torch_dtype=dtype)`` gives, weights of variance 1 / fan-in."""
        import diffusers

        with device:
            model: Any = getattr(diffusers, self.model)(**self.config)
        model.eval().requires_grad_(False)
        kept = set(getattr(model, "_keep_in_fp32_modules", None) or ())
        generator = torch.Generator(device).manual_seed(0)
        normalised = any(QUERIES.search(name) for name, _ in model.named_parameters())
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2 and not name.endswith("scale_shift_table"):
                parameter.data.normal_(0.0, parameter[0].numel() ** -0.5, generator=generator)
            if QUERIES.search(name) or (not normalised and name.endswith("attn1.to_q.weight")):
                parameter.data *= SHARPER
            if not kept & set(name.split(".")):
                parameter.data = parameter.data.to(dtype)
        return model


# ── the inputs of one step, as the pipelines make them ────────────────────────────────────────────────────────────────


def hunyuan_video(call: Call) -> Inputs:
    t, h, w = call.size
    config = call.model.config
    return {
        "hidden_states": call.normal(1, config.in_channels, t, 2 * h, 2 * w),
        "timestep": call.full(500.0, dtype=call.dtype),
        "encoder_hidden_states": call.normal(1, call.text, config.text_embed_dim),
        "encoder_attention_mask": call.kept(call.text, call.text // 2).to(call.dtype),  # the rest is padding
        "pooled_projections": call.normal(1, config.pooled_projection_dim),
        "guidance": call.full(6000.0, dtype=call.dtype),
    }


def flux(call: Call) -> Inputs:
    _, h, w = call.size
    config = call.model.config
    ids = torch.zeros(h, w, 3, device=call.device, dtype=call.dtype)
    ids[..., 1] = torch.arange(h, device=call.device)[:, None]
    ids[..., 2] = torch.arange(w, device=call.device)
    return {
        "hidden_states": call.normal(1, h * w, config.in_channels),
        "encoder_hidden_states": call.normal(1, call.text, config.joint_attention_dim),
        "pooled_projections": call.normal(1, config.pooled_projection_dim),
        "timestep": call.full(0.5, dtype=call.dtype),
        "guidance": call.full(3.5),
        "img_ids": ids.view(h * w, 3),
        "txt_ids": torch.zeros(call.text, 3, device=call.device, dtype=call.dtype),
    }


def qwen_image(call: Call) -> Inputs:
    _, h, w = call.size
    config = call.model.config
    return {
        "hidden_states": call.normal(1, h * w, config.in_channels),
        "encoder_hidden_states": call.normal(1, call.text, config.joint_attention_dim),
        "timestep": call.full(0.5, dtype=call.dtype),
        "img_shapes": [[(1, h, w)]],
    }


def sdxl(call: Call) -> Inputs:
    """Two samples: with and without the prompt. The size is that of the latents: the UNet's first grid."""
    _, h, w = call.size
    width = call.model.config.cross_attention_dim
    pooled = call.model.config.projection_class_embeddings_input_dim - 6 * call.model.config.addition_time_embed_dim
    pixels = [8.0 * h, 8.0 * w]
    time_ids = torch.tensor([[*pixels, 0.0, 0.0, *pixels]] * 2, device=call.device, dtype=call.dtype)
    return {
        "sample": call.normal(2, 4, h, w),
        "timestep": torch.tensor(500.0, device=call.device),
        "encoder_hidden_states": call.normal(2, call.text, width),
        "added_cond_kwargs": {"text_embeds": call.normal(2, pooled), "time_ids": time_ids},
    }


def ltx_video(call: Call) -> Inputs:
    t, h, w = call.size
    config = call.model.config
    return {
        "hidden_states": call.normal(1, t * h * w, config.in_channels),
        "encoder_hidden_states": call.normal(1, call.text, config.caption_channels),
        "timestep": call.full(500.0),
        "encoder_attention_mask": call.kept(call.text, call.text // 2),
        "num_frames": t,
        "height": h,
        "width": w,
        "rope_interpolation_scale": (8 / 25, 32, 32),
    }


def cogvideox(call: Call) -> Inputs:
    from diffusers.models.embeddings import get_3d_rotary_pos_embed

    t, h, w = call.size
    config = call.model.config
    rotary = get_3d_rotary_pos_embed(config.attention_head_dim, ((0, 0), (h, w)), (h, w), t, device=call.device)
    return {
        "hidden_states": call.normal(1, t, config.in_channels, 2 * h, 2 * w),
        "encoder_hidden_states": call.normal(1, call.text, config.text_embed_dim),
        "timestep": call.full(500, dtype=torch.int64),
        "image_rotary_emb": rotary,
    }


def mochi(call: Call) -> Inputs:
    """Two samples: without a prompt, and with one that fills a third of the tokens."""
    t, h, w = call.size
    config = call.model.config
    return {
        "hidden_states": call.normal(2, config.in_channels, t, 2 * h, 2 * w),
        "encoder_hidden_states": call.normal(2, call.text, config.text_embed_dim),
        "timestep": call.full(500.0, 2),
        "encoder_attention_mask": call.kept(call.text, 1, call.text // 3),
    }


# ── the rows ──────────────────────────────────────────────────────────────────────────────────────────────────────────

HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}
SDXL = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
TINY_SDXL = {  # attention at the first level: smaller maps than 64 × 64 stay dense
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"),
    "block_out_channels": (16, 32, 64),
    "transformer_layers_per_block": (1, 1, 1),
    "attention_head_dim": (1, 2, 4),
    "norm_num_groups": 8,
    "cross_attention_dim": 16,
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 64,
}
TINY_ROTARY = {**HEADS, "axes_dims_rope": (4, 6, 6), "joint_attention_dim": 16}
TINY_FLUX = {**TINY_ROTARY, "in_channels": 8, "num_layers": 1, "num_single_layers": 1, "pooled_projection_dim": 8}
TINY_HUNYUAN = {
    **HEADS,
    "num_layers": 1,
    "num_single_layers": 1,
    "num_refiner_layers": 1,
    "text_embed_dim": 16,
    "pooled_projection_dim": 8,
    "rope_axes_dim": (4, 6, 6),
}

# The window that is measured, in tiles; in pixels it is 5 · 256 of 4096 for Flux, which was trained at 1024.
SQUARES = {"tile": (1, 16, 16)}
WORKS = [
    Work(
        "HunyuanVideo 117×768×1280",
        "HunyuanVideoTransformer3DModel",
        "2 of 20 double, 4 of 40 single",
        (30, 48, 80),
        256,
        tilewise.STA(window=(3, 3, 3), tile=(6, 8, 8)),  # the STA paper's
        hunyuan_video,
        {"num_layers": 2, "num_single_layers": 4},
        TINY_HUNYUAN,
    ),
    *(
        Work(
            f"Flux.1 {16 * side}²",
            "FluxTransformer2DModel",
            "all 19 double, 38 single",
            (1, side, side),
            512,
            method,
            flux,
            {"guidance_embeds": True},
            TINY_FLUX,
            (1, 8 + side // 32, 12),
        )
        for side, method in (
            (64, tilewise.STA(window=(1, 5, 3), tile=(1, 8, 16))),
            (128, tilewise.STA(window=(1, 3, 3), **SQUARES)),
            (256, tilewise.STA(window=(1, 5, 5), **SQUARES)),
        )
    ),
    Work(
        "Qwen-Image 2048²",
        "QwenImageTransformer2DModel",
        "10 of 60",
        (1, 128, 128),
        200,
        tilewise.STA(window=(1, 3, 3), **SQUARES),
        qwen_image,
        {"num_layers": 10},
        {**TINY_ROTARY, "in_channels": 8, "out_channels": 2, "num_layers": 2},
        (1, 8, 12),
    ),
    *(
        Work(
            f"SDXL {8 * side}², two samples",
            "UNet2DConditionModel",
            "all",
            (1, side, side),
            77,
            tilewise.STA(window=window, tile=(1, 16, 8)),
            sdxl,
            SDXL,
            TINY_SDXL,
            (1, 64, 64 + side // 32),
        )
        for side, window in ((128, (1, 3, 3)), (256, (1, 3, 5)))
    ),
    Work(
        "LTX-Video 161×704×1216",
        "LTXVideoTransformer3DModel",
        "all 28",
        (21, 22, 38),
        128,
        tilewise.STA(density=0.3),
        ltx_video,
        {},
        {**HEADS, "num_layers": 2, "in_channels": 8, "cross_attention_dim": 32, "caption_channels": 16},
    ),
    Work(
        "CogVideoX-5B 49×480×720",
        "CogVideoXTransformer3DModel",
        "all 42",
        (13, 30, 45),
        226,
        tilewise.STA(density=0.3),
        cogvideox,
        {"num_layers": 42, "num_attention_heads": 48, "use_rotary_positional_embeddings": True},
        {**HEADS, "num_layers": 2, "time_embed_dim": 16, "text_embed_dim": 16},
    ),
    Work(
        "Mochi 163×480×848, two samples",
        "MochiTransformer3DModel",
        "6 of 48",
        (28, 30, 53),
        256,
        tilewise.STA(window=(3, 3, 3)),
        mochi,
        {"num_layers": 6},
        {**HEADS, "num_layers": 2, "pooled_projection_dim": 16, "text_embed_dim": 16, "time_embed_dim": 16},
    ),
]
TINY = [work.smaller() for work in WORKS]
