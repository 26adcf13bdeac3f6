"""Random weights of a tiny Wan denoiser, under the names that published causal checkpoints give them.

The names are written out here for one block, one by one, from the published files: no code is shared with the loader.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tiny_wan import save_tiny_pipeline, tiny_transformer

WIDTH = 256  # two heads of 128, the head size of every published model

TOP = {
    "patch_embedding.weight": "patch_embedding.weight",
    "patch_embedding.bias": "patch_embedding.bias",
    "text_embedding.0.weight": "condition_embedder.text_embedder.linear_1.weight",
    "text_embedding.0.bias": "condition_embedder.text_embedder.linear_1.bias",
    "text_embedding.2.weight": "condition_embedder.text_embedder.linear_2.weight",
    "text_embedding.2.bias": "condition_embedder.text_embedder.linear_2.bias",
    "time_embedding.0.weight": "condition_embedder.time_embedder.linear_1.weight",
    "time_embedding.0.bias": "condition_embedder.time_embedder.linear_1.bias",
    "time_embedding.2.weight": "condition_embedder.time_embedder.linear_2.weight",
    "time_embedding.2.bias": "condition_embedder.time_embedder.linear_2.bias",
    "time_projection.1.weight": "condition_embedder.time_proj.weight",
    "time_projection.1.bias": "condition_embedder.time_proj.bias",
    "head.head.weight": "proj_out.weight",
    "head.head.bias": "proj_out.bias",
    "head.modulation": "scale_shift_table",
}
BLOCK = {
    "modulation": "scale_shift_table",
    "self_attn.q.weight": "attn1.to_q.weight",
    "self_attn.q.bias": "attn1.to_q.bias",
    "self_attn.k.weight": "attn1.to_k.weight",
    "self_attn.k.bias": "attn1.to_k.bias",
    "self_attn.v.weight": "attn1.to_v.weight",
    "self_attn.v.bias": "attn1.to_v.bias",
    "self_attn.o.weight": "attn1.to_out.0.weight",
    "self_attn.o.bias": "attn1.to_out.0.bias",
    "self_attn.norm_q.weight": "attn1.norm_q.weight",
    "self_attn.norm_k.weight": "attn1.norm_k.weight",
    "norm3.weight": "norm2.weight",
    "norm3.bias": "norm2.bias",
    "cross_attn.q.weight": "attn2.to_q.weight",
    "cross_attn.q.bias": "attn2.to_q.bias",
    "cross_attn.k.weight": "attn2.to_k.weight",
    "cross_attn.k.bias": "attn2.to_k.bias",
    "cross_attn.v.weight": "attn2.to_v.weight",
    "cross_attn.v.bias": "attn2.to_v.bias",
    "cross_attn.o.weight": "attn2.to_out.0.weight",
    "cross_attn.o.bias": "attn2.to_out.0.bias",
    "cross_attn.norm_q.weight": "attn2.norm_q.weight",
    "cross_attn.norm_k.weight": "attn2.norm_k.weight",
    "ffn.0.weight": "ffn.net.0.proj.weight",
    "ffn.0.bias": "ffn.net.0.proj.bias",
    "ffn.2.weight": "ffn.net.2.weight",
    "ffn.2.bias": "ffn.net.2.bias",
}
IMAGE_TOP = {
    "img_emb.proj.0.weight": "condition_embedder.image_embedder.norm1.weight",
    "img_emb.proj.0.bias": "condition_embedder.image_embedder.norm1.bias",
    "img_emb.proj.1.weight": "condition_embedder.image_embedder.ff.net.0.proj.weight",
    "img_emb.proj.1.bias": "condition_embedder.image_embedder.ff.net.0.proj.bias",
    "img_emb.proj.3.weight": "condition_embedder.image_embedder.ff.net.2.weight",
    "img_emb.proj.3.bias": "condition_embedder.image_embedder.ff.net.2.bias",
    "img_emb.proj.4.weight": "condition_embedder.image_embedder.norm2.weight",
    "img_emb.proj.4.bias": "condition_embedder.image_embedder.norm2.bias",
}
IMAGE_BLOCK = {
    "cross_attn.k_img.weight": "attn2.add_k_proj.weight",
    "cross_attn.k_img.bias": "attn2.add_k_proj.bias",
    "cross_attn.v_img.weight": "attn2.add_v_proj.weight",
    "cross_attn.v_img.bias": "attn2.add_v_proj.bias",
    "cross_attn.norm_k_img.weight": "attn2.norm_added_k.weight",
}
LINEAR = [name.removesuffix(".weight") for name in BLOCK if name.endswith(".weight") and "norm" not in name]


def pairs(layers: int = 2, image: bool = False) -> dict[str, str]:
    """Wan's name of every weight → diffusers' name."""
    block = BLOCK | (IMAGE_BLOCK if image else {})
    blocks = {f"blocks.{i}.{wan}": f"blocks.{i}.{name}" for i in range(layers) for wan, name in block.items()}
    return {**TOP, **(IMAGE_TOP if image else {}), **blocks}


def random_weights(seed: int, **overrides: object) -> dict[str, torch.Tensor]:
    """A random tensor for each weight of a tiny denoiser, by diffusers' names."""
    model = tiny_transformer(**{"attention_head_dim": 128, **overrides})
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(w.shape, generator=generator) for name, w in model.state_dict().items()}


