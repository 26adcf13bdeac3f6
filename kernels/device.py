"""Where the fused elementwise kernels run: one rule for all of them."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import torch

FLOATS = (torch.float16, torch.bfloat16, torch.float32)

# Keyword arguments of ``torch.library.custom_op`` for operators that run Python anew at every call. Inductor must not record
# them into a CUDA graph, which would freeze one call's decision; it records what lies between them. A PyTorch without the tag
# (before 2.9) leaves CUDA graphs off for graphs that hold CPU tensors, which the arguments of such operators include.
_UNSAFE = getattr(torch._C.Tag, "cudagraph_unsafe", None)
CUDAGRAPH_UNSAFE: dict[str, Any] = {} if _UNSAFE is None else {"tags": (_UNSAFE,)}


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
