"""The two-stage pipeline, on a tiny pipeline with random weights: its parts, what it runs, what it refuses, its command."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import json
import threading
import warnings

import numpy as np
import pytest
import tiny_wan
import torch
from diffusers import (
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
    WanPipeline,
)

import tilewise
from tilewise.pipelines.highres.partial_schedule import entered_at, noised
from tilewise.pipelines.highres.preparation import native_in_shape, prepare
from tilewise.pipelines.highres.settings import HighresSettings, steps_to_run
from tilewise.pipelines.highres.two_stages import highres
from tilewise.pipelines.highres.upscale import upscale_frames, upscale_latents
from tilewise.pipelines.latent_spaces.base import latent_space, tiled
from tilewise.pipelines.loading.model_defaults import model_defaults
from tilewise.pipelines.media.video import read_frames, read_settings
from tilewise.plugins.autoencoders import wan_checks
from tilewise.plugins.autoencoders.wan_fused import FusedPass
from tilewise.plugins.errors import ConfigError, UnsupportedModelError
from tilewise.plugins.guidance.global_path import draft_bytes
from tilewise.plugins.hooks.temporary_attribute import temporary_attribute
from tilewise.plugins.models.common.family import Size
from tilewise.plugins.models.common.registry import family_of
from tilewise.plugins.runtime.call_stats import GLOBAL_PATH, SPARSE


@pytest.fixture(scope="module")
def pipe(tiny_pipe_dir):
    pipe = WanPipeline.from_pretrained(tiny_pipe_dir)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def make(pipe, height=128, width=96, **options):
    given = {"height": height, "width": width, "native": (64, 64), "frames": 5, "steps": 4, **options}
    return highres(pipe, "a red circle", **given)


# ── the whole ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_two_stages(pipe):
    told, native = [], []
    scheduler, before = pipe.scheduler, set(vars(pipe.transformer))
    made = make(pipe, progress=lambda *now: told.append(now), on_native=native.append)
    assert made.frames.shape == (5, 128, 96, 3)
    assert made.frames.dtype == np.uint8
    assert made.native is native[0]
    assert made.native.frames.shape == (5, 64, 64, 3)
    assert made.forwards == {"refreshed": 1, "reused": 1, "unguided": 2}  # 2 of 4 steps, 2 texts, one of them guided
    calls = {row.kind: row.calls for row in made.clip.summary.rows}
    assert calls == {SPARSE: 2 * 2 * 2, GLOBAL_PATH: 2}
    assert made.clip.summary.density == pytest.approx(9 / 16 * 9 / 12)
    phases = list(dict.fromkeys(phase for phase, _, _ in told))
    assert phases == ["native: denoise", "native: decode", "upscale", "denoise", "decode"]
    assert ("denoise", 2, 2) in told
    assert pipe.scheduler is scheduler
    assert set(vars(pipe.transformer)) - before <= {"_diffusers_hook"}  # which the pipeline's own cache_context leaves
    assert not tilewise.is_patched(pipe)
    json.dumps(made.to_dict())
    assert np.array_equal(make(pipe).frames, made.frames)
    assert not np.array_equal(make(pipe, seed=1).frames, made.frames)


def test_the_vae_runs_fused_in_both_stages(pipe, monkeypatch):
    monkeypatch.setattr(wan_checks, "fuses_on", lambda device: True)
    before, ran = set(vars(pipe.vae)) | set(vars(pipe.vae.decoder)), []
    for name in ("decode", "encode"):
        real = getattr(FusedPass, name)
        monkeypatch.setattr(FusedPass, name, lambda *given, r=real, n=name: ran.append(n) or r(*given))
    make(pipe, height=80, width=64)
    # 3 latents of 5 frames, decoded twice; encoded a frame and four frames
    assert ran == ["decode"] * 3 + ["encode"] * 2 + ["decode"] * 3
    assert set(vars(pipe.vae)) | set(vars(pipe.vae.decoder)) <= before | {"_conv_num", "_conv_idx", "_feat_map"} | {
        "_enc_conv_num", "_enc_conv_idx", "_enc_feat_map"
    }  # fmt: skip


def test_the_maps_of_a_draft_are_planned_for(pipe):
    made = {path: make(pipe, height=80, width=64, global_path=path) for path in ("draft", "pooled")}
    family, method = family_of(pipe.transformer), made["draft"].clip.settings.method.method
    layout = method.layout(family.grid_of_size(pipe.transformer, pipe, Size(80, 64, 5)))
    (layer, *_) = family.layers(pipe.transformer)
    maps = made["draft"].plan.activations - made["pooled"].plan.activations
    assert maps == draft_bytes(layout, layer.heads) > 0


def test_options_reach_the_run(pipe):
    size = {"height": 80, "width": 64, "frames": 1}
    base = make(pipe, refresh=1, guided="all", **size).frames
    for options, forwards in (
        ({"refresh": 1, "guided": "cond"}, {"refreshed": 2, "reused": 0, "unguided": 2}),
        ({"global_path": "none"}, {"refreshed": 0, "reused": 0, "unguided": 0}),
        ({"refresh": 1, "strength": 1.0, "guided": "all"}, {"refreshed": 8, "reused": 0, "unguided": 0}),
    ):
        made = make(pipe, **size, **options)
        assert made.forwards == forwards
        assert not np.array_equal(made.frames, base)
    for options in (
        {"global_path": "pooled"}, {"upscale": "latent"}, {"upscale": "lanczos"}, {"flow_shift": 3.0}, {"temperature": False},
        {"rope": "ntk"}, {"native": (48, 48)}, {"window": (32, 32)},
    ):  # fmt: skip
        assert not np.array_equal(make(pipe, **{"refresh": 1, "guided": "all", **size, **options}).frames, base), (
            options
        )
    tall = {"height": 256, "width": 64, "global_path": "none"}  # what all queries of a block leave out is whole cells
    assert not np.array_equal(make(pipe, far="cells", **tall).frames, make(pipe, **tall).frames)
    long = {"height": 64, "width": 64, "refresh": 1, "frames": 13}  # past the model's 9 frames
    assert not np.array_equal(make(pipe, rope_time="ntk", **long).frames, make(pipe, **long).frames)


def test_native_size_is_a_target_too(pipe):
    """At the native size the window is the whole frame: the second stage is stock video-to-video."""
    made = make(pipe, 64, 64, refresh=1, native_method="sta")
    assert made.clip.summary.density == 1.0
    assert made.native.summary is not None


def test_two_denoisers_and_a_timestep_per_token(tmp_path):
    for options in ({"boundary_ratio": 0.9}, {"expand_timesteps": True}):
        pipe = tiny_wan.tiny_pipeline(**options)
        made = make(pipe, 64, 96, native=(48, 48), guidance=3.0, flow_shift=None)
        assert made.frames.shape == (5, 64, 96, 3)


def test_an_offloaded_vae_makes_room_for_the_denoiser(pipe, monkeypatch):
    """After the second stage's encode, as after each decode."""
    told = []
    monkeypatch.setattr(pipe, "maybe_free_model_hooks", lambda: told.append("free"), raising=False)
    make(pipe, progress=lambda phase, done, total: told.append(f"{phase} {done}"))
    assert told[told.index("upscale 0") : told.index("upscale 1")] == ["upscale 0", "free"]


