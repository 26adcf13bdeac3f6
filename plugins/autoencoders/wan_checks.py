"""Whether the fused forward of a Wan decoder or encoder computes what the stock one would."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tilewise.kernels.device import FLOATS, runs_triton
from tilewise.plugins.diffusers_compat import another, wan_vae_modules
from tilewise.plugins.hooks.forward_override import has_own_forward


def why_stock(module: Any, x: torch.Tensor) -> str | None:
    """Why a call of a ``WanDecoder3d`` or ``WanEncoder3d`` runs the stock code; None: it may run fused.

    Hooks on ``module`` itself are the caller's concern: they run around either.
    """
    if not fuses_on(x.device):
        return f"no fused kernels on {x.device.type}"
    if torch.is_grad_enabled():
        return "gradients are enabled"
    if torch.compiler.is_compiling():
        return "torch.compile traces it"
    if torch.is_autocast_enabled(x.device.type):
        return "autocast is enabled"
    if x.dtype not in FLOATS:
        return f"latents or frames of {x.dtype}"
    if x.ndim != 5 or x.numel() == 0:
        return f"an input of shape {tuple(x.shape)}"
    return _why_other_modules(module) or _why_other_parameters(module, x)


def fuses_on(device: torch.device) -> bool:
    """Whether the fused forward is the faster one on ``device``."""
    return device.type == "cuda" and runs_triton(device)


def _why_other_modules(root: Any) -> str | None:
    """Modules of other classes, with other settings, or with hooks."""
    kinds = wan_vae_modules()
    known = {*kinds[1:], nn.Sequential, nn.ModuleList, nn.Conv2d, nn.ZeroPad2d, nn.Dropout, nn.Identity, nn.SiLU}
    for name, module in root.named_modules():
        kind = type(module)
        if module.training:
            return "it is in training mode"
        if kind not in known:
            return f"{name or 'it'} is {another(module, kinds.conv)}" if isinstance(module, kinds.conv) else (
                f"{name or 'it'} is a {kind.__name__} of {kind.__module__}"
            )  # fmt: skip
        if module is not root and not has_own_forward(module):
            return f"{name} has a hook or a forward of its own"
        if kind is kinds.upsample and (tuple(module.scale_factor), module.mode) != ((2.0, 2.0), "nearest-exact"):
            return f"{name} upsamples by {module.scale_factor}, {module.mode}"
        if kind is kinds.norm and (not module.channel_first or isinstance(module.bias, torch.Tensor)):
            return f"{name} has a bias, or its channels last"
        if kind in (kinds.residual_block, kinds.decoder, kinds.encoder) and type(module.nonlinearity) is not nn.SiLU:
            return f"{name or 'it'} has {type(module.nonlinearity).__name__} for its activation"
    return None


def _why_other_parameters(root: Any, x: torch.Tensor) -> str | None:
    """Quantized weights, and weights of another dtype or on another device than the input."""
    for name, weight in root.named_parameters():
        if type(weight) is not nn.Parameter or weight.layout != torch.strided:
            return f"{name} is a {type(weight).__name__}"
        if weight.dtype != x.dtype or weight.device != x.device:
            return f"{name} is {weight.dtype} on {weight.device}, the input {x.dtype} on {x.device}"
    return None
