"""Launch configurations of the Triton kernel, one after another: what ``launch_config``'s rules are chosen from."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch

from benchmarks.attention import check
from benchmarks.peers import reason
from benchmarks.rows import Row, visible
from benchmarks.timing import measure

# (BLOCK_M, BLOCK_N, num_warps, num_stages)
CONFIGS = [
    *((128, 64, 8, stages) for stages in (2, 3, 4, 5, 6, 7)),
    *((128, 128, 8, stages) for stages in (2, 3, 4, 5)),
    *((128, 32, 8, stages) for stages in (4, 7)),
    *((64, 64, 4, stages) for stages in (3, 4, 5, 6)),
    *((64, 128, 4, stages) for stages in (3, 5)),
    *((128, 64, 4, stages) for stages in (3, 4, 5, 6)),
]


def run(device: torch.device, seconds: float, rows: list[Row]) -> Iterator[dict[str, Any]]:
    """Milliseconds and TFLOP/s on needed pairs of each configuration. Nothing without a GPU."""
    if device.type == "cuda":
        for row in rows:
            yield run_row(row, device, seconds)


def run_row(row: Row, device: torch.device, seconds: float) -> dict[str, Any]:
    """Every configuration on one row; what the rules choose for it is the first of the list."""
    from tilewise.kernels.attention.backends import triton as kernel

    layout = row.method.layout(row.grid)
    plan = row.method.plan(layout, row.heads, device)
    shape = (1, row.grid.tokens, row.heads, row.head_dim)
    q, k, v = (torch.randn(shape, device=device, dtype=torch.bfloat16) for _ in range(3))
    coords = layout.coords.to(device)
    mask = functools.partial(visible, row, layout, coords)
    forward = functools.partial(kernel.triton_forward, q, k, v, plan, row.head_dim**-0.5)
    flops = 4 * row.grid.tokens**2 * row.heads * row.head_dim * plan.density
    rules = kernel.launch_config
    found = []
    for config in (None, *CONFIGS):
        keys = ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages")
        wanted = {} if config is None else dict(zip(keys, config, strict=True))
        used: dict[str, Any] = {}

        def chosen(*args: Any, wanted: dict[str, int] = wanted, used: dict[str, Any] = used, **options: Any) -> Any:
            used.update({**rules(*args, **options), **wanted})
            return used

        with mock.patch.object(kernel, "launch_config", chosen):
            try:
                check(forward()[0], q, k, v, mask, 1e-2)
                timing = measure(forward, device, seconds=seconds, warmup=0)
            except Exception as error:  # out of shared memory or registers: a fact about the configuration
                found.append({**used, "rule": config is None, "error": reason(error)})
                continue
        facts = {**timing.to_dict(), "tflops": flops / timing.median / 1e9}
        found.append({**used, "rule": config is None, **facts})
    return {"name": row.name, "head_dim": row.head_dim, "configs": found}
