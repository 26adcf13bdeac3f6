"""Wan's transformer block with fused kernels between its matrix products and attention.

    n = LayerNorm(h)·(1 + scale) + shift                                       one launch
    a = attn1(n)                                                               one more for both norms and rotations
    h = h + gate·a;   n = LayerNorm(h)·w + b;                  a = attn2(n)    one launch
    h = h + a;        n = LayerNorm(h)·(1 + scale) + shift;    f = ffn(n)      one launch, the GELU inside the first product
    h = h + gate·f                                                             one launch

What diffusers' ``WanTransformerBlock`` and ``WanAttnProcessor`` compute in float32 is computed in float32 here, and hidden states
are rounded at the same places; queries and keys are rounded once instead of twice. Attention, projections and feed-forward are
called as modules, with any LoRA or hooks on them. A weight is read directly only if calling its module would do no more than
that; otherwise the module is called. So offloaded and quantised weights work as they do in the stock block.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import nn

from tilewise.kernels.device import FLOATS
from tilewise.kernels.fused.linear_gelu import linear_gelu
from tilewise.kernels.fused.qk_norm_rope import qk_norm_rope
from tilewise.kernels.fused.residual_norm import gated_residual, layer_norm, residual_norm
from tilewise.plugins.diffusers_compat import another, dispatch_options, wan_modules
from tilewise.plugins.hooks.forward_override import ForwardOverride, can_override, has_own_forward, override_forward
from tilewise.plugins.hooks.stand_in import stock_processor
from tilewise.plugins.models.common.family import FusedState

STOCK = wan_modules()  # the classes that this file stands in for
PLAIN = (nn.Parameter, torch.Tensor)  # weights that are what they show; those of quantizers are classes of their own


def fuse_blocks(denoiser: nn.Module, state: FusedState) -> list[ForwardOverride]:
    """Put the fused forward on each block that is diffusers' own; returns the handles."""
    blocks: Any = denoiser.blocks
    own = [block for block in blocks if type(block).forward is STOCK.block.forward]
    return [handle for block in own if (handle := override_forward(block, _block_forward, state))]


def stock_reasons(denoiser: nn.Module, dense: Collection[int]) -> Counter[str]:
    """Why blocks of a denoiser run stock code and not this file's, whatever the device: reason → number of blocks.

    dense: numbers of blocks whose self-attention keeps a processor of its own.
    """
    blocks: Any = denoiser.blocks
    reasons = (_stock_reason(block, number not in dense) for number, block in enumerate(blocks))
    return Counter(reason for reason in reasons if reason is not None)


def feed_forward_reasons(denoiser: nn.Module) -> Counter[str]:
    """Why blocks that run this file's code call the first layer of their feed-forward as a module: reason → number of blocks."""
    blocks: Any = denoiser.blocks
    reasons = (_gelu_reason(block.ffn) for block in blocks if _stock_reason(block, False) is None)
    return Counter(reason for reason in reasons if reason is not None)


def _stock_reason(block: Any, attention: bool) -> str | None:
    """The first of a block's parts that is not the one that fused code stands in for, or None; attention: look at that too."""
    if type(block).forward is not STOCK.block.forward:
        return f"the block is {another(block, STOCK.block)} or a subclass with its forward"
    if not can_override(block):
        return "the block's forward was replaced"
    if type(block.scale_shift_table) not in PLAIN:
        return f"its scale_shift_table is a {type(block.scale_shift_table).__name__}"
    if not attention:
        return None
    attn = block.attn1
    processor = stock_processor(attn.processor)
    if type(attn) is not STOCK.attention:
        return f"self-attention is {another(attn, STOCK.attention)}"
    if type(processor) is not STOCK.processor:
        return f"the processor of self-attention is {another(processor, STOCK.processor)}"
    return None


