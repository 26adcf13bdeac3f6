"""Masks that weigh padding down: read for what they are, and answered exactly without an (S, S) mask."""

from __future__ import annotations

import pytest
import torch

import tilewise
from tilewise.kernels.attention import lse_merge
from tilewise.kernels.attention.dispatch import block_sparse_attention
from tilewise.kernels.plans.layout import Grid, cached_layout
from tilewise.plugins.masks.additive_padding_mask import add_weighed, attend_all, visible_of

STA = tilewise.STA(window=(1, 2, 1), tile=(1, 3, 3))
TEXT = 7


def mask_of(visible: torch.Tensor, weight: float = 1.0) -> torch.Tensor:
    """As Chroma's blocks make it."""
    m = visible.float() * weight**0.5
    return (m[:, None, None, :] * m[:, None, :, None]).round(decimals=6)


def visible(grid: Grid, *lengths: int) -> torch.Tensor:
    first = 0 if grid.text_first else grid.video
    shown = torch.ones(len(lengths), grid.tokens, dtype=torch.bool)
    for sample, n in enumerate(lengths):
        shown[sample, first + n : first + TEXT] = False
    return shown


@pytest.mark.parametrize("text_first", [True, False])
@pytest.mark.parametrize("pairs", [1 << 24, 1, 200])  # token pairs at once: all, less than a row, some rows
def test_what_a_mask_shows(monkeypatch, text_first, pairs):
    monkeypatch.setattr("tilewise.plugins.masks.additive_padding_mask.PAIRS", pairs)
    grid = Grid(1, 5, 6, text=TEXT, text_first=text_first)
    shown = visible(grid, 7, 3)
    for weight in (1.0, 4.0):
        found = visible_of(mask_of(shown, weight), 2, grid)
        assert found is not None and torch.equal(found[0], shown) and found[1] == weight
    found = visible_of(mask_of(shown[1:]), 2, grid)  # one for all samples
    assert found is not None and torch.equal(found[0], shown[1:].expand(2, -1))
    one_off, video = mask_of(shown), shown.clone()
    one_off[1, 0, 3, 4] += 0.5
    video[0, 0 if not text_first else TEXT] = False
    others = [one_off, mask_of(video), mask_of(shown) > 0, mask_of(shown)[:, :, :1], -mask_of(shown), mask_of(shown)[0]]
    for other in others:
        assert visible_of(other, 2, grid) is None


@pytest.mark.parametrize("length", [0, 1, 4, TEXT])
@pytest.mark.parametrize("text_first", [True, False])
@pytest.mark.parametrize(
    ("weight", "scale", "heads"), [(1.0, None, (2, 2)), (2.5, 0.3, (2, 1)), (1.0, None, (6, 2)), (2.5, 0.3, (6, 3))]
)
def test_it_is_dense_attention_with_the_mask_and_the_window(monkeypatch, length, text_first, weight, scale, heads):
    """heads: of queries, and of keys and values."""
    H, Hk = heads
    monkeypatch.setattr(lse_merge, "MAX_SCORES", 2 * H * 6 * 11)  # several chunks of queries
    grid = Grid(1, 5, 6, text=TEXT, text_first=text_first)
    layout = STA.layout(grid)
    generator = torch.Generator().manual_seed(length)
    q, k, v = (torch.randn(2, grid.tokens, n, 16, generator=generator) for n in (H, Hk, Hk))
    shown = visible(grid, length)[0]
    window = STA.plan(layout, H, torch.device("cpu")).to_mask(H)[0].clone()
    window[:, ~shown] = True  # padding sees everything
    bias = torch.where(window, weight * (shown[:, None] & shown).double(), -torch.inf)
    wide = [x.double().repeat_interleave(H // x.shape[2], 2) for x in (q, k, v)]
    scores = torch.einsum("bihd,bjhd->bhij", *wide[:2]) * (16**-0.5 if scale is None else scale) + bias
    want = torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), wide[2]).float()

    without = cached_layout(Grid(1, 5, 6, text=length, text_first=text_first), layout.tile)
    plan = STA.plan(without, H, torch.device("cpu"))
    mine, others = (tuple(x[:, at] for x in (q, k, v)) for at in (shown, ~shown))
    out, lse = block_sparse_attention(*mine, plan, scale=scale, return_lse=True)
    if length < TEXT:
        out, lse = add_weighed(mine[0], *others[1:], out, lse, weight, scale)
    theirs = attend_all(others[0], k, v, scale)
    # A softmax does not mind c, and so it is left out of what all visible keys share.
    torch.testing.assert_close(lse, scores.logsumexp(-1)[:, :, shown].float() - weight, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out, want[:, shown], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(theirs, want[:, ~shown], atol=1e-5, rtol=1e-5)
