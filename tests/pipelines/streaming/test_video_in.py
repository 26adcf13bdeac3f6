"""Video in: frames that are pushed come out changed, as many as went in."""

from __future__ import annotations

import copy
import threading

import numpy as np
import pytest
import torch

import tilewise
from tests.helpers.tiny_conditioned import without_ftfy
from tests.helpers.tiny_wan import tiny_pipeline
from tilewise.pipelines.latent_spaces.base import latent_spaces
from tilewise.pipelines.streaming.pushed import PushedFrames
from tilewise.pipelines.streaming.recipe import CausalRecipe
from tilewise.pipelines.streaming.sampler import levels_below
from tilewise.plugins.autoencoders.streaming import streaming_encoder

RECIPE = CausalRecipe(chunk=2, window=6, sink=2, height=32, width=48, fps=8, timesteps=(1000, 700, 300))
RED = "a red circle moving left"


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline()


def clip(frames: int, height: int = 32, width: int = 48) -> np.ndarray:
    return np.random.default_rng(frames).integers(0, 256, (frames, height, width, 3), np.uint8)


def edited(pipe, **kwargs):
    return tilewise.stream(pipe, RED, **{"recipe": RECIPE, "max_sequence_length": 16, **kwargs})


def decoded(pipe, latents: torch.Tensor) -> np.ndarray:
    space = latent_spaces()["WanPipeline"]
    return (space.decode(pipe, latents) * 255).round().astype(np.uint8)


