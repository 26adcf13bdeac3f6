"""``tilewise.stream``: frames come chunk by chunk, prompts change, the state comes back, and the pipeline is left as it was."""

from __future__ import annotations

import gc
import itertools
import threading
import types
import weakref

import numpy as np
import pytest
import torch

import tilewise
from tests.helpers.tiny_wan import tiny_pipeline
from tilewise.pipelines.streaming.recipe import CausalRecipe
from tilewise.pipelines.streaming.state import StreamState
from tilewise.plugins.streaming.kv_cache import KVCache

RECIPE = CausalRecipe(chunk=2, window=6, sink=2, height=32, width=48, fps=8, timesteps=(1000, 500))
RED, BLUE = "a red circle moving left", "a blue square moving right"


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline()


@pytest.fixture(scope="module")
def two_denoisers():
    return tiny_pipeline(boundary_ratio=0.9)


def stream(pipe, prompt=RED, **kwargs):
    return tilewise.stream(pipe, prompt, **{"recipe": RECIPE, "max_sequence_length": 16, **kwargs})


def frames_of(video, count=None) -> np.ndarray:
    return np.concatenate([chunk.frames for chunk in video])[:count]


def naive_stream(pipe, chunks: int, seed: int) -> np.ndarray:
    """The same video without a cache: each chunk's passes run over all clean latents before it, in a window that holds them."""
    from tests.helpers.causal_reference import MaskProcessor

    model, generator = pipe.transformer, torch.Generator().manual_seed(seed)
    text = pipe.encode_prompt(RED, do_classifier_free_guidance=False, max_sequence_length=16)[0]
    stock = [block.attn1.processor for block in model.blocks]
    clean = torch.zeros(1, 4, 0, 8, 12)

    def velocity(x: torch.Tensor, t: float) -> torch.Tensor:
        """Of the last frames: those before are at timestep 0, and each chunk sees itself and what is before it."""
        whole, frames = torch.cat([clean, x], 2), clean.shape[2] + x.shape[2]
        chunk = torch.arange(frames) // RECIPE.chunk
        for block in model.blocks:
            block.attn1.set_processor(MaskProcessor(chunk[:, None] >= chunk[None], 4, 6))
        at = torch.cat([torch.zeros(clean.shape[2] * 24), torch.full((x.shape[2] * 24,), t)])[None]
        return model(whole, at, text, return_dict=False)[0][:, :, clean.shape[2] :]

    try:
        for _ in range(chunks):
            sigmas = [*RECIPE.sigmas(), 0.0]
            x = torch.randn(1, 4, RECIPE.chunk, 8, 12, generator=generator)
            for sigma, following in itertools.pairwise(sigmas):
                x0 = x - sigma * velocity(x, 1000 * sigma)
                x = (
                    x0
                    if following == 0
                    else (1 - following) * x0 + following * torch.randn(x0.shape, generator=generator)
                )
            clean = torch.cat([clean, x], 2)
    finally:
        for block, processor in zip(model.blocks, stock, strict=True):
            block.attn1.set_processor(processor)
    video = pipe.vae.decode(clean, return_dict=False)[0]
    return ((video[0] / 2 + 0.5).clamp(0, 1) * 255).round().byte().permute(1, 2, 3, 0).numpy()


@torch.no_grad()
def test_a_stream_equals_the_same_video_without_a_cache(pipe):
    got = frames_of(stream(pipe, cache=KVCache(window=6), seconds=11 / 8, seed=4))
    wanted = naive_stream(pipe, 3, seed=4)
    assert got.shape == (11, 32, 48, 3) == wanted.shape
    assert np.abs(got.astype(int) - wanted).max() <= 1 and (got == wanted).mean() > 0.99


def test_chunks_say_what_they_are_and_nothing_stays(pipe):
    before = {
        name: type(module.processor)
        for name, module in pipe.transformer.named_modules()
        if hasattr(module, "processor")
    }
    with stream(pipe) as video:
        expected = video.cache_bytes
        chunks = [next(video) for _ in range(4)]
        assert tilewise.is_patched(pipe)
        assert expected["total"] == video.source.sampler.denoisers[0].nbytes > 6 * expected["latent"]
    assert [chunk.first_frame for chunk in chunks] == [0, 3, 7, 11] and [len(c.frames) for c in chunks] == [3, 4, 4, 4]
    assert [chunk.first_latent for chunk in chunks] == [0, 2, 4, 6]
    assert all(c.frames.dtype == np.uint8 and c.latents.shape == (1, 4, 2, 8, 12) for c in chunks)
    assert all(c.stats["fps"] > 0 and c.stats["denoise"] > 0 and c.prompt == RED for c in chunks)
    assert not tilewise.is_patched(pipe) and not pipe.transformer.rope._forward_hooks
    after = {
        name: type(module.processor)
        for name, module in pipe.transformer.named_modules()
        if hasattr(module, "processor")
    }
    assert after == before
    with pytest.raises(StopIteration):
        next(video)
    with pytest.raises(tilewise.TilewiseError, match="closed"):
        video.set_prompt(BLUE)


