"""`tilewise calibrate`: interrupted and continued, used by `generate`, bad input before weights are read."""

from __future__ import annotations

import json
import re

import pytest
from typer.testing import CliRunner

from tilewise.ui.cli import calibrate as command
from tilewise.ui.cli.app import app

SMALL = ["--steps", "4", "--frames", "9", "--method", "draft", "--set", "min_tokens=0", "--parts", "2"]


def invoke(*words: object):
    result = CliRunner().invoke(app, list(map(str, words)))
    return result, re.sub(r"[\s│]+", " ", result.stdout + result.stderr)


@pytest.fixture
def words(tiny_pipe_dir, tmp_path, monkeypatch) -> list[object]:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.txt").write_text("a red circle\na blue square\n")
    return ["calibrate", "--prompts", "p.txt", "--model", tiny_pipe_dir, *SMALL]


def test_interrupted_continued_and_used(words, tmp_path, tiny_pipe_dir, monkeypatch):
    made = []
    stock = command.profile_run

    def second_is_interrupted(pipe, settings, *rest):
        made.append(settings.prompt)
        if len(made) == 2:
            raise KeyboardInterrupt
        return stock(pipe, settings, *rest)

    monkeypatch.setattr(command, "profile_run", second_is_interrupted)
    result, said = invoke(*words, "--budget", "0.6")
    assert result.exit_code == 130 and "1 of 2 runs kept in calibration.parts" in said
    result, said = invoke(*words, "--budget", "0.6")
    assert result.exit_code == 0, said
    assert made == ["a red circle", "a blue square", "a blue square"]
    assert "1 run of an earlier calibration kept" in said and "wrote calibration.json" in said
    assert not (tmp_path / "calibration.parts").exists()
    written = json.loads((tmp_path / "calibration.json").read_text())
    assert written["method"]["made"]["budget"] == 0.6 and written["method"]["made"]["prompts"] == 2
    clip = ["generate", "a red circle", "--model", tiny_pipe_dir, "--steps", "4", "--frames", "9"]
    result, said = invoke(*clip, "--method", "calibration.json", "--out", "clip.mp4")
    assert result.exit_code == 0, said
    assert "calibrated base=draft budget=0.6 parts=2" in said
    run = json.loads((tmp_path / "clip.json").read_text())
    assert run["method"]["method"]["name"] == "calibrated" and 0 < run["run"]["density"] < 1
    result, said = invoke("generate", "--from", "clip.mp4", "--out", "again.mp4")
    assert result.exit_code == 0, said
    again = json.loads((tmp_path / "again.json").read_text())
    assert again["run"]["frames_sha256"] == run["run"]["frames_sha256"]


@pytest.mark.parametrize(
    ("more", "why"),
    [
        (["--budget", "0"], "budget must be in (0, 1]"),
        (["--budget", "0.2"], "the first 1 of 4 steps stay dense and take 0.250 of all pairs"),
        (["--method", "sta"], "sta cannot have a density for each head"),
        (["--density", "0.1"], "leave density out, got 0.1"),
        (["--budget", "0.26"], "leaves 0.013 of the pairs to the sparse steps; 0.05 is the least"),
        (["--budget", "0.4", "--set", "always=self,neighbours"], "0.23 is the least that they keep at this size"),
        (["--parts", "4"], "3 sparse steps of 4 cannot be divided into 4 parts"),
        (["--blocks", "1:"], "leave --blocks out"),
        (["--cache", "first-block"], "leave --cache out"),
        (["--add", "riflex"], "leave --add out"),
        (["--out", "x.mp4"], ".json"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_refused_before_weights_are_read(words, more, why, monkeypatch, tmp_path):
    monkeypatch.setattr(command, "load_pipeline", lambda *_, **__: pytest.fail("weights were read"))
    result, said = invoke(*words, *more)
    assert result.exit_code == 2 and why in said, said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p.txt"]


def test_the_help_names_its_own_default(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    _, said = invoke("calibrate", "--help")
    assert "draft or xattention" in said and "[default: (draft)]" in said and "sta-balanced" not in said


def test_no_prompts(words, tmp_path):
    (tmp_path / "p.txt").write_text("# none\n")
    result, said = invoke(*words)
    assert result.exit_code == 2 and "p.txt" in said


def test_a_dry_run_says_what_would_be_measured(words, tmp_path):
    result, said = invoke(*words, "--dry-run")
    assert result.exit_code == 0 and "measured in steps 1, 2 of 4" in said, said
    assert not (tmp_path / "calibration.json").exists()
