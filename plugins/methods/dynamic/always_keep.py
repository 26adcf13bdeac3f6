"""Pairs of blocks that a dynamic method keeps whatever its draft says.

    self          a block sees itself
    neighbours    and the tiles that share a face with its own, in time, height and width
    first-frame   every block sees the tiles of the first latent frame, which anchor how things look

Text is no choice: every block sees it and it sees every block.
"""

from __future__ import annotations

import torch

from tilewise.kernels.plans.layout import Layout

ALWAYS_KEEP = ("self", "neighbours", "first-frame")


def always_kept(layout: Layout, names: tuple[str, ...], device: torch.device) -> torch.Tensor:
    """(N, N) bool on ``device``, kept with the layout and not to be written to. names: of ``ALWAYS_KEEP``."""
    return layout.cached(("always kept", names, device), lambda: _always_kept(layout, names, device))


def _always_kept(layout: Layout, names: tuple[str, ...], device: torch.device) -> torch.Tensor:
    tile, text = layout.block_tile, layout.is_text
    kept = text[:, None] | text[None, :]
    video = ~text[:, None] & ~text[None, :]
    apart = (tile[:, None] - tile[None, :]).abs().sum(-1)
    if "self" in names:
        kept = kept | torch.eye(layout.blocks, dtype=torch.bool)
    if "neighbours" in names:
        kept = kept | (video & (apart <= 1))
    if "first-frame" in names:
        kept = kept | (video & (tile[None, :, 0] == 0))
    with torch.inference_mode(False):
        return kept.to(device)
