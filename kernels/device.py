"""Where Triton kernels run: one rule for all of them."""

from __future__ import annotations

import importlib.util
import os
from functools import cache
from typing import Any

import torch

ROCM = "TILEWISE_ROCM"  # environment variable: "1" runs our Triton kernels on AMD GPUs, which nobody has tried
FLOATS = (torch.float16, torch.bfloat16, torch.float32)

# Keyword arguments of ``torch.library.custom_op`` for operators that run Python anew at every call. Inductor must not record
# them into a CUDA graph, which would freeze one call's decision; it records what lies between them. A PyTorch without the tag
# (before 2.9) leaves CUDA graphs off for graphs that hold CPU tensors, which the arguments of such operators include.
_UNSAFE = getattr(torch._C.Tag, "cudagraph_unsafe", None)
CUDAGRAPH_UNSAFE: dict[str, Any] = {} if _UNSAFE is None else {"tags": (_UNSAFE,)}


def triton_unavailable(device: torch.device) -> str | None:
    """Why Triton kernels cannot run on a device, or None if they can."""
    if importlib.util.find_spec("triton") is None:
        return "the triton package is not installed"
    if device.type != "cuda":
        return f"Triton kernels need a CUDA device, not {device.type}"
    if torch.version.hip is not None and os.environ.get(ROCM) != "1":
        return f"compiled for ROCm, and never tried on an AMD GPU: set {ROCM}=1 to be the first"
    if not torch.cuda.is_available():
        return "PyTorch sees no CUDA device"
    if torch.version.hip is not None:
        return None
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return f"needs compute capability 8.0 or later, {torch.cuda.get_device_name(device)} has {major}.{minor}"
    return None


@cache
def _has_triton(device: torch.device) -> bool:
    """Whether Triton kernels can run on a GPU: what a machine has does not change, and asking takes longer than a launch."""
    return triton_unavailable(device) is None


def runs_triton(device: torch.device) -> bool:
    """Whether a fused operator launches its Triton kernel on ``device``; elsewhere it computes its naive formula.

    True for GPUs on which Triton kernels can run, and for the CPU in Triton's interpreter (``TRITON_INTERPRET=1``).
    """
    if device.type == "cpu":
        return os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None
    return _has_triton(device)


def capturing(device: torch.device) -> bool:
    """Whether work on ``device`` is being recorded into a CUDA graph, and not run."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
