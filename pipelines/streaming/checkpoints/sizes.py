"""Read the sizes of a Wan denoiser off its weights, so that it can be built without any config."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch

from tilewise.pipelines.errors import ModelError

HEAD_DIM = 128  # of every published Wan model
_BLOCK = re.compile(r"blocks\.(\d+)\.")


def config_of(weights: Mapping[str, torch.Tensor], known: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Arguments of `WanTransformer3DModel` for weights that have diffusers' names.

    known: a config of the same architecture. What weights do not show (head size, eps, length of the rotary table) is
    taken from it if its width is the same.

    Raises ModelError if the weights that show the sizes are missing.
    """

    def shape(name: str) -> tuple[int, ...]:
        if name not in weights:
            raise ModelError(
                f"this is no checkpoint of a Wan denoiser: there is no {name} among its {len(weights)} weights, which "
                f"begin with {', '.join(list(weights)[:3]) or 'nothing'}"
            )
        return tuple(weights[name].shape)

    known = known or {}
    dim = shape("blocks.0.attn1.to_k.weight")[0]
    patch = shape("patch_embedding.weight")
    if len(patch) != 5:
        raise ModelError(f"patch_embedding.weight has the shape {patch}; a Wan denoiser's has five sizes")
    image = "condition_embedder.image_embedder."
    has_image = f"{image}norm1.weight" in weights
    same_width = known.get("num_attention_heads", 0) * known.get("attention_head_dim", 0) == dim
    head_dim = known["attention_head_dim"] if same_width else HEAD_DIM
    if dim % head_dim:
        raise ModelError(
            f"a width of {dim} is no multiple of the head size {head_dim}; give a pipeline (pipe=) or a base (base=) "
            "of the same architecture, whose config says the head size"
        )
    hidden = {name: known[name] for name in ("eps", "rope_max_seq_len") if same_width and name in known}
    return {
        **hidden,
        "patch_size": patch[2:],
        "num_attention_heads": dim // head_dim,
        "attention_head_dim": head_dim,
        "in_channels": patch[1],
        "out_channels": shape("proj_out.weight")[0] // math.prod(patch[2:]),
        "text_dim": shape("condition_embedder.text_embedder.linear_1.weight")[1],
        "freq_dim": shape("condition_embedder.time_embedder.linear_1.weight")[1],
        "ffn_dim": shape("blocks.0.ffn.net.0.proj.weight")[0],
        "num_layers": 1 + max(int(block[1]) for name in weights if (block := _BLOCK.match(name))),
        "cross_attn_norm": "blocks.0.norm2.weight" in weights,
        "qk_norm": "rms_norm_across_heads" if "blocks.0.attn1.norm_q.weight" in weights else None,
        "image_dim": shape(f"{image}ff.net.0.proj.weight")[1] if has_image else None,
        "added_kv_proj_dim": shape("blocks.0.attn2.add_k_proj.weight")[1] if has_image else None,
        "pos_embed_seq_len": shape(f"{image}pos_embed")[1] if f"{image}pos_embed" in weights else None,
    }
