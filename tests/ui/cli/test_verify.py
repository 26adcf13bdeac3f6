"""`tilewise verify`: pairs, report and page; interrupted and continued; bad input before weights are read."""

from __future__ import annotations

import json
import re

import pytest
from typer.testing import CliRunner

from tilewise.pipelines.verification import pairs as making
from tilewise.pipelines.verification.report import check_report
from tilewise.ui.cli.app import app

SMALL = ["--steps", "2", "--frames", "5", "--method", "sta", "--window", "1,1,1"]
PROMPTS = "a <b>red</b> circle\na blue square\n# no\na green star\n"


def invoke(*words: object):
    return CliRunner().invoke(app, ["verify", *map(str, words)])


@pytest.fixture
def words(tiny_pipe_dir, tmp_path, monkeypatch) -> list[object]:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.txt").write_text(PROMPTS)
    return ["--prompts", "p.txt", "--model", tiny_pipe_dir, *SMALL]


def test_interrupted_and_continued(words, tmp_path, monkeypatch):
    made = []
    stock = making.generate

    def third_is_interrupted(pipe, settings, progress):
        made.append((settings.prompt, settings.method.method.name))
        if len(made) == 3:
            raise KeyboardInterrupt
        return stock(pipe, settings, progress)

    monkeypatch.setattr(making, "generate", third_is_interrupted)
    result = invoke(*words)
    assert result.exit_code == 130
    assert "1 of 3 pairs kept in verification.parts" in re.sub(r"\s+", " ", result.stderr)
    result = invoke(*words)
    assert result.exit_code == 0, result.stderr
    assert "1 pair of an earlier run is kept" in result.stderr
    # Both take turns in being first.
    both = [(prompt, method) for prompt, method in made[3:]]
    assert both == [
        ("a blue square", "sta"),
        ("a blue square", "dense"),
        ("a green star", "dense"),
        ("a green star", "sta"),
    ]
    report = json.loads((tmp_path / "verification.json").read_text())
    check_report(report)
    assert [pair["prompt"] for pair in report["pairs"]] == ["a <b>red</b> circle", "a blue square", "a green star"]
    assert report["model"]["revision"].startswith("folder:") and report["machine"]["versions"]["torch"]
    assert all(0 < pair["density"] < 1 and pair["psnr"] > 3 for pair in report["pairs"])
    assert report["method"]["method"]["window"] == [1, 1, 1]
    page = (tmp_path / "verification.html").read_text()
    assert "a &lt;b&gt;red&lt;/b&gt; circle" in page and "<b>red" not in page and "<script" not in page
    assert page.count("data:image/jpeg;base64,") == 3 * 9
    assert not (tmp_path / "verification.parts").exists()
    assert "PSNR, dB" in result.stdout and "wrote verification.json" in result.stdout
    # The name is taken: another run has the next one, and a name that was given is not replaced.
    before = page
    result = invoke(*words, "--out", "verification.html")
    assert result.exit_code == 2 and "--force" in result.stderr
    assert (tmp_path / "verification.html").read_text() == before


def test_seeds_of_lines_and_a_dry_run(words, tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "a", "seed": 1}\n{"prompt": "a", "seed": 2}\n')
    result = invoke(*words, "--prompts", "p.jsonl", "--dry-run")
    assert result.exit_code == 0, result.stderr
    assert "2 pairs of clips" in result.stdout and "density" in result.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p.jsonl", "p.txt"]


@pytest.mark.parametrize(
    ("text", "more", "message"),
    [
        ("", [], "holds no prompts"),
        ("a\nb\na\n", [], "line 3: says the same as line 1"),
        ("a\n", ["--method", "dense"], "choose another --method"),
        ("a\n", ["--frames", "6"], "frames"),
        ("a\n", ["--out", "report.json"], ".html"),
        ("a\n", ["--lpips"], "pip install lpips"),
    ],
)
def test_bad_input(words, tmp_path, text, more, message):
    (tmp_path / "p.txt").write_text(text)
    rest = words if "--method" not in more else words[:4]
    result = invoke(*rest, *more)
    told = re.sub(r"[\s│]+", " ", result.stderr)
    assert result.exit_code in (2, 3) and message in told, told
    assert [path.name for path in tmp_path.iterdir()] == ["p.txt"]


def test_fields_of_other_lines_belong_to_the_command(words, tmp_path):
    (tmp_path / "p.csv").write_text("prompt,steps\na,3\n")
    result = invoke(*words, "--prompts", "p.csv")
    assert result.exit_code == 2 and "is the same for all lines" in re.sub(r"[\s│]+", " ", result.stderr)


def test_reports_that_were_sent_in_are_checked(words, tmp_path, capsys):
    from benchmarks.community.__main__ import main

    assert main([]) == 0  # those of the folder
    result = invoke(*words, "--out", "mine.html")
    assert result.exit_code == 0, result.stderr
    assert main([str(tmp_path / "mine.json")]) == 0
    assert "| sta | 64×64×5, 2 steps | " in capsys.readouterr().out
    report = json.loads((tmp_path / "mine.json").read_text())
    report["pairs"][0]["psnr"] += 3
    (tmp_path / "better.json").write_text(json.dumps(report))
    (tmp_path / "no.json").write_text("{")
    assert main([str(tmp_path / name) for name in ("mine.json", "better.json", "no.json")]) == 1
    told = capsys.readouterr().err
    assert (
        "better.json: this is no report" in told
        and "summary.psnr.mean" in told
        and "no.json: it cannot be read" in told
    )
