"""The page's tab of clips past the model's size: its plan, what it refuses and snippets that make the same clip."""

from __future__ import annotations

import json
import re
import shlex
from types import SimpleNamespace

import pytest
import typer

pytest.importorskip("gradio", reason="the page needs Gradio: pip install -e '.[ui]'")

import tilewise
from tilewise.pipelines.batch.manifest import append, is_whole, read_manifest
from tilewise.pipelines.batch.two_stage_jobs import stages_of
from tilewise.pipelines.generation.cancellation import Cancelled
from tilewise.pipelines.generation.clip_metadata import read_clip_metadata
from tilewise.pipelines.media.video import read_frames
from tilewise.pipelines.memory.plan import plan_memory
from tilewise.plugins.errors import UnsupportedModelError
from tilewise.ui.cli import generate_highres as generating_highres
from tilewise.ui.cli.app import app
from tilewise.ui.cli.request import Request
from tilewise.ui.web.common.safety import Limits, RefusedError
from tilewise.ui.web.forms.form_parsing import SETTINGS, json_object, method_values, settings_from
from tilewise.ui.web.forms.highres_form import (
    FIELDS,
    command_line,
    highres_request,
    own_values,
    plan_html,
    planned,
    python_program,
    settings_dict,
    stages_in,
)
from tilewise.ui.web.jobs.job import Job
from tilewise.ui.web.jobs.models import Models
from tilewise.ui.web.tabs.highres import HighresStudio
from tilewise.ui.web.tabs.highres_one_stage import SETTINGS as STAGE
from tilewise.ui.web.tabs.highres_one_stage import OneStage
from tilewise.ui.web.tabs.highres_result import stages_html
from tilewise.ui.web.tabs.past_clips import past_clips

PROMPT = "-a red circle moving right"
OWN = {"height": 64, "width": 80, "strength": None, "refresh": 2, "global_path": "dense", "guided": "all"}
LIMITS = Limits(work=64 * 80 * 9 * 100)


@pytest.fixture(scope="module")
def models() -> Models:
    return Models(["demo"], device="cpu")


@pytest.fixture(scope="module")
def studio(models, tmp_path_factory) -> HighresStudio:
    return HighresStudio(models, tmp_path_factory.mktemp("highres") / "outputs")


def request_for(models, shared=(), **own):
    native = models.defaults("demo")
    values = {
        **dict.fromkeys(SETTINGS),
        "model": "demo", "prompt": PROMPT, "negative": "", "method": "dense", **method_values(tilewise.resolve("dense")),
        "height": 48, "width": 48, "frames": 9, "steps": 4, "guidance": 3.0, "seed": "1", "fps": native.fps,
        "max_sequence_length": native.max_sequence_length, **dict(shared),
    }  # fmt: skip
    return highres_request(models, LIMITS, values, [{**OWN, **own}.get(name) for name in FIELDS])


@pytest.fixture(autouse=True)
def as_much_memory_all_along(monkeypatch):
    """What is free changes from one moment to the next, and plans say it."""
    monkeypatch.setattr("tilewise.pipelines.memory.plan.device_bytes", lambda device: 16 * 2**30)
    monkeypatch.setattr("tilewise.pipelines.memory.plan.host_bytes", lambda: 16 * 2**30)


def plan_for(studio, shared=(), **own):
    return planned(studio.models, LIMITS, request_for(studio.models, shared, **own), studio.skeleton("demo"))


def test_the_plan_in_words(studio):
    work = plan_for(studio, strength=0.75)
    words = re.sub("<[^>]*>", " ", plan_html(work, studio.skeleton("demo")))
    assert "48×48 → 64×80 pixels" in " ".join(words.split())
    assert "6×6 of 5×8×10" in words
    assert "3 of 4 (strength 0.75)" in words
    assert "dense, at one step of 2, guides all forwards" in words
    assert "nothing has to give" in words
    own = re.sub("<[^>]*>", " ", plan_html(plan_for(studio), studio.skeleton("demo")))
    assert "2 of 4 (strength 0.5)" in own  # the demo model's
    alone = plan_html(plan_for(studio, global_path="none"), studio.skeleton("demo"))
    assert "none: the window alone" in alone


