"""Dense attention by others: what a sparse kernel is compared with. A peer that is not installed is left out, by name.

A peer is a function that gets q, k and v, (B, S, H, D) each, and returns the call that is timed.
"""

from __future__ import annotations

import functools
import importlib.metadata
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

Call = Callable[[], torch.Tensor]  # → (B, S, H, D)
Peer = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], Call]

# Largest relative error that a peer may have and still be timed, where it is not that of 16-bit arithmetic.
TOLERANCES = {"sage": 5e-2, "int8": 3e-2, "fp8": 5e-2}  # 8-bit products
PACKAGES = ("fa3-fwd", "flash-attn-4", "sageattention")


def _sdpa(backend: SDPBackend, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Call:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))

    def call() -> torch.Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)

    return call


def _fa3() -> Peer:
    from fa3_fwd_interface import flash_attn_func

    return functools.partial(_first_output, flash_attn_func)


def _fa4() -> Peer:
    from flash_attn.cute import flash_attn_func

    return functools.partial(_first_output, flash_attn_func)


def _first_output(function: Callable, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Call:
    def call() -> torch.Tensor:
        out = function(q, k, v)
        return out[0] if isinstance(out, tuple) else out

    return call


def _sage() -> Peer:
    from sageattention import sageattn

    def prepare(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Call:
        own = k.clone()  # it subtracts the mean of the keys in place
        return lambda: sageattn(q, own, v, tensor_layout="NHD")

    return prepare


def dense_peers(device: torch.device) -> tuple[dict[str, Peer], dict[str, str]]:
    """(name → dense attention that may run on ``device``, name → why it is left out)."""
    if device.type == "cpu":
        return {"sdpa": functools.partial(_sdpa, SDPBackend.FLASH_ATTENTION)}, {}
    found: dict[str, Peer] = {
        "cudnn": functools.partial(_sdpa, SDPBackend.CUDNN_ATTENTION),
        "flash-sdpa": functools.partial(_sdpa, SDPBackend.FLASH_ATTENTION),
    }
    missing: dict[str, str] = {}
    for name, load in (("fa3", _fa3), ("fa4 dense", _fa4), ("sage", _sage)):
        try:
            found[name] = load()
        except Exception as error:  # not installed, or installed for another machine
            missing[name] = reason(error)
    return found, missing


def reason(error: BaseException) -> str:
    """An error in one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300] if lines else 'no message'}"


def versions() -> dict[str, str]:
    """Versions of the peers that are installed."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
