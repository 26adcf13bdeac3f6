"""The page without a browser: what it refuses, how jobs queue, settings there and back, snippets that make the same clip."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import re
import shlex
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from PIL import Image
from typer.testing import CliRunner

pytest.importorskip("gradio", reason="the page needs Gradio: pip install -e '.[ui]'")


import tilewise
from tilewise.kernels.plans.layout import Grid
from tilewise.kernels.plans.query_visibility import region_of_query
from tilewise.pipelines.batch.input import Row
from tilewise.pipelines.batch.jobs import parse_seeds
from tilewise.pipelines.errors import SetupError
from tilewise.pipelines.generation.cancellation import Cancelled, cancellable
from tilewise.pipelines.generation.generate import generate
from tilewise.pipelines.generation.preview import LatentPreview
from tilewise.pipelines.generation.resolve import explain_settings, resolve_settings
from tilewise.pipelines.generation.settings import CLIP_OPTIONS, METHOD_HELP
from tilewise.pipelines.loading.load import load_pipeline, load_skeleton
from tilewise.pipelines.media.video import read_frames, write_video
from tilewise.pipelines.memory import estimate as memory_estimate
from tilewise.pipelines.memory.estimate import estimate_memory
from tilewise.plugins.methods.base import methods
from tilewise.ui.cli.app import app
from tilewise.ui.cli.declared_options import declared_options
from tilewise.ui.common.options import method_config
from tilewise.ui.web.common import media
from tilewise.ui.web.common.messages import error_message
from tilewise.ui.web.common.safety import Address, Limits, RefusedError, check_outputs, parse_auth
from tilewise.ui.web.forms.form_parsing import choices, json_object, settings_from, settings_of, values_of
from tilewise.ui.web.forms.snippets import command_line, method_words, python_program
from tilewise.ui.web.jobs.clips import Studio
from tilewise.ui.web.jobs.job import Job
from tilewise.ui.web.jobs.job_queue import JobQueue
from tilewise.ui.web.jobs.models import Models
from tilewise.ui.web.server import Headers, serving
from tilewise.ui.web.tabs import attention
from tilewise.ui.web.tabs.attention_picture import as_means, cell, frame_size, one_frame, strip, strip_places, token_at
from tilewise.ui.web.tabs.attention_query import Place, draft_of_query, seen_from
from tilewise.ui.web.tabs.batch import _config, check_rows, refuse_files, seed_count
from tilewise.ui.web.tabs.history import past_clips

SMALL = {"height": 64, "width": 64, "frames": 9, "steps": 2}
PROMPT = "a red circle moving right"


@pytest.fixture(scope="module")
def models() -> Models:
    return Models(["demo"])


@pytest.fixture(scope="module")
def pipe():
    return load_pipeline("demo", device="cpu")


def settings_for(models, method="sta-balanced", **changes):
    return resolve_settings(models.skeleton("demo"), PROMPT, model="demo", method=method, **{**SMALL, **changes})


# --- what is refused ----------------------------------------------------------------------------------------------


def test_other_interfaces_need_a_password_or_force():
    for host in ("127.0.0.1", "localhost", "::1", "127.1.2.3"):
        assert Address(host).is_local
    for host in ("0.0.0.0", "192.168.1.5", "::", "some.host", "127.0.0.1.evil.example"):
        with pytest.raises(tilewise.ConfigError, match=r"--auth USER:PASSWORD.*--force"):
            Address(host)
        assert not Address(host, force=True).is_local
        assert Address(host, auth=("a", "b")).auth == ("a", "b")
    with pytest.raises(tilewise.ConfigError, match="port"):
        Address(port=70000)


def test_auth_is_never_echoed():
    assert parse_auth("me:pass:word") == ("me", "pass:word")
    assert parse_auth(None) is None
    for bad in ("hunter2", ":hunter2", "hunter2:"):
        with pytest.raises(tilewise.ConfigError) as caught:
            parse_auth(bad)
        assert "hunter2" not in str(caught.value)


def test_the_output_folder_holds_nothing_else(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert check_outputs(Path("outputs")) == tmp_path / "outputs"
    for bad in (".", "..", "/", "~"):
        with pytest.raises(tilewise.ConfigError, match="fetch every file"):
            check_outputs(Path(bad))
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "model_index.json").write_text("{}")
    with pytest.raises(tilewise.ConfigError, match="is a model"):
        check_outputs(tmp_path / "m")


def test_caps(models):
    limits = Limits(work=64 * 64 * 9 * 2)
    limits.check(settings_for(models))
    with pytest.raises(RefusedError, match=r"1\.5 times"):
        limits.check(settings_for(models, steps=3))
    with pytest.raises(RefusedError, match=r"2\.0 times"):
        limits.check(settings_for(models), clips=2)
    for bad in ({"work": 0}, {"waiting": 0}):
        with pytest.raises(tilewise.ConfigError):
            Limits(**bad)


def test_caps_cannot_be_passed_round_by_shape(models):
    limits, small = Limits(), values_of(settings_for(models))
    changes: dict[str, Any] = {"height": 16, "width": 16}
    for field, value, words in (
        ("frames", 4001, "1,025 frames"), ("height", 8208, "pixels in height"), ("width", 1e300, "pixels in width"),
        ("steps", 1001, "1,000 steps"), ("max_sequence_length", 1025, "1,024 text tokens"),
        ("max_sequence_length", 10**9, "text tokens"),
    ):  # fmt: skip
        with pytest.raises(RefusedError, match=words):
            settings_of(models, limits, {**small, **changes, field: value})
    with pytest.raises(RefusedError, match="text tokens"):
        limits.check(dataclasses.replace(settings_for(models), max_sequence_length=1025))


def test_a_batch_is_checked_before_it_is_planned():
    fields = {"height": 64, "width": 64, "frames": 9, "steps": 2, "max_sequence_length": None}
    rows = [Row(1, {"prompt": "a"}), Row(2, {"prompt": "b", "seed": 7})]
    check_rows(rows, fields, 199, Limits())
    with pytest.raises(RefusedError, match="these are 201 clips"):
        check_rows(rows, fields, 200, Limits())
    for field, value in (("frames", 4001), ("height", 10**9), ("steps", 10**400), ("max_sequence_length", 5000)):
        with pytest.raises(RefusedError, match="line 2: "):
            check_rows([rows[0], Row(2, {"prompt": "b", field: value})], fields, 1, Limits())
    refuse_files(rows)
    with pytest.raises(tilewise.ConfigError, match="line 2: decode is for the command line"):
        refuse_files([rows[0], Row(2, {"prompt": "b", "decode": "tiny=/etc/passwd"})])
    for text in ("0", "0-3", "0-3,7", " 5 - 9 , 1"):
        assert seed_count(text) == len(parse_seeds(text))
    assert seed_count(",".join(["0-99999999999"] * 1000)) == 10**14


HERE = ["127.0.0.1", "127.0.0.1:7860", "localhost", "LOCALHOST:1", "[::1]", "[::1]:7860", "127.1.2.3:80"]
ELSEWHERE = ["127.evil.com", "127.0.0.1.evil.com", "127.0.0.1.evil.com:80", "evil.com", "", "[::1", "::1.evil.com", "0.0.0.0",
             "evil.com@127.0.0.1", "127.0.0.1:x@evil.com", "[evil.com]"]  # fmt: skip


def answer(method: str = "GET", local: bool = True, **headers: str) -> int:
    """The status of Headers before an app that says 200 to everything."""
    sent: list[Any] = []

    async def inner(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def send(message: Any) -> None:
        sent.append(message)

    given = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    scope = {"type": "http", "method": method, "headers": given}
    asyncio.run(Headers(inner, local=local)(scope, None, send))
    if sent[0]["status"] == 200:
        assert b"content-security-policy" in dict(sent[0]["headers"])
    return sent[0]["status"]


def test_names_that_were_pointed_at_this_machine():
    assert [answer(host=host) for host in HERE] == [200] * len(HERE)
    assert [answer(host=host) for host in ELSEWHERE] == [421] * len(ELSEWHERE)
    assert answer() == 421
    assert answer(local=False, host="gpu.example") == 200


def test_other_sites_get_nothing():
    host = "localhost:7860"
    for method in ("GET", "POST", "OPTIONS"):
        assert answer(method, host=host, origin=f"http://{host}") == 200
        for origin in (
            "http://evil.com",
            "http://localhost:3000",
            "null",
            "http://[",
            "http://localhost:7860.evil.com",
        ):
            assert answer(method, host=host, origin=origin) == 403
    assert answer("POST", host=host) == 200  # not a browser
    assert answer("POST", host=host, sec_fetch_site="cross-site") == 403
    assert answer("POST", host=host, sec_fetch_site="same-site", origin=f"http://{host}") == 403
    assert answer("GET", host=host, sec_fetch_site="cross-site") == 200  # a link to the page
    assert answer("POST", host=host, sec_fetch_site="same-origin", origin="null") == 200  # our referrer policy


@pytest.mark.parametrize("cap", ["inf", "nan", "-inf", "0"])
def test_a_cap_that_is_no_number_is_a_usage_error(cap):
    result = CliRunner().invoke(app, ["ui", f"--max-pixels-frames-steps={cap}"])
    assert result.exit_code == 2, result.output


def test_only_models_of_the_list(models):
    with pytest.raises(RefusedError, match="not started with"):
        models.skeleton("../secret")
    with pytest.raises(RefusedError, match="not started with"):
        models.pipeline("/etc")
    with pytest.raises(SetupError):
        Models(["/no/such/folder"])
    with pytest.raises(tilewise.ConfigError, match="once"):
        Models(["demo", "demo"])


def test_a_batch_reads_no_file_of_the_server(tmp_path):
    (tmp_path / "x.json").write_text('{"method": "dense"}')
    with pytest.raises(tilewise.ConfigError, match="not a file"):
        _config(str(tmp_path / "x.json"), {})
    assert _config({"method": "dense"}, {}).method == tilewise.Dense()


def test_a_port_that_is_taken_is_a_sentence(tmp_path):
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = Address(port=taken.getsockname()[1])
        with (
            pytest.raises(SetupError, match=r"cannot listen on 127\.0\.0\.1.*--port"),
            serving(["demo"], tmp_path / "outputs", address, Limits()),
        ):
            pass


def test_sentences():
    assert error_message(RefusedError("no more")) == "no more"
    assert "fewer frames" in error_message(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"))
    assert "/secret/path" not in error_message(RuntimeError("/secret/path"))


# --- clips --------------------------------------------------------------------------------------------------------


def test_jobs_around_a_cancelled_one_are_as_each_alone(models, tmp_path):
    """One worker runs them on one denoiser, with a method that keeps its choice between steps."""
    method = tilewise.Draft(density=0.4, tile=(1, 4, 4), min_tokens=0, refresh=2)
    wanted = settings_for(models, method, steps=3, frames=5)

    def frames(made):
        return read_frames(made.path)[0]

    alone = frames(Studio(models, tmp_path / "alone").clip(wanted, Job("clip")))
    studio, job_queue, made = Studio(models, tmp_path / "queue"), JobQueue(waiting=3), []

    def cancelled_at_work(values, job: Job):
        tell = job.tell

        def cancel_in_denoising(phase: str, done: int, total: int) -> None:
            if done == 1 and total == 3:
                job.cancel()
            tell(phase, done, total)

        job.tell = cancel_in_denoising
        studio.clip(dataclasses.replace(wanted, seed=1), job)

    def clip(values, job: Job):
        made.append(studio.clip(wanted, job))
        return {}

    job_queue.register("clip", clip)
    job_queue.register("cancelled", cancelled_at_work)
    jobs = [job_queue.submit(kind, "", {}) for kind in ("clip", "cancelled", "clip")]
    assert [job.join(60) for job in jobs] == ["done", "cancelled", "done"]
    for one in made:
        assert np.array_equal(frames(one), alone)
    job_queue.close()


def test_a_preview_that_fails_does_not_fail_the_clip(models, pipe, tmp_path, monkeypatch):
    asked = []

    def broken(self, done, latents):
        asked.append(done)
        raise RuntimeError("no picture")

    monkeypatch.setattr(models, "_loaded", ("demo", pipe, LatentPreview(pipe)))
    monkeypatch.setattr(LatentPreview, "frames", broken)
    made = Studio(models, tmp_path).clip(settings_for(models, steps=3), Job("clip"))
    assert asked == [1] and made.path.is_file()
    assert [note for note in made.run["notes"] if "no live preview from step 1 on: no picture" in note]

    # a line that was written by something else hides no other
    manifest = tmp_path / "ui" / "manifest.jsonl"
    line = json.loads(manifest.read_text())
    odd = {**line, "run": {**line["run"], "batch": {"key": "odd"}}}
    del odd["frames"]
    manifest.write_text(json.dumps(odd) + "\n" + manifest.read_text())
    found, problems = past_clips(tmp_path)
    assert [past.path for past in found] == [made.path]
    assert len(problems) == 1 and "frames" in problems[0]

    # nor does one that is damaged, in History or for the next clip, which puts it aside
    manifest.write_text("{broken\n" + json.dumps(line) + "\n")
    found, problems = past_clips(tmp_path)
    assert [past.path for past in found] == [made.path] and "line 1 is damaged" in problems[0]
    with Studio(models, tmp_path).store.alone():
        assert manifest.read_text() == json.dumps(line) + "\n"
    assert manifest.with_name("manifest.damaged.txt").read_text() == "{broken\n"


@pytest.mark.parametrize("where", ["denoise", "decode"])
def test_a_pipeline_stops_within_a_step_and_is_as_before(tiny_pipe, where):
    settings = resolve_settings(tiny_pipe, PROMPT, method="sta", max_sequence_length=16, **{**SMALL, "steps": 4})
    clean = generate(tiny_pipe, settings).frames
    seen, stop = [], threading.Event()

    def progress(phase: str, done: int, total: int) -> None:
        seen.append((phase, done))
        if phase == where:
            stop.set()

    with pytest.raises(Cancelled), cancellable(tiny_pipe, stop.is_set):
        generate(tiny_pipe, settings, progress)
    assert seen[-1] == (where, 0)
    assert not tilewise.is_patched(tiny_pipe)
    assert not tiny_pipe.transformer._forward_pre_hooks
    assert not tiny_pipe.vae.decoder._forward_pre_hooks
    assert not any(isinstance(kept, torch.Tensor) for kept in tiny_pipe.vae._feat_map)
    assert (generate(tiny_pipe, settings).frames == clean).all()


# --- settings and what is made of them ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method",
    ["dense", "sta", "sta-fast", tilewise.STA(window=(1, 2, 3)), tilewise.STA(density=0.3, tile=(3, 2, 2)),
     tilewise.resolve("sta", steps=(0.1, 0.9), blocks="2:")],
    ids=str,
)  # fmt: skip
def test_settings_there_and_back(models, method):
    settings = settings_for(models, method, seed=2**63 - 1, negative="no", guidance=2.5, fps=7.0)
    values = json.loads(json.dumps(values_of(settings)))
    assert settings_of(models, Limits(), values) == settings
    assert settings_from(json_object(json.dumps(settings.to_dict())), models, Limits()) == settings


@pytest.mark.parametrize("field", [{"precision": "fp8"}, {"strict": True}, {"fuse": False}])
def test_what_no_control_can_say_is_not_dropped(models, field):
    settings = settings_for(models, dataclasses.replace(tilewise.resolve("sta"), **field))
    with pytest.raises(tilewise.ConfigError, match=rf"{next(iter(field))} .*tilewise generate --from"):
        values_of(settings)


def test_a_file_of_the_server_is_not_named_by_a_visitor(models):
    settings = dataclasses.replace(settings_for(models), decode="tiny=/etc/passwd")
    with pytest.raises(tilewise.ConfigError, match=r"decode 'tiny=/etc/passwd'.*tilewise generate --from"):
        values_of(settings)


@pytest.mark.parametrize(
    ("field", "value"),
    [("method", "nonsense"), ("options", "{"), ("options", "[]"), ("options", '{"windw": 1}'), ("seed", "-1"), ("seed", "1e3"),
     ("height", None), ("height", "abc"), ("frames", 9.5), ("guidance", float("nan")), ("prompt", "  "), ("blocks", "x"),
     ("from_step", 2), ("model", "/etc/passwd"), ("steps", 10**9)],
)  # fmt: skip
def test_values_that_cannot_be(models, field, value):
    values = {**values_of(settings_for(models)), field: value}
    with pytest.raises(tilewise.TilewiseError):
        settings_of(models, Limits(), values)


@pytest.mark.parametrize("text", ["", "[]", "{}", "null", '{"prompt": 1}', "[" * 5000, '{"method": 3, "prompt": "a"}'])
def test_json_that_holds_no_settings(models, text):
    with pytest.raises(tilewise.ConfigError):
        settings_from(json_object(text), models, Limits())


def test_the_help_of_the_command_names_every_method():
    words = set(re.split(r"[ ,()]+", METHOD_HELP))
    assert {*methods(), *tilewise.presets()} <= words


def test_every_registered_method_can_be_chosen():
    assert {name for _, name in choices()} == {*methods(), *tilewise.presets()}


def test_the_snippets_make_the_same_clip(models, pipe, tmp_path, capsys):
    settings = settings_for(
        models, tilewise.resolve("sta", steps=(0.5, 1.0)), seed=4, negative="a blue square", guidance=2.5
    )
    frames = generate(pipe, settings).frames
    program = python_program(models.skeleton("demo"), settings, "float32").replace(
        "'clip.mp4'", repr(str(tmp_path / "p.mp4"))
    )
    exec(compile(program, "snippet", "exec"), {})
    program_frames = read_frames(tmp_path / "p.mp4")
    plain = settings_for(models, tilewise.resolve("sta-balanced"), seed=4)
    words = command_line(plain, models.defaults("demo"), "float32", Path("clip.mp4"))
    assert words.startswith("tilewise generate --model demo --method sta-balanced --height 64")
    ran = CliRunner().invoke(app, shlex.split(words.replace(" -- ", f" --out {tmp_path}/c.mp4 -- "))[1:])
    assert ran.exit_code == 0, ran.output
    for expected, got in ((frames, program_frames), (generate(pipe, plain).frames, read_frames(tmp_path / "c.mp4"))):
        write_video(tmp_path / "expected.mp4", expected, 8)
        assert (read_frames(tmp_path / "expected.mp4") == got).all()
    # what the options cannot say, the clip can
    unsaid = dataclasses.replace(settings, max_sequence_length=None)
    assert command_line(unsaid, models.defaults("demo"), "float32", Path("a b.mp4")).endswith(
        "--from 'a b.mp4' --out again.mp4"
    )


@pytest.mark.parametrize(
    "config",
    [
        tilewise.resolve(tilewise.Draft(recall=0.9, select="head", within=tilewise.STA(window=(1, 3, 3))), blocks="1:"),
        tilewise.resolve(tilewise.STA(window=((1, 2, 3), (3, 3, 3))), steps=(0.5, 0.75), strict=True, precision="int8"),
        tilewise.resolve(tilewise.XAttention(stride=8, drift=None, always=("self", "first-frame"))),
        tilewise.resolve(tilewise.Inward(native=(8, 8), temperature=False), fuse=False, min_tokens=0),
        tilewise.resolve(tilewise.Neighborhood(window=(3, 5, 5), causal=(True, False, False)), vae=False),
    ],
    ids=lambda config: config.method.name,
)
def test_every_option_of_a_method_can_be_said(config):
    """The words that the page shows for a method make it again, through the command's own parameters."""
    said: list[dict] = []
    command = typer.Typer()
    command.command()(declared_options(CLIP_OPTIONS.values())(lambda options: said.append(options)))
    result = CliRunner().invoke(command, method_words(config))
    assert result.exit_code == 0, result.output
    assert method_config(said[0]["method"], said[0]) == config


