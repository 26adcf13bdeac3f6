"""Each cache policy against its formula, on un-rotated keys kept in lists (tests/helpers/causal_reference.py)."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import tilewise
from tests.helpers.causal_reference import ListCache, with_list_caches
from tests.helpers.tiny_wan import tiny_transformer
from tilewise.kernels.plans.layout import Grid
from tilewise.plugins.streaming.causal_denoiser import CausalDenoiser
from tilewise.plugins.streaming.kv_cache import KVCache
from tilewise.plugins.streaming.policies.base import policies

H, W, C = 2, 3, 2
TEXT = torch.randn(1, 4, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

Pair = tuple[torch.Tensor, torch.Tensor]


def mix(old: Pair, new: Pair, rate: float) -> Pair:
    return old[0] + rate * (new[0] - old[0]), old[1] + rate * (new[1] - old[1])


def ema(cache: ListCache, evicted: list[int], chunk: list[int]) -> None:
    for i, frame in enumerate(evicted):
        cache.frames[i] = mix(cache.frames[i], cache.frames[frame], 0.001)


def dual_ema(cache: ListCache, evicted: list[int], chunk: list[int]) -> None:
    for i, frame in enumerate(evicted):
        for name, rate in (("long", 0.01), ("short", 0.1)):
            old = cache.frames.get((name, i))
            new = cache.frames[frame]
            cache.frames[(name, i)] = new if old is None else mix(old, new, rate)


def reference_run(
    video: torch.Tensor, window: int, update: Callable, *, ahead: bool = False, sink: int = C
) -> torch.Tensor:
    plain = tiny_transformer(5).double()
    caches = with_list_caches(plain, H, W)
    out = []
    for first in range(0, video.shape[2], C):
        own, kept = list(range(first, first + C)), list(range(min(sink, first)))
        ring = list(range(max(len(kept), first - (window - C - sink)), first))
        evicted = (
            [f for f in range(max(len(kept), first - C - (window - C - sink)), first) if f not in ring] if first else []
        )
        for cache in caches:
            if evicted:
                update(cache, evicted, own)
        oldest = ring[0] if ring else first
        at = {f: f for f in [*ring, *own]}
        sink_at = first + C if ahead else oldest - len(kept)
        at.update({i: sink_at + i for i in kept})
        extra = [name for name in caches[0].frames if isinstance(name, tuple)]
        extra.sort(key=lambda name: (name[0] != "long", name[1]))
        before = min([oldest, *(at[i] for i in kept)])
        at.update({name: before - len(extra) + i for i, name in enumerate(extra)})
        for cache in caches:
            cache.see(at, own)
        out.append(plain(video[:, :, first : first + C], torch.zeros(1), TEXT, return_dict=False)[0])
    return torch.cat(out, 2)


def cached_run(
    video: torch.Tensor, options: KVCache, shots: tuple[int, ...] = ()
) -> tuple[torch.Tensor, CausalDenoiser]:
    model = tilewise.patch(tiny_transformer(5).double(), "dense")
    out = []
    with CausalDenoiser(model, options, grid=Grid(C, H, W)) as causal:
        for first in range(0, video.shape[2], C):
            if first in shots:
                causal.new_shot()
            causal.begin()
            out.append(causal(video[:, :, first : first + C], torch.zeros(1), TEXT))
            causal.commit()
    return torch.cat(out, 2), causal


def clip(frames: int, seed: int) -> torch.Tensor:
    return torch.randn(1, 4, frames, 2 * H, 2 * W, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
@pytest.mark.parametrize(("name", "update"), [("ema", ema), ("dual_ema", dual_ema), ("fixed", lambda *a: None)])
def test_averages_follow_their_formula(name, update):
    video = clip(16, 2)
    got, causal = cached_run(video, KVCache(window=6, sink=C, policy=name))
    assert causal.nbytes == causal.cache_plan().total
    wanted = reference_run(video, 6, update)
    assert (got - wanted).abs().max() < 1e-9
    if name != "fixed":
        assert (got - reference_run(video, 6, lambda *a: None)).abs().max() > 1e-6


@torch.no_grad()
def test_a_reference_stands_ahead():
    video = clip(12, 3)
    got, _ = cached_run(video, KVCache(window=6, sink=1, policy="reference"))
    assert (got - reference_run(video, 6, lambda *a: None, ahead=True, sink=1)).abs().max() < 1e-9


def kept(causal: CausalDenoiser) -> torch.Tensor:
    buffers = causal._buffers
    assert buffers is not None
    return buffers.read_kept(range(buffers.memory, buffers.memory + buffers.sink)).key


def chunk_keys(video: torch.Tensor, options: KVCache, first: int, shots: tuple[int, ...] = ()) -> torch.Tensor:
    """The un-rotated keys that a stream had for the chunk at ``first``, just after it was finished."""
    _, causal = cached_run(video[:, :, : first + C], options, shots)
    slots = [causal.slots.frames.index(first + i) for i in range(C)]
    assert causal._buffers is not None
    return causal._buffers.read(slots, [first, first + 1]).key


@torch.no_grad()
def test_a_shot_pins_its_own_first_chunk():
    video, options = clip(14, 4), KVCache(window=6, sink=C, policy="shot")
    assert torch.allclose(kept(cached_run(video, options)[1]), chunk_keys(video, options, 0), atol=1e-12)
    pinned = kept(cached_run(video, options, shots=(8,))[1])
    assert torch.allclose(pinned, chunk_keys(video, options, 8, shots=(8,)), atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("threshold", [-2.0, 0.2, 2.0])
def test_an_adaptive_sink_replaces_what_is_unlike_the_newest(threshold, monkeypatch):
    """By the rule itself: least cosine over layers of mean keys. Thresholds out of reach show "never" and "always"."""
    monkeypatch.setattr("tilewise.plugins.streaming.policies.adaptive.THRESHOLD", threshold)
    video, options = clip(4, 5), KVCache(window=6, sink=C, policy="adaptive")
    old, new = chunk_keys(video, options, 0), chunk_keys(video, options, 2)
    means = [x.mean(4).flatten(-2) for x in (old, new)]
    cosines = (
        (means[0] * means[1]).sum(-1) / means[0].norm(dim=-1) / means[1].norm(dim=-1)
    )  # (lanes, layers, B, frames)
    stale = cosines.min(1).values < threshold
    wanted = torch.where(stale[:, None, :, :, None, None, None], new, old)
    assert torch.allclose(kept(cached_run(video, options)[1]), wanted, atol=1e-12)


def test_every_policy_is_tested():
    assert policies() == ["adaptive", "dual_ema", "ema", "fixed", "reference", "shot"]
