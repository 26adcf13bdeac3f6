"""The example on an empty page: a clip of the bundled model, dense and sparse, whose settings can be loaded."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

pytest.importorskip("gradio", reason="the page needs Gradio: pip install -e '.[ui]'")

import global_state
import gradio as gr

from tilewise.ui.web.common.safety import Limits
from tilewise.ui.web.forms.controls import Controls, prompt_box
from tilewise.ui.web.forms.form_parsing import FIELDS, FIRST, settings_of
from tilewise.ui.web.jobs.models import Models
from tilewise.ui.web.tabs.examples import Examples, examples, examples_html, timing
from tilewise.ui.web.tabs.job_view import job_box


@pytest.fixture(scope="module")
def models() -> Models:
    return Models(["demo"], device="cpu")


def built(models: Models) -> Examples:
    with global_state.restored(), gr.Blocks(analytics_enabled=False):  # Gradio switches telemetry off, for good
        return Examples(Controls(models, Limits(), prompt_box()), job_box("generate"))


def test_both_clips_are_of_one_prompt_and_seed():
    dense, sparse = examples()
    assert dense.settings.is_dense
    assert dense.settings == dataclasses.replace(sparse.settings, method=dense.settings.method)
    assert sum(made.path.stat().st_size for made in examples()) < 40_000
    for made in examples():
        assert made.run["content"]["colour"] and made.run["content"]["shape"] and made.run["content"]["motion"]


def test_captions_say_what_the_clips_metadata_says():
    html = examples_html()
    assert html.count("<video") == html.count("data:video/mp4;base64,") == 2
    for made in examples():
        assert timing(made) in html
        assert f"{made.run['seconds']['total']:.0f} s on" in timing(made)
    assert "<b>" + examples()[0].settings.prompt + "</b>" in html


def test_its_settings_fill_the_controls(models):
    values = built(models).load()
    assert len(values) == len(FIELDS)
    assert settings_of(models, Limits(), dict(zip(FIELDS, values, strict=True))) == examples()[1].settings
    assert dict(zip(FIELDS, values, strict=True))["method"] == FIRST


def test_it_is_shown_where_there_is_no_job_and_its_model_is_offered(models, tiny_pipe_dir):
    def shown(models: Models, job: str) -> tuple[bool, Any]:
        box, html = built(models).show(job)
        return box["visible"], html

    assert shown(models, "") == (True, examples_html())
    assert shown(models, "12ab")[0] is False
    assert shown(Models([str(tiny_pipe_dir)], device="cpu"), "")[0] is False


def test_files_that_are_damaged_leave_the_page_without_an_example(models, monkeypatch):
    def broken() -> Any:
        raise OSError("no such file")

    example = built(models)
    monkeypatch.setattr("tilewise.ui.web.tabs.examples.examples", broken)
    assert example.show("")[0]["visible"] is False
    assert all(value == gr.skip() for value in example.load())
