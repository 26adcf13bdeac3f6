"""A tiny Wan pipeline with random weights, built from configs alone: no download, the same for the same seed.

Spatial factor 4 and temporal factor 2 in the VAE and patches of (1, 2, 2): 64x64 pixels and 9 frames make a token
grid of (5, 8, 8). The classes are diffusers' and transformers' own, so what works here works on a real checkpoint.

Every weight of the denoiser is drawn with variance 1 / fan-in, larger than the library's initialisation, and the output
projection is random too: attention reaches the output visibly, which a test of attention needs.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    PreTrainedTokenizerFast,
    UMT5Config,
    UMT5EncoderModel,
)

Z_CHANNELS = 4
TEMPORAL = 2
TEXT_DIM = 32
IMAGE_DIM = 32
TEXT = """a an the on over with and in moving left right up down circling growing shrinking bouncing toward red green
blue yellow circle square triangle star plain striped checkered gradient background blurry"""

# What `tilewise` reads beside model_index.json: the size and settings that this model is meant for.
NATIVE = {
    "height": 64,
    "width": 64,
    "frames": 9,
    "steps": 4,
    "guidance": 3.0,
    "fps": 8,
    "max_sequence_length": 16,
}


def tiny_transformer(seed: int = 0, **overrides: Any) -> WanTransformer3DModel:
    """A Wan denoiser: 2 layers, 2 heads x 16, 4 latent channels. `overrides` replace entries of its config."""
    config: dict[str, Any] = {
        "patch_size": (1, 2, 2),
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "in_channels": Z_CHANNELS,
        "out_channels": Z_CHANNELS,
        "text_dim": TEXT_DIM,
        "freq_dim": 32,
        "ffn_dim": 64,
        "num_layers": 2,
        "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads",
        "rope_max_seq_len": 2048,
    }
    config.update(overrides)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = WanTransformer3DModel(**config)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if weight.ndim >= 2 and "scale_shift_table" not in name:
                    weight.normal_(0.0, weight[0].numel() ** -0.5)
    return model.eval()


def tiny_vae(seed: int = 0, **overrides: Any) -> AutoencoderKLWan:
    config: dict[str, Any] = {
        "base_dim": 8,
        "z_dim": Z_CHANNELS,
        "dim_mult": [1, 2],
        "num_res_blocks": 1,
        "attn_scales": [],
        "temperal_downsample": [True],
        "patch_size": 2,
        "in_channels": 12,
        "out_channels": 12,
        "latents_mean": [0.0] * Z_CHANNELS,
        "latents_std": [1.0] * Z_CHANNELS,
        "scale_factor_temporal": TEMPORAL,
        "scale_factor_spatial": 4,
    }
    config.update(overrides)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + 1)
        return AutoencoderKLWan(**config).eval()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    vocab = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *TEXT.split()])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )


def tiny_text_encoder(seed: int = 0) -> UMT5EncoderModel:
    config = UMT5Config(
        vocab_size=64,
        d_model=TEXT_DIM,
        d_kv=16,
        d_ff=64,
        num_layers=1,
        num_heads=2,
        dropout_rate=0.0,
        pad_token_id=0,
        eos_token_id=1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + 2)
        return UMT5EncoderModel(config).eval()


def tiny_pipeline(
    *,
    seed: int = 0,
    expand_timesteps: bool = False,
    boundary_ratio: float | None = None,
    image: bool = False,
    **overrides: Any,
) -> WanPipeline | WanImageToVideoPipeline:
    """A whole pipeline; `overrides` go to the denoiser's config.

    `expand_timesteps`: a timestep per token, as Wan2.2 5B. `boundary_ratio`: a second denoiser with other weights for
    the low-noise steps, as Wan2.2 14B. `image`: image to video as in Wan2.1, with an image encoder and image
    cross-attention; call that one with `prompt_embeds`: its text cleaning needs the library ftfy.
    """
    if image:
        overrides = {
            "in_channels": 2 * Z_CHANNELS + TEMPORAL,
            "image_dim": IMAGE_DIM,
            "added_kv_proj_dim": overrides.get("num_attention_heads", 2) * overrides.get("attention_head_dim", 16),
            **overrides,
        }
    parts: dict[str, Any] = {
        "tokenizer": tiny_tokenizer(),
        "text_encoder": tiny_text_encoder(seed),
        "vae": tiny_vae(seed),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0),
        "transformer": tiny_transformer(seed, **overrides),
        "transformer_2": None if boundary_ratio is None else tiny_transformer(seed + 100, **overrides),
        "boundary_ratio": boundary_ratio,
        "expand_timesteps": expand_timesteps,
    }
    if not image:
        pipe = WanPipeline(**parts)
    else:
        size = {"shortest_edge": 16}
        parts["image_processor"] = CLIPImageProcessorPil(size=size, crop_size={"height": 16, "width": 16})
        vision = CLIPVisionConfig(
            hidden_size=IMAGE_DIM,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=16,
            patch_size=8,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed + 3)
            parts["image_encoder"] = CLIPVisionModel(vision).eval()
        pipe = WanImageToVideoPipeline(**parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def save_tiny_pipeline(path: str | Path, *, native: dict[str, Any] | None = None, **kwargs: Any) -> Path:
    """Writes `tiny_pipeline(**kwargs)` as a diffusers folder with a tilewise.json (NATIVE, with `native` over it)."""
    folder = Path(path)
    tiny_pipeline(**kwargs).save_pretrained(folder)
    (folder / "tilewise.json").write_text(json.dumps({**NATIVE, **(native or {})}, indent=2) + "\n")
    return folder
