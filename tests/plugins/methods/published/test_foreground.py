"""``foreground``: where the object is, and which blocks its queries and the others keep, against plain loops."""

import pytest
import torch
from chosen_blocks import blocks_of, planned, tensors

import tilewise
from tests.helpers.tiny_wan import tiny_transformer
from tilewise.kernels.plans.layout import Grid
from tilewise.kernels.selection.select import GOLDEN
from tilewise.plugins.methods.base import make_method
from tilewise.plugins.methods.published.foreground import densities, masked_blocks

TILE = (1, 4, 4)
MASK = ((0.0, 1.0, 1.0), (0.0, 0.0, 1.0))
GRIDS = [Grid(2, 9, 14), Grid(2, 9, 10, text=5, text_first=True)]


def masked(layout, mask):
    """The blocks by loops over their tokens."""
    found = []
    for start, rows, text in zip(
        layout.block_start.tolist(), layout.block_rows.tolist(), layout.is_text.tolist(), strict=True
    ):
        values = []
        for s in range(start, start + rows):
            _, y, x = layout.coords[:, s].tolist()
            values.append(0.0 if text else mask[y * len(mask) // layout.grid.h][x * len(mask[0]) // layout.grid.w])
        found.append(not text and sum(values) / rows >= 0.5)
    return found


def check(method, layout, qkv, place, part, density):
    """Each row keeps the best by its own density; place: (samples, blocks)."""
    grid, N, rows, text = layout.grid, layout.blocks, layout.block_rows.tolist(), layout.is_text.tolist()
    share = grid.text / grid.tokens
    of_rows = max((density - share) / (1 - share), 1 / grid.tokens)
    outside = of_rows / (part * method.boost + 1 - part)
    inside = method.boost * outside
    if inside > 1:
        inside, outside = 1.0, (of_rows - part) / (1 - part)
    logits = method.draft(layout, *qkv[:2], 0.25).logits
    kept = blocks_of(layout, planned(method, layout, *qkv).plan, 4)
    for b in range(2):
        for h in range(4):
            for i in range(N):
                wanted = [j for j in range(N) if i == j or text[j] or text[i]]
                aim = (inside if place[b][i] else outside) - (i * GOLDEN % 1) / N
                for j in sorted(range(N), key=lambda j: -float(logits[b, h, i, j])):
                    if sum(rows[j] for j in wanted) / grid.tokens < aim and j not in wanted:
                        wanted.append(j)
                assert set(kept[b, h, i].nonzero().flatten().tolist()) == set(wanted), (b, h, i)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("boost", [3.0, 1.0])
def test_a_mask(grid, boost):
    options = {"tile": TILE, "mask": MASK, "boost": boost, "density": 0.35, "compensate": False, "min_tokens": 0}
    method = make_method("foreground", options)
    layout = method.layout(grid)
    place = masked(layout, MASK)
    assert masked_blocks(layout, method.mask, torch.device("cpu")).tolist() == place
    assert 0 < sum(place) < sum(~layout.is_text)
    part = sum(n for n, there in zip(layout.block_rows.tolist(), place, strict=True) if there) / grid.video
    check(method, layout, tensors(grid), [place, place], part, 0.35)


def test_words():
    grid = Grid(2, 9, 10, text=7)
    method = make_method(
        "foreground",
        {"tile": TILE, "words": (2, 4), "share": 0.3, "density": 0.4, "compensate": False, "min_tokens": 0},
    )
    layout, (q, k, v) = method.layout(grid), tensors(grid)
    video = (~layout.is_text).nonzero().flatten().tolist()
    count, place = round(0.3 * len(video)), []
    starts = layout.block_start.tolist()
    for b in range(2):
        seen = {}
        for i in video:
            mean = q[b, starts[i] : starts[i] + int(layout.block_rows[i])].double().mean(0)
            heads = [(0.25 * k[b, grid.video :, h // 2].double() @ mean[h]).softmax(0)[2:5].sum() for h in range(4)]
            seen[i] = float(sum(heads))
        best = sorted(video, key=lambda i: -seen[i])[:count]
        place.append([i in best for i in range(layout.blocks)])
    assert place[0] != place[1]
    check(method, layout, (q, k, v), place, count / len(video), 0.4)


def test_the_whole_keeps_the_density():
    for density in (0.1, 0.5, 0.9):
        for part in (0.0, 0.2, 1.0):
            inside, outside = densities(density, part, 3.0)
            assert part * inside + (1 - part) * outside == pytest.approx(density)
            assert 0 < outside <= inside <= 1


def test_words_of_another_attention_are_refused():
    """Text that is not in the sequence: dense, counted, and with ``strict`` an error."""
    model = tiny_transformer(seed=1)
    inputs = {"hidden_states": torch.randn(1, 4, 5, 16, 16), "encoder_hidden_states": torch.randn(1, 4, 32)}
    method = make_method("foreground", {"words": (0, 1), "tile": (1, 2, 4), "min_tokens": 0})
    with tilewise.patched(model, method, steps=":"), torch.no_grad():
        model(**inputs, timestep=torch.tensor([500.0]))
        assert "give mask" in str(tilewise.summary(model).fallbacks)
    with (
        tilewise.patched(model, method, steps=":", strict=True),
        torch.no_grad(),
        pytest.raises(tilewise.FallbackError, match="give mask"),
    ):
        model(**inputs, timestep=torch.tensor([500.0]))
