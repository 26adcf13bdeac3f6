"""Launch configurations of the Triton kernel, one after another: what ``launch_config``'s rules are chosen from."""

from __future__ import annotations

import functools
from typing import Any
from unittest import mock

import torch

from benchmarks.attention import PAPER
from benchmarks.timing import measure
from tilewise.kernels.layout import Grid

WORK = "STA 30×48×80, 24 heads, tile (6,8,8), window (3,3,3), bf16, kernel alone"
# (BLOCK_M, BLOCK_N, num_warps, num_stages)
CONFIGS = [
    *((128, 64, 8, stages) for stages in (2, 3, 4, 5, 6, 7)),
    *((128, 128, 8, stages) for stages in (2, 3, 4, 5)),
    *((128, 32, 8, stages) for stages in (4, 7)),
    *((64, 64, 4, stages) for stages in (3, 4, 5, 6)),
    *((64, 128, 4, stages) for stages in (3, 5)),
    *((128, 64, 4, stages) for stages in (3, 4, 5, 6)),
]


def run(device: torch.device, seconds: float = 0.25) -> dict[str, Any]:
    """Milliseconds and TFLOP/s on kept pairs of each configuration, for head dims 128 and 64. Nothing without a GPU."""
    if device.type != "cuda":
        return {}
    from tilewise.kernels import triton_forward as kernel

    layout = PAPER.layout(Grid(30, 48, 80))
    plan = PAPER.plan(layout, 24, device)
    rows = []
    for head_dim in (128, 64):
        shape = (1, layout.grid.tokens, 24, head_dim)
        q, k, v = (torch.randn(shape, device=device, dtype=torch.bfloat16) for _ in range(3))
        forward = functools.partial(kernel.triton_forward, q, k, v, plan, head_dim**-0.5)
        want, _ = forward()
        for m, n, warps, stages in CONFIGS:
            config = {"BLOCK_M": m, "BLOCK_N": n, "num_warps": warps, "num_stages": stages}
            with mock.patch.object(kernel, "launch_config", return_value={"BLOCK_D": head_dim, **config}):
                try:
                    torch.testing.assert_close(forward()[0], want, atol=2e-2, rtol=2e-2)
                    timing = measure(forward, device, seconds=seconds)
                except Exception as error:  # out of shared memory or registers: a fact about the configuration
                    rows.append({"head_dim": head_dim, **config, "error": str(error).splitlines()[0][:200]})
                    continue
            flops = 4 * layout.grid.tokens**2 * 24 * head_dim * plan.density
            rows.append(
                {"head_dim": head_dim, **config, "ms": timing.median, "tflops": round(flops / timing.median / 1e9)}
            )
    return {"work": WORK, "rows": rows}
