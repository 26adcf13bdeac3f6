"""What a clip differs by from the dense clip of the same prompt and seed.

PSNR and SSIM look at frames. The temporal error looks at what happens between them: flicker, and motion of another speed. LPIPS
(Zhang et al. 2018, arXiv 1801.03924) is nearer to what people see, and is measured if the package ``lpips`` is there.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tilewise.pipelines.errors import SetupError
from tilewise.pipelines.quality.metrics import SMALLEST, psnr, ssim

AT_ONCE = 8  # frames that LPIPS takes at once


def temporal_error(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> float | None:
    """Root mean square of (aₜ₊₁ − aₜ) − (bₜ₊₁ − bₜ) over all frames, pixels and channels, in levels of 255.

    a, b: (T, H, W, 3) uint8. None for a single frame.
    Raises ValueError for clips of different shapes.
    """
    if a.shape != b.shape:
        raise ValueError(f"the clips differ in shape: {a.shape} and {b.shape}")
    if len(a) < 2:
        return None
    total = 0.0
    for t in range(len(a) - 1):  # frame by frame: a whole clip in float64 may take gigabytes
        change = np.diff(a[t : t + 2].astype(np.float64), axis=0) - np.diff(b[t : t + 2].astype(np.float64), axis=0)
        total += float(np.square(change).mean())
    return math.sqrt(total / (len(a) - 1))


class Lpips:
    """LPIPS with AlexNet, the mean over frames. The package reads its backbone's weights from torchvision, which may download
    them once.

    Raises:
        SetupError: the package is not installed, or cannot load its weights.
    """

    def __init__(self, device: torch.device) -> None:
        try:
            import lpips
        except ImportError as error:
            raise SetupError("LPIPS needs the package lpips: pip install lpips, or leave it out") from error
        try:
            self.net: Any = lpips.LPIPS(net="alex", verbose=False).to(device).eval()
        except Exception as error:
            raise SetupError(f"LPIPS cannot load its weights: {error}") from error
        self.device = device

    @torch.no_grad()
    def __call__(self, a: NDArray[np.uint8], b: NDArray[np.uint8]) -> float:
        """a, b: (T, H, W, 3) uint8."""
        found = []
        for first in range(0, len(a), AT_ONCE):
            x, y = (
                torch.from_numpy(clip[first : first + AT_ONCE]).permute(0, 3, 1, 2).to(self.device).float() / 127.5 - 1
                for clip in (a, b)
            )
            found += self.net(x, y).flatten().tolist()
        return float(np.mean(found))


def differences(sparse: NDArray[np.uint8], dense: NDArray[np.uint8], lpips: Lpips | None) -> dict[str, float | None]:
    """ "psnr" in dB (None for identical clips), "ssim" (None for frames below 11 x 11 pixels), "temporal" and "lpips"."""
    close = psnr(sparse, dense)
    return {
        "psnr": close if math.isfinite(close) else None,
        "ssim": ssim(sparse, dense) if min(sparse.shape[1:3]) >= SMALLEST else None,
        "temporal": temporal_error(sparse, dense),
        "lpips": None if lpips is None else lpips(sparse, dense),
    }