# --- pictures -----------------------------------------------------------------------------------------------------


def test_the_preview_looks_like_the_clip(pipe):
    preview, shown = LatentPreview(pipe), []
    settings = resolve_settings(
        pipe, "a red circle moving right on a blue background", method="dense", **{**SMALL, "steps": 4}
    )
    clip = generate(pipe, settings, preview=lambda done, total, x: shown.append(preview.frames(done, x)))
    assert len(shown) == 4
    assert shown[-1].shape == (5, 16, 16, 3)
    groups = [clip.frames[:1], *np.split(clip.frames[1:], 4)]
    small = np.stack([group.mean(0) for group in groups]).reshape(5, 16, 4, 16, 4, 3).mean((2, 4))
    alike = [np.corrcoef(frames.ravel(), small.ravel())[0, 1] for frames in shown]
    assert alike[-1] > 0.9
    assert alike[1] > 0.5 > alike[0] + 0.1  # from the second step on, where the solver is heading is seen
    assert preview.frames(1, torch.zeros(1, 77, 64)) is None


def test_a_far_field_is_drawn_as_the_means_of_its_cells():
    colours = np.random.default_rng(0).integers(0, 256, (8, 12, 3)).astype(np.uint8)
    cells = np.array([[0, 1, 1], [2, 2, 0]])
    drawn = np.asarray(as_means(Image.fromarray(colours), cells)).astype(float)
    assert (drawn[:4, :4] == colours[:4, :4]).all() and (drawn[4:, 8:] == colours[4:, 8:]).all()
    for part in (np.s_[:4, 4:], np.s_[4:, :8]):
        assert np.abs(drawn[part] - colours[part].reshape(-1, 3).mean(0)).max() <= 0.5


