"""`--cache` of the command line and of batches: what runs, what is recorded and made again, what is refused before weights."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from tilewise.pipelines.batch.manifest_comparison import method_name
from tilewise.pipelines.generation.clip_metadata import read_clip_metadata
from tilewise.ui.cli.app import app

SMALL = ["--height", 64, "--width", 64, "--frames", 5, "--steps", 3]


def invoke(*words: object):
    return CliRunner().invoke(app, [str(word) for word in words])


def test_a_clip_of_the_demo_model_and_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = invoke("generate", "a red circle", *SMALL, "--method", "dense", "--cache", "first-block:threshold=100",
                  "--guidance", 1, "--out", "a.mp4")  # fmt: skip
    assert made.exit_code == 0, made.stderr
    assert "2 of 3 forwards reused" in made.stdout and "dense cache first-block:threshold=100" in made.stdout
    clip = read_clip_metadata("a.mp4")
    assert clip.settings.method.to_dict()["cache"] == {"name": "first-block", "threshold": 100.0}
    (row,) = clip.run["summary"]["cache"]
    assert (row["forwards"], row["reused"], row["modules"], row["skipped"]) == (3, 2, 24, 14)

    again = invoke("generate", "--from", "a.mp4", "--out", "b.mp4")
    assert again.exit_code == 0, again.stderr
    assert "the same, bit for bit" in again.stdout
    other = invoke("generate", "--from", "a.mp4", "--cache", "none", "--dry-run")
    assert "cache" not in other.stdout


def test_explain_foretells(tiny_pipe_dir):
    told = invoke(
        "explain", "--model", tiny_pipe_dir, "--method", "dense", "--cache", "taylor", "--steps", 20, "--json"
    )
    assert json.loads(told.stdout)["reused_steps"] == 13
    told = invoke("explain", "--model", tiny_pipe_dir, "--cache", '{"name": "first-block"}')
    assert "depends on the activations" in told.stdout


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--cache", "firstblock"], "Did you mean 'first-block'"),
        (["--cache", "first-block:treshold=1"], "Did you mean 'threshold'"),
        (["--cache", "mag"], "mag:calibrate=true"),
        (["--cache", "taylor", "--set", "cache=pab"], "are the same"),
        (["--cache", "taylor", "--stream", "--seconds", 2], "a stream takes no step cache"),
        (["--add", "riflex", "--stream", "--seconds", 2], "a stream over a KV cache takes no addition"),
        (["--method", "dense", "--compare", "dense"], "or a --cache"),
        (["--method", "dense", "--cache", "none", "--compare", "dense"], "or a --cache"),
    ],
)
def test_bad_input_is_a_usage_error(words, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = invoke("generate", "a red circle", *words)
    assert result.exit_code == 2 and said in " ".join(result.stderr.split()), result.stderr
    assert not list(tmp_path.iterdir())


def test_a_batch_has_a_column_and_a_sweep(tiny_pipe_dir, tmp_path):
    (tmp_path / "p.csv").write_text('prompt,cache\na red circle,\na blue square,"taylor:cache_interval=2"\n')
    words = [
        "batch",
        tmp_path / "p.csv",
        "--model",
        tiny_pipe_dir,
        "--steps",
        2,
        "--frames",
        5,
        "--out",
        tmp_path / "out",
    ]
    made = invoke(*words, "--sweep", "method=dense,sta", "--cache", "pab")
    assert made.exit_code == 0, made.stderr
    lines = [json.loads(line) for line in (tmp_path / "out" / "manifest.jsonl").read_text().splitlines()]
    names = sorted(method_name(line) for line in lines)
    assert [name.split(", ")[0].split()[0] for name in names] == ["dense", "dense", "sta", "sta"]
    assert sum("cache pab" in name for name in names) == sum("cache taylor:cache_interval=2" in n for n in names) == 2
    assert all(line["run"]["summary"]["cache"][0]["forwards"] == 4 for line in lines)
    assert invoke(*words, "--sweep", "cache=none,taylor", "--dry-run").exit_code == 0
    (tmp_path / "bad.csv").write_text("prompt,cache\na red circle,tailor\n")
    bad = invoke("batch", tmp_path / "bad.csv", "--model", tiny_pipe_dir, "--dry-run")
    assert bad.exit_code == 2 and "Did you mean 'taylor'" in bad.stderr


def test_two_stages_have_it_in_the_first(tiny_pipe_dir, tmp_path):
    size = ["--frames", 5, "--steps", 2, "--height", 128, "--width", 64, "--native", "64x64"]
    words = ["--model", tiny_pipe_dir, "--highres", *size, "--cache", "first-block:threshold=100"]
    made = invoke("generate", "a red circle", *words, "--out", tmp_path / "a.mp4")
    assert made.exit_code == 0, made.stderr
    stages = read_clip_metadata(tmp_path / "a.mp4").run["highres"]
    assert stages["native"]["method"]["cache"]["name"] == "first-block"