def test_planned_prompts_come_with_the_first_chunk_that_begins_then(pipe, tmp_path):
    """Chunks begin at frames 0, 3, 7, 11 and 15, of 8 a second."""
    with stream(pipe, seconds=19 / 8) as video:
        wanted = []
        for chunk in video:
            wanted.append(chunk)
            if video.frames_out in (3, 11):
                video.set_prompt(BLUE if video.frames_out == 3 else RED, "flush")
    with stream(pipe, seconds=19 / 8) as video:
        video.set_prompt(RED, "flush", at=11 / 8)
        video.set_prompt("never seen", at=0.2)
        video.set_prompt(BLUE, "flush", at=3 / 8)  # for the same chunk, and later
        got = [next(video)]
        video.state_dict().save(tmp_path / "state.safetensors")
        with pytest.raises(tilewise.ConfigError, match=r"up to 0\.375 s"):
            video.set_prompt(BLUE, at=0.3)
        got += list(video)
    assert [chunk.prompt for chunk in got] == [RED, BLUE, BLUE, RED, RED] == [chunk.prompt for chunk in wanted]
    assert all((a.frames == b.frames).all() for a, b in zip(got, wanted, strict=True))
    with stream(pipe, seconds=19 / 8) as video:
        video.load_state_dict(StreamState.load(tmp_path / "state.safetensors"))
        assert (frames_of(video) == np.concatenate([chunk.frames for chunk in wanted[1:]])).all()


@pytest.mark.parametrize("how", ["recache", "flush", "blend"])
def test_a_prompt_changes_from_the_next_chunk_on(pipe, how):
    plain = frames_of(stream(pipe, seconds=27 / 8))
    with stream(pipe, seconds=27 / 8) as video:
        got = []
        for chunk in video:
            got.append(chunk)
            if len(got) == 3:
                video.set_prompt(BLUE, how, over=2)
    assert [chunk.prompt for chunk in got] == [RED] * 3 + [BLUE] * 4
    frames = np.concatenate([chunk.frames for chunk in got])
    assert np.array_equal(frames[:11], plain[:11])
    assert all((frames[first : first + 4] != plain[first : first + 4]).mean() > 0.1 for first in (11, 15, 23))


def test_recache_computes_the_window_with_the_new_prompt(pipe):
    """After it the cache is that of a stream whose latents were the same and whose prompt was the new one, but for the sink."""
    with stream(pipe) as video:
        chunks = [next(video) for _ in range(4)]
        video.set_prompt(BLUE)
        next(video)
        key = video.source.sampler.denoisers[0]._buffers.key.data.clone()
        slots = dict(zip(video.source.sampler.denoisers[0].slots.frames, range(6), strict=True))
        sink, ring = key[0, 1, :, :48], [key[0, 1, :, 24 * slots[f] : 24 * slots[f] + 24] for f in (6, 7)]
    with stream(pipe, BLUE) as other:
        sampler = other.source.sampler
        with torch.no_grad():
            for chunk in chunks:
                sampler.given(chunk.latents)
        own = sampler.denoisers[0]
        at = dict(zip(own.slots.frames, range(6), strict=True))
        wanted = [own._buffers.key.data[0, 1, :, 24 * at[f] : 24 * at[f] + 24] for f in (6, 7)]
        assert not torch.allclose(own._buffers.key.data[0, 1, :, :48], sink, atol=1e-3)
    # The second layer's keys depend on the text. They also saw a sink of the old prompt: near, and far from the old ones.
    for a, b in zip(ring, wanted, strict=True):
        assert (a - b).abs().mean() < 0.2 * b.abs().mean()


@pytest.mark.parametrize("small", [False, True])
def test_the_state_goes_on(pipe, small, tmp_path):
    options = {"seconds": 31 / 8, "cache": KVCache(window=6, sink=2, policy="ema"), "seed": 3}
    with stream(pipe, **options) as video:
        for _ in range(5):
            next(video)
        video.set_prompt(BLUE, "blend", over=3)
        next(video)
        video.state_dict(small=small).save(tmp_path / "state.safetensors")
        wanted = frames_of(video)
    state = StreamState.load(tmp_path / "state.safetensors")
    assert any(name.startswith("cache.") for name in state.tensors) != small
    with stream(pipe, **options) as video:
        video.load_state_dict(state)
        got = frames_of(video)
        assert video.prompt == BLUE
    assert got.shape == wanted.shape == (8, 32, 48, 3)
    if not small:
        assert np.array_equal(got, wanted)
    else:
        assert np.abs(got.astype(int) - wanted).mean() < 20
    other = stream(pipe, **{**options, "recipe": RECIPE.replace(shift=3.0)})
    with other, pytest.raises(tilewise.ConfigError, match="recipe"):
        other.load_state_dict(state)


