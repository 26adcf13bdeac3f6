"""Clips from pictures and videos on the page."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from tiny_conditioned import picture, save, without_ftfy
from typer.testing import CliRunner

from tilewise.pipelines.generation.generate import generate
from tilewise.pipelines.generation.resolve import resolve_settings
from tilewise.pipelines.loading.load import load_pipeline
from tilewise.pipelines.loading.model_defaults import model_defaults
from tilewise.pipelines.media.video import read_frames, write_video
from tilewise.ui.cli.app import app
from tilewise.ui.web.forms.snippets import command_line, python_program


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save(tmp_path_factory.mktemp("models") / "i2v", "i2v")


@pytest.fixture(autouse=True)
def no_ftfy(monkeypatch):
    without_ftfy(monkeypatch)


def test_the_snippets_make_the_same_clip_from_the_same_picture(model, tmp_path):
    pipe = load_pipeline(model)
    start = str(picture(tmp_path / "a.png", (32, 32)))
    settings = resolve_settings(pipe, "a red circle", image=start, steps=2, model=str(model))
    write_video(tmp_path / "expected.mp4", generate(pipe, settings).frames, settings.fps)
    expected = read_frames(tmp_path / "expected.mp4")
    program = python_program(pipe, settings, "float32").replace("'clip.mp4'", repr(str(tmp_path / "p.mp4")))
    exec(compile(program, "snippet", "exec"), {})
    assert (read_frames(tmp_path / "p.mp4") == expected).all()
    words = command_line(settings, model_defaults(pipe), "float32", Path("clip.mp4"))
    assert f"--image={settings.image}" in words
    ran = CliRunner().invoke(app, shlex.split(words.replace(" -- ", f" --out {tmp_path}/c.mp4 -- "))[1:])
    assert ran.exit_code == 0, ran.output
    assert (read_frames(tmp_path / "c.mp4") == expected).all()
