"""Streams in a batch: made beside clips, swept, resumed, recorded; refused with their line before weights are read."""

from __future__ import annotations

import json
import re

import pytest
from causal_checkpoints import save_causal_pipeline
from tiny_conditioned import picture
from typer.testing import CliRunner

from tilewise.pipelines.batch.input import Row
from tilewise.pipelines.errors import OutputError
from tilewise.pipelines.media.video import read_frames, read_settings
from tilewise.pipelines.streaming import record
from tilewise.plugins.errors import ConfigError
from tilewise.ui.cli import batch as batching
from tilewise.ui.cli.app import app

RED, BLUE = "a red circle moving left", "a blue square moving right"
RECIPE = {"chunk": 2, "window": 6, "sink": 2, "height": 32, "width": 48, "fps": 8, "timesteps": [1000, 500]}
STREAM = {"prompt": RED, "stream": True, "seconds": 11 / 8}
CLIP = {"prompt": BLUE, "frames": 5, "steps": 1, "method": "dense"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_causal_pipeline(tmp_path_factory.mktemp("causal") / "m", RECIPE)


@pytest.fixture
def invoke(model, tmp_path, monkeypatch):
    """`tilewise batch p.jsonl` with options, in a folder of its own."""
    monkeypatch.chdir(tmp_path)

    def run(rows, *words):
        (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        shared = ["--model", model, "--out", "o", "--device", "cpu"]
        return CliRunner().invoke(app, [str(word) for word in ("batch", "p.jsonl", *shared, *words)])

    return run


def lines_in(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "o" / "manifest.jsonl").read_text().splitlines()]


def files_in(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".lock")


def test_streams_and_clips_are_made_swept_and_resumed(invoke, tmp_path):
    rows = [{**STREAM, "prompt_at": [f"0.5s={BLUE}", f"9/8s={RED}".replace("9/8", "1.125")], "id": "changing"}, CLIP]
    words = ["--sweep", "sink=0,2", "--prompt-change", "flush"]
    (tmp_path / "o").mkdir()
    (tmp_path / "o" / ".00000-changing-0-0123abcd.mp4.12-0123ab.part").mkdir()  # what a killed one left
    result = invoke(rows, *words)
    assert result.exit_code == 0, result.output
    assert "3 made" in result.stdout and "the command's prompt_change is not used where stream is not" in result.stderr
    lines = sorted(lines_in(tmp_path), key=lambda line: line["run"]["batch"]["index"])
    streams = [line for line in lines if "stream" in line["run"]]
    assert [line["run"]["stream"]["recipe"]["sink"] for line in streams] == [0, 2] and len(lines) == 3
    first = streams[0]
    told = first["run"]["stream"]["settings"]
    assert told["prompt_at"] == [f"0.5s={BLUE}", f"1.125s={RED}"] and told["prompt_change"] == "flush"
    assert (first["frames"], first["steps"], first["run"]["batch"]["ids"]) == (11, 2, ["changing"])
    assert first["run"]["unused_prompts"] == [RED] and "came after the last chunk" in result.stderr
    assert {"load", "first", "denoise", "total"} <= set(first["run"]["seconds"]) and first["run"]["peak_memory"][
        "bytes"
    ]
    file = tmp_path / "o" / first["file"]
    assert len(read_frames(file)) == 11
    metadata = read_settings(file)
    assert metadata == {key: first[key] for key in metadata}
    assert files_in(tmp_path / "o") == sorted(["manifest.jsonl", *(line["file"] for line in lines)])

    pictures = [str(picture(tmp_path / f"{n}.png", (48, 32), seed=n)) for n in range(2)]
    with_picture = invoke([{**STREAM, "image": path} for path in pictures], "--dry-run", "--seeds", "0")
    assert "2 of 2 clips" in with_picture.stdout, with_picture.output

    again = invoke(rows, *words)
    assert again.exit_code == 0 and "0 made, 3 there already" in again.stdout
    other = invoke([rows[0]], *words, "--storage", "fp8", "--dry-run")
    assert "2 of 2 clips" in other.stdout and "fp8" in other.stdout and "KV cache" in other.stdout
    same = CliRunner().invoke(app, ["generate", "--from", str(file), "--out", "again.mp4"])
    assert same.exit_code == 0 and "the same, bit for bit" in same.stdout, same.output
    compared = CliRunner().invoke(app, ["compare", "o"])
    assert compared.exit_code == 0 and "stream, dense, window 6, sink 0, policy fixed" in compared.stdout, (
        compared.output
    )


def test_windows_beside_causal_streams(invoke, tmp_path):
    """The way is swept like other options; what is made by it is another clip."""
    rows = [{**STREAM, "window": 5, "height": 32, "width": 32}]
    result = invoke(rows, "--sweep", "way=prefix,renoised", "--steps", 1)
    assert result.exit_code == 0 and "2 made" in result.stdout, result.output
    lines = lines_in(tmp_path)
    assert sorted(line["run"]["stream"]["recipe"]["way"] for line in lines) == ["prefix", "renoised"]
    assert len({line["run"]["frames_sha256"] for line in lines}) == 2 and {line["frames"] for line in lines} == {11}
    assert "0 made, 2 there already" in invoke(rows, "--sweep", "way=prefix,renoised", "--steps", 1).stdout
    compared = CliRunner().invoke(app, ["compare", "o"])
    assert "stream, dense, prefix, window 5, overlap 1" in re.sub(r"[\s│]+", " ", compared.output), compared.output
    causal = invoke([{**STREAM, "overlap": 2}], "--dry-run")
    assert causal.exit_code == 2 and "name a --way to make windows" in re.sub(r"[\s│]+", " ", causal.stderr)


def test_a_stream_that_fails_leaves_nothing(invoke, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OutputError("could not write it: bad luck")

    monkeypatch.setattr(record, "write_settings", full)
    result = invoke([STREAM])
    assert result.exit_code == 1 and "bad luck" in result.stderr
    assert files_in(tmp_path / "o") == ["manifest.jsonl"]
    assert [line["status"] for line in lines_in(tmp_path)] == ["failed"]


def test_a_table_holds_changes_of_the_prompt(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cells = [f'a,true,2,"1s={BLUE}"', f'b,true,2,"1s={BLUE}; 1.5s={RED}"', "c,,,"]
    (tmp_path / "p.csv").write_text("\n".join(["prompt,stream,seconds,prompt_at", *cells]))
    request = batching.BatchRequest(tmp_path / "p.csv", None, "0", [], {"model": str(model), "frames": 5}, "cpu")
    jobs = batching._check(request).plan.jobs
    told = [None if job.stream is None else job.stream.work.options.prompts() for job in jobs]
    assert told == [[(1.0, BLUE)], [(1.0, BLUE), (1.5, RED)], None]
    assert [job.settings.frames for job in jobs] == [16, 16, 5]


BAD = {
    "no length": ({"seconds": None}, "a stream needs its length"),
    "frames": ({"frames": 9}, "frames cannot be used with stream: a stream's length is seconds"),
    "two kinds": ({"highres": True}, "highres and stream are two ways to make a clip"),
    "not a stream": ({"stream": False, "seconds": None, "sink": 2}, "sink is an option of stream: give stream as true"),
    "window": ({"window": "3,3,3"}, "one whole number with --stream"),
    "window below chunk": ({"window": 2, "chunk": 4}, "a window of 2 latents is shorter than a chunk of 4"),
    "negative": ({"negative": "blurry"}, "has no guidance"),
    "times": ({"prompt_at": ["1s=a", "0.5s=b"]}, "must rise"),
    "checkpoint": ({"causal": "nowhere.pt"}, "there is no causal checkpoint nowhere.pt"),
}


def test_bad_lines_are_refused_before_weights_are_read(invoke, tmp_path, monkeypatch):
    monkeypatch.setattr(batching, "load_pipeline", lambda *_, **__: pytest.fail("the weights are read"))
    for case in ("checkpoint",):
        result = invoke([{**STREAM, **BAD[case][0]}])
        assert result.exit_code == 3 and BAD[case][1] in re.sub(r"[\s│]+", " ", result.stderr)
    cases = [case for case in BAD if case != "checkpoint"]
    result = invoke([{**STREAM, **BAD[case][0]} for case in cases])
    assert result.exit_code == 2 and not (tmp_path / "o").exists()
    told = re.sub(r"[\s│]+", " ", result.stderr)
    for number, case in enumerate(cases, 1):
        assert BAD[case][1] in told.split(f" line {number}: ")[1].split(" line ")[0], (case, told)
    for words, message in (
        (["--stream", "--frames", 9], "--frames cannot be used with --stream"),
        (["--sink", 2], "give --stream too"),
    ):
        rows = [{"prompt": RED, "seconds": 1}] if "--stream" in words else [CLIP]
        result = invoke(rows, *words, "--dry-run")
        assert result.exit_code == 2 and message in re.sub(r"[\s│]+", " ", result.stderr), result.output


def test_the_page_makes_no_streams():
    pytest.importorskip("gradio", reason="the page needs Gradio: pip install -e '.[ui]'")
    from tilewise.ui.web.tabs.batch import refuse_files

    for field in ({"stream": True}, {"causal": "x.pt"}):
        with pytest.raises(ConfigError, match=r"line 3: .* is for the command line"):
            refuse_files([Row(3, {"prompt": RED, **field})])
    refuse_files([Row(3, {"prompt": RED, "set.recall": 0.9})])
