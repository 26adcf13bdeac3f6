"""The bundled demo model, end to end through the command line: the clip shows what the prompt said."""

from __future__ import annotations

import programs

from tilewise.pipelines.generation.settings import GenerateSettings
from tilewise.pipelines.loading.load import load_skeleton
from tilewise.pipelines.loading.model_defaults import model_defaults
from tilewise.pipelines.media.video import read_frames, read_settings
from tilewise.pipelines.quality.content_detection import analyse
from tilewise.pipelines.quality.content_score import parse_prompt, score

PROMPT = "a red circle moving right on a blue background"


def test_the_demo_model_says_what_it_is_for():
    native = model_defaults(load_skeleton("demo"))
    assert (native.height, native.width, native.frames) == (128, 128, 17)
    assert native.world == "shapes"


def test_the_demo_clip_shows_the_prompt(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = programs.run_module(
        "tilewise", "generate", PROMPT, "--method", "sta-balanced", "--steps", 6, "--out", "demo.mp4"
    )

    frames = read_frames(tmp_path / "demo.mp4")
    assert frames.shape == (17, 128, 128, 3)
    found = score(analyse(frames), parse_prompt(PROMPT))
    assert {name: found[name] for name in ("colour", "shape", "motion", "background")} == {
        "colour": True,
        "shape": True,
        "motion": True,
        "background": True,
    }

    record = read_settings(tmp_path / "demo.mp4")
    assert GenerateSettings.from_dict(record).model == "demo"
    run = record["run"]
    assert run["content"]["colour"] is True
    assert run["summary"]["fallbacks"] == {}
    assert 0 < run["summary"]["density"] <= 0.4
    assert "prompt shown" in said