def test_interrupted(pipe):
    """Whatever stops it, the pipeline is as it was, and the first stage's clip has been handed out."""
    native = []

    def stop(phase, done, total):
        if phase == "denoise" and done == 1:
            raise KeyboardInterrupt

    scheduler = pipe.scheduler
    with pytest.raises(KeyboardInterrupt):
        make(pipe, progress=stop, on_native=native.append)
    assert len(native) == 1
    assert not tilewise.is_patched(pipe)
    assert pipe.scheduler is scheduler
    assert not pipe.vae.use_tiling
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in pipe.transformer.modules())
    assert all("forward" not in vars(m) for m in pipe.transformer.modules())


@pytest.mark.parametrize(
    ("size", "native"),
    [
        ((128, 128), (64, 64)),
        ((128, 136), (64, 64)),
        ((128, 96), (64, 48)),
        ((64, 256), (32, 128)),
        ((80, 16), (64, 64)),
    ],
)
def test_the_native_stage_has_the_clips_shape(pipe, size, native):
    """The model's own size, or where that would be stretched, about as many pixels in another shape."""
    assert native_in_shape(pipe, *size) == native


def test_a_native_stage_turned_upright(pipe, monkeypatch):
    own = dataclasses.replace(model_defaults(pipe), height=480, width=832)
    monkeypatch.setattr("tilewise.pipelines.highres.preparation.model_defaults", lambda pipe: own)
    assert native_in_shape(pipe, 1088, 1920) == (480, 832)
    assert native_in_shape(pipe, 1920, 1088) == (832, 480)
    height, width = native_in_shape(pipe, 1280, 1280)
    assert height == width and 0.9 < height * width / (480 * 832) < 1.1