def _block_forward(
    override: ForwardOverride,
    hidden_states: torch.Tensor,
    encoder_hidden_states: torch.Tensor,
    temb: torch.Tensor,
    rotary_emb: Any,
) -> torch.Tensor:
    """``WanTransformerBlock.forward``: hidden states (B, S, C), temb (B, 6, C) or, a timestep per token, (B, S, 6, C)."""
    block: Any = override.module
    state = override.state
    table = block.scale_shift_table
    if (
        state is None
        or not state.fused_here(hidden_states)
        or hidden_states.ndim != 3
        or hidden_states.stride(2) != 1
        or temb.ndim not in (3, 4)
        or temb.dtype not in FLOATS
        or not _readable(table, hidden_states.device)
    ):
        return override.stock(hidden_states, encoder_hidden_states, temb, rotary_emb)

    m = _Modulation(table, temb)
    h = hidden_states
    n = _modulated(block.norm1, h, None, m, 0)[1]
    a = block.attn1(n, None, None, rotary_emb)
    h, n = _affine(block.norm2, h, a, m)
    a = block.attn2(n, encoder_hidden_states, None, None)
    h, n = _modulated(block.norm3, h, a, m, 3)
    return gated_residual(h, _rows(_feed_forward(block.ffn, n)), m.values[5], gate_base=m.base[5])


class _Modulation:
    """Shift, scale and gate, for attention and for the feed-forward: table + temb in float32, six of them.

    With a timestep per token, that sum is as large as six hidden states in float32. Then the two parts are kept apart and the
    kernels add them: ``values[i]`` (B, S, C), a view of temb, and ``base[i]`` (C,), which is 1 + scale for the scales.
    """

    def __init__(self, table: torch.Tensor, temb: torch.Tensor) -> None:
        self.values: list[torch.Tensor]
        self.base: list[torch.Tensor | None]
        if temb.ndim == 4:
            rows = table[0].float()
            scales = 1 + rows
            self.values = [temb[:, :, i] for i in range(6)]
            self.base = [scales[i] if i in (1, 4) else rows[i] for i in range(6)]
        else:
            total = table.float() + temb.float()
            self.values = [total[:, i : i + 1] for i in range(6)]
            self.base = [None] * 6