def test_two_denoisers_each_have_a_cache(two_denoisers):
    recipe = RECIPE.replace(boundary=0.9)
    with stream(two_denoisers, recipe=recipe) as video:
        got = frames_of(next(video) for _ in range(3))
        assert [denoiser.next_frame for denoiser in video.source.sampler.denoisers] == [6, 6]
    with stream(two_denoisers) as video:
        alone = frames_of(next(video) for _ in range(3))
    assert (got != alone).mean() > 0.2
    with pytest.raises(tilewise.ConfigError, match="one transformer"):
        stream(tiny_pipeline(), recipe=recipe)


@pytest.mark.parametrize(
    "change", [{"solver": "euler"}, {"solver": "unipc"}, {"guidance": 2.0}, {"context_noise": 20.0}]
)
def test_recipes_differ(pipe, change):
    plain = frames_of((stream(pipe, seconds=7 / 8)), 7)
    negative = "blurry" if "guidance" in change else ""
    other = frames_of(stream(pipe, seconds=7 / 8, recipe=RECIPE.replace(**change), negative=negative), 7)
    assert other.std() > 5 and (plain != other).mean() > 0.05


def test_an_image_comes_first(pipe):
    picture = np.full((32, 48, 3), (200, 40, 90), np.uint8)
    with stream(pipe, image=picture, seconds=1) as video:
        chunks = list(video)
    assert [len(chunk.frames) for chunk in chunks] == [1, 4, 3]
    latents = chunks[0].latents
    again = pipe.vae.decode(latents.to(pipe.vae.dtype), return_dict=False)[0]
    pixels = ((again[0] / 2 + 0.5).clamp(0, 1) * 255).round().byte().permute(1, 2, 3, 0).detach().numpy()
    assert np.abs(chunks[0].frames.astype(int) - pixels).max() <= 1


def test_a_sparse_method_runs_inside_the_window(pipe):
    with stream(pipe, method=tilewise.STA(window=(1, 1, 1), tile=(2, 2, 2)), seconds=2) as video:
        for _ in range(3):
            next(video)
        report = tilewise.summary(pipe)
    assert {row.kind for row in report.rows} >= {"sparse"} and report.density < 1


def test_a_patched_pipeline_keeps_its_patch(pipe):
    tilewise.patch(pipe, "dense")
    try:
        frames_of(stream(pipe, seconds=0.3))
        assert tilewise.is_patched(pipe)
    finally:
        tilewise.unpatch(pipe)


def test_anyflow_is_refused_with_the_reason():
    class AnyFlowFARTransformer3DModel(torch.nn.Module):
        pass

    with pytest.raises(tilewise.UnsupportedModelError, match="a cache of its own, with compressed frames"):
        stream(types.SimpleNamespace(transformer=AnyFlowFARTransformer3DModel()))


def test_an_offloaded_autoencoder_is_refused(pipe):
    pipe.vae._hf_hook = object()
    try:
        with pytest.raises(tilewise.ConfigError, match="without CPU offload"):
            stream(pipe)
    finally:
        del pipe.vae._hf_hook


def test_an_exception_in_a_chunk_closes_the_stream(pipe):
    with stream(pipe) as video:
        next(video)
        handle = pipe.transformer.blocks[1].register_forward_pre_hook(
            lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
        )
        with pytest.raises(KeyboardInterrupt):
            next(video)
        handle.remove()
        assert not tilewise.is_patched(pipe)
    assert len(frames_of(stream(pipe, seconds=0.5))) == 4


def test_a_closed_stream_frees_its_cache_at_once(pipe):
    """Gigabytes of a large model, which must not wait for a garbage collection."""
    gc.collect()
    gc.disable()
    try:
        with stream(pipe) as video:
            next(video)
            cache = weakref.ref(video.source.sampler.denoisers[0]._buffers)
        assert cache() is not None
        del video
        assert cache() is None
    finally:
        gc.enable()


def test_pause_waits_for_resume(pipe):
    with stream(pipe) as video:
        next(video)
        video.pause()
        found: list = []
        reader = threading.Thread(target=lambda: found.append(next(video)))
        reader.start()
        reader.join(0.3)
        assert reader.is_alive() and not found
        video.resume()
        reader.join(30)
        assert len(found) == 1


def test_a_close_ends_a_reader_that_waits(pipe):
    with stream(pipe) as video:
        next(video)
        video.pause()
        ended: list = []
        reader = threading.Thread(target=lambda: ended.append(list(video)))
        reader.start()
        reader.join(0.2)
        assert reader.is_alive()
        video.close()
        reader.join(30)
        assert ended == [[]]
    assert not tilewise.is_patched(pipe)