def test_the_region_of_a_place(models):
    settings = settings_for(models, tilewise.resolve(tilewise.STA(window=(3, 3, 3)), steps=(0.5, 1.0), blocks="1:"))
    skeleton = models.skeleton("demo")
    seen = seen_from(skeleton, settings, Place(1, 2, 3, 0, 2, 5))
    method, grid = settings.method.method, Grid(5, 8, 8)
    layout = method.layout(grid)
    plan = method.plan(layout, 4, torch.device("cpu"))
    assert (seen.region == region_of_query(plan, layout, (1, 2, 3), 0).numpy()).all()
    assert not seen.region.all()
    assert seen_from(skeleton, settings, Place(1, 2, 3, 0, 1, 5)).region.all()  # a dense step
    assert seen_from(skeleton, settings, Place(1, 2, 3, 0, 2, 0)).region.all()  # a dense block
    assert seen.means is None
    coarse = settings_for(models, tilewise.Config(tilewise.STA(window=(3, 3, 3), far="cells"), steps=(0.5, 1.0)))
    both = seen_from(skeleton, coarse, Place(1, 2, 3, 0, 2, 5))
    assert ((both.means > 0) == ~both.region).all()
    large, small, _ = attention.pictures(both, None, coarse)
    assert np.asarray(large).std() > 0 and small.size[0] > large.size[0] / 4
    assert "as means" in attention.words(both, False) and "as means" not in attention.words(seen, False)
    far = seen_from(skeleton, settings, Place(99, -1, 99, 99, 99, 99)).place
    assert far == Place(4, 0, 7, 3, 2, 7)


