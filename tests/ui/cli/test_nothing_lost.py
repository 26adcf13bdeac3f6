"""No command replaces a file that is there, unless it is told to."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tilewise.pipelines.media.output_names import Outputs
from tilewise.ui.cli.app import app

SMALL = ["--height", 32, "--width", 32, "--frames", 1, "--steps", 1]
PROMPTS = ["a red circle", "赤い円", "青い四角", "红色圆圈", "красный круг", "दायरा", "دائرة حمراء", "!?", "a\u202ered"]


def run(*words: object):
    return CliRunner().invoke(app, list(map(str, words)))


def digests(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*.*")}


def test_prompts_of_any_script_have_names_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run("generate", PROMPTS[1], "--dry-run")
    assert "outputs/赤い円-0.mp4" in result.stdout
    from tilewise.ui.common.options import default_out

    names = [default_out(prompt, 0, 9).name for prompt in PROMPTS]
    assert names == [
        "a-red-circle-0.mp4", "赤い円-0.mp4", "青い四角-0.mp4", "红色圆圈-0.mp4", "красный-круг-0.mp4", "दायरा-0.mp4",
        "دائرة-حمراء-0.mp4", "clip-0.mp4", "a-red-0.mp4",
    ]  # fmt: skip


def test_the_same_prompt_and_seed_again_is_another_file(tiny_pipe_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["generate", "赤い円", "--model", tiny_pipe_dir, *SMALL]
    first = run(*words)
    assert first.exit_code == 0, first.output
    assert "1 frame of 32x32, 8 fps, 1 step " in first.stdout
    before = digests(tmp_path)
    assert set(before) == {"outputs/赤い円-0.png", "outputs/赤い円-0.png.json"}
    assert "wrote outputs/赤い円-0-2.png" in run(*words, "--method", "dense").stdout
    again = run("generate", "--from", "outputs/赤い円-0.png", "--model", tiny_pipe_dir)
    assert "wrote outputs/赤い円-0-3.png" in again.stdout and "the same, bit for bit" in again.stdout
    assert digests(tmp_path).items() > before.items()


@pytest.fixture
def taken(tiny_pipe_dir, tmp_path, monkeypatch) -> dict[str, list]:
    """Commands, each with the file that it would replace as its last word."""
    monkeypatch.chdir(tmp_path)
    for name in ("clip.mp4", "settings.json", "clip-dense.mp4", "clip-native.mp4", "r.html", "p.svg"):
        (tmp_path / name).write_text("mine")
    (tmp_path / "b").mkdir()
    return {
        "clip": ["generate", "x", "--model", tiny_pipe_dir, "--out", "clip.mp4"],
        "settings": ["generate", "x", "--model", tiny_pipe_dir, "--out", "settings.mp4"],
        "stream": ["generate", "x", "--stream", "--seconds", 1, "--out", "clip.mp4"],
        "highres": ["generate", "x", "--model", tiny_pipe_dir, "--highres", "--height", 128, "--width", 128,
                    "--out", "clip.mp4"],
        "report": ["compare", "b", "--out", "r.html"],
        "plot": ["explain", "--model", tiny_pipe_dir, "--method", "sta", "--plot", "p.svg"],
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["clip", "settings", "stream", "highres", "report", "plot"])
def test_an_existing_file_needs_force(kind, taken, tmp_path, monkeypatch):
    words = taken[kind]
    if kind == "report":  # which has nothing to compare: the name is looked at first
        monkeypatch.setattr("tilewise.ui.cli.compare.read_groups", lambda *_: [])
        monkeypatch.setattr("tilewise.ui.cli.compare.write_html", lambda file, *_: file.write("new") and 0)
    before = digests(tmp_path)
    result = run(*words)
    assert result.exit_code == 2, result.output
    assert re.search(rf"cannot write {words[-1]}: .*there.*--force", result.stderr)
    assert digests(tmp_path) == before
    if kind == "highres":  # planning it again takes longest
        return
    dry = [] if kind in ("report", "plot") else ["--dry-run"]
    result = run(*words, "--force", *dry)
    assert result.exit_code == 0, result.output
    assert (digests(tmp_path) == before) == bool(dry)


def test_a_name_that_is_taken_meanwhile_is_left_alone(tmp_path):
    outputs = Outputs(tmp_path / "clip.mp4", ("-dense",), given=True)
    with outputs.claimed() as first, outputs.claimed() as second:
        assert first == [tmp_path / "clip.mp4", tmp_path / "clip-dense.mp4"]
        assert second == [tmp_path / "clip-2.mp4", tmp_path / "clip-2-dense.mp4"]
        first[0].write_text("made")
    assert [p.name for p in tmp_path.iterdir()] == ["clip.mp4"]
    (tmp_path / "clip-2.json").write_text("{}")
    with outputs.claimed() as third:
        assert third[0].name == "clip-3.mp4"