def test_a_model_of_one_shape_keeps_it(pipe, monkeypatch):
    own = dataclasses.replace(model_defaults(pipe), one_shape=True)
    monkeypatch.setattr("tilewise.pipelines.highres.preparation.model_defaults", lambda pipe: own)
    assert native_in_shape(pipe, 128, 96) == (64, 64)


def test_a_native_stage_is_within_the_clip(pipe, monkeypatch):
    """Also where the model's own size is of nearly the clip's shape and a little larger on one side."""
    own = dataclasses.replace(model_defaults(pipe), height=720, width=1280)
    monkeypatch.setattr("tilewise.pipelines.highres.preparation.model_defaults", lambda pipe: own)
    height, width = native_in_shape(pipe, 704, 1312)
    assert height <= 704 and width <= 1312 and height / width == pytest.approx(704 / 1312, rel=0.02)


def test_stretching_is_said(pipe):
    with pytest.warns(UserWarning, match=r"native stage, 64×64, .* clip of 96×128 .*1\.33 times taller"):
        make(pipe, height=128, width=96, global_path="none")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make(pipe, height=128, width=96, native=None, global_path="none")


@pytest.mark.compile
def test_a_compiled_denoiser_has_no_full_path(pipe):
    """It would run as one of windows, unnoticed: refused before the native stage runs, and the window alone runs compiled."""
    plain = make(pipe, global_path="none")
    with temporary_attribute(pipe, "transformer", torch.compile(pipe.transformer, backend="eager")):
        with pytest.raises(UnsupportedModelError, match="transformer is compiled"):
            make(pipe, progress=lambda *_: pytest.fail("it ran"))
        assert np.array_equal(make(pipe, global_path="none").frames, plain.frames)
    torch.compiler.reset()


@pytest.mark.parametrize("at", ["native: decode", "upscale", "decode"])
def test_what_is_cut_off_leaves_nothing_on_the_device(pipe, monkeypatch, at):
    """A VAE keeps tensors between frames, and an offloaded part its place."""
    freed, phases = [], []
    part = pipe.vae.encoder if at == "upscale" else pipe.vae.decoder

    def full(module, args):
        if phases[-1] == at and any(isinstance(kept, torch.Tensor) for kept in caches()):
            raise torch.OutOfMemoryError("full")

    def caches():
        return [*pipe.vae._feat_map, *getattr(pipe.vae, "_enc_feat_map", [])]

    monkeypatch.setattr(pipe, "maybe_free_model_hooks", lambda: freed.append(phases[-1]))
    hook = part.register_forward_pre_hook(full)
    try:
        with pytest.raises(torch.OutOfMemoryError):
            make(pipe, frames=9, global_path="none", progress=lambda phase, *_: phases.append(phase))
    finally:
        hook.remove()
    assert freed[-1] == at
    assert not any(isinstance(kept, torch.Tensor) for kept in caches())


# ── what is refused ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"height": 120}, r"height=120 must be a multiple of 16, the nearest is 128"),
        ({"frames": 6}, "frames=6 must be"),
        ({"width": 96.0}, "width must be a whole number"),
        ({"height": 32}, "height 32 is smaller than the native stage's 64"),
        ({"height": 16384, "width": 16384}, r"a clip of 16384×16384 pixels and 5 frames does not fit: .*GiB"),
        ({"max_memory": "1MB"}, "does not fit: denoising needs"),
        ({"strength": 0.1}, "strength 0.1 leaves none of 4 steps; at least 0.25"),
        ({"strength": 2}, "strength must be in"),
        ({"refresh": 0}, "refresh must be"),
        ({"global_path": "dreft"}, "draft"),
        ({"upscale": "nearest"}, "upscale"),
        ({"flow_shift": -1}, "flow_shift must be"),
        ({"flow_shift": 0}, "flow_shift must be"),
        ({"flow_shift": float("nan")}, "flow_shift must be"),
        ({"rope": "riflex"}, "rope"),
        ({"rope": ["ntk"]}, "RoPE|rope"),
        ({"window": (3,)}, "window must be a height and a width in pixels"),
        ({"window": (64.0, 64.0)}, "window must be a height and a width"),
        ({"native": 64}, "native must be a height and a width"),
        ({"height": -128}, "height must be at least 1 pixel"),
        (
            {"height": 16384, "width": 16384, "native": (64, 64)},
            r"does not fit: denoising needs [\d.]+ GiB; give a smaller size",
        ),
        ({"height": 80_000, "width": 80_000}, r"3×10000×10000 tokens, it has positions for 2048×2048×2048"),
        ({"height": 1_600_000}, "height=1600000 is too large, at most 100000"),
        ({"refrehs": 3}, "refrehs"),
        ({"max_memory": "lots"}, "a size of memory"),
    ],
)
def test_bad_input(pipe, options, match):
    told = []
    with pytest.raises(ConfigError, match=match):
        make(pipe, progress=lambda *now: told.append(now), **options)
    assert not told
    assert not tilewise.is_patched(pipe)


