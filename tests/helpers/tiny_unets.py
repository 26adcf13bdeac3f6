"""Tiny UNets with random weights in the shape of published ones, and pipelines around them that take prompt embeddings."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DDIMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLControlNetImg2ImgPipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

CROSS, PLAIN = "CrossAttnDownBlock2D", "DownBlock2D"
UP = {CROSS: "CrossAttnUpBlock2D", PLAIN: "UpBlock2D"}
TEXT = 8  # channels of the prompt's embeddings


def tiny_unet(kind: str = "sd", **overrides: Any) -> Any:
    """A UNet with the levels of SD 1.5 ("sd") or SDXL ("sdxl"); trained, it says, on 16 × 16 latents."""
    torch.manual_seed(0)
    down = (CROSS, CROSS, CROSS, PLAIN) if kind == "sd" else (PLAIN, CROSS, CROSS)
    config: dict[str, Any] = {
        "sample_size": 16, "block_out_channels": (8, 8, 16, 16)[: len(down)], "layers_per_block": 2, "norm_num_groups": 4,
        "down_block_types": down, "up_block_types": tuple(UP[one] for one in reversed(down)), "cross_attention_dim": TEXT,
        "attention_head_dim": 2,
    }  # fmt: skip
    if kind == "sdxl":
        config["transformer_layers_per_block"] = (1, 2, 1)
    unet = UNet2DConditionModel(**config | overrides).eval()
    for weight in unet.parameters():
        if weight.ndim >= 2:  # larger than the library's, so that what is changed inside reaches the output
            torch.nn.init.normal_(weight, std=weight[0].numel() ** -0.5)
    return unet


def tiny_vae() -> Any:
    """8 pixels a latent, as the published ones."""
    torch.manual_seed(1)
    blocks = ("DownEncoderBlock2D",) * 4
    return AutoencoderKL(
        block_out_channels=(4, 4, 4, 4), down_block_types=blocks, up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4, norm_num_groups=2, layers_per_block=1,
    ).eval()  # fmt: skip


def tiny_pipe(unet: Any, kind: str = "text") -> Any:
    """A Stable Diffusion pipeline of a kind, "text", "image", "inpaint" or "control", around a UNet."""
    parts: dict[str, Any] = {
        "vae": tiny_vae(), "text_encoder": None, "tokenizer": None, "unet": unet, "scheduler": DDIMScheduler(),
        "safety_checker": None, "feature_extractor": None, "requires_safety_checker": False,
    }  # fmt: skip
    classes = {
        "text": StableDiffusionPipeline, "image": StableDiffusionImg2ImgPipeline,
        "inpaint": StableDiffusionInpaintPipeline, "control": StableDiffusionControlNetPipeline,
    }  # fmt: skip
    if kind == "control":
        parts["controlnet"] = tiny_controlnet(unet)
    pipe = classes[kind](**parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_xl_pipe(kind: str = "text") -> Any:
    """An SDXL pipeline of a kind, "text", "image", "inpaint", "control" or "control image"."""
    conditions = {"addition_embed_type": "text_time", "addition_time_embed_dim": 4}
    conditions |= {"projection_class_embeddings_input_dim": 6 * 4 + TEXT}
    unet = tiny_unet("sdxl", **conditions, **({"in_channels": 9} if kind == "inpaint" else {}))
    parts: dict[str, Any] = {
        "vae": tiny_vae(), "text_encoder": None, "text_encoder_2": None, "tokenizer": None, "tokenizer_2": None, "unet": unet,
        "scheduler": EulerDiscreteScheduler(),
    }  # fmt: skip
    classes = {
        "text": StableDiffusionXLPipeline, "image": StableDiffusionXLImg2ImgPipeline,
        "inpaint": StableDiffusionXLInpaintPipeline, "control": StableDiffusionXLControlNetPipeline,
        "control image": StableDiffusionXLControlNetImg2ImgPipeline,
    }  # fmt: skip
    if "control" in kind:
        parts["controlnet"] = tiny_controlnet(unet)
    pipe = classes[kind](**parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_controlnet(unet: Any) -> Any:
    """A ControlNet with the weights of a UNet's way down, whose output is not zero."""
    torch.manual_seed(2)
    net = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(4, 4, 8, 8))
    for one in [*net.controlnet_down_blocks, net.controlnet_mid_block]:
        torch.nn.init.normal_(one.weight, std=0.3)
    return net.eval()


def prompt(seed: int = 3) -> dict[str, torch.Tensor]:
    """Embeddings of a prompt and a negative prompt."""
    generator = torch.Generator().manual_seed(seed)
    names = ("prompt_embeds", "negative_prompt_embeds")
    return {name: torch.randn(1, 5, TEXT, generator=generator) for name in names}


def whole_pipe(unet: Any | None = None) -> Any:
    """A Stable Diffusion pipeline with a tokenizer and text encoder of its own, which can be called with a prompt."""
    torch.manual_seed(4)
    words = {
        word: i for i, word in enumerate(("<|startoftext|>", "<|endoftext|>", "a</w>", "fox</w>", "a", "f", "o", "x"))
    }
    text = CLIPTextConfig(
        vocab_size=len(words), hidden_size=TEXT, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=8, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    pipe = tiny_pipe(tiny_unet() if unet is None else unet)
    pipe.register_modules(
        text_encoder=CLIPTextModel(text).eval(),
        tokenizer=CLIPTokenizer(vocab=words, merges=[], model_max_length=8),
    )
    return pipe
