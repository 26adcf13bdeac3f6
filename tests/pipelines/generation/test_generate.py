"""generate and compare: the right clip, honest numbers, and a pipeline left as it was found."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import statistics

import numpy as np
import pytest
import tiny_wan
import torch

import tilewise
from tilewise.pipelines.errors import OutputError
from tilewise.pipelines.generation.compare import compare, side_by_side, speedup_words
from tilewise.pipelines.generation.generate import add_content_score, content_score, generate
from tilewise.pipelines.generation.resolve import prompt_notes, resolve_settings
from tilewise.pipelines.generation.settings import GenerateSettings
from tilewise.pipelines.highres.settings import HighresSettings
from tilewise.pipelines.highres.two_stages import HighresClip
from tilewise.pipelines.loading.load import load_pipeline, load_skeleton
from tilewise.pipelines.loading.model_defaults import size_notes
from tilewise.pipelines.quality.metrics import psnr

PROMPT = "a red circle moving right"
SIZE = {"height": 64, "width": 64, "frames": 9, "steps": 4, "guidance": 3.0, "max_sequence_length": 16, "fps": 8}


def settings_for(pipe, method="sta", **changes) -> GenerateSettings:
    return resolve_settings(pipe, PROMPT, method=method, **{**SIZE, **changes})


def state_of(pipe) -> list:
    """Everything on the denoiser that a patch or a hook could leave behind."""
    modules = list(pipe.transformer.modules())
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in modules]
    return [id(m.processor) for m in modules if hasattr(m, "processor")] + hooks + [sorted(vars(m)) for m in modules]


def stock_frames(pipe, settings) -> np.ndarray:
    output = pipe(
        prompt=settings.prompt,
        negative_prompt="",
        height=settings.height,
        width=settings.width,
        num_frames=settings.frames,
        num_inference_steps=settings.steps,
        guidance_scale=settings.guidance,
        generator=torch.Generator().manual_seed(settings.seed),
        max_sequence_length=settings.max_sequence_length,
    )
    return np.round(output.frames[0] * 255).astype(np.uint8)


def test_dense_is_the_stock_pipeline(tiny_pipe):
    settings = settings_for(tiny_pipe, "dense", seed=5)
    clip = generate(tiny_pipe, settings)
    assert re.fullmatch(r"Clip\(9 frames of 64×64, dense, \d+\.\d s\)", repr(clip))
    made = HighresClip(clip, clip, HighresSettings(), None, None, {})
    assert repr(made) == f"HighresClip({clip!r}, native {clip!r})"
    assert clip.frames.shape == (9, 64, 64, 3)
    assert clip.frames.dtype == np.uint8
    assert clip.summary is None
    assert (clip.frames == stock_frames(tiny_pipe, settings)).all()


def test_sparse_is_the_patched_pipeline(tiny_pipe):
    settings = settings_for(tiny_pipe, tilewise.STA(window=(1, 2, 2)))
    clip = generate(tiny_pipe, settings)
    with tilewise.patched(tiny_pipe, settings.method):
        assert (clip.frames == stock_frames(tiny_pipe, settings)).all()
    assert not (clip.frames == stock_frames(tiny_pipe, settings)).all()
    assert 0 < clip.summary.density < 0.5
    assert clip.summary.fallbacks == {}


@pytest.mark.parametrize("kind", [{}, {"boundary_ratio": 0.9}, {"expand_timesteps": True}])
def test_seeds_decide(kind):
    pipe = tiny_wan.tiny_pipeline(**kind)
    first, again, other = (generate(pipe, settings_for(pipe, seed=seed)).frames for seed in (1, 1, 2))
    assert (first == again).all()
    assert not (first == other).all()


def test_seconds_and_progress(tiny_pipe):
    calls = []
    clip = generate(tiny_pipe, settings_for(tiny_pipe), lambda *call: calls.append(call))
    seconds = clip.seconds
    assert list(seconds) == ["encode", "denoise", "decode", "total"]
    assert all(s > 0 for s in seconds.values())
    assert math.isclose(seconds["encode"] + seconds["denoise"] + seconds["decode"], seconds["total"])
    denoise = [("denoise", step, 4) for step in range(5)]
    assert calls == [("encode", 0, 1), ("encode", 1, 1), *denoise, ("decode", 0, 1), ("decode", 1, 1)]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("method", ["sta", "dense"])
def test_the_pipeline_is_as_before_whatever_happens(tiny_pipe, error, method):
    def stop(phase, done, total):
        if (phase, done) == ("denoise", 2):
            raise error

    settings = settings_for(tiny_pipe, method)
    untouched = generate(tiny_pipe, settings_for(tiny_pipe, "dense")).frames  # diffusers leaves a hook registry behind
    before = state_of(tiny_pipe)
    with pytest.raises(error):
        generate(tiny_pipe, settings, stop)
    assert state_of(tiny_pipe) == before
    assert (generate(tiny_pipe, settings_for(tiny_pipe, "dense")).frames == untouched).all()


def test_a_patched_pipeline_is_refused_and_stays_patched(tiny_pipe):
    tilewise.patch(tiny_pipe, "sta-fast")
    with pytest.raises(tilewise.ConfigError, match="already patched"):
        generate(tiny_pipe, settings_for(tiny_pipe))
    assert tilewise.is_patched(tiny_pipe)


def test_compare_refuses_a_patched_pipeline_before_any_work(tiny_pipe):
    tilewise.patch(tiny_pipe, "sta-fast")
    phases = []
    with pytest.raises(tilewise.ConfigError, match="already patched"):
        compare(tiny_pipe, settings_for(tiny_pipe), lambda phase, done, total: phases.append(phase))
    assert phases == []
    assert tilewise.is_patched(tiny_pipe)


def test_a_broken_model_makes_no_clip(tiny_pipe):
    with torch.no_grad():
        tiny_pipe.transformer.proj_out.weight.fill_(float("nan"))
    with pytest.raises(OutputError, match="NaN"):
        generate(tiny_pipe, settings_for(tiny_pipe))
    assert not tilewise.is_patched(tiny_pipe)


def test_a_pipeline_that_needs_an_image_is_refused():
    pipe = tiny_wan.tiny_pipeline(image=True)
    with pytest.raises(tilewise.ConfigError, match="needs a file for --image"):
        settings_for(pipe)


def test_compare(tiny_pipe):
    settings = settings_for(tiny_pipe, tilewise.STA(window=(1, 2, 2)), seed=3)
    phases = []
    result = compare(tiny_pipe, settings, lambda phase, done, total: phases.append(phase))
    assert (result.dense.frames == generate(tiny_pipe, settings_for(tiny_pipe, "dense", seed=3)).frames).all()
    assert (result.sparse.frames == generate(tiny_pipe, settings).frames).all()
    assert result.psnr == psnr(result.sparse.frames, result.dense.frames)
    assert -1 <= result.ssim < 1
    for phase in ("denoise", "total"):
        assert result.speedup[phase] == pytest.approx(result.dense.seconds[phase] / result.sparse.seconds[phase])
    assert list(dict.fromkeys(phases)) == [
        "warm-up", "dense: encode", "dense: denoise", "dense: decode", "sta: encode", "sta: denoise", "sta: decode",
    ]  # fmt: skip
    assert not tilewise.is_patched(tiny_pipe)


def test_a_speedup_is_said_with_its_runs(tiny_pipe):
    settings = settings_for(tiny_pipe, tilewise.STA(window=(1, 2, 2)), steps=1)
    phases = []
    result = compare(tiny_pipe, settings, lambda phase, done, total: phases.append(phase), runs=3)
    assert [len(result.runs), result.to_dict()["runs"][0]["total"]] == [3, result.runs[0]["total"]]
    assert result.speedup["total"] == statistics.median(run["total"] for run in result.runs)
    assert "dense: denoise, run 3 of 3" in phases
    low, high = (pick(run["total"] for run in result.runs) for pick in (min, max))
    assert result.speedup_words("total").endswith(f"x (median of 3 runs, {low:.2f} to {high:.2f})")
    assert speedup_words([1.04]) == "1.04x (one run)"
    assert speedup_words([1.0, 2.0], "clip") == "1.50x (median of 2 clips, 1.00 to 2.00)"
    with pytest.raises(tilewise.ConfigError, match="runs must be a whole number of at least 1, not 0"):
        compare(tiny_pipe, settings, runs=0)


def test_compare_with_a_window_that_sees_everything(tiny_pipe):
    result = compare(tiny_pipe, settings_for(tiny_pipe, tilewise.STA(window=(99, 99, 99))))
    assert result.psnr > 60  # only rounding of the last bit of a byte can differ
    json.dumps(result.to_dict(), allow_nan=False)


def test_compare_refuses_dense(tiny_pipe):
    with pytest.raises(tilewise.ConfigError, match="dense with dense"):
        compare(tiny_pipe, settings_for(tiny_pipe, "dense"))


def test_side_by_side():
    a, b = np.full((2, 32, 48, 3), 200, np.uint8), np.full((2, 32, 48, 3), 90, np.uint8)
    sheet = side_by_side(a, b, ("dense", "sta"))
    assert sheet.shape == (2, 48, 100, 3)
    assert (sheet[:, 16:, :48] == 200).all()
    assert (sheet[:, 16:, 52:] == 90).all()
    assert sheet[:, :16, :48].max() > 200
    with pytest.raises(ValueError, match="differ in shape"):
        side_by_side(a, b[:1])


def test_settings_round_trip(tiny_pipe):
    settings = settings_for(tiny_pipe, tilewise.resolve("sta-fast", steps=(0.5, 1.0), blocks="1:"), seed=9)
    assert GenerateSettings.from_dict(json.loads(json.dumps(settings.to_dict()))) == settings


def test_settings_that_cannot_be_read(tiny_pipe):
    values = settings_for(tiny_pipe).to_dict()
    with pytest.raises(tilewise.ConfigError, match=r"unknown setting 'sede'.*'seed'"):
        GenerateSettings.from_dict({**values, "sede": 1})
    del values["seed"]
    with pytest.raises(tilewise.ConfigError, match="seed missing"):
        GenerateSettings.from_dict(values)


def test_defaults_come_from_the_model(tiny_pipe_dir):
    settings = resolve_settings(load_skeleton(tiny_pipe_dir), PROMPT)
    native = tiny_wan.NATIVE
    assert (settings.height, settings.frames, settings.steps) == (64, native["frames"], native["steps"])
    assert (settings.fps, settings.guidance, settings.max_sequence_length) == (8, 3, 16)
    assert settings.method == tilewise.presets()["sta-balanced"]
    assert settings.model == str(tiny_pipe_dir)


@pytest.mark.parametrize(
    "bad",
    [
        {"height": 60},
        {"height": 72},  # fits the patches, but Wan's pipelines take multiples of 16 only
        {"width": 0},
        {"frames": 8},
        {"frames": 0},
        {"steps": 0},
        {"steps": True},
        {"guidance": float("nan")},
        {"guidance": -1.0},
        {"seed": -1},
        {"seed": 2**63},
        {"fps": 0},
        {"max_sequence_length": 0},
    ],
)
def test_bad_settings(tiny_pipe, bad):
    with pytest.raises(tilewise.ConfigError, match=next(iter(bad))):
        settings_for(tiny_pipe, **bad)


def test_a_refused_size_comes_with_the_nearest(tiny_pipe):
    with pytest.raises(tilewise.ConfigError, match=r"height.*64.*frames.*(9|11)"):
        settings_for(tiny_pipe, height=60, frames=10)


def test_an_empty_prompt(tiny_pipe):
    with pytest.raises(tilewise.ConfigError, match="prompt is empty"):
        resolve_settings(tiny_pipe, "  \n", **SIZE)


def test_prompt_notes(tiny_pipe):
    settings = settings_for(tiny_pipe)
    assert prompt_notes(tiny_pipe, settings) == []
    strange = dataclasses.replace(settings, prompt="a red, striped zebra! on " + "blue " * 30, negative="blurry")
    notes = prompt_notes(tiny_pipe, strange)
    assert len(notes) == 2
    assert "the model reads the first 16" in notes[0]
    assert notes[1].endswith("of the prompt: zebra")


def test_content_is_judged_only_in_the_world_of_shapes(tmp_path, tiny_pipe):
    frames = np.zeros((9, 64, 64, 3), np.uint8)
    assert content_score(tiny_pipe, settings_for(tiny_pipe), frames) is None
    shapes = load_skeleton(tiny_wan.save_tiny_pipeline(tmp_path / "m", native={"world": "shapes"}))
    found = content_score(shapes, settings_for(shapes), frames)
    assert found["colour"] is False
    unread = content_score(shapes, dataclasses.replace(settings_for(shapes), prompt="something else"), frames)
    assert unread is not None and set(unread.values()) == {None}


def test_a_model_of_one_size_says_so_at_another(tmp_path, tiny_pipe):
    shapes = load_skeleton(tiny_wan.save_tiny_pipeline(tmp_path / "m", native={"world": "shapes"}))
    assert size_notes(shapes, 64, 64, 9) == size_notes(shapes, 64, 64) == []
    for size, words in {(64, 64, 17): "64×64 with 17 frames", (64, 48, 9): "48×64 with 9 frames"}.items():
        [note] = size_notes(shapes, *size)
        assert note.startswith(f"{words} is not this model's own size: it was trained at 64×64 with 9 frames alone")
        assert "--highres" not in note
    assert "--highres" in size_notes(shapes, 128, 128, 9)[0]
    assert size_notes(tiny_pipe, 64, 64, 17) == []


def test_judging_is_a_step_of_its_own(tmp_path):
    native = {"world": "shapes"}
    pipe = load_pipeline(tiny_wan.save_tiny_pipeline(tmp_path / "m", native=native), device="cpu")
    clip = generate(pipe, settings_for(pipe, steps=1))
    assert clip.content is None
    seen = add_content_score(pipe, clip)
    assert seen.content == content_score(pipe, clip.settings, clip.frames)
    assert (seen.content["colour"], seen.content["background"]) == (False, None)