def test_what_was_expected_lies_where_the_blocks_are():
    grid = Grid(2, 4, 4)
    layout = tilewise.STA(tile=(1, 2, 2)).layout(grid)
    draft = torch.eye(layout.blocks) * 0.75 + 0.25 / layout.blocks
    spread = draft_of_query(draft, layout, (1, 3, 0))
    assert spread.shape == (2, 4, 4)
    assert spread.sum() == pytest.approx(1)
    assert (spread[1, 2:, :2] > 0.18).all()
    assert (np.delete(spread.reshape(-1), [24, 25, 28, 29]) < 0.01).all()


def test_a_picture_is_written_once(tmp_path):
    """A browser may be reading it: Gradio's own would be written over by the next drawing of the same."""
    image = Image.fromarray(np.full((8, 9, 3), 40, np.uint8))
    path = media.kept_picture(image, tmp_path / "cache")
    inode = path.stat().st_ino
    os.utime(path, (0, 0))
    assert media.kept_picture(image.copy(), tmp_path / "cache") == path
    assert path.stat().st_ino == inode
    assert path.stat().st_mtime > 0  # shown again: not old
    assert np.abs(np.asarray(Image.open(path)).astype(int) - 40).max() <= 2
    other = media.kept_picture(Image.fromarray(np.zeros((8, 9, 3), np.uint8)), tmp_path / "cache")
    assert sorted((tmp_path / "cache").iterdir()) == sorted([path, other])


