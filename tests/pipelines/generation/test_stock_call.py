"""Pipelines whose call takes no ``callback_on_step_end`` and no guidance (HunyuanVideo 1.5), wherever one is called."""

from __future__ import annotations

import numpy as np
import pytest
import test_models as models
import torch

from tilewise.pipelines.generation.compare import compare
from tilewise.pipelines.generation.generate import generate, warm_up
from tilewise.pipelines.generation.resolve import resolve_settings
from tilewise.plugins.errors import ConfigError
from tilewise.ui.web.forms.snippets import python_program


@pytest.fixture
def pipe():
    pipe, _ = models.hunyuan_video15()
    pipe.set_progress_bar_config(disable=True)
    return pipe


SIZE = {"height": 64, "width": 96, "frames": 5, "steps": 3}


def test_steps_are_told_and_seen(pipe):
    settings = resolve_settings(pipe, "a star", method="sta", **SIZE)
    told, seen = [], []
    clip = generate(pipe, settings, lambda *now: told.append(now), preview=lambda *now: seen.append(now))
    assert clip.frames.shape == (5, 64, 96, 3)
    assert [now for now in told if now[0] != "encode"] == [
        *(("denoise", done, 3) for done in range(4)), ("decode", 0, 1), ("decode", 1, 1)
    ]  # fmt: skip
    assert [now[:2] for now in seen] == [(1, 3), (2, 3), (3, 3)]
    assert not torch.equal(seen[0][2], seen[1][2])
    generator = torch.Generator("cpu").manual_seed(settings.seed)
    again = pipe(
        "a star", height=64, width=96, num_frames=5, num_inference_steps=3, generator=generator, output_type="latent"
    )
    assert "step" not in vars(pipe.scheduler)
    stock = resolve_settings(pipe, "a star", method="dense", guidance=pipe.guider.guidance_scale, **SIZE)
    last = []
    generate(pipe, stock, preview=lambda *now: last.append(now[2]))
    assert torch.equal(last[-1], again.frames)


def test_guidance_is_the_guiders(pipe):
    own = pipe.guider
    made = []
    for guidance in (1.5, 6.0, own.guidance_scale):
        made.append(generate(pipe, resolve_settings(pipe, "a star", method="dense", guidance=guidance, **SIZE)).frames)
        assert pipe.guider is own
    assert not np.array_equal(made[0], made[1])
    assert resolve_settings(pipe, "a star", **SIZE).guidance == own.guidance_scale
    assert np.array_equal(generate(pipe, resolve_settings(pipe, "a star", method="dense", **SIZE)).frames, made[2])


def test_guidance_that_nothing_takes_is_refused(pipe):
    pipe.guider.disable()
    assert resolve_settings(pipe, "a star", **SIZE).guidance == 1
    with pytest.raises(
        ConfigError, match=r"guidance 9 is not for this HunyuanVideo15Pipeline.*ClassifierFreeGuidance takes none"
    ):
        generate(pipe, resolve_settings(pipe, "a star", method="dense", guidance=9.0, **SIZE))
    assert generate(pipe, resolve_settings(pipe, "a star", method="dense", **SIZE)).frames.std() > 0


def test_a_wrapper_of_the_users_own_stays(pipe):
    whole, calls = pipe.scheduler.step, []

    def mine(*args, **kwargs):
        calls.append(1)
        return whole(*args, **kwargs)

    pipe.scheduler.step = mine
    settings = resolve_settings(pipe, "a star", method="dense", **SIZE)
    for runs in (1, 2):
        generate(pipe, settings)
        assert pipe.scheduler.step is mine
        assert len(calls) == 3 * runs


def test_a_run_that_fails_leaves_the_pipeline_as_it_was(pipe):
    own, settings = pipe.guider, resolve_settings(pipe, "a star", method="sta", guidance=2.0, **SIZE)

    def stop(phase: str, done: int, total: int) -> None:
        if (phase, done) == ("denoise", 2):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(pipe, settings, stop)
    assert pipe.guider is own
    assert "step" not in vars(pipe.scheduler)
    assert generate(pipe, settings).summary.calls > 0


def test_compared_and_warmed_up(pipe):
    settings = resolve_settings(pipe, "a star", method="sta", **SIZE)
    assert warm_up(pipe, settings) > 0
    both = compare(pipe, settings)
    assert both.dense.frames.shape == both.sparse.frames.shape


def test_the_pages_program_has_its_guidance(pipe, monkeypatch):
    settings = resolve_settings(pipe, "a star", method="dense", model="tiny", guidance=6.0, **SIZE)
    wanted = generate(pipe, settings).frames
    text = python_program(pipe, settings, "float32")
    made = []
    monkeypatch.setattr("tilewise.pipelines.loading.load.load_pipeline", lambda *_, **__: pipe)
    monkeypatch.setattr("tilewise.pipelines.media.video.write_video", lambda name, frames, fps: made.append(frames))
    exec(compile(text, "program", "exec"), {})
    assert np.abs(made[0] * 255 - wanted).max() <= 0.51
