"""highres on tiny pipelines of each kind that it serves besides Wan: latents there and back, the schedule, both stages."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import family_checks
import numpy as np
import pytest
import test_chroma
import test_easyanimate
import test_flux
import test_flux2
import test_hunyuan_video
import test_hunyuan_video15
import test_kandinsky5
import test_ltx
import test_mochi
import test_qwen_image
import test_sd3
import test_skyreels
import test_z_image
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    ChromaPipeline,
    FlowMatchEulerDiscreteScheduler,
    Flux2Pipeline,
    LTXPipeline,
    UniPCMultistepScheduler,
    ZImagePipeline,
)

import tilewise
from tilewise.pipelines.generation import generate
from tilewise.pipelines.generation.resolve import resolve_settings
from tilewise.pipelines.highres.partial_schedule import entered_at, noised
from tilewise.pipelines.highres.preparation import few_steps, native_in_shape, prepare
from tilewise.pipelines.highres.settings import HighresSettings
from tilewise.pipelines.highres.two_stages import highres, make, warm_up
from tilewise.pipelines.latent_spaces.base import latent_space, latent_spaces
from tilewise.pipelines.loading.model_defaults import model_defaults
from tilewise.plugins.config import resolve
from tilewise.plugins.errors import ConfigError, TilewiseError, UnsupportedModelError
from tilewise.plugins.guidance.cross_attention_cache import CrossAttentionCache
from tilewise.plugins.runtime.call_stats import GLOBAL_PATH, SPARSE

DYNAMIC = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_image_seq_len=16, max_image_seq_len=64)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def ltx():
    pipe = test_ltx.pipeline(LTXPipeline)
    pipe.scheduler = DYNAMIC
    mask = torch.ones(1, 7, dtype=torch.int64)
    pipe.encode_prompt = lambda **_: (noise(1, 7, 16), mask, noise(1, 7, 16, seed=1), mask)
    return pipe, {"native": (32, 64), "height": 64, "width": 96, "frames": 9}


def hunyuan_video():
    pipe = test_hunyuan_video.pipeline()
    mask = test_hunyuan_video.padded(9, (6,))
    pipe.encode_prompt = lambda **_: (noise(1, 9, 16), noise(1, 8, seed=1), mask)
    return pipe, {"native": (48, 48), "height": 64, "width": 96, "frames": 5}


def flux():
    pipe = test_flux.pipeline()
    pipe.scheduler = DYNAMIC
    pipe.vae.register_to_config(shift_factor=0.1, scaling_factor=0.4)
    pipe.encode_prompt = lambda **_: (noise(1, 7, 12), noise(1, 8, seed=1), torch.zeros(7, 3))
    return pipe, {"native": (32, 32), "height": 48, "width": 64, "frames": 1}


def sd3():
    pipe = test_sd3.pipeline()
    torch.manual_seed(0)
    pipe.vae = AutoencoderKL(
        block_out_channels=(8, 8, 8, 8), down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4, latent_channels=4, norm_num_groups=4, scaling_factor=1.5, shift_factor=0.06,
    )  # fmt: skip
    text, pooled = test_sd3.TEXT_DIM, 8
    pipe.encode_prompt = lambda **_: (
        noise(1, 7, text),
        noise(1, 7, text, seed=1),
        noise(1, pooled),
        noise(1, pooled, seed=1),
    )
    return pipe, {"native": (64, 64), "height": 96, "width": 128, "frames": 1}


def qwen_image():
    pipe = test_qwen_image.pipeline()
    pipe.scheduler = DYNAMIC
    channels = test_qwen_image.CHANNELS // 4
    torch.manual_seed(0)
    pipe.vae = AutoencoderKLQwenImage(
        base_dim=8, z_dim=channels, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True],
        latents_mean=[0.1] * channels, latents_std=[2.0] * channels,
    )  # fmt: skip
    mask = torch.ones(1, 7, dtype=torch.int64)
    pipe.encode_prompt = lambda prompt, **_: (noise(1, 7, test_qwen_image.TEXT_DIM, seed=len(prompt)), mask)
    return pipe, {"native": (64, 64), "height": 96, "width": 128, "frames": 1}


def skyreels():
    pipe = test_skyreels.pipeline(
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    )
    text = test_skyreels.tiny_wan.TEXT_DIM
    pipe.encode_prompt = lambda **_: (noise(1, 16, text), noise(1, 16, text, seed=1))
    return pipe, {"native": (16, 32), "height": 32, "width": 48, "frames": 5}


def hunyuan_video15():
    pipe = test_hunyuan_video15.pipeline()

    def encode_prompt(prompt, **_):
        seed = len(prompt or "")
        masks = test_hunyuan_video.padded(9, (6,)), test_hunyuan_video.padded(5, (0,))
        return noise(1, 9, 16, seed=seed), masks[0], noise(1, 5, 12, seed=seed), masks[1]

    pipe.encode_prompt = encode_prompt
    return pipe, {"native": (48, 48), "height": 64, "width": 96, "frames": 5}


def mochi():
    pipe = test_mochi.pipeline(channels=12)  # as many as the pipeline's decode counts on
    pipe.vae.register_to_config(latents_mean=[0.1, 0.0, -0.2] * 4, latents_std=[2.0, 1.0, 0.5] * 4, scaling_factor=0.8)
    text, width = test_mochi.TEXT, test_mochi.TEXT_DIM
    masks = [torch.arange(text)[None] < n for n in (7, 2)]
    pipe.encode_prompt = lambda **_: (noise(1, text, width), masks[0], noise(1, text, width, seed=1), masks[1])
    return pipe, {"native": (48, 48), "height": 64, "width": 96, "frames": 7}


def kandinsky5(**overrides):
    pipe = test_kandinsky5.pipeline(test_kandinsky5.denoiser(**overrides))
    width, lengths = test_kandinsky5.TEXT_DIM, torch.tensor([0, 7], dtype=torch.int32)
    pipe.encode_prompt = lambda prompt, **_: (
        noise(1, 7, width, seed=len(prompt[0])),
        noise(1, 12, seed=len(prompt[0])),
        lengths,
    )
    return pipe, {"native": (48, 48), "height": 64, "width": 96, "frames": 5}


def easyanimate():
    pipe = test_easyanimate.pipeline()
    pipe.scheduler = DYNAMIC
    text, width = test_easyanimate.TEXT, test_easyanimate.TEXT_DIM
    mask = torch.ones(1, text, dtype=torch.int64)
    pipe.encode_prompt = lambda **_: (noise(1, text, width), noise(1, text, width, seed=1), mask, mask)
    return pipe, {"native": (48, 48), "height": 64, "width": 96, "frames": 5}


def chroma():
    own, _ = flux()
    parts = dict.fromkeys(["text_encoder", "tokenizer"])
    pipe = ChromaPipeline(scheduler=DYNAMIC, vae=own.vae, transformer=test_chroma.tiny(), **parts)
    text, mask = test_chroma.TEXT_DIM, (torch.arange(7) < torch.tensor([[5]])).float()
    ids = torch.zeros(7, 3)
    pipe.encode_prompt = lambda **_: (noise(1, 7, text), ids, mask, noise(1, 7, text, seed=1), ids, mask)
    return pipe, {"native": (32, 32), "height": 48, "width": 64, "frames": 1}


def flux2():
    torch.manual_seed(0)
    vae = AutoencoderKLFlux2(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=test_flux2.CHANNELS // 4, norm_num_groups=4,
    )  # fmt: skip
    vae.bn.running_mean.copy_(noise(len(vae.bn.running_mean)))
    vae.bn.running_var.copy_(noise(len(vae.bn.running_var), seed=1).square() + 0.1)
    parts = dict.fromkeys(["text_encoder", "tokenizer"])
    pipe = Flux2Pipeline(scheduler=DYNAMIC, vae=vae, transformer=test_flux2.tiny(), **parts)
    pipe.encode_prompt = lambda **_: (noise(1, 7, test_flux2.TEXT_DIM), torch.zeros(1, 7, 4))
    return pipe, {"native": (32, 32), "height": 48, "width": 64, "frames": 1}


def z_image():
    own, _ = sd3()
    parts = dict.fromkeys(["text_encoder", "tokenizer"])
    pipe = ZImagePipeline(scheduler=DYNAMIC, vae=own.vae, transformer=test_z_image.tiny(), **parts)
    text = test_z_image.TEXT_DIM
    pipe.encode_prompt = lambda **_: ([noise(7, text)], [noise(40, text, seed=1)])
    return pipe, {"native": (64, 64), "height": 96, "width": 128, "frames": 1}


KINDS = [
    ltx, hunyuan_video, flux, sd3, qwen_image, skyreels, hunyuan_video15, mochi, kandinsky5, easyanimate, chroma, flux2, z_image,
]  # fmt: skip
CROSS = ("LTXPipeline", "SkyReelsV2Pipeline", "Kandinsky5T2VPipeline")  # those with cross-attention
ALONE = ("MochiPipeline", "ChromaPipeline", "Flux2Pipeline", "ZImagePipeline")  # those without a full path


@pytest.fixture(params=KINDS, ids=lambda kind: kind.__name__)
def case(request):
    pipe, size = request.param()
    pipe.vae.eval()
    pipe.set_progress_bar_config(disable=True)
    return pipe, size


@pytest.fixture
def held(monkeypatch) -> list[int]:
    """Bytes in a full path's cache, each time that something is put there."""
    sizes: list[int] = []
    put = CrossAttentionCache.put

    def watched(self, *given):
        put(self, *given)
        sizes.append(self.on_device + self.on_host)

    monkeypatch.setattr(CrossAttentionCache, "put", watched)
    return sizes