def wan_names(weights: dict[str, torch.Tensor], prefix: str = "", image: bool = False) -> dict[str, torch.Tensor]:
    """The same weights by Wan's names. Fails unless the lists above are complete."""
    names = pairs(1 + max(int(n.split(".")[1]) for n in weights if n.startswith("blocks.")), image)
    assert sorted(names.values()) == sorted(weights)
    return {prefix + wan: weights[name] for wan, name in names.items()}


def random_lora(
    seed: int, rank: int = 3, layers: int = 2, width: int = WIDTH, hidden: int = 64
) -> dict[str, torch.Tensor]:
    """Pairs lora_A, lora_B for every Linear of the blocks, by Wan's names, as PEFT saves them."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for i in range(layers):
        for name in LINEAR:
            rows = hidden if name == "ffn.0" else width
            columns = hidden if name == "ffn.2" else width
            module = f"base_model.model.blocks.{i}.{name}"
            tensors[f"{module}.lora_A.weight"] = torch.randn(rank, columns, generator=generator)
            tensors[f"{module}.lora_B.weight"] = torch.randn(rows, rank, generator=generator)
    return tensors


def small_lora(seed: int) -> dict[str, torch.Tensor]:
    """Of the tiny model, small enough to leave its clips alike."""
    return {name: 0.1 * weight for name, weight in random_lora(seed, width=32).items()}


def save_lora(path: Path, seed: int) -> Path:
    """``small_lora`` in a file, by the names that trainers of Wan give; returns the path."""
    save_file({name.replace("base_model.model.", "diffusion_model."): w for name, w in small_lora(seed).items()}, path)
    return path


def with_lora(
    weights: dict[str, torch.Tensor], lora: dict[str, torch.Tensor], scale: float = 1.0
) -> dict[str, torch.Tensor]:
    """W + scale · B A in float64, by diffusers' names; ``lora`` by PEFT's."""
    names = pairs()
    changed = {name: weight.double() for name, weight in weights.items()}
    for name in lora:
        if name.endswith(".lora_A.weight"):
            module = name.removesuffix(".lora_A.weight")
            change = lora[f"{module}.lora_B.weight"].double() @ lora[name].double()
            changed[names[module.removeprefix("base_model.model.") + ".weight"]] += scale * change
    return changed


def save_causal_pipeline(folder: Path, recipe: dict[str, Any]) -> Path:
    """A tiny pipeline with a causal LoRA in its folder."""
    save_tiny_pipeline(folder)
    (folder / "causal").mkdir()
    lora = {name: 0.3 * weight for name, weight in random_lora(5, width=32).items()}
    save_file(lora, folder / "causal" / "causal_lora.safetensors")
    (folder / "causal" / "recipe.json").write_text(json.dumps(recipe))
    return folder
