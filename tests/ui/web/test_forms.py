"""What the page makes of values and says in HTML, without a browser: measures of methods, its address, thumbnails, tables."""

from __future__ import annotations

import dataclasses
import json
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("gradio", reason="the page needs Gradio: pip install -e '.[ui]'")

import global_state
import gradio as gr
import numpy as np
import torch

import tilewise
from tilewise.pipelines.generation.resolve import resolve_settings
from tilewise.pipelines.loading.load import load_skeleton
from tilewise.pipelines.media.video import write_video
from tilewise.plugins.text_format import counted
from tilewise.ui.common.shares import shares_words
from tilewise.ui.web.common import media
from tilewise.ui.web.common.safety import Limits, RefusedError
from tilewise.ui.web.common.summary_table import summary_html
from tilewise.ui.web.forms.controls import read_calibration
from tilewise.ui.web.forms.form_parsing import config_of, method_values, name_of
from tilewise.ui.web.forms.method_controls import MethodControls, measures_of
from tilewise.ui.web.forms.snippets import method_words
from tilewise.ui.web.forms.url_state import UrlState
from tilewise.ui.web.jobs import fit
from tilewise.ui.web.jobs.job_queue import JobQueue
from tilewise.ui.web.jobs.models import Models
from tilewise.ui.web.page import Page
from tilewise.ui.web.server import must_be_saved
from tilewise.ui.web.tabs.history import settings_in_file
from tilewise.ui.web.tabs.past_clips import Past, gallery_html


@pytest.mark.parametrize(
    ("method", "measure"),
    [
        (tilewise.STA(density=0.3), "density"),
        (tilewise.STA(window=(1, 2, 3)), "window"),
        (tilewise.STA(window=((1, 1, 1),) * 4), "window"),  # one a head: no three fields can say it
        (tilewise.Draft(recall=0.8), "recall"),
        (tilewise.Draft(density=0.6, refresh=2), "density"),
    ],
    ids=str,
)  # fmt: skip
def test_how_much_is_kept_has_its_own_controls(method, measure):
    config = dataclasses.replace(tilewise.resolve("sta"), method=method)
    said = {"method": method.name, **json.loads(json.dumps(method_values(config)))}
    assert said["measure"] == measure
    assert (measure in json.loads(said["options"])) == ("((" in str(method))
    assert config_of(said) == config


@pytest.mark.parametrize("method", ["dense", "sta", "draft-fast"])
@pytest.mark.parametrize("cache", ["none", "first-block", "taylor:cache_interval=3:use_lite_mode=true"])
def test_a_step_cache_has_a_control(method, cache):
    config = tilewise.resolve(method, cache=cache)
    said = {"method": method, **json.loads(json.dumps(method_values(config)))}
    assert said["cache"] == cache
    assert config_of(said) == config
    with pytest.raises(tilewise.ConfigError, match="Did you mean 'taylor'"):
        config_of(said | {"cache": "tailor"})


def test_steps_by_number_have_a_control():
    config = tilewise.resolve("draft-fast", steps="1:")
    said = {"method": "draft-fast", **json.loads(json.dumps(method_values(config)))}
    assert said["step_numbers"] == "1:" and config_of(said) == config
    assert config_of(said | {"step_numbers": " "}).steps == (0.25, 1.0)  # by the shares
    with pytest.raises(tilewise.ConfigError, match="steps"):
        config_of(said | {"step_numbers": "first"})


def test_a_calibration_has_a_control(tmp_path):
    table = {"denoiser": {"model": "M", "heads": [2, 2], "weights": []}, "heads": [["01", "10"]]}
    made = {"name": "calibrated", "base": {"name": "draft"}, "densities": [0.25, 1.0], "noise": [], "tables": [table]}
    config = tilewise.Config.from_dict({"method": made, "steps": "2:", "blocks": "1:", "cache": "pab"})
    said = {"method": name_of(config), **json.loads(json.dumps(method_values(config)))}
    assert said["method"] in tilewise.presets() and config_of(said) == config
    assert config_of(said | {"cache": "none"}).cache is None
    file = tmp_path / "calibration.json"
    tilewise.save_config(config, file)
    assert config_of(said | {"calibration": read_calibration(str(file))}) == config
    tilewise.save_config("sta", file)
    with pytest.raises(gr.Error, match="'sta' is no calibration"):
        read_calibration(str(file))


@pytest.mark.parametrize("method", ["dense", "sta"])
def test_an_addition_has_a_control(method):
    config = tilewise.resolve(method, add="raunet:t1=0.5")
    said = {"method": method, **json.loads(json.dumps(method_values(config)))}
    assert said["add"] == "raunet:t1=0.5" and config_of(said) == config
    assert method_words(config)[:4] == ["--method", method, "--add", "raunet:t1=0.5"]


