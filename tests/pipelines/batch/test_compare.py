"""`tilewise compare`: what is measured against what, and a report that needs nothing but itself."""

from __future__ import annotations

import base64
import json
import math
import re
import shutil
from html.parser import HTMLParser

import pytest
from typer.testing import CliRunner

from tilewise.pipelines.batch.manifest import read_manifest
from tilewise.pipelines.batch.manifest_comparison import measured, method_rows, read_groups
from tilewise.pipelines.media.video import read_frames
from tilewise.pipelines.quality.metrics import psnr, ssim
from tilewise.ui.cli.app import app

NASTY = '<script>alert("x")</script> a red circle & "more" \' </section>'


def invoke(*words: object):
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture(scope="module")
def folders(tiny_pipe_dir, tmp_path_factory):
    """Two batches: dense and sta of two prompts; and the same prompts with a window that sees everything."""
    root = tmp_path_factory.mktemp("compare")
    (root / "p.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in (NASTY, "a blue square")))
    words = ["batch", root / "p.jsonl", "--model", tiny_pipe_dir, "--steps", 2, "--frames", 5]
    for name, more in {
        "a": ["--sweep", "method=dense,sta", "--window", "1,2,2"],
        "b": ["--method", "sta", "--window", "99,99,99"],
    }.items():
        result = invoke(*words, *more, "--out", root / name)
        assert result.exit_code == 0, result.stderr
    return root / "a", root / "b"


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def test_clips_with_other_loras_are_of_another_group(folders, tmp_path):
    """What a LoRA changes is no method's doing, whatever its file is called."""
    lines = [json.loads(line) for line in (folders[0] / "manifest.jsonl").read_text().splitlines()]
    made = [line for line in lines if line["status"] == "done"]
    for number, line in enumerate(made):
        weight = 1.0 if line["method"]["method"]["name"] == "dense" else 0.5
        line["lora"] = [f"style {number}.safetensors:{weight}@sha256:{'0' * 64}"]
        shutil.copy(folders[0] / line["file"], tmp_path / line["file"])
    (tmp_path / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in made))
    groups = read_groups([tmp_path])
    assert {len({clip.line["lora"][0].split(":")[1] for clip in group.clips}) for group in groups} == {1}
    assert len(groups) == sum(len(group.clips) for group in groups) == len(made) == 4


def test_clips_are_measured_against_dense_of_the_same_prompt_and_seed(folders):
    groups = list(measured(read_groups(folders)))
    assert len(groups) == 2
    for group in groups:
        dense, *others = group.clips
        assert dense.is_dense
        assert (dense.psnr, dense.speedup) == (None, None)
        assert len({clip.line["prompt"] for clip in group.clips}) == 1
        assert len(others) == 2
        for clip in others:
            a, b = read_frames(clip.path), read_frames(dense.path)
            assert clip.psnr == psnr(a, b)
            assert clip.ssim == ssim(a, b)
            seconds = [one.line["run"]["seconds"]["denoise"] for one in (dense, clip)]
            assert clip.speedup == pytest.approx(seconds[0] / seconds[1])
    rows = method_rows(groups)
    assert [row.method.split(" ")[0] for row in rows] == ["dense", "sta", "sta"]
    assert [row.clips for row in rows] == [2, 2, 2]
    assert rows[2].density < 1.0
    assert rows[2].psnr < 60
    identical = [clip for group in groups for clip in group.clips if clip.psnr is not None and math.isinf(clip.psnr)]
    assert sum(row.same for row in rows) == len(identical)


def test_what_ran_elsewhere_gets_no_speedup(folders, tmp_path):
    """A dense clip of another device says nothing about speed, only about pixels."""
    for path in folders[0].glob("*.mp4"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    lines = list(read_manifest(folders[0]).values())
    lines[0]["run"]["device_name"] = "another"
    (tmp_path / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    group = next(g for g in measured(read_groups([tmp_path])) if g.clips[0].line["run"]["device_name"] == "another")
    assert group.clips[1].speedup is None
    assert group.clips[1].psnr is not None


def test_the_report_holds_everything(folders, tmp_path):
    out = tmp_path / "new" / "r.html"
    result = invoke("compare", folders[0] / "manifest.jsonl", folders[1], "--out", out)
    assert result.exit_code == 0, result.stderr
    assert f"wrote {out}" in result.stdout
    assert "dense" in result.stdout
    text = out.read_text()
    page = Page(text)
    videos = page.all("video")
    assert len(videos) == 6
    files = {path.read_bytes() for folder in folders for path in folder.glob("*.mp4")}
    prefix = "data:video/mp4;base64,"
    assert {base64.b64decode(video["src"].removeprefix(prefix)) for video in videos} == files
    assert all(video["poster"].startswith("data:image/jpeg;base64,") for video in videos)
    assert len(page.all("script")) == 1  # the prompt's own is text
    assert NASTY in page.text
    for tag, attributes in page.tags:
        for name in ("src", "href", "poster", "action"):
            assert name not in attributes or attributes[name].startswith("data:"), (tag, attributes)
    assert not re.search(r"https?://|@import|url\(", text)
    assert "default-src 'none'" in page.all("meta")[1]["content"]
    assert str(folders[0]) not in text
    assert len(page.all("section")) == 2
    assert len(page.all("button")) == 2


def test_large_clips_are_linked(folders, tmp_path):
    out = tmp_path / "r.html"
    result = invoke("compare", *folders, "--out", out, "--embed", 0)
    assert result.exit_code == 0
    assert "6 clips are linked" in result.stdout
    page = Page(out.read_text())
    assert page.all("video") == []
    assert len(page.all("img")) == 6
    for link in page.all("a"):
        assert (tmp_path / link["href"]).resolve().is_file()


def test_damaged_clips_are_said(folders, tmp_path):
    for path in folders[0].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    first, second, *_ = sorted(tmp_path.glob("*.mp4"))
    first.unlink()
    second.write_bytes(b"x")
    result = invoke("compare", tmp_path, "--out", tmp_path / "r.html")
    assert result.exit_code == 0, result.stderr
    assert "2 clips are missing" in result.stdout
    assert "linked" not in result.stdout
    assert "not as the manifest says" in Page((tmp_path / "r.html").read_text()).text


def test_bad_requests(folders, tmp_path):
    (tmp_path / "empty").mkdir()
    for words, message in (
        ([tmp_path / "empty"], "no clip to compare"),
        ([tmp_path / "absent"], "no manifest"),
        ([folders[0] / "other.jsonl"], "no manifest"),
        ([folders[0], "--out", tmp_path / "r.txt"], ".html"),
        ([folders[0], "--embed", -1], "--embed"),
        ([], "manifests"),
    ):
        result = invoke("compare", *words)
        assert result.exit_code == 2, result.output
        assert message in result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty"]
