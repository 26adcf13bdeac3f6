"""One denoiser forward at real size: stock diffusers with each dense backend against the patched one. Random weights."""

from __future__ import annotations

from typing import Any

import torch

import tilewise
from benchmarks.timing import measure

# Wan2.1-T2V-1.3B: the published config of its transformer.
WAN_1_3B = {
    "num_attention_heads": 12,
    "attention_head_dim": 128,
    "ffn_dim": 8960,
    "num_layers": 30,
    "text_dim": 4096,
    "freq_dim": 256,
}
SIZES = {"Wan2.1-1.3B 480×832×81": (21, 60, 104)}  # latent frames, height, width
METHODS = {
    "sta, window (3,3,3)": tilewise.STA(),
    "sta, density 0.4": tilewise.STA(density=0.4),
    "sta, density 0.2": tilewise.STA(density=0.2),
}


def run(device: torch.device, seconds: float = 2.0) -> list[dict[str, Any]]:
    """Every size: milliseconds a forward, stock and patched (method on every block, no dense step), and peak memory."""
    if device.type != "cuda":
        return []
    from diffusers import WanTransformer3DModel

    rows = []
    with torch.device(device):
        torch.set_default_dtype(torch.bfloat16)
        try:
            model = WanTransformer3DModel(**WAN_1_3B).eval()
        finally:
            torch.set_default_dtype(torch.float32)
    for name, (frames, height, width) in SIZES.items():
        x = torch.randn(1, 16, frames, height, width, device=device, dtype=torch.bfloat16)
        text = torch.randn(1, 512, 4096, device=device, dtype=torch.bfloat16)
        timestep = torch.tensor([500.0], device=device)

        def forward(x: Any = x, timestep: Any = timestep, text: Any = text) -> torch.Tensor:
            with torch.no_grad():
                return model(x, timestep, text, return_dict=False)[0]

        result: dict[str, Any] = {"name": name, "stock": {}, "patched": {}}
        for backend in ("native", "_native_cudnn"):
            model.set_attention_backend(backend)
            torch.cuda.reset_peak_memory_stats()
            timing = measure(forward, device, seconds=seconds)
            peak = torch.cuda.max_memory_allocated() / 2**30
            result["stock"][backend] = {**timing.to_dict(), "peak_gib": peak}
        best = min(row["ms"] for row in result["stock"].values())
        for label, method in METHODS.items():
            with tilewise.patched(model, method, steps=(0, 1), strict=True):
                torch.cuda.reset_peak_memory_stats()
                timing = measure(forward, device, seconds=seconds)
                peak = torch.cuda.max_memory_allocated() / 2**30
                density = tilewise.summary(model).density
            result["patched"][label] = {
                **timing.to_dict(),
                "peak_gib": peak,
                "density": density,
                "speedup": best / timing.median,
            }
        rows.append(result)
    return rows