def test_the_command_of_a_clip_says_its_step_cache_and_numbered_steps():
    config = tilewise.resolve("draft-fast", cache="taylor:cache_interval=3", steps="1:")
    words = method_words(config)
    assert words == ["--method", "draft-fast", "--cache", "taylor:cache_interval=3", "--steps-sparse", "1:"]
    assert method_words(tilewise.resolve("dense", cache="pab")) == ["--method", "dense", "--cache", "pab"]


def test_what_a_step_cache_did_is_told():
    row = {"cache": "pab", "denoiser": "transformer", "reused": 3, "forwards": 8, "skipped": 24, "modules": 64}
    told = summary_html({"rows": [], "cache": [{**row, "skips": "attention layers"}]})
    assert "cache pab, transformer: 3 of 8 forwards reused, 24 of 64 attention layers skipped" in told


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"options": '{"density": 0.2}'}, "density has a control of its own"),
        ({"options": '{"window": [3, 3, 3]}'}, "window has a control of its own"),
        ({"measure": "window", "window_t": 1.5}, "whole numbers t, h, w"), ({"measure": "window", "window_h": None}, "window h"),
        ({"density": "much"}, "density must be a number"), ({"density": float("inf")}, "density must be a number"),
        ({"density": 0}, "density must be in"), ({"measure": "window", "window_w": 0}, "window"),
    ],
)  # fmt: skip
def test_measures_that_cannot_be(changes, words):
    with pytest.raises(tilewise.ConfigError, match=words):
        config_of({"method": "sta", **method_values(tilewise.resolve("sta-fast")), **changes})


def test_only_what_a_method_has_is_shown():
    assert measures_of("sta-fast") == ["density", "window"] and measures_of("draft") == ["density", "recall"]
    assert measures_of("dense") == measures_of("nonsense") == []
    with gr.Blocks():
        controls = MethodControls(tilewise.resolve("sta-fast"))
    for name, measure, shown in (
        ("sta", "window", "window"),
        ("draft", "window", "density"),
        ("dense", "density", None),
        ("neighborhood", "density", "window"),
    ):
        radio, *rest = controls.show(name, measure)
        assert radio["visible"] == (len(measures_of(name)) > 1)
        assert [update["visible"] for update in rest] == [shown == each for each in ("density", "recall", "window")]


def test_the_address_says_what_controls_say_and_nothing_else():
    with gr.Blocks():
        fields = {
            "prompt": gr.Textbox("a"), "height": gr.Slider(16, 64, 32), "method": gr.Dropdown(["sta", "dense"], value="sta"),
            "guided": gr.Radio(["all", "cond"], value="all"), "fps": gr.Number(8), "temperature": gr.Checkbox(True),
        }  # fmt: skip
        state = UrlState(fields)
    script = state.script()
    assert '"start": {"prompt": "a", "height": 32' in script
    said = {
        "prompt": "</script>",
        "height": "48",
        "method": "dense",
        "guided": "cond",
        "fps": "7.5",
        "temperature": "false",
    }
    assert state.read(said, {}) == ["</script>", 48, "dense", "cond", 7.5, False]
    for odd in ({"height": "nan"}, {"height": "x"}, {"method": "/etc"}, {"guided": ""}, {"prompt": "x" * 2001}, {}):
        assert state.read(odd, {}) == [gr.skip()] * 6
    assert state.read({}, {"height": 16})[1] == 16
    fields["prompt"].value = "</script><script>alert(1)"
    assert "</script><script>alert" not in state.script()


def test_neighbours_differences_are_marked(tmp_path):
    clip = write_video(tmp_path / "c.png", np.full((1, 16, 24, 3), 90, np.uint8), 8)
    method = tilewise.resolve("sta-fast").to_dict()
    line = {
        "prompt": "a <b>", "method": method, "seed": 1, "frames": 1, "height": 16, "width": 24, "steps": 2, "guidance": 3.0,
        "fps": 8, "model": "demo", "run": {"started": "2026-01-01T10:00:00"},
    }  # fmt: skip
    clips = [
        Past("3", clip, {**line, "seed": 2, "guidance": 4.0}),
        Past("2", clip, {**line, "seed": 2}),
        Past("1", tmp_path / "gone.png", line),
    ]
    (tmp_path / "gone.png").write_text("no picture")
    cards = gallery_html(clips, tmp_path / "cache", "2").split('<button type="button"')[1:]
    assert ["<mark>seed 2</mark>" in card for card in cards] == [False, True, False]
    assert ["<mark>guidance 4.0</mark>" in card for card in cards] == [True, False, False]
    assert ["<img" in card for card in cards] == [True, True, False]
    assert ['aria-pressed="true"' in card for card in cards] == [False, True, False]
    assert all("a &lt;b&gt;" in card and "1 frame of 16×24" in card for card in cards)