def test_clicks_and_drawings_agree():
    size = frame_size((832, 480), 640)
    for place in ((0, 0), (29, 51), (7, 33)):
        left, top, right, bottom = cell(place, (30, 52), size)
        for x, y in ((left, top), (right, bottom)):
            assert token_at(x + 0.5, y + 0.5, (30, 52), size) == place
    from PIL import Image

    seen = np.zeros((3, 4, 6), bool)
    seen[:, 1:3, 2:4] = True
    pictures = [Image.new("RGB", (96, 64), (0, 0, 200))] * 3
    drawn = np.asarray(one_frame(pictures[0], seen[0], None, 96))
    assert drawn[32, 48, 2] > 170  # seen: its own colour
    assert drawn[5, 5].max() < 60  # not seen: dark and grey
    sheet = strip(pictures, seen, (1, 2, 3), 96)
    left, top = strip_places(3, (96, 64))[2]
    assert np.asarray(sheet)[top + 32, left + 48, 2] > 170


def test_memory_is_estimated(models):
    skeleton = load_skeleton("demo")
    found = []
    for height in (64, 128):
        settings = settings_for(models, height=height, width=height)
        found.append(estimate_memory(skeleton, settings, explain_settings(skeleton, settings), torch.float32))
    weights = sum(
        f.stat().st_size for f in Path(tilewise.pipelines.loading.model_folder.DEMO_FOLDER).rglob("*.safetensors")
    )
    assert weights < found[0].weights < 2.2 * weights  # they are stored in 16 bits and run in 32
    assert 3.5 < found[1].decode / found[0].decode < 4.5
    assert found[1].denoise == 4 * found[0].denoise
    assert found[0].notes == ()


