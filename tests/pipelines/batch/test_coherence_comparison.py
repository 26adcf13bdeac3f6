"""`tilewise compare` past the training size, on the bundled demo model: repetition, sharpness and counts against a recount."""

from __future__ import annotations

import json
import re
from html import unescape

import pytest
from typer.testing import CliRunner

from tilewise.pipelines.highres.two_stages import highres
from tilewise.pipelines.loading.load import load_pipeline
from tilewise.pipelines.quality.content_detection import analyse
from tilewise.ui.cli.app import app

PROMPTS = {0: "a red circle on a blue background", 2: "a yellow star on a purple background"}  # by seed
SIZE = {"height": 80, "width": 80, "frames": 3, "steps": 6}
ROW = re.compile(
    r"  highres from 64×64, strength 0\.5, refresh (\d), .*: repetition ([+-]\d\.\d{4}) against the native stage, "
    r"(\d\.\d{3}) × as sharp as that scaled up, objects as asked in (\d) of 2 \(\d+ %\), native stages (\d) of 2 \(\d+ %\)"
)


def invoke(*words):
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert done.exit_code == 0, done.output
    return done.stdout


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two batches of the same prompts: two stages from 64×64, with k=1 and k=5; and dense at the same size."""
    root = tmp_path_factory.mktemp("compare")
    rows = [{"prompt": prompt, "seed": seed, **SIZE} for seed, prompt in PROMPTS.items()]
    (root / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["batch", root / "p.jsonl", "--device", "cpu"]
    invoke(*words, "--highres", "--native", "64x64", "--sweep", "refresh=1,5", "--out", root / "two")
    invoke(*words, "--method", "dense", "--out", root / "dense")
    return root / "two", root / "dense"


@pytest.fixture(scope="module")
def again():
    """The clips of k=1 once more, by seed, without a batch."""
    pipe = load_pipeline("demo", device="cpu")
    return {s: highres(pipe, text, native=(64, 64), refresh=1, seed=s, **SIZE) for s, text in PROMPTS.items()}


def lines(folder):
    return [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_the_manifest_records_coherence_and_counts(folders, again):
    found = {
        line["seed"]: line["run"]["highres"]
        for line in lines(folders[0])
        if line["run"]["highres"]["options"]["refresh"] == 1
    }
    for seed, made in again.items():
        assert found[seed]["coherence"] == made.coherence.to_dict()
        counted = {"asked": 1, "clip": analyse(made.frames).count, "native": analyse(made.native.frames).count}
        assert found[seed]["objects"] == counted


def test_compare_prints_the_means_and_the_counts(folders, again, tmp_path):
    out = tmp_path / "r.html"
    printed = invoke("compare", *folders, "--out", out).split("past the training size (means over clips):\n")[1]
    rows = {int(found[1]): found for found in ROW.finditer(printed)}
    assert sorted(rows) == [1, 5]
    made = list(again.values())
    assert float(rows[1][2]) == pytest.approx(sum(clip.coherence.excess for clip in made) / 2, abs=6e-5)
    assert float(rows[1][3]) == pytest.approx(sum(clip.coherence.sharpness for clip in made) / 2, abs=6e-4)
    assert int(rows[1][4]) == sum(analyse(clip.frames).count == 1 for clip in made)
    assert int(rows[1][5]) == sum(analyse(clip.native.frames).count == 1 for clip in made)
    told = [line["run"]["highres"] for line in lines(folders[0])]
    five = [one["coherence"]["excess"] for one in told if one["options"]["refresh"] == 5]
    assert float(rows[5][2]) == pytest.approx(sum(five) / 2, abs=6e-5)
    right = sum(line["run"]["content"]["count"] for line in lines(folders[1]))
    assert f"\n  dense: objects as asked in {right} of 2 ({50 * right} %)\n" in f"\n{printed}"
    # The report has the same lines, and each clip's own numbers below it.
    page = unescape(out.read_text())
    for line in printed.splitlines()[:3]:
        assert f"<li>{line.strip()}</li>" in page
    for one in told:
        found, objects = one["coherence"], one["objects"]
        assert (
            f"repetition {found['excess']:+.4f} against its native stage, {found['sharpness']:.3f} × as sharp as that scaled "
            f"up, {objects['clip']} objects, native {objects['native']}, asked 1"
        ) in page
    assert page.count("objects as asked<") + page.count("objects not as asked<") == 2
    assert page.count("objects as asked<") == right


def test_seconds_are_those_of_both_stages(folders, tmp_path):
    """A speed-up over dense that left the native stage out would flatter."""
    from tilewise.pipelines.batch.manifest_comparison import measured, read_groups

    for group in measured(read_groups(folders)):
        dense, *others = group.clips
        assert [clip.is_dense for clip in group.clips] == [True, False, False]
        for clip in others:
            run = clip.line["run"]
            both = run["seconds"]["denoise"] + run["highres"]["native"]["seconds"]["denoise"]
            assert clip.speedup == pytest.approx(dense.line["run"]["seconds"]["denoise"] / both)


def test_a_comparison_of_ordinary_batches_stays_as_it_is(folders, tmp_path):
    printed = invoke("compare", folders[1], "--out", tmp_path / "r.html")
    assert "repetition (0 … 1" in printed
    page = (tmp_path / "r.html").read_text()
    for words in ("past the training size", "as asked", "native stage"):
        assert words not in printed.lower()
        assert words not in page.lower()


def test_clips_of_several_shapes_are_one_way(folders, tmp_path):
    """By default a native stage follows the clip's shape: sizes that only do so make no row of their own, others do."""
    from tilewise.pipelines.batch.manifest_comparison import method_rows, read_groups

    def written(*sizes):
        told = []
        for number, (size, native) in enumerate(sizes):
            line = json.loads(json.dumps(lines(folders[0])[0]))
            line["run"]["batch"]["key"] = str(number)
            line |= dict(zip(("height", "width"), size, strict=True))
            line["run"]["highres"]["native"] |= dict(zip(("height", "width"), native, strict=True))
            told.append(json.dumps(line) + "\n")
        (tmp_path / "manifest.jsonl").write_text("".join(told))
        return [(row.method.split(",")[0], row.clips) for row in method_rows(read_groups([tmp_path]))]

    upright, wide = ((128, 96), (64, 48)), ((96, 128), (48, 64))
    assert written(upright, wide) == [("highres from a size of its shape", 2)]
    assert written(upright, upright) == [("highres from 64×48", 2)]
    assert written(upright, wide, ((96, 128), (72, 96))) == [
        (f"highres from {size}", 1) for size in ("48×64", "64×48", "72×96")
    ]
