"""Flux.1 (dev, schnell, Fill, Control, Redux, Kontext): text and image tokens in one attention.

Double blocks keep two streams and attend over [text | image]; single blocks run on that sequence. Images come packed, with
their positions in ``img_ids``. Kontext's reference images follow the image in its stream; in a patched denoiser they stand
before it, and count as text.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn

from tilewise.kernels.plans.layout import Grid
from tilewise.plugins.models.common.family import AttentionLayer, Family, Reorder, Size, Streams, UnreadableGridError
from tilewise.plugins.models.common.image import StreamOrder, by_name, image_tokens
from tilewise.plugins.models.common.position_ids import image_shape
from tilewise.plugins.models.common.registry import register_family

CONTROLNET = ("controlnet_block_samples", "controlnet_single_block_samples")


class FluxFamily(Family):
    name = "flux"
    classes: tuple[str, ...] = ("FluxTransformer2DModel",)
    streams: ClassVar = {
        "FluxTransformer2DModel": Streams(
            ("transformer_blocks", "single_transformer_blocks"), text=1, joint=True, text_first=True
        )
    }
    parameters: tuple[str, ...] = (
        "hidden_states", "encoder_hidden_states", "pooled_projections", "timestep", "img_ids", "txt_ids", "guidance",
        "joint_attention_kwargs", *CONTROLNET,
    )  # fmt: skip
    max_text = 512  # the pipelines' max_sequence_length, which they pad every prompt to

    def grid(self, denoiser: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Grid:
        call = by_name(self.parameters, args, kwargs)
        rows, columns, others = image_shape(call["img_ids"])
        return Grid(1, rows, columns, text=call["encoder_hidden_states"].shape[1] + others, text_first=True)

    def _others(self, denoiser: nn.Module, args: tuple, kwargs: dict[str, Any]) -> int:
        """Tokens of reference images; 0 where no order can be in force, and nothing needs to be read."""
        if self.refuses(denoiser, args, kwargs) is not None:
            return 0
        ids = by_name(self.parameters, args, kwargs)["img_ids"]
        if torch.compiler.is_compiling():
            return image_shape(ids)[2]
        try:
            return image_shape(ids)[2]
        except UnreadableGridError:  # ``grid`` has reported it
            return 0

    def timestep(self, args: tuple, kwargs: dict[str, Any]) -> torch.Tensor:
        return by_name(self.parameters, args, kwargs)["timestep"] * 1000  # given in 0 … 1

    def layers(self, denoiser: nn.Module) -> list[AttentionLayer]:
        model: Any = denoiser
        heads, head_dim = model.config.num_attention_heads, model.config.attention_head_dim
        kinds = ("transformer_blocks", "single_transformer_blocks")
        attentions = [
            (f"{kind}.{i}.attn", block.attn) for kind in kinds for i, block in enumerate(getattr(model, kind))
        ]
        return [AttentionLayer(name, attn, block, heads, head_dim) for block, (name, attn) in enumerate(attentions)]

    def reorder_hooks(self, denoiser: nn.Module, reorder: Reorder) -> list[Any]:
        model: Any = denoiser
        orders: list[StreamOrder] = []  # of the current forward

        # The arguments are reordered, not the embedders' outputs: a LoRA added later wraps an embedder, and a hook on it.
        def enter(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
            call = by_name(self.parameters, args, kwargs)
            others = self._others(module, args, kwargs)
            x, text = call["hidden_states"], call["encoder_hidden_states"].shape[1]
            order = StreamOrder(reorder, x.shape[1], text, x.device, text_first=True, others=others)
            orders[:] = [order]
            changed: dict[str, Any] = {"hidden_states": order.enter(x), "img_ids": order.enter(call["img_ids"], -2)}
            for name in CONTROLNET:
                if call.get(name) is not None:
                    changed[name] = [order.enter(sample) for sample in call[name]]
            if call.get("attention_mask") is not None:
                changed["attention_mask"] = order.others_first(call["attention_mask"])
            options = call.get("joint_attention_kwargs")
            if options and options.get("attention_mask") is not None:
                mask = order.others_first(options["attention_mask"])
                changed["joint_attention_kwargs"] = {**options, "attention_mask": mask}
            return (), {**call, **changed}

        def leave(module: nn.Module, args: tuple, output: torch.Tensor) -> Any:
            return orders.pop().leave(output)

        return [
            model.register_forward_pre_hook(enter, with_kwargs=True),
            model.norm_out.register_forward_hook(leave),
        ]

    def raster_hooks(self, module: nn.Module, reorder: Reorder) -> list[Any]:
        """As ``Family.raster_hooks``; reference images stay before the image, as everywhere in a patched denoiser."""

        def order_of(kwargs: dict[str, Any]) -> StreamOrder:
            x, text = kwargs["hidden_states"], kwargs.get("encoder_hidden_states")
            return StreamOrder(reorder, x.shape[1], 0 if text is None else text.shape[1], x.device, text_first=True)

        def enter(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
            tables = tuple(reorder.back(table, 0) for table in kwargs["image_rotary_emb"])
            return args, {
                **kwargs,
                "hidden_states": order_of(kwargs).leave(kwargs["hidden_states"]),
                "image_rotary_emb": tables,
            }

        def leave(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
            order = order_of(kwargs)
            if isinstance(output, tuple):  # image, text and perhaps an IP-Adapter's image
                return (order.enter(output[0]), output[1], *(order.enter(x) for x in output[2:]))
            return order.enter(output)

        return [
            module.register_forward_pre_hook(enter, with_kwargs=True),
            module.register_forward_hook(leave, with_kwargs=True),
        ]

    def grid_of_size(self, denoiser: nn.Module, pipe: Any, size: Size) -> Grid:
        rows, columns = image_tokens(denoiser, size, 2 * getattr(pipe, "vae_scale_factor", 8))
        return Grid(1, rows, columns, text=self.max_text, text_first=True)


register_family(FluxFamily())