@pytest.mark.parametrize("case", ["scheduler", "order", "compiled", "blocks"])
def test_what_the_second_stage_cannot_take_is_refused_before_the_first(pipe, case, monkeypatch):
    told, scheduler = [], pipe.scheduler
    if case in ("scheduler", "order"):
        kind = EulerDiscreteScheduler if case == "scheduler" else FlowMatchHeunDiscreteScheduler
        monkeypatch.setattr(pipe, "scheduler", kind())
        match = "no flow-matching scheduler" if case == "scheduler" else "several forwards a step"
    elif case == "compiled":
        monkeypatch.setattr(pipe.transformer, "_compiled_call_impl", lambda *args: None)
        match = "is compiled"
    else:
        monkeypatch.setattr("tilewise.plugins.methods.inward.MAX_BLOCKS", 2)
        match = "blocks, more than 2: the size is too large"
    with pytest.raises((ConfigError, UnsupportedModelError), match=match):
        make(pipe, progress=lambda *now: told.append(now))
    assert not told
    monkeypatch.undo()
    assert pipe.scheduler is scheduler


def test_overlapping_plans_leave_the_pipeline_alone(tiny_pipe_dir, monkeypatch):
    """Two requests of the page plan with one skeleton, the second while the first is within its check of the scheduler."""
    pipe = WanPipeline.from_pretrained(tiny_pipe_dir)
    own, config = pipe.scheduler, dict(pipe.scheduler.config)
    attributes, whole = dict(vars(own)), WanPipeline.__setattr__
    swaps: list[str] = []
    second_swapped, first_done = threading.Event(), threading.Event()
    works = []

    def plan() -> None:
        options = HighresSettings(flow_shift=5.0)
        shared = {"frames": 5, "steps": 4}
        works.append(prepare(pipe, "a red circle", 128, 96, (64, 64), "dense", options, shared))

    second = threading.Thread(target=plan)

    def set_and_wait(self, name, value):
        """The first plan's change waits for the second's, and that one for the end of the first plan."""
        whole(self, name, value)
        if name != "scheduler":
            return
        swaps.append(value)
        if len(swaps) == 1:
            second.start()
            second_swapped.wait(60)
        elif len(swaps) == 2:
            second_swapped.set()
            first_done.wait(60)

    monkeypatch.setattr(WanPipeline, "__setattr__", set_and_wait)
    plan()
    first_done.set()
    if not swaps:
        second.start()
    second.join(60)
    assert pipe.scheduler is own
    assert not swaps
    assert dict(own.config) == config
    assert vars(own) == attributes
    assert works[0].target == works[1].target


def test_planning_in_threads_leaves_the_pipeline_alone(tiny_pipe_dir):
    pipe = WanPipeline.from_pretrained(tiny_pipe_dir)
    own = pipe.scheduler

    def plan(flow_shift: float) -> float:
        options = HighresSettings(flow_shift=flow_shift)
        work = prepare(pipe, "a red circle", 128, 96, (64, 64), "dense", options, {"frames": 5, "steps": 4})
        return work.options.flow_shift

    shifts = [1.0 + n for n in range(16)]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert list(pool.map(plan, shifts)) == shifts
    assert pipe.scheduler is own
    assert "set_timesteps" not in vars(own)


def test_a_draft_over_too_many_blocks_is_refused_before_anything_runs(pipe, monkeypatch):
    monkeypatch.setattr("tilewise.plugins.methods.dynamic.map_method.MAX_BLOCKS", 3)
    told = []
    with pytest.raises(
        ConfigError, match=r"global_path='draft' is not for a size of 96×128: .*Give 'pooled' or 'dense'"
    ):
        make(pipe, global_path="draft", progress=lambda *now: told.append(now))
    assert not told


