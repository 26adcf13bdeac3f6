"""Sparse attention against dense peers, on the same tensors in the same run, checked before it is timed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.peers import dense_peers
from benchmarks.timing import measure
from tilewise.kernels.attention import block_sparse_attention, choose_backend
from tilewise.kernels.layout import Grid
from tilewise.kernels.plan import BlockPlan
from tilewise.kernels.reference import masked_attention
from tilewise.plugins.methods.sta import STA

Triple = tuple[int, int, int]


@dataclass(frozen=True)
class Row:
    name: str
    grid: Triple
    heads: int
    head_dim: int
    method: STA


PAPER = STA(window=(3, 3, 3), tile=(6, 8, 8))
GPU_ROWS = [
    Row("STA 30×48×80", (30, 48, 80), 24, 128, PAPER),
    Row("STA 18×48×80", (18, 48, 80), 24, 128, PAPER),
    Row("STA 21×30×52", (21, 30, 52), 12, 128, PAPER),
    Row("STA 21×45×80", (21, 45, 80), 40, 128, PAPER),
    Row("full window 21×30×52", (21, 30, 52), 12, 128, STA(window=(99, 99, 99), tile=(6, 8, 8))),
]
# The bundled demo model at 128×128 and 256×256 pixels, as the method runs there: with chosen tiles and windows.
CPU_ROWS = [
    Row(f"demo {32 * across // 4}×{32 * across // 4}, {label}", (9, across, across), 4, 64, method)
    for across in (16, 32)
    for label, method in (
        ("window (3,3,3)", STA()),
        ("density 0.4", STA(density=0.4)),
        ("density 0.25", STA(density=0.25)),
        ("density 0.15", STA(density=0.15)),
    )
]


def check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: BlockPlan, tolerance: float) -> float:
    """Largest relative error ‖out − ref‖/‖ref‖ over a few query blocks of the first head, against fp32."""
    out = block_sparse_attention(q, k, v, plan)
    worst = 0.0
    for block in {0, plan.index.shape[2] // 2, plan.index.shape[2] - 1}:
        rows = slice(int(plan.q_start[block]), int(plan.q_start[block] + plan.q_rows[block]))
        listed = plan.index[0, 0, block, : int(plan.ends[0, 0, block, 2])].long()
        keys = torch.cat(
            [torch.arange(int(plan.k_start[b]), int(plan.k_start[b] + plan.k_rows[b]), device=q.device) for b in listed]
        )
        want, _ = masked_attention(q[:, rows, :1], k[:, keys, :1], v[:, keys, :1], dtype=torch.float32)
        error = float((out[:, rows, :1].float() - want).norm() / want.norm())
        worst = max(worst, error)
    if not worst < tolerance:
        raise AssertionError(f"wrong result: relative error {worst:.2e}, expected below {tolerance:.0e}")
    return worst


def run_row(row: Row, device: torch.device, seconds: float) -> dict[str, Any]:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    layout = row.method.layout(Grid(*row.grid))
    plan = row.method.plan(layout, row.heads, device)
    generator = torch.Generator(device).manual_seed(0)
    shape = (1, layout.grid.tokens, row.heads, row.head_dim)
    q, k, v = (torch.randn(shape, generator=generator, device=device, dtype=dtype) for _ in range(3))
    error = check(q, k, v, plan, 1e-2 if dtype == torch.bfloat16 else 1e-5)
    chosen = choose_backend(q, k, v, plan)
    ours = measure(lambda: block_sparse_attention(q, k, v, plan), device, seconds=seconds)
    order, inverse = layout.permutation.to(device), layout.inverse.to(device)

    def with_permutes() -> torch.Tensor:
        moved = [x.index_select(1, order) for x in (q, k, v)]
        return block_sparse_attention(*moved, plan).index_select(1, inverse)

    permuted = measure(with_permutes, device, seconds=seconds)
    flops = 4 * layout.grid.tokens**2 * row.heads * row.head_dim
    result: dict[str, Any] = {
        "name": row.name,
        "grid": row.grid,
        "heads": row.heads,
        "head_dim": row.head_dim,
        "tile": layout.tile,
        **row.method.describe(layout),
        "dtype": str(dtype).removeprefix("torch."),
        "density": plan.density,
        "work": plan.work,
        "backend": chosen.backend,
        "relative_error": error,
        "ours": ours.to_dict(),
        "ours_with_permutes": permuted.to_dict(),
        "tflops_on_kept_pairs": flops * plan.density / ours.median / 1e9,
        "peers": {},
        "speedup": {},
        "fraction_of_ideal": {},
    }
    peers, missing = dense_peers(device)
    for name, attend in peers.items():
        try:
            timing = measure(lambda attend=attend: attend(q, k, v), device, seconds=seconds)  # type: ignore[misc]
        except RuntimeError as error_:  # a backend that refuses this device or shape
            missing[name] = str(error_).splitlines()[0]
            continue
        result["peers"][name] = timing.to_dict()
        result["speedup"][name] = timing.median / ours.median
        result["fraction_of_ideal"][name] = timing.median / ours.median * plan.density
    result["missing_peers"] = missing
    return result


def run(device: torch.device, seconds: float = 1.0) -> list[dict[str, Any]]:
    """All rows for a device."""
    return [run_row(row, device, seconds) for row in (GPU_ROWS if device.type == "cuda" else CPU_ROWS)]
