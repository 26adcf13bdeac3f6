"""Dense attention by others: what a sparse kernel is compared with. A peer that is not installed is left out, by name."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

Attention = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor
]  # (B, S, H, D) three times → (B, S, H, D)


def _sdpa(backend: SDPBackend, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    with sdpa_kernel(backend):
        out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    return out.transpose(1, 2)


def dense_peers(device: torch.device) -> tuple[dict[str, Attention], dict[str, str]]:
    """(name → dense attention that may run on ``device``, name → why it is left out)."""
    found: dict[str, Attention] = {}
    missing: dict[str, str] = {}
    if device.type == "cpu":
        return {"sdpa": functools.partial(_sdpa, SDPBackend.FLASH_ATTENTION)}, {}
    found["cudnn"] = functools.partial(_sdpa, SDPBackend.CUDNN_ATTENTION)
    found["flash-sdpa"] = functools.partial(_sdpa, SDPBackend.FLASH_ATTENTION)
    try:
        from fa3_fwd_interface import flash_attn_func

        def flash_attention_3(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            out = flash_attn_func(q, k, v)
            return out[0] if isinstance(out, tuple) else out

        found["fa3"] = flash_attention_3
    except ImportError as error:
        missing["fa3"] = f"fa3-fwd is not installed ({error})"
    return found, missing
