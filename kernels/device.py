"""Where the fused elementwise kernels run: one rule for all of them."""

from __future__ import annotations

import importlib.util
import os

import torch

FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def runs_triton(device: torch.device) -> bool:
    """Whether a fused operator launches its Triton kernel on ``device``; elsewhere it computes its naive formula.

    True for CUDA devices where Triton is installed, and for the CPU in Triton's interpreter (``TRITON_INTERPRET=1``).
    """
    if importlib.util.find_spec("triton") is None:
        return False
    return device.type == "cuda" or (device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1")


def capturing(device: torch.device) -> bool:
    """Whether work on ``device`` is being recorded into a CUDA graph, and not run."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
