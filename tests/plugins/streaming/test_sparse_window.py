"""Sparse attention inside the window: the method's mask over all frames in the order of time, sink and memory seen whole."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import tilewise
from tests.helpers.tiny_wan import tiny_transformer
from tilewise.kernels.plans.layout import Grid
from tilewise.plugins.methods.base import with_tile
from tilewise.plugins.streaming.causal_denoiser import CausalDenoiser
from tilewise.plugins.streaming.kv_cache import KVCache
from tilewise.plugins.streaming.sparse_window import SparseWindow, choose_chunk_tile

C, H, W = 2, 5, 6  # a ragged grid for tiles of (2, 2, 3)
TEXT = torch.randn(1, 4, 32, generator=torch.Generator().manual_seed(1))
METHODS = [
    tilewise.STA(window=(1, 1, 3), tile=(2, 2, 3)),
    tilewise.STA(window=((3, 1, 1), (1, 3, 3)), tile=(1, 2, 3)),
    tilewise.Neighborhood(window=(3, 3, 3)),
    tilewise.Inward(native=(3, 3)),
]


class MaskedWindow:
    """Attention of a processor over a list of frames under a mask: what the sparse call is compared with. In float64."""

    def __init__(self, method: tilewise.Method, sink: int) -> None:
        self.method, self.sink = method, sink

    def mask(self, frames: int, heads: int) -> torch.Tensor:
        """(heads, C · tokens, frames · tokens) in raster order."""
        grid = Grid(frames, H, W)
        layout = self.method.layout(grid)
        assert layout is not None
        seen = self.method.plan(layout, heads, torch.device("cpu")).to_mask(heads)[0]
        seen = seen[:, layout.inverse][:, :, layout.inverse]
        seen[:, :, : min(self.sink, frames) * H * W] = True
        return seen[:, -C * H * W :]


@pytest.mark.parametrize("method", METHODS, ids=lambda m: f"{m.name}-{getattr(m, 'tile', '')}")
@pytest.mark.parametrize("policy", ["fixed", "dual_ema"])
def test_the_plan_is_the_methods_mask(method, policy):
    """Against the mask of the method over the frames in the order of time, at every turn of the ring."""
    cache, heads = KVCache(window=8, sink=2, policy=policy), 2
    memory = 4 if policy == "dual_ema" else 0
    window = SparseWindow(method, Grid(C, H, W), cache, memory)
    assert window.reason == "" and window.layout is not None
    tokens = H * W
    for slots in ([0, 1], [0, 1, 2, 3], [0, 1, 2, 3, 4, 5, 6, 7], [0, 1, 4, 5, 2, 3, 6, 7]):
        has_memory = memory > 0 and len(slots) == 8
        keys = window.keys(slots, has_memory)
        plan = keys.plan(with_tile(method, window.layout.tile).plan(keys.layout, heads, torch.device("cpu")))
        kept = memory if has_memory else 0
        in_time = [*range(kept), *(kept + slot for slot in slots)]
        wanted = MaskedWindow(method, kept + 2).mask(len(in_time), heads)
        got = plan.to_mask(heads)[0][:, window.layout.inverse]
        # Rows of the buffer back to time and raster order.
        chunks = torch.cat([got.new_tensor(range(0), dtype=torch.long)] + [
            at * tokens + window.layout.inverse for at in in_time[::C]
        ])  # fmt: skip
        got = got[:, :, chunks]
        assert torch.equal(got, wanted)
        assert plan.density == pytest.approx(float(wanted.float().mean()), abs=1e-6)


@pytest.mark.parametrize(("window", "sink"), [(12, 3), (21, 3), (9, 0)])
def test_the_density_of_sta_counts_the_sink(window, sink):
    """Kept pairs of the whole call are at most what was asked for, in every turn of the ring and while the window fills."""
    cache, grid, found = KVCache(window=window, sink=sink), Grid(3, 10, 12), []
    for density in (0.35, 0.5, 0.75, 1.0):
        sparse = SparseWindow(tilewise.STA(density=density, tile=(3, 2, 2)), grid, cache, 0)
        found.append(sparse.expected(2)[0])
        assert 0.6 * density < found[-1] <= density + 1e-6
        for frames in range(3, window + 1, 3):
            keys = sparse.keys(range(frames), False)
            kept = sparse.method.window_plan(keys, 2, torch.device("cpu")).density
            assert kept <= max(density, min(1.0, sink / frames + 1 / 9)) + 1e-6
    assert found == sorted(found) and found[-1] == 1


def velocities(method, cache: KVCache, frames: int, **kwargs) -> tuple[torch.Tensor, torch.nn.Module]:
    model = tilewise.patch(tiny_transformer(3), method, steps=(0.0, 1.0), **kwargs)
    video = torch.randn(1, 4, frames, 2 * H, 2 * W, generator=torch.Generator().manual_seed(2))
    out = []
    with torch.no_grad(), CausalDenoiser(model, cache, grid=Grid(C, H, W)) as causal:
        for first in range(0, frames, C):
            causal.begin()
            out.append(causal(video[:, :, first : first + C], torch.full((1,), 200.0), TEXT))
            causal.commit()
    return torch.cat(out, 2), model


@pytest.mark.parametrize("policy", ["fixed", "ema", "dual_ema", "adaptive"])
def test_a_window_that_sees_all_is_dense(policy):
    """Rows in tile order, moved and rotated in it: with a window as large as the grid nothing but rounding differs from dense."""
    cache = KVCache(window=6, sink=C, policy=policy)
    dense, _ = velocities("dense", cache, 16)
    sparse, model = velocities(tilewise.STA(window=(9, 9, 9), tile=(2, 2, 3)), cache, 16)
    assert (sparse - dense).abs().max() < 1e-4 * dense.abs().max()
    assert {row.kind for row in tilewise.summary(model).rows} == {"sparse"}


def test_a_small_window_changes_the_output_and_is_counted():
    cache = KVCache(window=6, sink=C)
    dense, _ = velocities("dense", cache, 12)
    sparse, model = velocities(tilewise.STA(window=(1, 1, 1), tile=(2, 2, 3)), cache, 12)
    assert (sparse - dense).abs().max() > 1e-2 * dense.abs().max()
    report = tilewise.summary(model)
    assert 0.2 < report.density < 0.9 and not report.fallbacks


def test_a_window_with_a_far_field_runs_without_it():
    """The means are of cells of a whole clip, and a KV cache keeps none."""
    window = tilewise.STA(window=(1, 1, 1), tile=(2, 2, 3))
    alone, _ = velocities(window, KVCache(window=6, sink=C), 12)
    got, model = velocities(dataclasses.replace(window, far="tiles"), KVCache(window=6, sink=C), 12, strict=True)
    assert torch.equal(got, alone)
    assert not tilewise.summary(model).fallbacks


@pytest.mark.parametrize(
    ("method", "cache", "reason"),
    [
        ("sta", KVCache(window=7, sink=2), "window of 7 latent frames is no multiple"),
        ("sta", KVCache(window=6, sink=1), "sink of 1 latent frames is no multiple"),
        (tilewise.STA(tile=(4, 2, 2)), KVCache(window=6), "do not divide a chunk"),
        (tilewise.Neighborhood(dilation=(1, 2, 2)), KVCache(window=6), "dilated windows"),
    ],
)
def test_what_cannot_be_sparse_is_dense_and_counted(method, cache, reason):
    dense, _ = velocities("dense", cache, 8)
    got, model = velocities(method, cache, 8)
    assert torch.equal(got, dense)
    assert any(reason in found for found in tilewise.summary(model).fallbacks)
    with pytest.raises(tilewise.FallbackError, match=reason):
        velocities(method, cache, 8, strict=True)


def test_chunks_of_other_lengths():
    model = tilewise.patch(tiny_transformer(3), tilewise.STA(window=(1, 1, 1), tile=(2, 2, 3)), steps=(0.0, 1.0))
    part, at = torch.randn(1, 4, C, 2 * H, 2 * W), torch.zeros(1)
    with torch.no_grad(), CausalDenoiser(model, KVCache(window=6), grid=Grid(C, H, W)) as causal:
        causal.begin(1)
        causal(part[:, :, :1], at, TEXT)
        causal.commit()
    assert any("a chunk of 1 latent frames among" in reason for reason in tilewise.summary(model).fallbacks)
    with torch.no_grad(), CausalDenoiser(model, KVCache(window=6), grid=Grid(C, H, W)) as causal:
        causal.begin()
        causal(part, at, TEXT)
        causal.commit()
        with pytest.raises(tilewise.ConfigError, match="all chunks alike"):
            causal.begin(1)


@pytest.mark.parametrize("shape", [(3, 30, 52), (3, 45, 80), (1, 30, 52), (8, 22, 40), (3, 16, 16)])
def test_chunk_tiles_are_well_filled(shape):
    tile = choose_chunk_tile(shape)
    blocks = [-(-n // t) for n, t in zip(shape, tile, strict=True)]
    assert shape[0] % tile[0] == 0 and tile[0] * tile[1] * tile[2] <= 128
    assert shape[0] * shape[1] * shape[2] / (blocks[0] * blocks[1] * blocks[2] * 128) > 0.85