@pytest.mark.parametrize(
    ("shared", "own", "error", "words"),
    [
        ({}, {"height": 32}, tilewise.ConfigError, "smaller than the native stage's 48"),
        ({}, {"height": 70}, tilewise.ConfigError, "height"),
        ({}, {"width": None}, tilewise.ConfigError, "target width is empty"),
        ({}, {"width": 64.5}, tilewise.ConfigError, "target width must be a whole number"),
        ({}, {"strength": 2}, tilewise.ConfigError, "strength"),
        ({}, {"strength": "0"}, tilewise.ConfigError, "strength"),
        ({}, {"strength": 0}, tilewise.ConfigError, "strength"),
        ({}, {"strength": "half"}, tilewise.ConfigError, "strength must be a number"),
        ({}, {"strength": 0.1}, tilewise.ConfigError, "leaves none of 4 steps"),
        ({}, {"refresh": 0}, tilewise.ConfigError, "refresh"),
        ({}, {"global_path": "both"}, tilewise.ConfigError, "global path"),
        ({}, {"height": 16000}, RefusedError, "at most 8,192 pixels in height"),
        ({"steps": 100}, {"width": 96}, RefusedError, "times what this page was started for"),
        ({"model": "/etc"}, {}, RefusedError, "was not started with"),
        ({"prompt": ""}, {}, tilewise.ConfigError, "prompt"),
    ],
)
def test_refusals(studio, shared, own, error, words):
    with pytest.raises(error, match=words):
        plan_for(studio, shared, **own)


def test_a_unet_is_served_in_one_stage(tiny_sd_dir, tmp_path):
    """By HiDiffusion, whatever method is chosen beside the tab; planned, made and said again."""
    models = Models([str(tiny_sd_dir), "demo"], device="cpu")
    one = OneStage(models, LIMITS, tmp_path)
    assert one.serves(str(tiny_sd_dir)) and not one.serves("demo")
    native = models.defaults(str(tiny_sd_dir))
    values = {
        **dict.fromkeys(SETTINGS), "model": str(tiny_sd_dir), "prompt": "a fox", "negative": "", "method": "sta",
        **method_values(tilewise.resolve("sta")), "height": native.height, "width": native.width, "frames": 1, "steps": 2,
        "guidance": 5.0, "seed": "1", "fps": native.fps,
    }  # fmt: skip
    size = {"height": 2 * native.height, "width": 2 * native.width}
    settings = one.settings(values, [size.get(name) for name in FIELDS])
    assert (settings.height, settings.width, settings.seed) == (2 * native.height, 2 * native.width, 1)
    assert settings.method == tilewise.presets()["hidiffusion"]
    with pytest.raises(tilewise.ConfigError, match="strength: a UNet's picture is made in one stage"):
        one.settings(values, [{**size, "strength": 0.5}.get(name) for name in FIELDS])
    job = Job("one", values={STAGE: settings.to_dict()})
    job.result = one.work(job.values, job)
    assert read_clip_metadata(tmp_path / job.result["clip"]).settings == settings
    result, summary, told, command, program = one.result(job)
    assert "shifted-windows" in result and "raunet (sd): of 2 forwards" in summary and "raunet" in told
    assert "--highres" not in command and "hidiffusion" in command and "hidiffusion" in program


def test_a_pipeline_that_is_not_served_is_refused_with_the_reason(studio):
    other = type("CogVideoXPipeline", (), {})()
    with pytest.raises(UnsupportedModelError, match=r"highres serves .*WanPipeline, .*not CogVideoXPipeline: "):
        planned(studio.models, LIMITS, request_for(studio.models), other)


def test_a_plan_that_does_not_fit_is_refused_with_its_numbers(studio, monkeypatch):
    def little(*args, **options):
        return plan_memory(*args, **{**options, "limit": 10**6})

    monkeypatch.setattr("tilewise.pipelines.highres.preparation.plan_memory", little)
    with pytest.raises(tilewise.ConfigError, match=r"does not fit.*GiB"):
        plan_for(studio)


