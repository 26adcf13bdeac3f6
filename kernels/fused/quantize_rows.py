"""Rows in 8 bits with a scale each, for matrix products in fp8: one pass where separate operators take six.

    scale[m] = max(|x[m]|, eps) / 448        q[m] = round to e4m3(x[m] / scale[m])        x[m] ≈ scale[m] · q[m]

448 is the largest number of float8 e4m3. Computed in float32.
"""

from __future__ import annotations

from functools import lru_cache

import torch

from tilewise.kernels.device import FLOATS, runs_triton

LARGEST = 448.0
EPS = 1e-12
MAX_COLUMNS = 32_768


def quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Each row of x in float8 e4m3, with its scale.

    Args:
        x: (M, K) float16, bfloat16 or float32, K ≤ 32,768, with contiguous rows.

    Returns:
        (M, K) float8_e4m3fn and (M, 1) float32, contiguous.

    Raises:
        ValueError: another shape, or rows that are not contiguous.
        TypeError: another dtype.
    """
    if x.ndim != 2 or not 0 < x.shape[1] <= MAX_COLUMNS or x.stride(1) != 1:
        raise ValueError(
            f"quantize_rows: x must be (M, K) with contiguous rows and K ≤ {MAX_COLUMNS}, got {tuple(x.shape)}, strides "
            f"{x.stride()}"
        )
    if x.dtype not in FLOATS:
        raise TypeError(f"quantize_rows: takes float16, bfloat16 and float32, got {x.dtype}")
    if runs_triton(x.device) and (x.device.type == "cpu" or has_fp8(x.device)):
        from tilewise.kernels.fused.triton_quantize_rows import triton_quantize_rows

        return triton_quantize_rows(x)
    return quantize_rows_reference(x)


@lru_cache(maxsize=64)
def has_fp8(device: torch.device) -> bool:
    """Whether a GPU has products in float8 e4m3: compute capability 8.9 and later."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


def quantize_rows_reference(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The formula."""
    rows = x.float()
    scale = rows.abs().amax(1, keepdim=True).clamp_min(EPS) / LARGEST
    return (rows / scale).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn), scale
