"""Keys of earlier windows: calls see them beside their own, as plain attention over all of them in float64 does."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import tilewise
from tests.helpers.tiny_wan import tiny_transformer
from tilewise.kernels.plans.layout import Grid
from tilewise.plugins.patching import patches_of
from tilewise.plugins.runtime.attention_request import AttentionRequest
from tilewise.plugins.runtime.call_stats import SPARSE
from tilewise.plugins.runtime.earlier_keys import EarlierKeys

GRID = Grid(5, 3, 7, text=9, opposite=2)  # text on both sides of the video
FRAME, SINK, PREVIOUS, OVERLAP = 3 * 7, 2, 2, 1
LAYERS, FORWARDS, WINDOWS, BATCH, HEADS, KEY_HEADS, WIDTH = 2, 2, 3, 2, 4, 2, 16
STA = tilewise.STA(window=(1, 1, 1), tile=(2, 2, 2))


def stock(query, key, value, mask, dropout, causal, scale, gqa, **_):
    group = query.shape[2] // key.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (query, *(x.repeat_interleave(group, 2) for x in (key, value))))
    return F.scaled_dot_product_attention(q, k, v, mask, scale=scale).transpose(1, 2)


def reference(q, k, v, visible) -> torch.Tensor:
    """visible: (B, H, Sq, Sk) bool."""
    q, k, v = (x.double().transpose(1, 2) for x in (q, *(x.repeat_interleave(HEADS // KEY_HEADS, 2) for x in (k, v))))
    scores = (q @ k.transpose(2, 3)) * WIDTH**-0.5
    return (scores.masked_fill(~visible, -torch.inf).softmax(-1) @ v).transpose(1, 2)


def frames(x: torch.Tensor, first: int, end: int) -> torch.Tensor:
    return x[:, GRID.video_start + first * FRAME : GRID.video_start + end * FRAME]


def earlier_of(kept: list, window: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(key, value) that a call of a window sees besides: first frames of the first, last new ones of the one before."""
    if window == 0:
        return []
    first, last = kept[0], kept[window - 1]
    begin = max(GRID.t - OVERLAP - PREVIOUS, SINK if window == 1 else 0)
    return [(frames(first[0], 0, SINK), frames(first[1], 0, SINK)),
            (frames(last[0], begin, GRID.t - OVERLAP), frames(last[1], begin, GRID.t - OVERLAP))]  # fmt: skip


@pytest.mark.parametrize("masked", [False, True], ids=["", "mask"])
@pytest.mark.parametrize(
    ("method", "sparse"),
    [("dense", False), (STA, True), (tilewise.Draft(density=0.3, compensate=False, min_tokens=0), True)],
    ids=["dense", "sta", "draft"],
)
def test_calls_see_the_keys_of_earlier_windows(method, sparse, masked):
    generator = torch.Generator()
    print("seed", generator.seed())
    model = tiny_transformer()
    tilewise.patch(model, method, steps=(0.0, 1.0))
    (patch,) = patches_of(model).values()
    state, seen = patch.state, []
    state.observers.append(seen.append)
    state.earlier = EarlierKeys(SINK, PREVIOUS, OVERLAP)
    mask = None
    if masked:  # one sample's text is shorter
        mask = torch.ones(BATCH, 1, 1, GRID.tokens, dtype=torch.bool)
        mask[1, ..., -3:] = False
    kept: dict[tuple[int, int], list] = {}
    for window in range(WINDOWS):
        state.earlier.begin_window()
        for forward in range(FORWARDS):
            state.begin(GRID, torch.tensor([500.0]))
            for layer in range(LAYERS):
                q, k, v = (
                    torch.randn(BATCH, GRID.tokens, heads, WIDTH, generator=generator)
                    for heads in (HEADS, KEY_HEADS, KEY_HEADS)
                )
                request = AttentionRequest(q, k, v, attn_mask=mask, enable_gqa=True)
                seen.clear()
                out = patch.calls.answer(layer, request, stock)
                there = torch.ones(BATCH, GRID.tokens, dtype=torch.bool) if mask is None else mask[:, 0, 0]
                own = there[:, None, None].repeat(1, HEADS, GRID.tokens, 1)
                for call in seen if sparse else []:  # one for each group of samples with the same text
                    assert call.kind == SPARSE
                    shown, rows = call.plan.to_mask(HEADS), (there.sum(1) == call.plan.k_len).nonzero()[:, 0].tolist()
                    order, _ = state.plans.order(state.forward.layout, q.device)
                    for number, row in enumerate(rows):
                        tokens = order[there[row][order]]
                        own[row][:, tokens[:, None], tokens[None]] = shown[number % len(shown)]
                earlier = earlier_of(kept.get((forward, layer), []), window)
                keys, values = (torch.cat([x, *(pair[i] for pair in earlier)], 1) for i, x in enumerate((k, v)))
                further = torch.ones(*own.shape[:3], keys.shape[1] - GRID.tokens, dtype=torch.bool)
                wanted = reference(q, keys, values, torch.cat([own, further], 3))
                torch.testing.assert_close(out.double()[there], wanted[there], atol=2e-5, rtol=2e-5)
                kept.setdefault((forward, layer), []).append((k, v))
            state.end()
    sink, last = SINK * FRAME, PREVIOUS * FRAME
    assert state.earlier.bytes == 2 * 4 * BATCH * KEY_HEADS * WIDTH * LAYERS * FORWARDS * (sink + last)
    rows = tilewise.summary(model).rows
    assert {row.kind for row in rows} == ({"sparse"} if sparse else {"dense layer"})
    tilewise.unpatch(model)
