"""Windows of other models than Wan: LTX-Video, SkyReels-V2, HunyuanVideo, Mochi; and which models go none of the ways."""

from __future__ import annotations

import numpy as np
import pytest
import test_broadway
import test_cogvideox
import test_ltx
import torch
from diffusers import (
    AnimateDiffPipeline,
    AutoencoderKL,
    AutoencoderKLWan,
    CogVideoXDDIMScheduler,
    CogVideoXDPMScheduler,
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    LTX2Pipeline,
    UniPCMultistepScheduler,
)
from diffusers.pipelines.skyreels_v2 import pipeline_skyreels_v2

import tilewise
from tests.helpers.tiny_unets import tiny_unet, tiny_vae
from tests.pipelines.highres.test_models import (
    easyanimate,
    flux,
    hunyuan_video,
    hunyuan_video15,
    kandinsky5,
    ltx,
    mochi,
    noise,
    skyreels,
)
from tilewise.pipelines.streaming.windows.noise import level_after, noised
from tilewise.pipelines.streaming.windows.ways.base import way_named
from tilewise.plugins.models.common.native_size import call_parameters
from tilewise.plugins.models.common.registry import family_of
from tilewise.plugins.patching import denoisers_of

pytestmark = pytest.mark.filterwarnings("ignore:.*latent frames.*:UserWarning")


def cogvideox():
    pipe = test_cogvideox.pipeline()
    text = noise(1, test_cogvideox.TEXT, 16)
    pipe.encode_prompt = lambda *_, **__: (text, -text)
    return pipe, None


def ltx2():
    pipe = test_ltx.pipeline2(LTX2Pipeline)  # whose decoder makes two frames of a latent, and two pixels
    pipe.vae_temporal_compression_ratio = pipe.vae_spatial_compression_ratio = 2
    pipe.vae.temporal_compression_ratio = pipe.vae.spatial_compression_ratio = 2
    mask = torch.ones(1, test_ltx.TEXT, dtype=torch.int64)
    pipe.encode_prompt = lambda **_: (noise(1, 7, 48, seed=5), mask, noise(1, 7, 48, seed=6), mask)
    return pipe, None


def animatediff():
    unet = tiny_unet()
    pipe = AnimateDiffPipeline(
        vae=tiny_vae(), text_encoder=None, tokenizer=None, unet=unet, motion_adapter=test_broadway.motion_adapter(),
        scheduler=DDIMScheduler(beta_schedule="linear", clip_sample=False),
    )  # fmt: skip
    pipe.unet.eval()
    text = noise(1, 7, unet.config.cross_attention_dim)
    pipe.encode_prompt = lambda *_, **__: (text, -text)
    return pipe, None


# name: pipeline, its size, its usual way, an overlap
CASES = {
    "ltx": (ltx, {"height": 32, "width": 64}, "prefix"),
    "skyreels": (skyreels, {"height": 16, "width": 32}, "renoised"),
    "hunyuan_video": (hunyuan_video, {"height": 48, "width": 48}, "renoised"),
    "cogvideox": (cogvideox, {"height": 32, "width": 32}, "renoised"),
    "hunyuan_video15": (hunyuan_video15, {"height": 48, "width": 48}, "renoised"),
    "kandinsky5": (kandinsky5, {"height": 48, "width": 48}, "renoised"),
    "easyanimate": (easyanimate, {"height": 48, "width": 48}, "renoised"),
    "mochi": (mochi, {"height": 48, "width": 48}, "renoised"),
    "ltx2": (ltx2, {"height": 32, "width": 32}, "prefix"),
    "animatediff": (animatediff, {"height": 32, "width": 48}, "renoised"),
}


@pytest.fixture(params=CASES)
def case(request, monkeypatch):
    # SkyReels-V2 cleans prompts with it; here they are not encoded.
    monkeypatch.setattr(pipeline_skyreels_v2, "ftfy", object(), raising=False)
    make, size, way = CASES[request.param]
    pipe, _ = make()
    pipe.vae.eval()
    pipe.set_progress_bar_config(disable=True)
    return pipe, {**size, "steps": 2, "window": 5, "overlap": 2, "fps": 8}, way


def temporal_of(pipe) -> int:
    names = ("vae_scale_factor_temporal", "vae_temporal_compression_ratio", "vae_temporal_scale_factor")
    return next((getattr(pipe, name) for name in names if hasattr(pipe, name)), 1)


def test_windows_go_on_and_the_first_is_the_stock_clip(case):
    pipe, options, way = case
    frames = 1 + 4 * temporal_of(pipe)
    # Kandinsky's own default is another one than none.
    negative = {"negative_prompt": ""} if "negative_prompt" in call_parameters(pipe) else {}
    stock = pipe(
        prompt="a star", height=options["height"], width=options["width"], num_frames=frames, num_inference_steps=2,
        generator=torch.Generator().manual_seed(4), output_type="latent", return_dict=False, **negative,
    )[0]  # fmt: skip
    length = frames + 6 * temporal_of(pipe)
    with tilewise.stream(pipe, "a star", seed=4, seconds=length / 8, **options) as video:
        assert video.recipe.way == way
        chunks = list(video)
        space = video.source.sampler.space
    latents = torch.cat([chunk.latents for chunk in chunks], 2)
    count = 5 if way == "prefix" else 3  # the last ones are faded over
    first = space.finished(pipe, stock, (5, *latents.shape[3:])).float()
    assert torch.equal(latents[:, :, :count], first[:, :, :count])
    assert latents.shape[2] == 11 and sum(len(chunk.frames) for chunk in chunks) == length
    assert [chunk.first_frame for chunk in chunks] == np.cumsum([0, *(len(c.frames) for c in chunks[:-1])]).tolist()
    assert not torch.allclose(latents[:, :, 5:8], latents[:, :, 8:]) and latents.isfinite().all()
    assert not tilewise.is_patched(pipe) and not any(one._forward_pre_hooks for one in denoisers_of(pipe).values())


