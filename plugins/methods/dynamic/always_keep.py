"""Pairs of blocks that a dynamic method keeps whatever its draft says.

    self          a block sees itself
    neighbours    and the tiles that share a face with its own, in time, height and width
    first-frame   every block sees the tiles of the first latent frame, which anchor how things look

Over the window of a KV cache, where a chunk's queries see the keys of all its frames, places are those in time: the first frame
is the oldest of the window. Memory and sink are kept besides.

Text is no choice: every block sees it and it sees every block.
"""

from __future__ import annotations

import torch

from tilewise.kernels.plans.layout import Layout
from tilewise.kernels.plans.window_keys import WindowKeys

ALWAYS_KEEP = ("self", "neighbours", "first-frame")


def always_kept(
    layout: Layout, names: tuple[str, ...], device: torch.device, window: WindowKeys | None = None
) -> torch.Tensor:
    """(Nq, Nk) bool on ``device``, kept with the layout or the window and not to be written to.

    names: of ``ALWAYS_KEEP``. window: the keys, where they are not the queries' own alone.
    """
    kept = layout.cached if window is None else window.cached
    return kept(("always kept", names, device), lambda: _always_kept(layout, names, device, window))


def _always_kept(
    layout: Layout, names: tuple[str, ...], device: torch.device, window: WindowKeys | None
) -> torch.Tensor:
    if window is None:
        found = _pairs(layout, names, layout.blocks)
    else:
        found = _pairs(window.layout, names, layout.blocks)[:, window.in_time] | window.always
    with torch.inference_mode(False):
        return found.to(device)


def _pairs(layout: Layout, names: tuple[str, ...], last: int) -> torch.Tensor:
    """(last, N) bool: of the last query blocks of a layout."""
    first = layout.blocks - last
    tile, text = layout.block_tile, layout.is_text
    kept = text[first:, None] | text[None, :]
    video = ~text[first:, None] & ~text[None, :]
    apart = (tile[first:, None] - tile[None, :]).abs().sum(-1)
    if "self" in names:
        kept = kept | torch.eye(layout.blocks, dtype=torch.bool)[first:]
    if "neighbours" in names:
        kept = kept | (video & (apart <= 1))
    if "first-frame" in names:
        kept = kept | (video & (tile[None, :, 0] == 0))
    return kept


def tokens_always_kept(layout: Layout, names: tuple[str, ...], window: WindowKeys | None = None) -> torch.Tensor:
    """(Nq,) float64 on the CPU: tokens that each query block sees in any case. The arguments are those of ``always_kept``."""

    def make() -> torch.Tensor:
        keys = layout if window is None else window.layout
        always = always_kept(layout, names, torch.device("cpu"), window)
        return (always.float() @ keys.block_rows.float()).double()  # whole numbers below 2²⁴

    return (layout.cached if window is None else window.cached)(("tokens always kept", names), make)


def kept_by_rows(layout: Layout, names: tuple[str, ...], levels: tuple[float, ...]) -> tuple[float, ...]:
    """Share of a head's pairs that each level keeps, text included: every row of video keeps so much of its own, but never less
    than in any case (``names``, text and one block)."""
    rows, text = layout.block_rows.double(), layout.is_text
    least = tokens_always_kept(layout, names).clamp_min(float(rows[~text].mean())) / rows.sum()  # of each query block
    kept = [torch.where(text, 1.0, least.clamp_min(level)) for level in levels]
    return tuple(float(each @ rows / rows.sum()) for each in kept)


def nearness(layout: Layout, device: torch.device) -> torch.Tensor:
    """(N, N) int64 on ``device``: place of key block j among the blocks of the video by distance from query block i, itself 0.

    Distances are Euclidean between the middles of the tiles in tokens, equal ones in the order of the blocks. Text comes last,
    and has no distance of its own. Kept with the layout, and not to be written to.
    """

    def make() -> torch.Tensor:
        middle = layout.block_tile.double() * torch.tensor(layout.tile, dtype=torch.float64)
        apart = torch.cdist(middle, middle).masked_fill(layout.is_text[None, :], torch.inf)
        rank = apart.argsort(dim=-1, stable=True).argsort(dim=-1)
        with torch.inference_mode(False):
            return rank.to(device)

    return layout.cached(("nearness", device), make)
