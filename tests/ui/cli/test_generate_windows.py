"""`tilewise generate --stream` without a causal checkpoint, or with `--way`: windows of a bidirectional model."""

from __future__ import annotations

import hashlib
import json
import re

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

import tilewise
from tests.helpers.tiny_conditioned import save, without_ftfy
from tests.helpers.tiny_wan import save_tiny_pipeline
from tilewise.pipelines.loading.load import load_pipeline
from tilewise.pipelines.media.video import read_frames, read_settings
from tilewise.pipelines.streaming import preparation
from tilewise.ui.cli.app import app

RED, BLUE = "a red circle moving left", "a blue square moving right"
NATIVE = {"height": 32, "width": 32, "frames": 9, "steps": 2, "clean_frames": 1}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny bidirectional model that says that it was trained to go on from a clean latent frame."""
    return save_tiny_pipeline(tmp_path_factory.mktemp("plain") / "m", native=NATIVE)


def run(*words: object, command: str = "generate"):
    return CliRunner().invoke(app, [command, *map(str, words)])


@pytest.mark.filterwarnings("ignore:an overlap of 2 latent frames:UserWarning")
def test_the_file_has_the_windows_and_what_makes_them_again(model, tmp_path):
    file = tmp_path / "clip.mp4"
    words = ["--model", model, "--seconds", 3, "--overlap", 2, "--adain", 0.5, "--prefix-noise", 0.02, "--seed", 7]
    words += ["--sink", 1, "--previous", 1]
    result = run(RED, "--stream", *words, "--prompt-at", f"1.5s={BLUE}", "--out", file)
    assert result.exit_code == 0, result.output
    assert "prefix: windows of 5 latent frames in 2 steps, 2 of the one before" in re.sub(r"[\s│]+", " ", result.stdout)
    assert "an overlap of 2 latent frames is longer than the 1" in re.sub(r"[\s│]+", " ", result.stderr)
    assert "UserWarning" not in result.stderr and "KV cache" not in result.stdout
    record = read_settings(file)
    assert record == json.loads(file.with_suffix(".json").read_text())
    recipe = record["run"]["stream"]["recipe"]
    assert (recipe["way"], recipe["window"], recipe["overlap"], recipe["adain"], recipe["prefix_noise"]) == (
        "prefix", 5, 2, 0.5, 0.02,
    )  # fmt: skip
    options = {"overlap": 2, "adain": 0.5, "prefix_noise": 0.02, "sink": 1, "previous": 1, "seed": 7, "seconds": 3}
    with tilewise.stream(load_pipeline(model), RED, **options) as video:
        video.set_prompt(BLUE, at=1.5)
        frames = np.concatenate([chunk.frames for chunk in video])
    assert record["run"]["frames_sha256"] == hashlib.sha256(frames.tobytes()).hexdigest()
    assert len(read_frames(file)) == 24 == record["frames"]
    again = run("--from", file, "--out", tmp_path / "again.mp4")
    assert again.exit_code == 0 and "the same, bit for bit" in again.stdout, again.output
    other = run(
        "--from", file, "--stream", "--way", "renoised", "--prefix-noise", 0, "--steps", 1, "--out", tmp_path / "o.mp4"
    )
    assert other.exit_code == 0, other.output
    told = read_settings(tmp_path / "o.mp4")
    assert (told["run"]["stream"]["recipe"]["way"], told["steps"], told["seed"]) == ("renoised", 1, 7)


@pytest.mark.parametrize("way", ["prefix", "renoised"])
def test_the_bundled_model_streams_by_a_way(way, tmp_path):
    """It has a causal checkpoint too, which a way leaves aside."""
    words = ["--stream", "--seconds", 3, "--way", way, "--height", 32, "--width", 32, "--steps", 2]
    result = run("a red circle moving right on a blue background", *words, "--out", tmp_path / "c.mp4")
    assert result.exit_code == 0, result.output
    recipe = read_settings(tmp_path / "c.mp4")["run"]["stream"]["recipe"]
    assert (recipe["way"], recipe["window"], recipe["overlap"], recipe["steps"]) == (way, 9, 3, 2)
    assert len(read_frames(tmp_path / "c.mp4")) == 24 and "trained" not in result.stderr


def test_a_step_cache_begins_anew_in_each_window(model, tmp_path):
    words = ["--model", model, "--stream", "--seconds", 1.5, "--way", "prefix", "--guidance", 1, "--steps", 3]
    result = run(RED, *words, "--method", "dense", "--cache", "first-block:threshold=1000", "--out", tmp_path / "c.mp4")
    assert result.exit_code == 0, result.output
    (row,) = read_settings(tmp_path / "c.mp4")["run"]["summary"]["cache"]
    windows = row["forwards"] // 3
    assert windows > 1 and (row["forwards"], row["reused"]) == (3 * windows, 2 * windows)


def test_a_model_that_takes_a_picture_begins_each_window_with_one(tmp_path, monkeypatch):
    without_ftfy(monkeypatch)
    model, image = save(tmp_path / "m", "first"), tmp_path / "start.png"
    Image.fromarray(np.full((32, 32, 3), 90, np.uint8)).save(image)
    words = ["--stream", "--model", model, "--seconds", 1.5, "--window", 3]
    result = run(RED, *words, "--image", image, "--out", tmp_path / "c.mp4")
    assert result.exit_code == 0, result.output
    recipe = read_settings(tmp_path / "c.mp4")["run"]["stream"]["recipe"]
    assert (recipe["way"], recipe["window"], recipe["overlap"]) == ("condition", 3, 1)
    assert len(read_frames(tmp_path / "c.mp4")) == 12
    without = run(RED, *words, "--out", tmp_path / "d.mp4")
    assert without.exit_code == 2 and "begins with a picture" in re.sub(r"[\s│]+", " ", without.stderr), without.stderr


def test_dry_run_and_explain_tell_the_way(model):
    for result in (
        run(RED, "--stream", "--seconds", 3, "--model", model, "--dry-run"),
        run("--stream", "--model", model, "--window", 5, command="explain"),
    ):
        assert result.exit_code == 0, result.output
        words = re.sub(r"[\s│]+", " ", result.stdout)
        assert "way prefix window 5 latent frames, 1 of them" in words and "adds 8" in words and "grid (t×h×w" in words
    told = run("--stream", "--model", model, "--way", "renoised", "--overlap", 3, "--json", command="explain")
    recipe = json.loads(told.stdout)["recipe"]
    assert (recipe["way"], recipe["overlap"]) == ("renoised", 3)


BAD = {
    "overlap of a whole window": (["--overlap", 5], "leaves nothing new in a window of 5"),
    "no overlap": (["--overlap", 0], "overlap must be a whole number of at least 1"),
    "way": (["--way", "sideways"], "prefix, renoised"),
    "guard": (["--adain", 1.5], "adain must be a number from 0 to 1"),
    "guard of another way": (["--way", "renoised", "--prefix-noise", 0.1], "prefix_noise is of the way prefix"),
    "memory": (["--memory", 1], "--memory is an option of streams of causal checkpoints, and the model"),
    "memory and way": (["--way", "prefix", "--memory", 1], "this one makes windows, by the way prefix"),
    "a sink with a step cache": (["--sink", 1, "--cache", "first-block"], "leave the cache out"),
    "a long sink": (["--sink", 9], "longer than the first window, 5"),
    "checkpoint and way": (["--way", "prefix", "--causal", "x.pt"], "--causal is an option of streams of causal"),
    "steps without way": (["--steps", 1], "where a --way is named"),
    "negative without guidance": (["--guidance", 1, "--negative", "blurry"], "no guidance"),
    "size": (["--height", 30], "height"),
    "of windows": (["--model", "demo", "--overlap", 2], "name a --way to make windows"),
    "no length": (["--seconds", "nan"], "seconds"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_requests_are_refused_before_weights_are_read(model, case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(preparation, "load_pipeline", lambda *_, **__: pytest.fail("the weights are read"))
    words, message = BAD[case]
    result = run(RED, "--stream", "--model", model, "--seconds", 3, *words)
    assert result.exit_code == 2, result.output
    assert message in re.sub(r"[\s│]+", " ", result.stderr) and result.stdout == ""
    assert list(tmp_path.iterdir()) == []
