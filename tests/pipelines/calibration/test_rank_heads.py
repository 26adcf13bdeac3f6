"""`tilewise rank-heads`: scores, the greedy search, and the command from an interruption to the heads in a clip."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from tiny_unets import whole_pipe
from typer.testing import CliRunner

import tilewise
from tilewise.pipelines.calibration import rank_heads as ranking
from tilewise.pipelines.calibration.rank_heads import SCORES, candidates, rank_heads, score_function, tries, with_heads
from tilewise.pipelines.generation.resolve import resolve_settings
from tilewise.plugins.additions.soft_pag import SoftPAG
from tilewise.ui.cli.app import app


@pytest.fixture(scope="module")
def pipe():
    return whole_pipe()


def test_scores():
    frames = np.zeros((2, 4, 6, 3), np.uint8)
    frames[:, :, 3:] = 255
    assert SCORES["brightness"](frames, "") == pytest.approx(0.5)
    assert SCORES["contrast"](frames, "") == pytest.approx(0.5)
    assert SCORES["contrast"](frames[:, :, 3:], "") == pytest.approx(0)
    grey = np.full((5, 96, 96, 3), 128, np.uint8)
    assert 0 <= SCORES["detector"](grey, "a red circle on a blue background") < 1


def test_a_function_of_your_own(tmp_path):
    (tmp_path / "mine.py").write_text("def height(frames, prompt):\n    return frames.shape[1] + len(prompt)\n")
    assert score_function(f"{tmp_path}/mine.py:height")(np.zeros((1, 4, 6, 3)), "ab") == 6
    assert score_function("math:dist")([0, 0], [3, 4]) == 5
    for text in ("brightnes", "nowhere:f", f"{tmp_path}/no.py:f", "math:pi", f"{tmp_path}/mine.py:width"):
        with pytest.raises(tilewise.ConfigError, match="score"):
            score_function(text)
    with pytest.raises(tilewise.ConfigError, match="returned nan, not a finite number"):
        ranking.checked(float("nan"), "mine")


def test_the_search_is_greedy(pipe):
    """Worth of heads by themselves, and of two that are worth more together."""
    jobs = [resolve_settings(pipe, "a fox", method="sta", seed=seed) for seed in (0, 1)]
    worth = {"0.0": 1.0, "0.1": 3.0, "1.0": 2.0, "1.1": 0.0}
    made = []

    def make(settings):
        used = settings.method.additions
        heads = used[0].heads if used else ()
        made.append(heads)
        assert settings.method.method.name == "sta" and all(one.u == 0.5 for one in used)
        return sum(worth[head] for head in heads) + 5 * ({"0.1", "1.1"} <= set(heads)) + settings.seed

    told = []
    found = rank_heads(jobs, make, list(worth), SoftPAG(u=0.5), rounds=2, tried=lambda *at: told.append(at))
    assert found.heads == ("0.1", "1.1")
    assert list(found.rounds[0].scores) == ["0.1", "1.0", "0.0", "1.1"] and found.rounds[0].before == 0.5
    assert found.rounds[1].before == 3.5 and found.rounds[1].scores["1.1"] == 8.5
    assert told[-1] == (8, 8) and tries(4, 2, 1) == 8 and len(made) == 16
    assert rank_heads(jobs, make, list(worth), SoftPAG(u=0.5), keep=2, lowest=True).heads == ("1.1", "0.0")
    told.clear()
    both = rank_heads(jobs, make, list(worth), SoftPAG(u=0.5), rounds=2, keep=2, tried=lambda *at: told.append(at))
    assert both.heads == ("0.1", "1.0", "1.1", "0.0") and both.rounds[1].before == 5.5
    assert told[-1] == (8, 8) and tries(4, 2, 2) == 8
    with pytest.raises(tilewise.ConfigError, match="3 rounds that choose 2 each cannot be: there are 4 heads"):
        tries(4, 3, 2)
    assert with_heads(jobs[0], SoftPAG(), ()) is jobs[0]


def test_candidates(pipe):
    assert candidates(pipe, "0,14:") == ["0.0", "0.1", "14.0", "14.1", "15.0", "15.1"]
    with pytest.raises(tilewise.ConfigError, match="select none of the 16 blocks"):
        candidates(pipe, "99")


def test_the_command(tiny_sd_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.txt").write_text("a fox\n")
    words = [
        "rank-heads",
        "--prompts",
        "p.txt",
        "--model",
        str(tiny_sd_dir),
        "--steps",
        "2",
        "--layers",
        "6",
        "--scale",
        "20",
    ]

    def invoke(*more):
        result = CliRunner().invoke(app, [*words, *more])
        return result, re.sub(r"[\s│]+", " ", result.stdout + result.stderr)

    result, said = invoke("--dry-run", "--rounds", "2")
    assert result.exit_code == 0 and "2 heads in 2 rounds: 4 clips" in said
    stock, made = ranking.brightness, []

    def interrupted(frames, prompt):
        made.append(prompt)
        if len(made) == 3:
            raise KeyboardInterrupt
        return stock(frames, prompt)

    monkeypatch.setitem(ranking.SCORES, "brightness", interrupted)
    result, said = invoke()
    assert result.exit_code == 130 and len(list((tmp_path / "heads.parts").iterdir())) == 2
    result, said = invoke()
    assert result.exit_code == 0, said
    assert len(made) == 4 and not (tmp_path / "heads.parts").exists()
    told = json.loads((tmp_path / "heads.json").read_text())
    (one,) = told["rounds"]
    assert told["heads"] == [max(one["scores"], key=one["scores"].get)] and set(one["scores"]) == {"6.0", "6.1"}
    assert len({one["before"], *one["scores"].values()}) == 3
    assert f"--add {told['add']}" in said and told["add"] == f"soft-pag:heads={told['heads'][0]}:scale=20.0"
    clip = ["generate", "a fox", "--model", str(tiny_sd_dir), "--steps", "2", "--method", "dense", "--out", "a.png"]
    result = CliRunner().invoke(app, [*clip, "--add", told["add"]])
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize(
    ("more", "why"),
    [
        (["--score", "nicest"], "unknown score 'nicest'"),
        (["--u", "0"], "u must be above 0"),
        (["--rounds", "9"], "there are 2 heads"),
        (["--add", "agent"], "agent does not ask"),
        (["--model", "demo"], "soft-pag serves"),
    ],
)
def test_bad_input_before_weights_are_read(tiny_sd_dir, tmp_path, more, why):
    (tmp_path / "p.txt").write_text("a fox\n")
    words = ["rank-heads", "--prompts", str(tmp_path / "p.txt"), "--model", str(tiny_sd_dir), "--layers", "6"]
    result = CliRunner().invoke(app, [*words, "--out", str(tmp_path / "h.json"), *more])
    assert result.exit_code == (1 if why == "soft-pag serves" else 2), result.output
    assert why in re.sub(r"[\s│]+", " ", result.stderr)
