"""`--image`, `--video` and the like: through the command line, into the file's metadata, and again with `--from`."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from tiny_conditioned import picture, save, video, without_ftfy
from typer.testing import CliRunner

from tilewise.pipelines.batch.manifest_comparison import read_groups
from tilewise.pipelines.media.video import read_settings
from tilewise.ui.cli.app import app

PROMPT = "a red circle"


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("models")
    return {kind: save(base / kind, kind) for kind in ("i2v", "v2v")}


@pytest.fixture(autouse=True)
def no_ftfy(monkeypatch):
    without_ftfy(monkeypatch)


def run(*words: object):
    return CliRunner().invoke(app, [str(word) for word in words])


def test_a_clip_from_a_picture_and_again(models, tmp_path):
    start, out = picture(tmp_path / "start.png", (64, 64), mode="RGBA"), tmp_path / "out.mp4"
    result = run("generate", PROMPT, "--model", models["i2v"], "--image", start, "--steps", 2, "--out", out)
    assert result.exit_code == 0, result.output
    assert "start.png is transparent in parts, which are shown on white" in result.stderr
    told = read_settings(out)
    assert told is not None and told["image"].startswith(f"{start}@sha256:")
    again = run("generate", "--from", out, "--out", tmp_path / "again.mp4")
    assert f"frames of {out}: the same, bit for bit" in again.stdout, again.output
    picture(start, (64, 64), seed=4)
    changed = run("generate", "--from", out, "--out", tmp_path / "third.mp4")
    assert changed.exit_code == 2 and "start.png has changed since the clip was made from it" in changed.stderr
    start.unlink()
    gone = run("generate", "--from", out, "--out", tmp_path / "third.mp4")
    assert gone.exit_code == 2 and "start.png is not there" in gone.stderr
    other = run("generate", "--from", out, "--image", picture(tmp_path / "b.png"), "--out", tmp_path / "b.mp4")
    assert other.exit_code == 0 and f"frames of {out}" not in other.stdout


def test_a_dry_run_says_what_is_done_to_a_video(models, tmp_path):
    path = video(tmp_path / "in.mp4", 12, (80, 32))
    words = ["--model", models["v2v"], "--video", path, "--strength", 0.5, "--frames", 5, "--dry-run"]
    result = run("generate", PROMPT, *words)
    assert result.exit_code == 0, result.output
    assert "note: in.mp4 is longer than the clip: its first 5 frames are used" in result.stdout
    assert "strength 0.5 leaves 2 of 4 timesteps" in " ".join(result.stdout.split())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--image", "a.png"], "--image is not for this WanPipeline: it makes clips from text alone"),
        (["--image", "missing.png"], "--image: the file missing.png is not there"),
        (["--image", "a.png", "--highres", "--height", "320", "--width", "512"], "--image is not for this WanPipeline"),
        (["--strength", "0.5"], "--strength is not for this WanPipeline"),
    ],
)
def test_the_bundled_model_takes_no_files(tmp_path, monkeypatch, words, said):
    monkeypatch.chdir(tmp_path)
    picture(Path("a.png"))
    result = run("generate", PROMPT, *words, "--dry-run")
    assert result.exit_code == 2 and said in " ".join(result.stderr.split())


def test_a_batch_reads_files_from_columns_and_notices_a_changed_one(models, tmp_path):
    pictures = [picture(tmp_path / f"{n}.png", (32, 32), seed=n) for n in range(2)]
    table = tmp_path / "in.csv"
    with table.open("w", newline="") as file:
        csv.writer(file).writerows([["prompt", "image"], *([PROMPT, path] for path in pictures)])
    words = ["batch", table, "--model", models["i2v"], "--steps", 1, "--out", tmp_path / "clips"]
    first = run(*words, "--sweep", "method=dense,sta")
    assert first.exit_code == 0, first.output

    def lines() -> list[dict]:
        return [json.loads(line) for line in (tmp_path / "clips" / "manifest.jsonl").read_text().splitlines()]

    assert len({line["run"]["batch"]["key"] for line in lines()}) == 4
    groups = read_groups([tmp_path / "clips"], print)
    assert [len(group.clips) for group in groups] == [2, 2]  # each picture's dense clip with its sparse one
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "clips").glob("*.mp4")}
    moved = tmp_path / "elsewhere.png"
    pictures[0].rename(moved)  # the same content under another name is the same clip
    picture(pictures[1], (32, 32), seed=9)
    table.write_text(table.read_text().replace(str(pictures[0]), str(moved)))
    second = run(*words, "--sweep", "method=dense,sta")
    assert second.exit_code == 0, second.output
    after = {path: path.stat().st_mtime_ns for path in (tmp_path / "clips").glob("*.mp4")}
    assert before.items() <= after.items() and len(after) == 6
    assert len({line["run"]["batch"]["key"] for line in lines()}) == 6


def test_past_the_training_size(models, tmp_path, monkeypatch):
    """Both stages from the picture, alone and in a batch, and again from the clip's file."""
    monkeypatch.setattr("tilewise.pipelines.memory.plan.vae_bytes", lambda *args: 0)  # it takes the longest
    start, out = picture(tmp_path / "start.png", (64, 64), mode="RGBA"), tmp_path / "out.mp4"
    large = ["--highres", "--height", 64, "--width", 64, "--steps", 2]
    result = run("generate", PROMPT, "--model", models["i2v"], "--image", start, *large, "--out", out)
    assert result.exit_code == 0, result.output
    assert "start.png is transparent in parts, which are shown on white" in result.stderr
    again = run("generate", "--from", out, "--out", tmp_path / "again.mp4")
    assert f"frames of {out}: the same, bit for bit" in again.stdout, again.output
    table = tmp_path / "in.csv"
    table.write_text(f"prompt,image\n{PROMPT},{start}\n")
    batch = run("batch", table, "--model", models["i2v"], *large, "--out", tmp_path / "clips")
    assert batch.exit_code == 0, batch.output
    made = list((tmp_path / "clips").glob("*.mp4"))
    assert len(made) == 2  # the native one too
    assert all(read_settings(path)["image"].startswith(f"{start}@sha256:") for path in made)


def test_verify_takes_them_too(models, tmp_path):
    (tmp_path / "prompts.txt").write_text(f"{PROMPT}\n")
    words = ["--model", models["i2v"], "--method", "sta", "--steps", 2, "--out", tmp_path / "report.html"]
    result = run("verify", "--prompts", tmp_path / "prompts.txt", "--image", picture(tmp_path / "a.png"), *words)
    assert result.exit_code == 0, result.output
    told = json.loads((tmp_path / "report.json").read_text())
    assert "a.png@sha256:" in json.dumps(told)
