"""One attention call of a stock processor, with everything that diffusers' attention dispatcher is given."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch

from tilewise.plugins.context_parallel.token_shares import RankOrder
from tilewise.plugins.torch_compat import constant_in_graphs


@dataclass(eq=False)
class AttentionRequest:
    """The arguments of ``diffusers.models.attention_dispatch.dispatch_attention_fn``, by the names that it has for them.

    Attributes:
        query: (B, Sq, H, D). key, value: (B, Sk, Hk, D), Hk dividing H.
        attn_mask: boolean (True = attend) or additive, broadcastable to (B, H, Sq, Sk); None: every query sees every key.
        dropout_p, is_causal, scale, enable_gqa: as for ``torch.nn.functional.scaled_dot_product_attention``.
        attention_kwargs, backend, parallel_config: of diffusers; passed on to the stock attention as they are.
        fused: whether the family's fused kernels made the query and key, rather than the stock processor.
        qk_order: (permutation, inverse) of the token order that they made the query and key in, as ``Layout`` has them; the
            value is in the model's own. None: so are all three.
        rank_order: on the device: all three are in the order of the ranks that they came from, and so is the output to be. The
            mask is in the model's. None: in the model's too.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    attn_mask: torch.Tensor | None = None
    dropout_p: float = 0.0
    is_causal: bool = False
    scale: float | None = None
    enable_gqa: bool = False
    attention_kwargs: dict[str, Any] | None = None
    backend: Any = None
    parallel_config: Any = None
    fused: bool = False
    qk_order: tuple[torch.Tensor, torch.Tensor] | None = None
    rank_order: RankOrder | None = None

    @property
    def qkv(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.query, self.key, self.value

    def autocast(self) -> AttentionRequest:
        """The request as PyTorch's attention would see it: in the dtype of autocast where that is on, whatever norms left.

        Autocast leaves float64 as it is, and boolean masks.
        """
        device = self.query.device.type
        if not is_autocast(device):
            return self
        dtype = torch.get_autocast_dtype(device)
        query, key, value, mask = (
            x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() and x.dtype != torch.float64 else x
            for x in (*self.qkv, self.attn_mask)
        )
        return self.replace(query=query, key=key, value=value, attn_mask=mask)

    def replace(self, **changes: Any) -> AttentionRequest:
        """The same request with some fields changed."""
        return dataclasses.replace(self, **changes)


def is_autocast(device_type: str) -> bool:
    """Whether autocast is on for a type of device."""
    return _has_autocast(device_type) and torch.is_autocast_enabled(device_type)


@constant_in_graphs  # Dynamo of PyTorch 2.11 cannot trace the question
def _has_autocast(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type)