@pytest.mark.parametrize(
    "scheduler",
    [CogVideoXDDIMScheduler(), CogVideoXDPMScheduler(), UniPCMultistepScheduler(use_flow_sigmas=True, flow_shift=3.0,
     prediction_type="flow_prediction"), FlowMatchEulerDiscreteScheduler(shift=3.0)],
)  # fmt: skip
def test_noise_levels_are_the_schedulers_own(scheduler):
    clean, mask = noise(1, 4, 2, 3, 3), noise(1, 4, 2, 3, 3, seed=1)
    scheduler.set_timesteps(5)
    for step, timestep in enumerate(scheduler.timesteps[1:], 1):
        if hasattr(scheduler, "scale_noise"):
            wanted = scheduler.scale_noise(clean, timestep[None], mask)
        else:
            wanted = scheduler.add_noise(clean, mask, timestep[None])
        torch.testing.assert_close(noised(scheduler, clean, mask, level_after(scheduler, step)), wanted)
    assert level_after(scheduler, 5) == 0


@pytest.mark.parametrize("make", [ltx, skyreels, ltx2])
def test_a_timestep_for_each_latent_frame(make):
    """As a scalar one where all are equal; with others in front the result is another."""
    pipe, _ = make()
    family, seen = family_of(pipe.transformer), []
    assert family is not None

    def before(module, args, kwargs):
        own = family.timestep(args, kwargs).flatten()[0].float()
        plain, equal, clean = (
            module.forward(*a, **{**k, "return_dict": False})[0]
            for a, k in (
                (args, kwargs),
                family.with_lead_timesteps(module, args, kwargs, own.expand(2)),
                family.with_lead_timesteps(module, args, kwargs, torch.zeros(2)),
            )
        )
        seen.append((plain, equal, clean))

    handle = pipe.transformer.register_forward_pre_hook(before, with_kwargs=True)
    size = {"height": 32, "width": 64, "num_frames": 1 + 2 * temporal_of(pipe), "num_inference_steps": 1}
    pipe(prompt="a star", output_type="latent", **size)
    handle.remove()
    for plain, equal, clean in seen:
        assert torch.allclose(plain, equal, atol=1e-4) and (plain - clean).abs().max() > 1e-3


def test_models_that_go_none_of_the_ways(case):
    pipe, options, way = case
    image_pipe, _ = flux()
    with pytest.raises(
        tilewise.UnsupportedModelError, match=r"FluxPipeline goes none of the ways \(.*prefix, renoised\)"
    ):
        tilewise.stream(image_pipe, "a star")
    if not isinstance(pipe.vae, AutoencoderKLWan | AutoencoderKL):
        with pytest.raises(tilewise.UnsupportedModelError, match=r"cannot encode a clip bit by bit here"):
            tilewise.stream(pipe, "a star", strength=0.5, **options)
    if way == "renoised" and type(pipe).__name__ != "SkyReelsV2Pipeline":
        with pytest.raises(tilewise.UnsupportedModelError, match="cannot go the way prefix: the family"):
            tilewise.stream(pipe, "a star", way="prefix", **options)
    if (why := way_named("diagonal").refuses(pipe)) is None:
        assert type(pipe).__name__ in ("LTXPipeline", "SkyReelsV2Pipeline")
        with tilewise.stream(pipe, "a star", way="diagonal", **{**options, "steps": 3}) as video:
            latents = torch.cat([next(video).latents for _ in range(3)], 2)
        assert latents.shape[2] == 11 and latents.isfinite().all()
    else:
        assert why.startswith("the family") or "none of flow matching" in why or "sound too" in why
    if type(pipe).__name__ == "AnimateDiffPipeline":
        with pytest.raises(tilewise.ConfigError, match="attends within each frame"):
            tilewise.stream(pipe, "a star", sink=1, **options)
        video = np.random.default_rng(0).integers(0, 256, (9, 32, 48, 3), np.uint8)
        chunks = list(tilewise.stream(pipe, "a star", video=[video], strength=0.5, **options))
        assert np.concatenate([chunk.frames for chunk in chunks]).shape == video.shape
        pipe.scheduler = EulerDiscreteScheduler()
        with pytest.raises(tilewise.UnsupportedModelError, match="larger the more noise"):
            tilewise.stream(pipe, "a star", **options)
    pipe.scheduler = FlowMatchHeunDiscreteScheduler()
    with pytest.raises(tilewise.UnsupportedModelError, match="takes 2 forwards a step"):
        tilewise.stream(pipe, "a star", **options)


def test_explain_tells_the_way_and_the_window(case):
    pipe, options, way = case
    told = tilewise.explain_stream(pipe, **{name: value for name, value in options.items() if name != "fps"})
    assert told.recipe.way == way and told.frames == 1 + 4 * temporal_of(pipe) and told.new == 3 * temporal_of(pipe)
    assert told.memory.cache == 0 and told.memory.decode > 0
    words = str(told)
    assert way in words and "5 latent frames, 2 of them those of the window before" in words
    assert told.to_dict()["recipe"] == told.recipe.to_dict()
    with pytest.raises(tilewise.ConfigError, match="option of a stream"):
        tilewise.explain_stream(pipe, windw=5)