def test_a_close_in_the_middle_of_a_chunk(pipe):
    """From another thread: the chunk is dropped, the reader's iteration ends, and the pipeline is as it was."""
    video = stream(pipe)
    next(video)
    in_forward, go_on, ended = threading.Event(), threading.Event(), []

    def hold(*_):
        in_forward.set()
        go_on.wait(30)

    handle = pipe.transformer.blocks[1].register_forward_pre_hook(hold)
    reader = threading.Thread(target=lambda: ended.append(list(video)))
    reader.start()
    assert in_forward.wait(30)
    closer = threading.Thread(target=video.close)
    closer.start()
    closer.join(0.2)
    assert closer.is_alive() and tilewise.is_patched(pipe)  # it waits for the pass
    go_on.set()
    closer.join(30)
    reader.join(30)
    handle.remove()
    assert ended == [[]] and not tilewise.is_patched(pipe)
    assert video.chunks == 1  # what was under way is dropped
    assert len(frames_of(stream(pipe, seconds=0.5))) == 4


@pytest.mark.parametrize("how", ["recache", "flush"])
def test_a_new_prompt_is_a_new_shot(pipe, how):
    """With the policy ``shot`` its first frames become the sink: what follows is another video, and comes back from a state."""
    made = {}
    for policy in ("fixed", "shot"):
        cache = KVCache(window=6, sink=2, policy=policy)
        with stream(pipe, cache=cache) as video:
            chunks = [next(video) for _ in range(4)]
            video.set_prompt(BLUE, how)
            chunks += [next(video) for _ in range(2)]
            state = video.state_dict()
            if policy == "shot":
                assert torch.equal(video.source.history.sink, chunks[4].latents)
            made[policy] = frames_of([*chunks, next(video), next(video)])
        with stream(pipe, cache=cache) as again:
            again.load_state_dict(state)
            assert np.array_equal(frames_of([next(again), next(again)]), made[policy][-8:])
    same = (made["fixed"] == made["shot"]).reshape(len(made["shot"]), -1).mean(1)
    assert same[:17].min() > 0.99 and same[-4:].max() < 0.9  # four chunks have 13 frames, the first of the new shot 4


def test_a_state_before_the_first_chunk_has_the_image(pipe):
    picture = np.full((32, 48, 3), (200, 40, 90), np.uint8)
    with stream(pipe, image=picture, seconds=1) as video:
        state = video.state_dict()
        whole = frames_of(video)
    with stream(pipe, image=255 - picture, seconds=1) as again:
        again.load_state_dict(state)
        assert np.array_equal(frames_of(again), whole)


def test_a_state_of_another_method_is_refused(pipe):
    with stream(pipe, method=tilewise.STA(window=(1, 1, 1), tile=(2, 2, 2))) as video:
        next(video)
        state = video.state_dict()
    with stream(pipe) as other, pytest.raises(tilewise.ConfigError, match="the state's method is"):
        other.load_state_dict(state)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"recipe": RECIPE.replace(timesteps=(700, 500), warp=False)}, "for video to video"),
        ({"seconds": float("inf")}, "seconds must be a number above 0"),
        ({"seconds": "10"}, "seconds must be a number above 0"),
        ({"seconds": 1e308}, "seconds must be at most"),
        ({"fps": float("nan")}, "fps must be a number from 0.01 to 1000"),
        ({"fps": 1e308}, "fps must be a number from 0.01 to 1000"),
        ({"decode_device": "nonsense"}, "unknown device"),
        ({"decode_device": "cuda:99"}, "decode_device: there is no device"),
        ({"negative": "blurry"}, "no guidance"),
        ({"prompt": " "}, "prompt is empty"),
        ({"height": 30}, "height"),
        ({"chunk": 5}, "does not fit"),
        ({"seconds": 0}, "seconds must be a number above 0"),
        ({"image": np.zeros((8, 8, 3), np.uint8)}, "resize it first"),
        ({"cache": KVCache(window=6, sink=1, policy="ema")}, "as long as a chunk"),
    ],
)
def test_bad_input_is_refused_and_changes_nothing(pipe, options, message):
    with pytest.raises(tilewise.ConfigError, match=message):
        stream(pipe, **options)
    assert not tilewise.is_patched(pipe)


def test_prompts_that_cannot_be(pipe):
    with stream(pipe) as video:
        for prompt, options, message in (
            ("", {}, "empty"),
            (BLUE, {"how": "soon"}, "way to change"),
            (BLUE, {"over": 0}, "over"),
        ):
            with pytest.raises(tilewise.ConfigError, match=message):
                video.set_prompt(prompt, **options)
