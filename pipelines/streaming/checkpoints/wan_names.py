"""Names of weights: what wrappers put in front of them, and Wan's own names as diffusers calls them.

Source of the pairs: `wan/modules/model.py` of Wan 2.1 against `WanTransformer3DModel`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from tilewise.pipelines.errors import ModelError
from tilewise.plugins.torch_compat import COMPILED_PREFIX

# Training wrappers leave their attribute in the middle of a name: FSDP, activation checkpointing, torch.compile.
WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", COMPILED_PREFIX)
PREFIXES = ("model.", "net.", "module.", "generator.", "diffusion_model.", "transformer.", "base_model.")

_ATTENTION = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0", "norm_q": "norm_q", "norm_k": "norm_k"}
_IMAGE = {"k_img": "add_k_proj", "v_img": "add_v_proj", "norm_k_img": "norm_added_k"}

# Wan's norm1 and norm2 have no weights. Its norm3, before cross-attention, is diffusers' norm2.
_IN_BLOCK = {
    **{f"self_attn.{wan}": f"attn1.{name}" for wan, name in _ATTENTION.items()},
    **{f"cross_attn.{wan}": f"attn2.{name}" for wan, name in (_ATTENTION | _IMAGE).items()},
    "norm3": "norm2",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
}
_AT_TOP = {
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "head.head": "proj_out",
    "img_emb.proj.0": "condition_embedder.image_embedder.norm1",
    "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
    "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
    "img_emb.proj.4": "condition_embedder.image_embedder.norm2",
}
_TABLES = {"head.modulation": "scale_shift_table", "img_emb.emb_pos": "condition_embedder.image_embedder.pos_embed"}
_BLOCK = re.compile(r"(blocks\.\d+\.)(.+)")


def bare_name(name: str) -> str:
    """A name without the wrappers in it and the prefixes before it."""
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    while prefix := next((p for p in PREFIXES if name.startswith(p)), ""):
        name = name.removeprefix(prefix)
    return name


def bare_names(names: Iterable[str]) -> dict[str, str]:
    """Bare name → name. Raises ModelError where two names are the same without their prefixes."""
    found: dict[str, str] = {}
    for name in names:
        bare = bare_name(name)
        if bare in found:
            raise ModelError(f"the checkpoint has the weight {bare} twice, as {found[bare]} and as {name}")
        found[bare] = name
    return found


def module_name(module: str) -> str:
    """diffusers' name of a module (`blocks.0.self_attn.q` → `blocks.0.attn1.to_q`); other names stay."""
    if block := _BLOCK.fullmatch(module):
        return block[1] + _IN_BLOCK.get(block[2], block[2])
    return _AT_TOP.get(module, module)


def weight_name(name: str) -> str:
    """diffusers' name of a weight; names that are diffusers' already, or unknown, stay."""
    if name in _TABLES:
        return _TABLES[name]
    if (block := _BLOCK.fullmatch(name)) and block[2] == "modulation":
        return block[1] + "scale_shift_table"
    module, _, last = name.rpartition(".")
    return f"{module_name(module)}.{last}" if module else name


def diffusers_names(weights: Mapping[str, object]) -> dict[str, str]:
    """diffusers' name → name in the file, for every weight. Raises ModelError as `bare_names` does."""
    return {weight_name(bare): name for bare, name in bare_names(weights).items()}
