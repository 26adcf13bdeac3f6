"""Past the training size with a UNet: `tilewise.highres` and `--highres` are one run with the preset hidiffusion."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image
from tiny_unets import whole_pipe
from typer.testing import CliRunner

import tilewise
from tilewise.pipelines.generation.generate import generate
from tilewise.pipelines.generation.resolve import resolve_settings
from tilewise.pipelines.media.video import read_settings
from tilewise.ui.cli.app import app

SIZE = {"height": 192, "width": 160}


@pytest.fixture(scope="module")
def pipe():
    return whole_pipe()


def test_it_is_one_run_with_the_preset(pipe):
    made = tilewise.highres(pipe, "a fox", **SIZE, steps=5)
    want = generate(pipe, resolve_settings(pipe, "a fox", method="hidiffusion", **SIZE, steps=5))
    assert np.array_equal(made.frames, want.frames) and made.frames.shape == (1, 192, 160, 3)
    assert made.clip.settings.method == tilewise.resolve("hidiffusion")
    assert any("of 5 forwards 2 with a coarse conv" in note for note in made.clip.summary.notes)
    assert not tilewise.is_patched(pipe)
    other = tilewise.highres(
        pipe, "a fox", **SIZE, steps=5, native_method=tilewise.resolve("shifted-windows", min_tokens=1)
    )
    assert not np.array_equal(other.frames, made.frames)


def test_options_of_two_stages_are_refused(pipe):
    with pytest.raises(tilewise.ConfigError, match="refresh, native: a UNet's picture is made in one stage"):
        tilewise.highres(pipe, "a fox", **SIZE, native=(128, 128), refresh=2)


def test_the_command_makes_it_and_makes_it_again(tiny_sd_dir, tmp_path):
    words = [
        "generate",
        "a fox",
        "--model",
        str(tiny_sd_dir),
        "--highres",
        "--height",
        "192",
        "--width",
        "160",
        "--steps",
        "3",
    ]
    result = CliRunner().invoke(app, [*words, "--out", str(tmp_path / "a.png")])
    assert result.exit_code == 0, result.output
    assert Image.open(tmp_path / "a.png").size == (160, 192)
    settings = read_settings(tmp_path / "a.png")
    assert settings["method"]["add"] == [{"name": "raunet", "t1": None, "t2": None, "variant": None}]
    again = CliRunner().invoke(
        app, ["generate", "--from", str(tmp_path / "a.png"), "--out", str(tmp_path / "b.png"), "--device", "cpu"]
    )
    assert "the same, bit for bit" in again.output, again.output
    refused = CliRunner().invoke(app, [*words, "--refresh", "2"])
    assert refused.exit_code == 2 and "--refresh: a UNet's picture is made in one stage" in refused.output
    explained = CliRunner().invoke(
        app, ["explain", "--model", str(tiny_sd_dir), "--method", "sta", "--add", "raunet:t1=0.5", "--json"]
    )
    assert explained.exit_code == 0, explained.output
    assert json.loads(explained.output)["config"]["add"][0]["t1"] == 0.5


def test_the_native_size_is_that_of_the_unet(pipe):
    from tilewise.pipelines.loading.model_defaults import model_defaults, size_notes

    assert (model_defaults(pipe).height, model_defaults(pipe).width) == (128, 128)
    (note,) = size_notes(pipe, 256, 256)
    assert "--highres, or --method hidiffusion" in note


def test_batches_make_it_too(tiny_sd_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.txt").write_text("a fox\n")
    words = [
        "batch",
        "p.txt",
        "--model",
        str(tiny_sd_dir),
        "--highres",
        "--height",
        "192",
        "--width",
        "160",
        "--steps",
        "3",
    ]
    result = CliRunner().invoke(app, [*words, "--out", "out"])
    assert result.exit_code == 0, result.output
    (line,) = map(json.loads, (tmp_path / "out" / "manifest.jsonl").read_text().splitlines())
    assert line["method"] == tilewise.resolve("hidiffusion").to_dict()
    swept = CliRunner().invoke(app, [*words, "--out", "both", "--sweep", "method=dense,sta"])
    assert swept.exit_code == 0, swept.output
    lines = map(json.loads, (tmp_path / "both" / "manifest.jsonl").read_text().splitlines())
    assert [line["method"]["method"]["name"] for line in lines] == ["dense", "sta"]
    refused = CliRunner().invoke(app, [*words, "--out", "other", "--refresh", "2"])
    assert refused.exit_code == 2 and "--refresh: a UNet's picture is made in one stage" in refused.output