def test_other_bad_input(pipe):
    with pytest.raises(ConfigError, match="one prompt"):
        highres(pipe, ["a", "b"], height=128, width=128)
    image = tiny_wan.tiny_pipeline(image=True)
    with pytest.raises(ConfigError, match="WanImageToVideoPipeline needs a file for --image"):
        make(image)
    tilewise.patch(pipe, "sta")
    with pytest.raises(ConfigError, match="already patched"):
        make(pipe)
    tilewise.unpatch(pipe)


# ── its parts ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "scheduler",
    [
        FlowMatchEulerDiscreteScheduler(shift=3.0),
        UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
    ],
    ids=["euler", "unipc"],
)
def test_the_schedule_is_the_end_of_the_whole_one(scheduler):
    class Pipe:
        pass

    pipe = Pipe()
    pipe.scheduler = scheduler
    whole = type(scheduler).from_config(
        scheduler.config, **{k: 9.0 for k in ("flow_shift", "shift") if k in scheduler.config}
    )
    whole.set_timesteps(10)
    with entered_at(pipe, 10, 0.7, 9.0) as entered:
        assert pipe.scheduler is entered
        x = noised(torch.ones(1, 2, 3), entered, {"num_inference_steps": 10}, 0, torch.Generator().manual_seed(0))
        entered.set_timesteps(10)
        assert torch.equal(entered.timesteps, whole.timesteps[3:])
        assert torch.equal(entered.sigmas, whole.sigmas[3:])
        sigma = float(whole.sigmas[3])
        noise = torch.randn(1, 2, 3, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(x, (1 - sigma) * torch.ones(1, 2, 3) + sigma * noise)
        # A denoiser that always knows the answer leads to it, whatever the schedule.
        clean = torch.full((1, 2, 3), 0.5)
        latents = (1 - sigma) * clean + sigma * noise
        entered.set_begin_index(0)
        for i, t in enumerate(entered.timesteps):
            velocity = (latents - clean) / float(entered.sigmas[i])
            latents = entered.step(velocity, t, latents, return_dict=False)[0]
        torch.testing.assert_close(latents, clean, atol=1e-3, rtol=1e-3)
    assert pipe.scheduler is scheduler
    with entered_at(pipe, 10, 1.0, None) as entered:
        entered.set_timesteps(10)
        scheduler.set_timesteps(10)
        assert torch.equal(entered.sigmas, scheduler.sigmas)
        assert entered is not scheduler


def test_other_schedulers_are_refused():
    class Pipe:
        scheduler = EulerDiscreteScheduler()

    with pytest.raises(UnsupportedModelError, match="no flow-matching scheduler"), entered_at(Pipe(), 4, 0.5, None):
        pass
    assert steps_to_run(50, 0.7) == 35


@pytest.mark.parametrize("how", ["bicubic", "bilinear", "lanczos"])
def test_upscaling(how):
    y, x = np.mgrid[0:16, 0:12].astype(np.float32)
    clip = np.stack([y / 20, x / 20, 0.2 + 0 * x], -1)[None].repeat(2, 0)
    large = upscale_frames(clip, 48, 24, how)
    assert large.shape == (2, 48, 24, 3)
    # A ramp stays one, away from the borders: pixel centres agree.
    wanted = ((np.arange(48) + 0.5) / 3 - 0.5) / 20
    np.testing.assert_allclose(large[0, 9:-9, 12, 0], wanted[9:-9], atol=2e-3)
    assert upscale_frames(np.float32(clip > 0.3), 48, 24, how).max() <= 1
    with pytest.raises(ConfigError, match="nearest"):
        upscale_frames(clip, 32, 24, "nearest")


def test_upscaling_latents():
    latents = torch.randn(2, 3, 2, 4, 5, generator=torch.Generator().manual_seed(0))
    large = upscale_latents(latents, 8, 10)
    assert large.shape == (2, 3, 2, 8, 10)
    one = torch.nn.functional.interpolate(latents[1:, :, 1], (8, 10), mode="bicubic")
    torch.testing.assert_close(large[1:, :, 1], one)
    with pytest.raises(ConfigError, match="latents to upscale"):
        upscale_latents(latents[0], 8, 10)


def test_vae_there_and_back():
    """On the trained demo model: any length comes back, whole or in tiles, and is what the pipeline's own decode gives."""
    from tilewise.pipelines.loading.load import load_pipeline

    pipe = load_pipeline("demo", device="cpu")
    y, x = np.mgrid[0:64, 0:96] / 64
    frames = np.full((7, 64, 96, 3), (0.16, 0.31, 0.86), np.float32)
    for t, frame in enumerate(frames):
        frame[np.hypot(y - 0.5, x - 0.4 - t / 40) < 0.25] = (0.86, 0.16, 0.16)
    space = latent_space(pipe)
    latents = space.encode(pipe, frames)
    assert latents.shape == (1, 12, 4, 16, 24)
    assert 0.1 < latents.std() < 3
    back = space.decode(pipe, latents)
    assert back.shape == frames.shape
    assert np.abs(back - frames).mean() < 0.03
    vae = pipe.vae
    vae.tile_sample_min_height = vae.tile_sample_min_width = 48
    vae.tile_sample_stride_height = vae.tile_sample_stride_width = 32
    with tiled(vae, True):
        pieces = space.decode(pipe, latents)
    assert not vae.use_tiling
    assert np.abs(pieces - back).max() > 0
    assert np.abs(pieces - back).mean() < 0.02


# ── the command ──────────────────────────────────────────────────────────────────────────────────────────────────────


def from_clip(path, *options):
    from typer.testing import CliRunner

    from tilewise.ui.cli.app import app

    words = ["generate", "--from", str(path), "--device", "cpu"]
    return CliRunner().invoke(app, [*words, *options], catch_exceptions=False)


def command(tiny_pipe_dir, *options):
    from typer.testing import CliRunner

    from tilewise.ui.cli.app import app

    words = [
        "generate",
        "a red circle",
        "--model",
        str(tiny_pipe_dir),
        "--frames",
        "5",
        "--steps",
        "4",
        "--device",
        "cpu",
    ]
    return CliRunner().invoke(app, [*words, *options], catch_exceptions=False)


def test_command(tiny_pipe_dir, tmp_path):
    out = tmp_path / "large.mp4"
    size = ("--height", "128", "--width", "96", "--out", str(out))
    dry = command(tiny_pipe_dir, "--highres", *size, "--dry-run")
    assert dry.exit_code == 0, dry.output
    assert "memory:" in dry.output
    assert not out.exists()
    done = command(tiny_pipe_dir, "--highres", *size, "--refresh", "1", "--max-memory", "2GB")
    assert done.exit_code == 0, done.output
    assert "repetition" in done.output
    assert read_frames(out).shape == (5, 128, 96, 3)
    assert read_frames(tmp_path / "large-native.mp4").shape == (5, 64, 48, 3)  # in the clip's shape
    told = read_settings(out)["run"]["highres"]
    assert told["options"]["refresh"] == 1
    assert told["options"]["max_memory"] == 2 * 10**9
    assert HighresSettings.from_dict(told["options"]).refresh == 1


def test_a_clip_of_a_flat_native_stage_is_kept(tiny_pipe_dir, tmp_path, monkeypatch):
    """Such a stage has no edge to measure sharpness against, and JSON no number for that."""
    from tilewise.pipelines.highres import two_stages as module

    real = module.coherence
    monkeypatch.setattr(module, "coherence", lambda frames, native: real(frames, np.zeros_like(native)))
    out = tmp_path / "large.mp4"
    done = command(tiny_pipe_dir, "--highres", "--height", "80", "--width", "64", "--out", str(out))
    assert done.exit_code == 0, done.output
    assert "native 0.000" in done.output and "sharpness" not in done.output
    assert read_settings(out)["run"]["highres"]["coherence"]["sharpness"] is None


def test_made_again_in_tiles(tiny_pipe_dir, tmp_path, monkeypatch):
    """Tiles show in the pixels: a clip that was decoded in them, for want of memory, is so again where there is plenty."""
    from tilewise.pipelines.memory import plan as memory_plan

    out, again = tmp_path / "large.png", tmp_path / "again.png"
    size = ("--height", "272", "--width", "272", "--native", "64x64", "--frames", "1", "--global-path", "none")
    sufficient = memory_plan._in_tiles_if_need_be
    with monkeypatch.context() as little:
        little.setattr(memory_plan, "_in_tiles_if_need_be", lambda *given: sufficient(*given[:-1], 0))
        assert command(tiny_pipe_dir, "--highres", *size, "--out", str(out)).exit_code == 0
    assert read_settings(out)["run"]["highres"]["plan"]["vae_tiling"]
    done = from_clip(out, "--out", str(again))
    assert done.exit_code == 0, done.output
    assert read_settings(again)["run"]["highres"]["plan"]["vae_tiling"]
    assert f"frames of {out}: the same, bit for bit" in " ".join(done.output.split())


def test_the_command_takes_every_option(tiny_pipe_dir, tmp_path):
    """Those that decide the second stage, as the clip's record has them."""
    out = tmp_path / "large.mp4"
    words = ("--flow-shift", "3", "--rope", "yarn", "--rope-time", "riflex", "--guided", "cond", "--upscale", "lanczos")
    done = command(tiny_pipe_dir, "--highres", "--height", "80", "--width", "64", *words, "--out", str(out))
    assert done.exit_code == 0, done.output
    told = read_settings(out)["run"]["highres"]["options"]
    given = {"flow_shift": 3.0, "rope": "yarn", "rope_time": "riflex", "guided": "cond", "upscale": "lanczos"}
    assert {name: told[name] for name in given} == given


def test_a_size_past_the_models_own_is_pointed_out(tiny_pipe_dir):
    size = ("--width", "64", "--dry-run")
    for height, noted in ((64, False), (80, False), (96, True), (128, True)):
        said = " ".join(command(tiny_pipe_dir, "--height", str(height), *size).output.split())
        assert ("--highres makes such a clip" in said) is noted


def test_made_again_from_a_clip(tiny_pipe_dir, tmp_path):
    """From its settings alone: the same pixels. What is given wins; a clip of one stage becomes the native one."""
    out, again = tmp_path / "large.mp4", tmp_path / "again.mp4"
    size = ("--height", "80", "--width", "64")
    options = ("--strength", "0.75", "--refresh", "1", "--native", "48x48", "--global-path", "pooled", "--seed", "3")
    assert command(tiny_pipe_dir, "--highres", *size, *options, "--method", "sta", "--out", str(out)).exit_code == 0
    done = from_clip(out, "--out", str(again))
    assert done.exit_code == 0, done.output
    assert f"frames of {out}: the same, bit for bit" in " ".join(done.output.split())
    first, second = (read_settings(path)["run"]["highres"] for path in (out, again))
    for told in (first, second):
        del told["native"]["seconds"], told["plan"]["limit"], told["plan"]["host_limit"]  # of the moment
    assert first == second
    other = from_clip(out, "--seed", "4", "--out", str(tmp_path / "other.mp4"))
    assert other.exit_code == 0, other.output
    assert not np.array_equal(read_frames(tmp_path / "other.mp4"), read_frames(again))
    larger = from_clip(tmp_path / "large-native.mp4", "--highres", *size, "--out", str(tmp_path / "larger.mp4"))
    assert larger.exit_code == 0, larger.output
    told = read_settings(tmp_path / "larger.mp4")["run"]["highres"]["native"]
    assert (told["height"], told["width"], told["method"]["method"]["name"]) == (48, 48, "sta")
    refused = from_clip(out, "--out", str(out))
    assert "would be replaced" in " ".join(refused.output.split())


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (("--strength", "0.5"), "with --highres it is the second stage's"),
        (("--highres",), "needs a prompt, --height and --width"),
        (("--highres", "--height", "128", "--width", "128", "--compare", "dense"), "--compare cannot be used"),
        (("--highres", "--height", "128", "--width", "128", "--native", "big"), "such as 480x832"),
        (("--highres", "--height", "128", "--width", "120"), "the nearest is"),
        (("--highres", "--height", "128", "--width", "128", "--max-memory", "1MB"), "does not fit"),
    ],
)
def test_command_refuses(tiny_pipe_dir, options, match):
    done = command(tiny_pipe_dir, *options)
    assert done.exit_code != 0
    assert match in " ".join(done.output.split())


def test_prepare_works_on_a_skeleton(tiny_pipe_dir):
    from tilewise.pipelines.loading.load import load_skeleton

    skeleton = load_skeleton(tiny_pipe_dir)
    shared = {"frames": 5, "steps": 4}
    work = prepare(skeleton, "a star", 128, 96, None, "dense", HighresSettings(), shared, torch.device("cpu"))
    assert work.plan.fits
    assert (work.native.height, work.target.height) == (64, 128)
    assert work.target.method.method.native == (8, 6)
