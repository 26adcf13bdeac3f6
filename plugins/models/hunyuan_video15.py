"""HunyuanVideo 1.5: [video, text] in one softmax as in HunyuanVideo, with two-stream blocks only.

Its text tokens are of three kinds, joined by the model: of the image, of words to be written (ByT5) and of the prompt, each with
its padding; all padding is last. The stock processor turns the mask over text tokens into one over pairs of tokens,
(B, 1, S, S) bool, in every layer: gigabytes, and no fast kernel takes it. The pairs that it hides are those with a hidden key and
those with a hidden query. Nothing reads the output of a hidden query, as it is hidden as a key too. So here the attention modules
run with a mask over keys, (B, 1, 1, S), made once a forward; in dense steps too. The video comes out the same.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from tilewise.kernels.plans.layout import Grid
from tilewise.plugins.diffusers_compat import another, apply_rotary, dispatch_options, hunyuan_video15_processor
from tilewise.plugins.hooks.stand_in import is_stand_in, stock_processor
from tilewise.plugins.models.common.family import AttentionLayer, Size, Streams
from tilewise.plugins.models.common.forward_arguments import argument
from tilewise.plugins.models.common.registry import register_family
from tilewise.plugins.models.hunyuan_video import HunyuanVideoFamily, grid_of, patches, vae_factors

TEXT = {"tokenizer_max_length": 1000, "tokenizer_2_max_length": 256, "vision_num_semantic_tokens": 729}


class HunyuanVideo15Family(HunyuanVideoFamily):
    name = "hunyuan_video15"
    classes: tuple[str, ...] = ("HunyuanVideo15Transformer3DModel",)
    stacks: ClassVar[tuple[str, ...]] = ("transformer_blocks",)
    streams: ClassVar = {"HunyuanVideo15Transformer3DModel": Streams(("transformer_blocks",), text=2, joint=True)}

    def grid(self, denoiser: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Grid:
        latents = argument(args, kwargs, 0, "hidden_states")  # (B, C, frames, height, width)
        parts = [(2, "encoder_hidden_states"), (5, "encoder_hidden_states_2"), (7, "image_embeds")]
        text = sum(argument(args, kwargs, *part).shape[1] for part in parts)
        return Grid(*patches(denoiser, latents.shape[2:]), text=text)

    def replace_processor(self, layer: AttentionLayer) -> Callable[..., Any] | None:
        module: Any = layer.module
        # diffusers' own and no subclass of it, as ``attend_with_key_mask`` repeats what it does.
        return attend_with_key_mask if type(module.processor) is hunyuan_video15_processor() else None

    def notes(self, denoiser: nn.Module, *, fuse: bool, dense: Collection[str]) -> list[str]:
        known, found = hunyuan_video15_processor(), Counter[str]()
        for layer in self.layers(denoiser):
            module: Any = layer.module
            processor = stock_processor(module.processor)
            if type(processor) is not known and layer.name not in dense:
                found[another(processor, known)] += 1
        return [
            f"{count} of {len(self.layers(denoiser))} layers attend with a mask over all pairs of tokens, which takes memory and "
            f"fast kernels refuse: their processor is {kind}"
            for kind, count in found.items()
        ]

    def hooks(self, denoiser: nn.Module) -> list[Any]:
        model: Any = denoiser
        masks, known = _KeyMask(), hunyuan_video15_processor()

        def enter(module: nn.Module, args: tuple) -> None:
            # (video, text, temb, mask, tables). Made here, so that the first layer's graph is no different from the others'.
            masks.of(args[3], args[0].shape[1])

        def give(module: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
            # Any other processor gets the model's own mask. The blocks call attn with keyword arguments alone.
            if not is_stand_in(module.processor) or type(stock_processor(module.processor)) is not known:
                return None
            mask = masks.of(kwargs["attention_mask"], kwargs["hidden_states"].shape[1])
            return args, {**kwargs, "attention_mask": mask}

        def leave(module: nn.Module, args: tuple) -> None:
            masks.clear()

        hooks: list[Any] = super().hooks(denoiser)
        hooks += [block.register_forward_pre_hook(enter) for block in model.transformer_blocks[:1]]
        hooks += [layer.module.register_forward_pre_hook(give, with_kwargs=True) for layer in self.layers(denoiser)]
        return [*hooks, model.norm_out.register_forward_pre_hook(leave)]

    def grid_of_size(self, denoiser: nn.Module, pipe: Any, size: Size) -> Grid:
        text = sum(getattr(pipe, name, usual) for name, usual in TEXT.items())
        spatial, temporal = vae_factors(pipe, 16)
        return grid_of(denoiser, size, spatial, temporal, text=text)


class _KeyMask:
    """The mask over keys of the current forward: one tensor for all layers, so that its values are read once."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self.text: torch.Tensor | None = None
        self.keys: torch.Tensor | None = None

    def of(self, text: torch.Tensor, video: int) -> torch.Tensor:
        """(B, 1, 1, video + n) bool from the model's own (B, n), which it hands to all layers. All video is visible."""
        if self.keys is None or self.text is not text:
            self.text = text
            self.keys = F.pad(text.bool(), (video, 0), value=True)[:, None, None]
        return self.keys


def attend_with_key_mask(
    processor: Any,
    dispatch: Callable[..., torch.Tensor],
    attn: Any,
    hidden_states: torch.Tensor,
    encoder_hidden_states: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``HunyuanVideo15AttnProcessor2_0.__call__`` with a mask over keys in place of one over pairs of tokens.

    Not a copy of its code with another dispatcher: the stock one makes its mask on the way.

    Args:
        hidden_states: (B, video, C). encoder_hidden_states: (B, n, C). attention_mask: (B, 1, 1, video + n) bool, over keys.
        image_rotary_emb: (video, D) tables.

    Returns:
        Both streams, attended.
    """
    assert encoder_hidden_states is not None and attention_mask is not None and image_rotary_emb is not None

    def heads(x: torch.Tensor, norm: Any) -> torch.Tensor:
        x = x.unflatten(2, (attn.heads, -1))
        return x if norm is None else norm(x)

    query = apply_rotary(heads(attn.to_q(hidden_states), attn.norm_q), image_rotary_emb, token_axis=1)
    key = apply_rotary(heads(attn.to_k(hidden_states), attn.norm_k), image_rotary_emb, token_axis=1)
    value = heads(attn.to_v(hidden_states), None)
    query = torch.cat([query, heads(attn.add_q_proj(encoder_hidden_states), attn.norm_added_q)], dim=1)
    key = torch.cat([key, heads(attn.add_k_proj(encoder_hidden_states), attn.norm_added_k)], dim=1)
    value = torch.cat([value, heads(attn.add_v_proj(encoder_hidden_states), None)], dim=1)
    video = hidden_states.shape[1]
    out = dispatch(query, key, value, attn_mask=attention_mask, **dispatch_options(processor))
    out = out.flatten(2, 3).to(query.dtype)
    return attn.to_out[1](attn.to_out[0](out[:, :video])), attn.to_add_out(out[:, video:])


register_family(HunyuanVideo15Family())