def call(pipe, size, **options):
    frames = {"num_frames": size["frames"]} if size["frames"] > 1 else {}
    given = {"height": size["height"], "width": size["width"], **frames, "num_inference_steps": 2, "return_dict": False}
    return pipe(prompt="a star", generator=torch.Generator().manual_seed(0), **given, **options)[0]


def as_given(pipe, taken):
    """Latents as a call takes them in the form in which it gives them."""
    return pipe._pack_latents(taken) if isinstance(pipe, Flux2Pipeline) else taken


def test_latents_there_and_back(case):
    pipe, size = case
    space = latent_space(pipe)
    shape = space.shape(pipe, size["height"], size["width"], size["frames"])
    given = call(pipe, size, output_type="latent")
    latents = space.unpacked(pipe, given, shape)
    assert latents.shape == (1, space.channels(pipe.vae), *shape)
    assert torch.equal(as_given(pipe, space.packed(pipe, latents)), given)
    stock = np.asarray(call(pipe, size, output_type="np"))
    frames = space.decode(pipe, latents)
    np.testing.assert_allclose(frames, stock.reshape(frames.shape), atol=1e-5)
    assert frames.shape == (size["frames"], size["height"], size["width"], 3)
    assert frames.std() > 0.01
    again = space.encode(pipe, frames)
    assert again.shape == latents.shape
    video = torch.from_numpy(frames).permute(3, 0, 1, 2)[None] * 2 - 1
    with torch.no_grad():
        stock_latents = pipe.vae.encode(video[:, :, 0] if space.flat else video).latent_dist.mode()
    mean, std = space.statistics(pipe.vae, again)
    torch.testing.assert_close((again * std + mean).view_as(stock_latents), stock_latents, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("case", [ltx, hunyuan_video, flux, mochi], indirect=True, ids=lambda kind: kind.__name__)
def test_warmed_up(case):
    """The fewest steps: not every schedule can be made of one."""
    pipe, size = case
    size = dict(size)
    height, width = size.pop("native")
    stages = prepare(
        pipe, "a star", size["height"], size["width"], (height, width), resolve("dense"), HighresSettings(),
        {"frames": size["frames"], "steps": 8},
    )  # fmt: skip
    assert warm_up(pipe, stages) > 0
    few = few_steps(pipe, stages)
    made = make(pipe, few)
    assert few.native.steps == 2
    counts = {name: count for name, count in made.forwards.items() if count}
    if few.options.global_path != "none":
        assert counts["refreshed"] == counts["reused"] > 0
    sparse = few_steps(
        pipe, dataclasses.replace(stages, native=dataclasses.replace(stages.native, method=resolve("sta-balanced")))
    )
    assert sparse.native.method.steps == (0.0, 1.0)
    alone = resolve_settings(pipe, "a star", method="sta", height=height, width=width, frames=size["frames"], steps=8)
    calls = []
    assert generate.warm_up(pipe, alone, lambda *now: calls.append(now)) > 0
    assert calls == [("warm-up", done, 2) for done in range(3)]


def test_two_stages(case):
    pipe, size = case
    scheduler, guidance = pipe.scheduler, {"guidance": 3.0}
    call(pipe, size, output_type="latent")  # some leave a hook of diffusers' own
    parts, before = dict(pipe.components), family_checks.traces(pipe.transformer)
    made = highres(pipe, "a star", **size, steps=4, refresh=1, strength=0.5, **guidance)
    assert made.frames.shape == (size["frames"], size["height"], size["width"], 3)
    assert made.native.frames.shape == (size["frames"], *size["native"], 3)
    assert made.clip.summary.density < 1
    kinds = {row.kind for row in made.clip.summary.rows}
    cross = type(pipe).__name__ in CROSS
    assert kinds == ({SPARSE, GLOBAL_PATH} if cross else {SPARSE})
    assert made.options.global_path == ("dense" if cross else "none")
    assert made.options.flow_shift is None
    assert bool(made.forwards["refreshed"]) == cross
    assert pipe.scheduler is scheduler
    assert "set_timesteps" not in vars(scheduler)
    assert not tilewise.is_patched(pipe)
    again = highres(
        pipe, "a star", **size, steps=4, refresh=1, strength=0.5, upscale="latent", flow_shift=2.0, **guidance
    )
    assert not np.array_equal(again.frames, made.frames)
    if not cross:
        paths = "'none'" if type(pipe).__name__ in ALONE else "'none' or 'dense'"
        with pytest.raises(ConfigError, match=f"which has {paths}:"):
            highres(pipe, "a star", **size, steps=4, global_path="draft")
    assert all(part is parts[name] for name, part in pipe.components.items())
    assert family_checks.traces(pipe.transformer) == before


def test_the_second_stage_begins_at_its_noise_level(case, monkeypatch):
    """With the velocity that leads from the noise to the clip for the denoiser's, its steps end with the clip itself: they do
    from the level at which the schedule was entered, and from no other."""
    pipe, size = case
    space, ends, seen = latent_space(pipe), [], {}
    decode = type(space).decode

    def noise_known(clean, scheduler, *rest):
        latents = noised(clean, scheduler, *rest)
        drawn = noise(*clean.shape, seed=5 + 1)
        velocity = as_given(pipe, space.packed(pipe, drawn - clean))
        velocity = -velocity if scheduler.config.get("invert_sigmas") else velocity
        seen.update(clean=clean, start=latents, calls=0)
        step = scheduler.step

        @functools.wraps(step)
        def exact(output, *args, **kwargs):
            seen["calls"] += 1
            return step(velocity.to(output), *args, **kwargs)

        scheduler.step = exact
        return latents

    monkeypatch.setattr("tilewise.pipelines.highres.two_stages.noised", noise_known)
    monkeypatch.setattr(type(space), "decode", lambda self, pipe, x: ends.append(x) or decode(self, pipe, x))
    highres(pipe, "a star", **size, steps=6, strength=0.5, global_path="none", guidance=1.0, seed=5)
    assert seen["calls"] == 3
    assert (seen["start"] - seen["clean"]).abs().max() > 0.3
    torch.testing.assert_close(ends[-1].float(), seen["clean"], atol=1e-3, rtol=1e-3)


def test_a_full_path_where_text_is_part_of_the_sequence(case, held):
    """On request. It changes the clip, ends without a trace, and its cache is what was planned."""
    pipe, size = case
    if type(pipe).__name__ in ALONE:
        with pytest.raises(ConfigError, match="which has 'none'"):
            highres(pipe, "a star", **size, steps=4, global_path="dense")
        return
    made = highres(pipe, "a star", **size, steps=4, strength=0.5, refresh=2, global_path="dense", guidance=3.0)
    assert {row.kind for row in made.clip.summary.rows} == {SPARSE, GLOBAL_PATH}
    assert made.forwards["refreshed"] == made.forwards["reused"] > 0
    assert made.plan.cache == max(held)
    assert not tilewise.is_patched(pipe)
    alone = highres(pipe, "a star", **size, steps=4, strength=0.5, global_path="none", guidance=3.0)
    assert np.array_equal(alone.native.frames, made.native.frames)
    assert not np.array_equal(alone.frames, made.frames)


def test_guidance_in_one_batch_is_planned_for(held):
    """LTX: both texts in one forward. What the cache is planned to hold is what it holds."""
    pipe, size = ltx()
    made = highres(pipe, "a star", **size, steps=4, refresh=2, guided="cond", guidance=3.0)
    assert made.plan.cache == max(held)
    without = highres(pipe, "a star", **size, steps=4, refresh=2, guidance=1.0)
    assert made.plan.cache == 2 * without.plan.cache
    assert made.plan.activations == pytest.approx(2 * without.plan.activations, abs=2)


def test_native_sizes():
    pipe, _ = sd3()
    native = model_defaults(pipe)
    assert (native.height, native.width, native.frames) == (pipe.default_sample_size * 8,) * 2 + (1,)
    assert native.highres_flow_shift is None
    native = model_defaults(ltx()[0])
    assert (native.height, native.width, native.frames, native.fps) == (512, 704, 161, 25)
    assert model_defaults(mochi()[0]).highres_strength == 0.45
    for kind, size in ((mochi, (480, 848, 19)), (hunyuan_video15, (480, 848, 121)), (z_image, (1024, 1024, 1))):
        native = model_defaults(kind()[0])
        assert (native.height, native.width, native.frames) == size


@pytest.mark.parametrize(
    ("call", "wanted"),
    [
        (lambda self, prompt, height=512, width=768, num_frames=None: None, (512, 768, 81)),  # as LTX-2's
        (lambda self, prompt, height=1024, width=1024: None, (1024, 1024, 1)),
        (lambda self, prompt, height=None, width=None: None, (480, 832, 1)),
        (lambda self, prompt, height=None, width=None, num_frames=16: None, (480, 832, 16)),
    ],
)
def test_sizes_that_a_pipeline_says_in_part(call, wanted):
    native = model_defaults(type("Pipe", (), {"__call__": call})())
    assert (native.height, native.width, native.frames) == wanted


def test_a_schedule_that_begins_elsewhere_is_an_error():
    """Noise for one length of sequence, and a run with another."""

    class Pipe:
        scheduler = DYNAMIC

    asked = {"sigmas": np.linspace(1, 0.25, 4), "mu": 0.1}
    with entered_at(Pipe(), 4, 0.5, None) as scheduler:
        noised(torch.zeros(1, 4), scheduler, asked, 40, torch.Generator())
        scheduler.set_timesteps(sigmas=asked["sigmas"], mu=0.5 + 0.65 * 0.5)
        with pytest.raises(TilewiseError, match="begins its second stage at noise level"):
            scheduler.set_timesteps(**asked)


def test_a_condition_that_is_none():
    """Kandinsky 5 whose latents hold a condition too: the second stage is given one of zeros, as the first."""
    pipe, size = kandinsky5(visual_cond=True)
    stock, taken = call(pipe, size, output_type="latent"), []
    space = latent_space(pipe)
    pipe.transformer.register_forward_pre_hook(
        lambda m, a, given: taken.append(given["hidden_states"].clone()), with_kwargs=True
    )
    call(pipe, size, output_type="latent")
    packed = space.packed(pipe, space.unpacked(pipe, taken[0][..., :4], (2, 8, 12)))
    assert torch.equal(packed, taken[0])
    made = highres(pipe, "a star", **size, steps=4, strength=0.5, guidance=3.0)
    assert made.frames.shape == (5, 64, 96, 3)
    assert not taken[-1][..., 4:].any()
    assert taken[-1].shape[-1] == 9
    assert stock.shape[-1] == 4


def test_sparse_attention_of_its_own_is_refused():
    pipe, size = kandinsky5(attention_type="nabla")
    with pytest.raises(
        UnsupportedModelError, match=r"does not serve this Kandinsky5T2VPipeline: it runs its own sparse"
    ):
        highres(pipe, "a star", **size)


def test_guidance_that_is_the_guiders():
    """HunyuanVideo 1.5: its call takes none, and tells no step. The guider is there again afterwards, as it was."""
    pipe, size = hunyuan_video15()
    guider, told = pipe.guider, []
    assert model_defaults(pipe).guidance == guider.guidance_scale == 3.0

    def frames(**options):
        return highres(pipe, "a star", **size, steps=4, strength=0.5, **options).frames

    usual = frames(progress=lambda *told_: told.append(told_))
    assert [x for x in told if "denoise" in x[0]] == [
        *(("native: denoise", n, 4) for n in (1, 2, 3, 4)),
        *(("denoise", n, 2) for n in (1, 2)),
    ]
    assert pipe.guider is guider
    assert np.array_equal(frames(guidance=3.0), usual)
    assert not np.array_equal(frames(guidance=1.0), usual)
    guider.disable()
    with pytest.raises(ConfigError, match=r"guidance 3 is not for this HunyuanVideo15Pipeline"):
        frames(guidance=3.0)
    assert np.array_equal(frames(), frames(guidance=1.0))
    assert "step" not in vars(pipe.scheduler)


def test_every_kind_is_tested():
    # Wan's are in files of their own.
    here = {type(kind()[0]).__name__ for kind in KINDS} | {"WanPipeline", "WanImageToVideoPipeline"}
    from_pictures = Path(__file__).with_name("test_from_pictures.py").read_text(encoding="utf-8")
    assert {name for name in latent_spaces() if name not in from_pictures} <= here <= set(latent_spaces())


def test_kandinskys_native_stage_stays_where_positions_are_as_at_its_own_size():
    """Beyond sides of 480 to 854 the pipeline turns them by less: 464×832 would be nearer to 16:9 than what is taken."""
    pipe, _ = kandinsky5()
    own = pipe._get_scale_factor(512, 768)
    assert pipe._get_scale_factor(464, 832) != own
    sizes = [native_in_shape(pipe, *size) for size in ((720, 1280), (1280, 720), (1152, 2048), (1088, 1920))]
    assert {pipe._get_scale_factor(*size) for size in sizes} == {own}
    assert sizes[0][1] / sizes[0][0] == pytest.approx(16 / 9, rel=0.04) and sizes[0] == sizes[1][::-1]