@pytest.mark.parametrize(
    ("shared", "own"),
    [
        ({}, {}),
        ({"negative": "-blue", "seed": str(2**63 - 1)}, {"strength": 0.75, "refresh": 1, "global_path": "pooled"}),
        ({}, {"guided": "cond", "refresh": 5}),
        ({"method": "sta-fast", **method_values(tilewise.resolve("sta-fast"))}, {"global_path": "none"}),
        ({"fps": 12, "max_sequence_length": 16}, {}),
        (
            {},
            {"upscale": "lanczos", "flow_shift": "4.5", "temperature": False, "highres_window": "32x32", "rope": "ntk"},
        ),
        ({}, {"rope_time": "riflex", "precision": "int8", "max_memory": "2GB"}),
    ],
)
def test_the_command_makes_the_same_work(studio, shared, own):
    work = plan_for(studio, shared, **own)
    words = shlex.split(command_line(work, studio.models.defaults("demo"), studio.models.dtype))
    assert words[:2] == ["tilewise", "generate"]
    given = typer.main.get_command(app).commands["generate"].make_context("generate", words[2:]).params
    own = ("prompt", "source", "out", "compare", "device", "dry_run")
    options = {name: value for name, value in given.items() if name not in own and value is not None}
    request = Request(given["prompt"], options, device="cpu")
    assert generating_highres._check(request, create=False).work == work


def test_the_program_makes_what_the_command_makes(studio, monkeypatch):
    work, native = plan_for(studio, {"max_sequence_length": 16}), studio.models.defaults("demo")
    assert "--max-sequence-length 16" in command_line(work, native, "float32")
    _assert_program_makes(work, python_program(work, native, "float32"), studio, monkeypatch)


@pytest.mark.parametrize(
    ("shared", "own"),
    [
        ({}, {"strength": 0.75, "refresh": 3, "global_path": "pooled"}),
        ({"fps": 12}, {}),
        ({"max_sequence_length": 16}, {}),
        ({}, {"rope_time": "riflex", "temperature": False, "highres_window": "32x48", "flow_shift": "3"}),
    ],
)
def test_the_program_makes_the_same_work(studio, monkeypatch, shared, own):
    work = plan_for(studio, shared, **own)
    _assert_program_makes(work, python_program(work, studio.models.defaults("demo"), "float32"), studio, monkeypatch)


def _assert_program_makes(work, program, studio, monkeypatch):
    """Runs it on the skeleton, up to what would run weights."""
    ran, wrote = [], []

    def caught(pipe, work, *_):
        ran.append(work)
        clip = SimpleNamespace(summary="", frames=None)
        return SimpleNamespace(clip=clip, native=clip, frames=None)

    monkeypatch.setattr("tilewise.pipelines.highres.two_stages.make", caught)
    monkeypatch.setattr(
        "tilewise.pipelines.loading.load.load_pipeline", lambda *a, **k: _on_cpu(studio.skeleton("demo"))
    )
    monkeypatch.setattr("tilewise.pipelines.media.video.write_video", lambda *a, fps: wrote.append(fps))
    exec(compile(program, "program", "exec"), {})
    assert wrote == [work.target.fps] * 2
    found, wanted = (settings_dict(each) for each in (ran[0], work))
    for stage in ("native", "target"):  # the program's own name for the model is that of its loading
        for each in (found, wanted):
            each[stage] = {k: v for k, v in each[stage].items() if k not in ("model", "fps")}
    assert found == wanted


def _on_cpu(skeleton):
    """`prepare` asks a loaded pipeline for its device; a skeleton's is meta."""

    class Loaded(type(skeleton)):
        device = Models(["demo"], device="cpu").device

    Loaded.__name__ = type(skeleton).__name__
    copy = object.__new__(Loaded)
    copy.__dict__ = dict(vars(skeleton))
    return copy