def _modulated(
    norm: nn.Module, h: torch.Tensor, y: torch.Tensor | None, m: _Modulation, first: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(h + y, its norm, scaled and shifted by m's entries ``first`` + 1 and ``first``); y None: h as it is."""
    shift, scale = m.values[first], m.values[first + 1]
    bias, weight = m.base[first], m.base[first + 1]
    if _plain_layer_norm(norm, h) and norm.weight is None and norm.bias is None:
        eps: Any = norm.eps
        if y is None:
            return h, layer_norm(h, weight=weight, bias=bias, scale=scale, shift=shift, eps=eps)
        return residual_norm(h, _rows(y), weight=weight, bias=bias, scale=scale, shift=shift, eps=eps)
    if y is not None:
        h = gated_residual(h, _rows(y))
    factor = scale + (1 if weight is None else weight)
    offset = shift if bias is None else shift + bias
    return h, (norm(h.float()) * factor + offset).type_as(h)


def _affine(norm: nn.Module, h: torch.Tensor, y: torch.Tensor, m: _Modulation) -> tuple[torch.Tensor, torch.Tensor]:
    """(h + gate·y, its norm): the second norm, which has weights of its own or is ``nn.Identity``."""
    gate, base = m.values[2], m.base[2]
    if _plain_layer_norm(norm, h):
        eps: Any = norm.eps
        weight: Any = norm.weight
        bias: Any = norm.bias
        return residual_norm(h, _rows(y), gate, gate_base=base, weight=weight, bias=bias, eps=eps)
    h = gated_residual(h, _rows(y), gate, gate_base=base)
    if type(norm) is nn.Identity and has_own_forward(norm):
        return h, h
    return h, norm(h.float()).type_as(h)


def _feed_forward(ffn: Any, x: torch.Tensor) -> torch.Tensor:
    """``ffn(x)``, with its first product and GELU in one where all three modules are the plain ones."""
    if _gelu_reason(ffn) is not None:
        return ffn(x)
    proj = ffn.net[0].proj
    if not (_readable(proj.weight, x.device) and _readable(proj.bias, x.device)):
        return ffn(x)
    if not x.dtype == proj.weight.dtype == proj.bias.dtype or torch.is_autocast_enabled(x.device.type):
        return ffn(x)
    return ffn.net[2](ffn.net[1](linear_gelu(x, proj.weight, proj.bias)))


def _gelu_reason(ffn: Any) -> str | None:
    """Why a feed-forward calls its first layer and its GELU as modules, whatever the input; None: they run as one kernel."""
    if type(ffn) is not STOCK.feed_forward or len(ffn.net) != 3:
        return f"the feed-forward is {another(ffn, STOCK.feed_forward)}"
    gelu = ffn.net[0]
    if type(gelu) is not STOCK.gelu:
        return f"its activation is {another(gelu, STOCK.gelu)}"
    if gelu.approximate != "tanh":
        return "its GELU is not the one by tanh"
    proj = gelu.proj
    if type(proj) is not nn.Linear:
        return f"its first layer is {another(proj, nn.Linear)}"
    if proj.bias is None:
        return "its first layer has no bias"
    if type(proj.weight) not in PLAIN:
        return f"its first layer's weight is a {type(proj.weight).__name__}"
    if not all(has_own_forward(part) for part in (ffn, gelu, proj)):
        return "the forward of it, or of a part, is hooked or was replaced"
    return None


def wan_self_attention(
    processor: Any,
    dispatch: Callable[..., torch.Tensor],
    attn: Any,
    hidden_states: torch.Tensor,
    encoder_hidden_states: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    *,
    order: torch.Tensor | None = None,
) -> torch.Tensor | None:
    """``WanAttnProcessor.__call__`` for self-attention, its two norms and rotations in one kernel.

    Args:
        processor: the stock processor, whose attention backend and parallel config are passed on.
        dispatch: called as diffusers' ``dispatch_attention_fn`` is.
        attn, hidden_states, …: the arguments of ``WanAttnProcessor.__call__``.
        order: (S,) int64, of the query and key that ``dispatch`` gets; None: the model's own, as the value's.

    Returns:
        What the stock processor returns; or None, before any module was called, where this cannot stand in for it.
    """
    if not _stands_in(processor, attn, hidden_states, encoder_hidden_states, rotary_emb):
        return None
    if attn.fused_projections:
        query, key, value = attn.to_qkv(hidden_states).chunk(3, dim=-1)
    else:
        query, key, value = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
    cos, sin = (None, None) if rotary_emb is None else rotary_emb
    query, key = qk_norm_rope(
        _rows(query), _rows(key), attn.norm_q.weight, attn.norm_k.weight, cos, sin, heads=attn.heads, eps=attn.norm_q.eps,
        order=order,
    )  # fmt: skip
    out = dispatch(
        query,
        key,
        value.unflatten(2, (attn.heads, -1)),
        attn_mask=attention_mask,
        dropout_p=0.0,
        is_causal=False,
        **dispatch_options(processor),
    )
    out = out.flatten(2, 3).type_as(query)
    return attn.to_out[1](attn.to_out[0](out))


def _stands_in(processor: Any, attn: Any, x: torch.Tensor, encoder_hidden_states: Any, rotary_emb: Any) -> bool:
    if type(processor) is not STOCK.processor or type(attn) is not STOCK.attention:
        return False
    if encoder_hidden_states is not None or attn.add_k_proj is not None or attn.is_cross_attention or x.ndim != 3:
        return False
    width = attn.inner_dim
    for norm in (attn.norm_q, attn.norm_k):
        if type(norm) is not nn.RMSNorm or not has_own_forward(norm) or tuple(norm.normalized_shape) != (width,):
            return False
        if norm.eps is None or (norm.weight is not None and not _readable(norm.weight, x.device)):
            return False
    if attn.norm_q.eps != attn.norm_k.eps or attn.kv_inner_dim != width or (width // attn.heads) % 2:
        return False
    if rotary_emb is None:
        return True
    if type(rotary_emb) is not tuple or len(rotary_emb) != 2:
        return False
    for t in rotary_emb:
        if t.ndim != 4 or t.shape[0] not in (1, x.shape[0]) or t.shape[1] != x.shape[1] or t.shape[2] != 1:
            return False
        if t.shape[3] != width // attn.heads or t.stride(3) != 1 or t.dtype not in FLOATS or t.device != x.device:
            return False
    return True


def _plain_layer_norm(norm: Any, x: torch.Tensor) -> bool:
    """Whether a module is a LayerNorm over the channels, and its weights are there to be read."""
    if type(norm) is not STOCK.layer_norm or not has_own_forward(norm) or tuple(norm.normalized_shape) != x.shape[2:]:
        return False
    return all(w is None or _readable(w, x.device) for w in (norm.weight, norm.bias))


def _readable(weight: torch.Tensor, device: torch.device) -> bool:
    """Whether a weight is an ordinary one, and on the device: offloaded ones are elsewhere until their module is called."""
    return type(weight) in PLAIN and weight.device == device and weight.dtype in FLOATS


def _rows(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()
