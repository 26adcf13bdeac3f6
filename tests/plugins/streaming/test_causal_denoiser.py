"""A denoiser against its KV cache: as one forward under a block-causal mask, and as a list of keys rotated at every read."""

from __future__ import annotations

import pytest
import torch

import tilewise
from tests.helpers.causal_reference import MaskProcessor, with_list_caches
from tests.helpers.tiny_wan import tiny_transformer
from tilewise.kernels.plans.layout import Grid
from tilewise.plugins.streaming.causal_denoiser import CausalDenoiser
from tilewise.plugins.streaming.kv_cache import KVCache
from tilewise.plugins.streaming.policies.base import policies, policy

H, W = 3, 4  # tokens
TEXT = torch.randn(2, 6, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def denoiser(dtype: torch.dtype = torch.float64) -> torch.nn.Module:
    return tiny_transformer(7).to(dtype)


def latents(frames: int, seed: int, batch: int = 1) -> torch.Tensor:
    return torch.randn(
        batch, 4, frames, 2 * H, 2 * W, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )


def open_stream(model: torch.nn.Module) -> CausalDenoiser:
    return CausalDenoiser(model, KVCache(window=3), grid=Grid(3, H, W))


def run(
    causal: CausalDenoiser, video: torch.Tensor, chunks: list[int], timestep: float = 300.0, **kwargs
) -> torch.Tensor:
    """Velocities of a video, chunk by chunk; each chunk has a noisy pass first, whose keys must not stay."""
    out, first, batch = [], 0, video.shape[0]
    text = TEXT[:1].expand(batch, -1, -1).to(video.dtype)
    for chunk in chunks:
        causal.begin(chunk)
        part = video[:, :, first : first + chunk]
        causal(torch.randn_like(part), torch.full((batch,), 900.0), text, **kwargs)
        out.append(causal(part, torch.full((batch,), timestep), text, **kwargs))
        causal.commit()
        first += chunk
    return torch.cat(out, 2)


# A window that holds all frames lets none go. "ema" and "dual_ema" change what they keep only when one leaves, and "shot" only
# with a new shot, which none of these streams begins: for them the chunks equal one forward.
BLOCK_CAUSAL = ("dual_ema", "ema", "fixed", "shot")
# "reference" has the sink's keys after the chunk instead of at their own positions, and "adaptive" takes frames of the newest
# chunk into the sink: what later chunks see is not what a block-causal mask shows.
NOT_BLOCK_CAUSAL = ("adaptive", "reference")


def chunks_and_one_forward(chunks: list[int], position: str, name: str) -> float:
    """How far a stream in a window that holds it whole is from one forward under the block-causal mask."""
    frames = sum(chunks)
    video = latents(frames, 1, batch=2)
    chunk_of = torch.tensor([i for i, n in enumerate(chunks) for _ in range(n)])
    whole = denoiser()
    for block in whole.blocks:
        block.attn1.set_processor(MaskProcessor(chunk_of[:, None] >= chunk_of[None], H, W))
    wanted = whole(video, torch.full((2,), 300.0), TEXT[:1].expand(2, -1, -1), return_dict=False)[0]
    model = tilewise.patch(denoiser(), "dense")
    sink = max(chunks) if policy(name).whole_chunks else 1
    cache = KVCache(window=frames, sink=sink, sink_position=position, policy=name)
    with CausalDenoiser(model, cache, grid=Grid(max(chunks), H, W), batch=2) as causal:
        got = run(causal, video, chunks)
    return (got - wanted).abs().max().item()


@torch.no_grad()
@pytest.mark.parametrize("chunks", [[3, 3, 3], [1, 3, 2, 3], [1, 1, 1, 1]])
@pytest.mark.parametrize("position", ["clamped", "absolute"])
@pytest.mark.parametrize("name", BLOCK_CAUSAL)
def test_chunks_equal_one_forward_under_the_block_causal_mask(chunks, position, name):
    assert chunks_and_one_forward(chunks, position, name) < 1e-10


@torch.no_grad()
@pytest.mark.parametrize("name", NOT_BLOCK_CAUSAL)
def test_the_other_policies_are_not_block_causal(name, monkeypatch):
    monkeypatch.setattr("tilewise.plugins.streaming.policies.adaptive.THRESHOLD", 2.0)  # every frame is replaced
    assert chunks_and_one_forward([3, 3, 3], "absolute", name) > 1e-4
    assert sorted(BLOCK_CAUSAL + NOT_BLOCK_CAUSAL) == policies()


@torch.no_grad()
@pytest.mark.parametrize(
    ("window", "sink", "chunks"),
    [(8, 3, [3] * 6), (7, 1, [3, 3, 3, 3, 3]), (5, 0, [1, 2, 2, 3, 1, 2]), (4, 1, [1] * 8)],
)
@pytest.mark.parametrize("position", ["clamped", "absolute"])
def test_the_window_equals_a_list_of_keys(window, sink, chunks, position):
    video = latents(sum(chunks), 2)
    plain = denoiser()
    caches = with_list_caches(plain, H, W)
    wanted, first = [], 0
    for chunk in chunks:
        own = list(range(first, first + chunk))
        kept = list(range(min(sink, first)))
        room = window - chunk - len(kept)
        ring = list(range(max(len(kept), first - room), first))
        oldest = ring[0] if ring else first
        at = {frame: frame for frame in [*kept, *ring, *own]}
        if position == "clamped":
            at.update({frame: oldest - len(kept) + frame for frame in kept})
        for cache in caches:
            cache.see(at, own)
        wanted.append(
            plain(video[:, :, first : first + chunk], torch.full((1,), 300.0), TEXT[:1], return_dict=False)[0]
        )
        first += chunk
    model = tilewise.patch(denoiser(), "dense")
    with CausalDenoiser(model, KVCache(window, sink, sink_position=position), grid=Grid(max(chunks), H, W)) as causal:
        got = run(causal, video, chunks)
    assert (got - torch.cat(wanted, 2)).abs().max() < 1e-10


@torch.no_grad()
def test_a_far_frame_is_as_exact_as_a_near_one():
    """The same window at frame 12 and at 10⁶ gives the same output, as attention depends on differences of positions alone."""
    model = tilewise.patch(denoiser(torch.float32), "dense")
    video = latents(12, 4).float()
    outs = []
    for first in (0, 10**6):
        with CausalDenoiser(model, KVCache(window=6, sink=2), grid=Grid(2, H, W)) as causal:
            causal.slots.next_frame = first
            outs.append(run(causal, video, [2] * 6))
    assert (outs[0] - outs[1]).abs().max() < 1e-4
    assert outs[0].std() > 0.1


@torch.no_grad()
def test_lanes_do_not_see_each_other():
    model = tilewise.patch(denoiser(), "dense")
    video, other = latents(4, 5), latents(4, 6)
    with CausalDenoiser(model, KVCache(window=4), grid=Grid(2, H, W)) as causal:
        alone = run(causal, video, [2, 2])
    with CausalDenoiser(model, KVCache(window=4), grid=Grid(2, H, W), lanes=2) as causal:
        out = []
        for first in (0, 2):
            causal.begin()
            out.append(causal(video[:, :, first : first + 2], torch.full((1,), 300.0), TEXT[:1]))
            causal(other[:, :, first : first + 2], torch.full((1,), 300.0), TEXT[1:], lane=1)
            causal.commit()
    assert torch.equal(torch.cat(out, 2), alone)


@torch.no_grad()
def test_memory_stays_flat_and_is_known_before():
    model = tilewise.patch(denoiser(torch.float32), "dense")
    with CausalDenoiser(model, KVCache(window=5, sink=1), grid=Grid(1, H, W)) as causal:
        expected = causal.cache_plan().total
        part, at, text = latents(1, 8).float(), torch.zeros(1), TEXT[:1].float()
        for _ in range(1200):
            causal.begin()
            if causal.next_frame % 50 == 0:
                causal(part, at, text)
            causal.commit() if causal.nbytes else None
        assert causal.nbytes == expected and causal.next_frame == 1200


@torch.no_grad()
def test_the_state_comes_back_bit_for_bit():
    model = tilewise.patch(denoiser(torch.float32), "dense")
    video = latents(12, 9).float()
    options = KVCache(window=6, sink=2, policy="ema")
    with CausalDenoiser(model, options, grid=Grid(2, H, W)) as causal:
        run(causal, video[:, :, :8], [2] * 4)
        plain, tensors = causal.state_dict()
        tensors = {name: tensor.clone() for name, tensor in tensors.items()}
        wanted = run(causal, video[:, :, 8:], [2, 2])
    with CausalDenoiser(model, options, grid=Grid(2, H, W)) as causal:
        causal.load_state_dict(plain, tensors)
        assert torch.equal(run(causal, video[:, :, 8:], [2, 2]), wanted)
    other = CausalDenoiser(model, KVCache(window=8), grid=Grid(2, H, W))
    with pytest.raises(tilewise.ConfigError, match="the state is of"):
        other.load_state_dict(plain, tensors)


@torch.no_grad()
def test_nothing_stays_on_the_denoiser():
    model = denoiser(torch.float32)
    video, text = latents(3, 10).float(), TEXT[:1].float()
    before = model(video, torch.full((1,), 300.0), text, return_dict=False)[0]
    tilewise.patch(model, "dense")
    with pytest.raises(tilewise.ConfigError, match="does not fit"), open_stream(model) as causal:
        run(causal, video, [3, 4])
    assert torch.equal(model(video, torch.full((1,), 300.0), text, return_dict=False)[0], before)
    assert not model.rope._forward_hooks
    with open_stream(model) as causal:
        with pytest.raises(tilewise.TilewiseError, match="another stream"):
            open_stream(model).__enter__()
        causal.begin()
        tilewise.unpatch(model)
        with pytest.raises(tilewise.TilewiseError, match="unpatched"):
            causal(video, torch.zeros(1), text)
    assert torch.equal(model(video, torch.full((1,), 300.0), text, return_dict=False)[0], before)


def test_calls_are_counted_as_what_they_are():
    model = tilewise.patch(denoiser(torch.float32), "dense")
    with torch.no_grad(), CausalDenoiser(model, KVCache(window=4), grid=Grid(2, H, W)) as causal:
        run(causal, latents(4, 11).float(), [2, 2])
    rows = tilewise.summary(model).rows
    assert {row.kind for row in rows} == {"dense window"} and sum(row.calls for row in rows) == 8
    assert sum(row.pairs for row in rows) == 2 * 2 * 2 * (2 + 4) * (H * W) ** 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 0}, "window must be a whole number of at least 1"),
        ({"window": 4, "sink": 4}, "leaves no room"),
        ({"window": 4, "sink": 2}, "a chunk of 3 latent frames does not fit"),
        ({"window": 8, "sink_position": "middle"}, "clamped, absolute"),
        ({"window": 8, "sink": 2, "policy": "ema"}, "needs a sink as long as a chunk"),
        ({"window": 8, "policy": "adaptive"}, "needs a sink"),
        ({"window": 8, "policy": "none"}, "unknown cache policy"),
        ({"window": 8, "memory": 2}, "keeps 0 latent frames of memory"),
    ],
)
def test_options_that_cannot_be_are_refused(options, message):
    model = tilewise.patch(denoiser(), "dense")
    with pytest.raises(tilewise.ConfigError, match=message):
        CausalDenoiser(model, KVCache(**options), grid=Grid(3, H, W))


def test_denoisers_that_cannot_stream_are_refused():
    with pytest.raises(tilewise.TilewiseError, match="is not patched"):
        CausalDenoiser(denoiser(), KVCache(), grid=Grid(3, H, W))
    other = tilewise.patch(tiny_transformer(1, patch_size=(2, 2, 2)), "dense")
    with pytest.raises(tilewise.UnsupportedModelError, match="2 latent frames a token"):
        CausalDenoiser(other, KVCache(), grid=Grid(3, H, W))