@pytest.mark.parametrize("frames", [1, 2, 4, 9, 12])
def test_latents_that_are_taken_are_those_of_the_whole_clip(pipe, frames):
    """Whatever the sizes that frames come in and latents go out; the end is made up with copies of the last frame."""
    space, video = latent_spaces()["WanPipeline"], clip(frames)
    pushed = PushedFrames(
        streaming_encoder(pipe.vae), space, pipe.vae, size=(32, 48), device=torch.device("cpu"), factors=(4, 2)
    )
    for part in np.array_split(video, min(3, frames)):
        pushed.push(part)
    pushed.end()
    parts = [pushed.take(count, lambda: None) for count in (1, 3, 2, 10)]
    latents = 1 + -(-(frames - 1) // 2)
    whole = np.concatenate([video, np.repeat(video[-1:], 1 + 4 * -(-(frames - 1) // 4) - frames, 0)])
    wanted = space.encode(pipe, whole.astype(np.float32) / 255)[:, :, :latents]
    assert torch.cat(parts, 2).shape == wanted.shape
    torch.testing.assert_close(torch.cat(parts, 2), wanted, atol=1e-4, rtol=1e-4)
    assert pushed.take(2, lambda: None).shape[2] == 0


@pytest.mark.parametrize("frames", [1, 6, 11])
def test_as_many_frames_come_out_and_without_noise_they_are_the_decoded_video(pipe, frames):
    video = clip(frames)
    got = np.concatenate([chunk.frames for chunk in edited(pipe, video=[video], strength=0)])
    assert got.shape == video.shape
    padded = np.concatenate([video, np.repeat(video[-1:], 1 + 4 * -(-(frames - 1) // 4) - frames, 0)])
    latents = latent_spaces()["WanPipeline"].encode(pipe, padded.astype(np.float32) / 255)
    assert np.abs(got.astype(int) - decoded(pipe, latents)[:frames]).max() <= 1


def test_more_noise_leaves_less_of_the_video(pipe):
    """With a model of random weights: distance to the video's own latents, and to a stream of noise alone at strength 1."""
    video = clip(11)
    plain = torch.cat([chunk.latents for chunk in edited(pipe, video=[video], strength=0)], 2)
    found = {
        strength: torch.cat([chunk.latents for chunk in edited(pipe, video=[video], strength=strength)], 2)
        for strength in (0.1, 0.6, 1.0)
    }
    far = [float((latents - plain).norm()) for latents in found.values()]
    assert far[0] < far[1] < far[2]
    noise = torch.cat([chunk.latents for chunk in edited(pipe, seconds=11 / 8)], 2)
    torch.testing.assert_close(found[1.0], noise)


def test_levels_begin_at_the_strength():
    assert levels_below((1.0, 0.7, 0.3), 0.6) == (0.6, 0.3)
    assert levels_below((1.0, 0.7, 0.3), 0.7) == (0.7, 0.3)
    assert levels_below((1.0, 0.7, 0.3), 0.0) == ()


def test_frames_are_pushed_by_another_thread_and_latency_is_told(pipe):
    video = clip(7)
    with edited(pipe, strength=0.3) as stream:
        assert stream.frames is None

        def push() -> None:
            for frame in video:
                stream.push_frames(frame)
            stream.end_frames()

        camera = threading.Timer(0.1, push)
        camera.start()
        chunks = list(stream)
        camera.join()
        assert stream.frames_waiting == 0
        with pytest.raises(tilewise.TilewiseError, match="has ended"):
            stream.push_frames(video)
    assert sum(len(chunk.frames) for chunk in chunks) == 7
    assert all(0 < chunk.stats["latency"] < 60 for chunk in chunks)


def test_a_stream_that_waits_for_frames_can_be_closed(pipe):
    stream = edited(pipe, strength=0.3)
    closing = threading.Timer(0.1, stream.close)
    closing.start()
    assert list(stream) == []
    closing.join()
    assert not tilewise.is_patched(pipe)


def test_frames_of_another_size_are_fitted_and_this_is_said(pipe):
    with pytest.warns(UserWarning, match=r"40×40 are scaled and cut to the stream's 32×48"):
        got = list(edited(pipe, video=[clip(3, 40, 40)], strength=0.2))
    assert sum(len(chunk.frames) for chunk in got) == 3


def test_a_recipe_for_video_to_video_has_its_own_strength(pipe):
    recipe = RECIPE.replace(timesteps=(500, 300))
    with edited(pipe, recipe=recipe, video=[clip(3)]) as stream:
        assert stream.source.strength == pytest.approx(recipe.sigmas()[0])
    with pytest.raises(tilewise.ConfigError, match="or give a video"):
        edited(pipe, recipe=recipe)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"strength": 1.5}, "from 0 to 1"),
        ({"strength": 0.5, "image": clip(1)[0]}, "its own first frame"),
    ],
)
def test_what_is_refused(pipe, given, words):
    with pytest.raises(tilewise.ConfigError, match=words):
        edited(pipe, **given)
    assert not tilewise.is_patched(pipe)


def windowed(pipe, **kwargs):
    return edited(
        pipe, **{"recipe": None, "window": 5, "overlap": 2, "height": 32, "width": 48, "steps": 3, "fps": 8, **kwargs}
    )


@pytest.mark.filterwarnings("ignore:nothing says that these weights:UserWarning")
@pytest.mark.parametrize("way", ["prefix", "renoised"])
@pytest.mark.parametrize("frames", [1, 9, 14])
def test_windows_change_a_video(pipe, way, frames):
    """As many frames as went in, in windows that are full, partly full and not full; of no strength they are the video's."""
    video = clip(frames)
    padded = np.concatenate([video, np.repeat(video[-1:], 1 + 4 * -(-(frames - 1) // 4) - frames, 0)])
    space = latent_spaces()["WanPipeline"]
    wanted = space.encode(pipe, padded.astype(np.float32) / 255)[:, :, : 1 + -(-(frames - 1) // 2)]
    far = []
    for strength in (0, 0.35, 1.0):
        chunks = list(windowed(pipe, way=way, video=[video], strength=strength, seed=3))
        assert np.concatenate([chunk.frames for chunk in chunks]).shape == video.shape
        latents = torch.cat([chunk.latents for chunk in chunks], 2)
        assert latents.shape == wanted.shape
        far.append(float((latents - wanted).norm()))
    assert far[0] < 1e-3 < far[1] < far[2]


def test_windows_begin_at_the_strengths_noise_level(pipe):
    """The first forward has the video's latents at the level of the schedule that is nearest, and its timestep."""
    video, seen = clip(9), []
    handle = pipe.transformer.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append((kwargs["hidden_states"].clone(), float(kwargs["timestep"].max()))),
        with_kwargs=True,
    )
    with windowed(pipe, way="renoised", video=[video], strength=0.6, steps=4, guidance=1.0, seed=1) as stream:
        next(stream)
        sigma = float(pipe.scheduler.sigmas[0])
        clean = stream.source._clean
    handle.remove()
    whole = copy.deepcopy(pipe.scheduler)
    whole.set_timesteps(4)
    assert abs(sigma - 0.6) == pytest.approx(float((whole.sigmas - 0.6).abs().min()), abs=1e-6) and len(seen) < 4
    assert [at / 1000 for _, at in seen] == pytest.approx(pipe.scheduler.sigmas[:-1].tolist(), abs=1e-3)
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(seen[0][0].float(), (1 - sigma) * clean + sigma * noise, atol=1e-4, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:nothing says that these weights:UserWarning")
def test_windows_wait_for_frames_that_are_pushed(pipe):
    """What is held back of the last window comes when the end is known; the sink has keys of each pass that there is."""
    video, got = clip(17), []
    with windowed(pipe, way="renoised", strength=0.5, sink=1) as stream:
        stream.push_frames(video)
        got += [next(stream).frames, next(stream).frames]
        kept = stream.cache_bytes["total"]
        assert sum(map(len, got)) == 15 - 4
        stream.end_frames()
        got += [chunk.frames for chunk in stream]
    assert np.concatenate(got).shape == video.shape and kept > 0


def test_a_video_gives_the_first_picture_of_a_model_that_needs_one(monkeypatch):
    without_ftfy(monkeypatch)
    pipe, video, seen = tiny_pipeline(image=True), clip(12), []
    preprocess = pipe.video_processor.preprocess
    monkeypatch.setattr(
        pipe.video_processor,
        "preprocess",
        lambda image, **k: (seen.append(np.asarray(image)), preprocess(image, **k))[1],
    )
    chunks = list(windowed(pipe, overlap=None, video=[video], strength=0.9, steps=2))
    assert np.concatenate([chunk.frames for chunk in chunks]).shape == video.shape
    assert np.array_equal(seen[0], video[0]) and np.array_equal(seen[-1], chunks[-2].frames[-1])


def test_frames_of_another_kind_and_streams_without_a_video(pipe):
    with edited(pipe, strength=0.5) as stream, pytest.raises(tilewise.ConfigError, match="needs uint8 frames"):
        stream.push_frames(np.zeros((2, 32, 48, 3), np.float32))
    with edited(pipe, video=[clip(1)]) as stream, pytest.raises(tilewise.TilewiseError, match="was given its video"):
        stream.push_frames(clip(1))
    with edited(pipe) as stream, pytest.raises(tilewise.TilewiseError, match="begins with noise"):
        stream.push_frames(clip(1))