def test_settings_are_read_from_files_that_hold_them(tmp_path):
    clip = write_video(tmp_path / "c.png", np.zeros((1, 16, 16, 3), np.uint8), 8, settings={"prompt": "x"})
    assert settings_in_file(str(clip)) == {"prompt": "x"}
    (tmp_path / "c.json").write_text('{"prompt": "y"}')
    assert settings_in_file(str(tmp_path / "c.json")) == {"prompt": "y"}
    (tmp_path / "bad.json").write_bytes(b"\xff\xfe")
    plain = write_video(tmp_path / "plain.png", np.zeros((1, 16, 16, 3), np.uint8), 8)
    for path, words in (
        (tmp_path / "bad.json", "not UTF-8"),
        (tmp_path / "x.exe", "not from x.exe"),
        (plain, "no settings"),
    ):
        with pytest.raises(tilewise.TilewiseError, match=words):
            settings_in_file(str(path))


def test_cost_stands_beside_density():
    run = {"density": 0.25, "cost": 0.3124}
    rows = media.run_share_rows(run)
    assert [name for name, _ in rows] == ["density where sparse", "cost, means counted too"]
    assert rows[0][1].endswith("0.250") and rows[1][1].endswith("0.312")
    for without in ({"density": 0.25}, {"density": 0.25, "cost": 0.25}, {"density": 1.0, "cost": 1.0}):
        assert len(media.run_share_rows(without)) == 1
    assert shares_words(run) == "density 0.250, cost 0.312" and shares_words({"density": 1.0}) == "density 1.000"


def test_a_summary_is_a_table():
    row = {"denoiser": "transformer", "layers": "1-7", "kind": "fallback", "calls": 1200, "density": None, "backend": "torch",
           "seconds": 1.234, "reason": "a <reason>"}  # fmt: skip
    html = summary_html(
        {"rows": [row], "recall": 0.9, "broken": 1, "vae": [], "notes": ["a note"], "skipped_layers": {}}
    )
    for words in (
        "fallback: a &lt;reason&gt;",
        "1,200",
        "<td>–</td>",
        "1.23",
        "estimated: 0.900",
        "1 list of",
        "a note",
    ):
        assert words in html
    assert "dense" in summary_html(None) and "cost" not in html
    row |= {"density": 0.25, "cost": 0.3124, "kind": "sparse", "reason": ""}
    html = summary_html({"rows": [row]})
    assert "<td>0.250</td><td>0.312</td>" in html and html.count("<th ") == 8


def test_a_clip_that_cannot_fit_is_refused_with_its_numbers(tiny_pipe_dir, monkeypatch):
    monkeypatch.setattr("tilewise.pipelines.memory.fit.device_bytes", lambda device: 2**30)
    skeleton = load_skeleton(tiny_pipe_dir)
    models = SimpleNamespace(
        skeleton=lambda name: skeleton, dtype="float32", device=torch.device("cpu"), shared=None, parts=1
    )
    settings = resolve_settings(skeleton, "x", method="dense", height=2048, width=2048, frames=101)
    with pytest.raises(RefusedError, match=r"does not fit: it needs about 6\.61 GiB, and cpu has 1\.00 GiB"):
        fit.check_fits(models, settings)
    fit.check_fits(models, resolve_settings(skeleton, "x", method="dense"))


@pytest.mark.parametrize(
    ("path", "kind", "saved"),
    [
        ("/gradio_api/file=/o/a.html", b"text/html; charset=utf-8", True),
        ("/gradio_api/file=/o/a.svg", b"image/svg+xml", True),
        ("/file=/o/a.json", b"application/json", True),
        ("/gradio_api/file=/o/a.mp4", b"video/mp4", False),
        ("/gradio_api/file/o/a.png", b"image/png", False),
        ("/", b"text/html", False),
        ("/assets/a.js", b"text/javascript", False),
    ],
)
def test_only_clips_and_pictures_are_shown_by_a_browser(path, kind, saved):
    assert must_be_saved(path, kind) is saved


def test_counts():
    assert [counted(n, "frame") for n in (0, 1, 2, 1025)] == ["0 frames", "1 frame", "2 frames", "1,025 frames"]


def test_handlers_of_one_event_do_not_keep_each_other_busy(tmp_path):
    """Gradio repeats an event as a whole when a handler with "always_last" was busy: two of them on one would do so for ever."""
    with global_state.restored():  # Gradio switches telemetry off, for good
        page = Page(Models(["demo"]), Limits(), JobQueue(1), tmp_path)
    waiting: dict[tuple[Any, str], list[str]] = {}
    for handler in page.blocks.fns.values():
        for target in handler.targets:
            if handler.trigger_mode == "always_last" and handler.fn is not None and target[0] is not None:
                waiting.setdefault(target, []).append(handler.name)
    assert len(waiting) > 20
    assert [names for names in waiting.values() if len(names) > 1] == []
