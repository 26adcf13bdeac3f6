"""The ways in which several GPUs divide the work of one denoiser."""

from __future__ import annotations

from tilewise.plugins.errors import unknown

CONTEXT, CFG = "context", "cfg"
WAYS = (
    CONTEXT,
    CFG,
)  # the tokens split over all GPUs; or a branch of guidance for each half of them, which splits the tokens


def check_way(way: str) -> None:
    """Raises ConfigError for a way that there is not."""
    if way not in WAYS:
        raise unknown("value of parallel", way, WAYS)


def token_parts(gpus: int, way: str) -> int:
    """Over how many of the GPUs the tokens of a forward are split."""
    return gpus // 2 if way == CFG and gpus > 1 else gpus
