"""Clips from pictures and videos on the page."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

pytest.importorskip("gradio", reason="the page needs Gradio: pip install -e '.[ui]'")

import gradio as gr
from tiny_conditioned import picture, save, video, without_ftfy
from typer.testing import CliRunner

from tilewise.pipelines.conditioning.files import ROLES
from tilewise.pipelines.generation.generate import generate
from tilewise.pipelines.generation.resolve import resolve_settings
from tilewise.pipelines.loading.load import load_pipeline
from tilewise.pipelines.loading.model_defaults import model_defaults
from tilewise.pipelines.media.video import read_frames, write_video
from tilewise.plugins.errors import ConfigError
from tilewise.ui.cli.app import app
from tilewise.ui.web.common.safety import Limits, RefusedError
from tilewise.ui.web.common.uploads import FOLDER, Uploads
from tilewise.ui.web.forms.controls import Controls, prompt_box
from tilewise.ui.web.forms.form_parsing import FIELDS, settings_from, settings_of, values_of
from tilewise.ui.web.forms.snippets import command_line, python_program
from tilewise.ui.web.jobs.clips import Studio
from tilewise.ui.web.jobs.job import Job
from tilewise.ui.web.jobs.job_queue import JobQueue
from tilewise.ui.web.jobs.models import Models
from tilewise.ui.web.tabs.generate import GenerateTab
from tilewise.ui.web.tabs.job_view import job_box


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save(tmp_path_factory.mktemp("models") / "i2v", "i2v")


@pytest.fixture(autouse=True)
def no_ftfy(monkeypatch):
    without_ftfy(monkeypatch)


@pytest.fixture(scope="module")
def models(model) -> Models:
    return Models(["demo", str(model)], device="cpu")


def controls_in(models, outputs: Path) -> Controls:
    """The controls of a page. `controls.files.uploads.arrived` is a folder that stands for what its server puts uploads into."""
    with gr.Blocks():
        controls = Controls(models, Limits(inputs=outputs / FOLDER), prompt_box())
    arrived = outputs.parent / "arrived"
    arrived.mkdir()
    controls.files.uploads.arrived = arrived.resolve()
    return controls


def given(controls: Controls, model: object, **said: object) -> list[object]:
    """What the browser sends."""
    size = {"height": 32, "width": 32, "frames": 5, "steps": 1}
    small = resolve_settings(controls.models.skeleton("demo"), "a red circle", method="dense", **size)
    values = {**values_of(small), "model": str(model), "guidance": 1.0, "max_sequence_length": 8, **said}
    return [values[name] for name in FIELDS]


def test_uploads_are_kept_by_their_content_and_checked(tmp_path):
    arrived = tmp_path / "arrived"
    arrived.mkdir()
    uploads = Uploads(tmp_path / "inputs", arrived)
    start = picture(arrived / "..; rm -rf $HOME.png", (32, 32))
    kept = Path(uploads.kept(str(start)))
    assert kept.parent == tmp_path / "inputs" and re.fullmatch(r"[0-9a-f]{64}\.png", kept.name)
    assert kept.read_bytes() == start.read_bytes() and uploads.kept(str(kept)) == str(kept)
    other = arrived / "b.mp4"  # a picture by another name is a picture
    other.write_bytes(start.read_bytes())
    assert uploads.kept(str(other)) == str(kept)
    clip = Path(uploads.kept(str(video(arrived / "c.mp4", 5))))
    assert clip.suffix == ".mp4" and len(list(kept.parent.iterdir())) == 2
    page = arrived / "page.png"
    page.write_text("<script>alert(1)</script>")
    with pytest.raises(ConfigError, match=r"^page.png cannot be read as a video"):
        uploads.kept(str(page))
    elsewhere = picture(tmp_path / "secret.png")
    for path in (elsewhere, arrived / ".." / "secret.png", kept.parent / ".." / "secret.png"):
        with pytest.raises(RefusedError, match="must be uploaded to this page"):
            uploads.kept(str(path))
    (arrived / "link.png").symlink_to(elsewhere)
    with pytest.raises(RefusedError, match="must be uploaded"):
        uploads.kept(str(arrived / "link.png"))
    with pytest.raises(RefusedError, match="text alone"):
        Uploads(None, arrived).kept(str(start))


def test_uploads_that_are_too_large_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("tilewise.ui.web.common.uploads.LARGEST", 2000)
    start = picture(tmp_path / "a.png", (64, 64))
    with pytest.raises(RefusedError, match=r"at most 2\.0 KiB here, not 12\.1 KiB"):
        Uploads(tmp_path / "inputs", tmp_path).kept(str(start))
    monkeypatch.undo()
    monkeypatch.setattr("tilewise.ui.web.common.uploads.MOST", 2000)
    with pytest.raises(RefusedError, match="must be tidied up first"):
        Uploads(tmp_path / "inputs", tmp_path).kept(str(start))


def test_the_page_has_upload_fields_for_what_the_model_takes(models, model, tmp_path):
    controls = controls_in(models, tmp_path / "outputs")
    shown = dict(zip(["box", *controls.files.components], controls.files_shown(str(model)), strict=True))
    assert [name for name, update in shown.items() if update["visible"]] == ["box", "image", "last_image"]
    assert shown["video"]["value"] is None and "value" not in shown["image"]
    assert not any(update["visible"] for update in controls.files_shown("demo"))
    wide = picture(controls.files.uploads.arrived / "a.png", (64, 32))
    files = [str(wide) if role == "image" else None for role in ROLES]
    height, width, frames, fps = controls.files_chosen(str(model), *files)
    assert (height, width, frames) == (16, 32, 5) and fps == gr.skip()
    assert controls.files_chosen(str(model), *[None] * len(ROLES)) == [gr.skip()] * 4


def test_a_clip_is_made_from_an_upload(models, model, tmp_path):
    outputs = (tmp_path / "outputs").resolve()
    controls = controls_in(models, outputs)
    with gr.Blocks():
        tab = GenerateTab(
            controls, JobQueue(1), Studio(models, outputs), gr.State(""), job_box("generate"), gr.Button(), gr.Button()
        )
    start = picture(controls.files.uploads.arrived / "a.png", (32, 32), mode="RGBA")
    said = given(controls, model, image=str(start))
    values = json.loads(json.dumps(tab.start(*said)[1]))
    start.unlink()  # Gradio sweeps uploads; the job has its own
    job = Job("generate", "a red circle", values)
    job.result = tab.work(values, job)
    made = tab.studio.find(job.result["clip"])
    assert made.settings.image is not None and made.settings.image.startswith(str(outputs / FOLDER))
    assert any("transparent in parts" in note for note in made.run["notes"])
    again = values_of(made.settings)
    assert again["reference"] is None and again["image"] == made.settings.image.partition("@")[0]
    assert settings_of(models, controls.limits, again) == made.settings
    with pytest.raises(ConfigError, match="needs a file for --image"):
        tab.start(*given(controls, model))


def test_settings_name_no_files_of_the_server(models, model, tmp_path):
    controls = controls_in(models, tmp_path / "outputs")
    secret = picture(tmp_path / "secret.png", (32, 32))
    settings = resolve_settings(models.skeleton(str(model)), "a", image=str(secret), model=str(model))
    with pytest.raises(RefusedError, match="image is no file that was uploaded to this page"):
        settings_from(settings.to_dict(), models, controls.limits)
    with pytest.raises(RefusedError, match="image is no file that was uploaded"):
        settings_of(models, controls.limits, values_of(settings))
    with pytest.raises(RefusedError, match="must be uploaded"):
        controls.values(given(controls, model, image=str(secret)))
    assert "must be uploaded" in controls.plan(*given(controls, model, image=str(secret)))


def test_the_snippets_make_the_same_clip_from_the_same_picture(model, tmp_path):
    pipe = load_pipeline(model)
    start = str(picture(tmp_path / "a.png", (32, 32)))
    settings = resolve_settings(pipe, "a red circle", image=start, steps=2, model=str(model))
    write_video(tmp_path / "expected.mp4", generate(pipe, settings).frames, settings.fps)
    expected = read_frames(tmp_path / "expected.mp4")
    program = python_program(pipe, settings, "float32").replace("'clip.mp4'", repr(str(tmp_path / "p.mp4")))
    exec(compile(program, "snippet", "exec"), {})
    assert (read_frames(tmp_path / "p.mp4") == expected).all()
    words = command_line(settings, model_defaults(pipe), "float32", Path("clip.mp4"))
    assert f"--image={settings.image}" in words
    ran = CliRunner().invoke(app, shlex.split(words.replace(" -- ", f" --out {tmp_path}/c.mp4 -- "))[1:])
    assert ran.exit_code == 0, ran.output
    assert (read_frames(tmp_path / "c.mp4") == expected).all()
