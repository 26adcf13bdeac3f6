"""How close two clips are: PSNR and SSIM.

They say how far a sparse clip is from the dense one at the same seed. They do not say which one is better: a clip can
differ from the dense one in every pixel and show the prompt just as well.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import correlate1d

SIGMA = 1.5
RADIUS = 5  # an 11 x 11 window
SMALLEST = 2 * RADIUS + 1  # pixels of a side that SSIM needs
K1, K2 = 0.01, 0.03
LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601, as in the usual grey conversion


def psnr(a: NDArray, b: NDArray) -> float:
    """Peak signal-to-noise ratio of two clips in dB, over all frames, pixels and channels at once.

    a, b: equal shapes, any rank; uint8 in 0..255 or float in 0..1, each its own. Identical clips give infinity.
    Raises ValueError when shapes differ or a clip is empty or of another dtype.
    """
    x, y = _unit_pair(a, b)
    error = float(np.mean((x - y) ** 2))
    return math.inf if error == 0 else -10 * math.log10(error)


def ssim(a: NDArray, b: NDArray) -> float:
    """Structural similarity of two clips in [-1, 1]: per frame on luma, averaged over frames. Identical clips give 1.

    As in Wang et al. 2004 (IEEE TIP 13:4): Gaussian window of 11 x 11 with sigma 1.5, K1 = 0.01, K2 = 0.03, population
    covariance, only positions where the whole window lies inside the frame.

    a, b: (T, H, W, 3), uint8 in 0..255 or float in 0..1, H and W at least 11. Raises ValueError otherwise.
    """
    x, y = _unit_pair(a, b)
    if x.ndim != 4 or x.shape[-1] != 3:
        raise ValueError(f"ssim takes clips of shape (T, H, W, 3), not {x.shape}")
    if min(x.shape[1:3]) < SMALLEST:
        raise ValueError(f"ssim needs frames of at least 11 x 11 pixels, not {x.shape[1]} x {x.shape[2]}")
    # One frame at a time: five filtered copies of a whole high-resolution clip in float64 would take gigabytes.
    return float(np.mean([_ssim_frame(p @ LUMA, q @ LUMA) for p, q in zip(x, y, strict=True)]))


def _ssim_frame(x: NDArray, y: NDArray) -> float:
    mean_x, mean_y = _blur(x), _blur(y)
    var_x = _blur(x * x) - mean_x**2
    var_y = _blur(y * y) - mean_y**2
    cov = _blur(x * y) - mean_x * mean_y
    c1, c2 = K1**2, K2**2
    score = (2 * mean_x * mean_y + c1) * (2 * cov + c2)
    score /= (mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2)
    return float(score.mean())


def _blur(x: NDArray) -> NDArray:
    """Gaussian-weighted mean over each 11 x 11 window that lies wholly inside `x` (H, W) -> (H - 10, W - 10)."""
    offsets = np.arange(-RADIUS, RADIUS + 1)
    weights = np.exp(-(offsets**2) / (2 * SIGMA**2))
    weights /= weights.sum()
    blurred = correlate1d(correlate1d(x, weights, axis=0), weights, axis=1)
    return blurred[RADIUS:-RADIUS, RADIUS:-RADIUS]


def _unit_pair(a: NDArray, b: NDArray) -> tuple[NDArray, NDArray]:
    if a.shape != b.shape:
        raise ValueError(f"the clips differ in shape: {a.shape} and {b.shape}")
    if a.size == 0:
        raise ValueError(f"the clips are empty: shape {a.shape}")
    return _unit(a), _unit(b)


def _unit(x: NDArray) -> NDArray:
    if x.dtype == np.uint8:
        return x.astype(np.float64) / 255
    if np.issubdtype(x.dtype, np.floating):
        return x.astype(np.float64)
    raise ValueError(f"a clip is uint8 in 0..255 or float in 0..1, not {x.dtype}")