def test_clips_and_their_records(studio):
    shown = []
    job = Job("one")
    job.show = shown.append
    clip_request = request_for(studio.models, {"frames": 5, "steps": 2}, height=64, width=64)
    made = studio.clip(clip_request, job)
    native = made.path.with_stem(f"{made.path.stem}-native")
    assert read_frames(made.path).shape == (5, 64, 64, 3)
    assert read_frames(native).shape == (5, 48, 48, 3)
    assert [native.name in each.html for each in shown] == [True]
    assert read_clip_metadata(native).settings == clip_request.native
    folder = studio.store.folder
    [(key, line)] = read_manifest(folder).items()
    assert made.path == folder / line["file"] and is_whole(folder, line)
    assert line["run"] == json.loads(json.dumps(made.metadata["run"]))
    assert line["run"]["highres"]["options"]["strength"] == 0.5
    assert line["run"]["highres"]["native"]["file"] == native.name
    html = stages_html(made.path, made.metadata)
    for words in ("repetition", "sharpness", "objects found", "native stage", "with its cached cross-attention"):
        assert words in html
    again = studio.clip(clip_request, job)  # the same settings: the same file, and its line anew
    assert again.path == made.path
    assert list(read_manifest(folder)) == [key]
    job.cancel()
    with pytest.raises(Cancelled):
        studio.clip(request_for(studio.models, {"seed": "7"}), job)
    assert not list(folder.glob("*-7-*"))

    [past], problems = past_clips(folder.parent)
    assert problems == []
    assert "two stages, from 48×48 · 5×64×64" in past.label
    assert f"<td>{PROMPT}</td>" in past.html
    assert native.name in past.html and "repetition" in past.html
    native.unlink()
    [past], problems = past_clips(folder.parent)
    assert problems == [] and native.name not in past.html and made.path.name in past.html
    # Odd lines hide no other.
    for number, odd in enumerate(("x" * 300, "../../etc/passwd", None)):
        broken = json.loads(json.dumps(line))
        broken["run"]["highres"]["native"]["file"] = odd
        broken["run"]["batch"]["key"] = str(number)
        append(folder / "manifest.jsonl", broken)
    huge = json.loads(json.dumps(line))
    huge["run"]["batch"]["key"], huge["run"]["seconds"]["total"] = "huge", 10**400
    append(folder / "manifest.jsonl", huge)
    append(folder / "manifest.jsonl", {**huge, "file": "x" * 300})
    found, problems = past_clips(folder.parent)
    assert [each.path for each in found] == [made.path]
    assert len(problems) == 4 and all("cannot be shown" in told for told in problems)


def test_a_clip_that_the_detector_cannot_judge_is_kept(studio, monkeypatch):
    monkeypatch.setattr("tilewise.pipelines.batch.two_stage_clip.add_content_score", lambda *_: 1 / 0)
    made = studio.clip(
        request_for(studio.models, {"frames": 5, "steps": 2, "seed": "3"}, height=64, width=64), Job("one")
    )
    assert made.path.is_file()
    assert "could not be scored: division by zero" in str(made.metadata["run"]["notes"])
    assert "objects found" not in stages_html(made.path, made.metadata)


@pytest.mark.parametrize(
    "own",
    [
        {},
        {"strength": 0.75, "refresh": 3, "global_path": "pooled", "guided": "cond"},
        {"upscale": "latent", "flow_shift": 4.5, "temperature": False, "highres_window": "32x32", "rope": "yarn"},
        {"rope_time": "riflex", "precision": "fp8"},
    ],
)
def test_settings_of_two_stages_come_back(studio, own):
    """From what the tab shows, and from a clip's metadata: the controls and the tab's own say the same again."""
    work = plan_for(studio, {"method": "sta-fast", **method_values(tilewise.resolve("sta-fast"))}, **own)
    told = stages_of(work)
    metadata = {**work.target.to_dict(), "run": {"highres": {**told.to_dict(), "options": work.options.to_dict()}}}
    for text in (json.dumps(settings_dict(work)), json.dumps(metadata)):
        target, stages = stages_in(json_object(text))
        values = own_values(settings_from(target, studio.models, LIMITS), stages, studio.skeleton("demo"))
        shared = {"method": "sta-fast", **method_values(stages.method), "height": stages.height, "width": stages.width}
        again = plan_for(studio, shared, **dict(zip(FIELDS, values, strict=True)))
        assert settings_dict(again) == settings_dict(work)
    assert stages_in(work.native.to_dict()) is None


def test_stages_that_the_page_cannot_say_or_read(studio):
    work = plan_for(studio)
    told = json.loads(json.dumps(settings_dict(work)))
    told["highres"] |= {"flow_shift": None, "max_memory": 10**9}  # the scheduler's own shift
    target, stages = stages_in(told)
    with pytest.raises(tilewise.ConfigError, match=r"no control for flow_shift None, with which"):
        own_values(settings_from(target, studio.models, LIMITS), stages, studio.skeleton("demo"))
    for broken in ({**told, "native": None}, {**told, "highres": {"sharpness": 1}}, {"run": {"highres": {}}}):
        with pytest.raises(tilewise.ConfigError, match=r"cannot be read|sharpness|incomplete"):
            stages_in(broken)