@pytest.mark.parametrize("frames", [21, 121])  # a layer of the decoder is the peak, or the joining of the frames
def test_memory_of_a_long_clip_is_that_of_its_whole_decode(frames, monkeypatch):
    skeleton = load_skeleton("demo")
    short = memory_estimate._decode_bytes(skeleton, 64, 64, frames)
    monkeypatch.setattr(memory_estimate, "DECODED", 10**6)
    memory_estimate._decode_bytes.cache_clear()
    assert memory_estimate._decode_bytes(skeleton, 64, 64, frames) == pytest.approx(short, rel=0.01)


def test_memory_is_estimated_alike_in_many_threads(models):
    skeleton, sizes = models.skeleton("demo"), [64, 80, 96, 112]

    def decode(size: int) -> int | None:
        settings = settings_for(models, height=size, width=size)
        return estimate_memory(skeleton, settings, explain_settings(skeleton, settings), torch.float32).decode

    memory_estimate._decode_bytes.cache_clear()
    alone = [decode(size) for size in sizes]
    memory_estimate._decode_bytes.cache_clear()
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(decode, sizes)) == alone
    assert None not in alone


def test_what_comes_from_outside_is_escaped():
    evil = '<img src=x onerror="alert(1)">'
    for html in (
        media.video(Path("/o/a b.mp4"), evil, version="1"),
        media.download(Path(f"/o/{evil}.mp4")),
        media.table([(evil, "")]),
    ):
        assert "<img" not in html
