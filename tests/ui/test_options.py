"""Each option is declared once, on the field that it sets: the command line, a batch's columns and the page all have it."""

from __future__ import annotations

import dataclasses

import global_state
import pytest
import typer

pytest.importorskip("gradio", reason="the page needs Gradio: pip install -e '.[ui]'")

import gradio as gr

from tilewise.pipelines.batch.input import FIELDS
from tilewise.pipelines.conditioning.files import ROLES
from tilewise.pipelines.generation.settings import CLIP_OPTIONS, GenerateSettings
from tilewise.pipelines.highres.settings import (
    PRECISIONS,
    ROPE,
    ROPE_TIME,
    TWO_STAGE_OPTIONS,
    UPSCALES,
    HighresSettings,
)
from tilewise.pipelines.highres.upscale import FRAMES
from tilewise.pipelines.options import field_values, option, options_of
from tilewise.pipelines.streaming.settings import STREAM_OPTIONS
from tilewise.plugins.config import PRECISIONS as CONFIG_PRECISIONS
from tilewise.plugins.errors import ConfigError
from tilewise.plugins.guidance.rope_scaling import SPATIAL, TEMPORAL
from tilewise.ui.cli.app import app
from tilewise.ui.cli.declared_options import declared_options

OF_MANY = {"prompt", "seed"}  # lines and --seeds of a batch have them


def parameters(command: str) -> dict[str, typer.core.TyperOption]:
    return {parameter.name: parameter for parameter in typer.main.get_command(app).commands[command].params}


@pytest.fixture(scope="module")
def page_ids(tmp_path_factory) -> set[str]:
    """Ids of what stands on the page."""
    from tilewise.ui.web.common.safety import Limits
    from tilewise.ui.web.jobs.job_queue import JobQueue
    from tilewise.ui.web.jobs.models import Models
    from tilewise.ui.web.page import Page

    with global_state.restored():  # Gradio sets environment variables
        page = Page(Models(["demo"], device="cpu"), Limits(), JobQueue(1), tmp_path_factory.mktemp("outputs"))
    return {block.elem_id for block in page.blocks.blocks.values() if getattr(block, "elem_id", None)}


def missing(settings, command_line, columns, ids, prefix="") -> list[str]:
    """Options of a settings class that one of the three does not have."""
    return [
        name
        for name in options_of(settings)
        if name not in command_line or name not in columns or f"{prefix}{name.replace('_', '-')}" not in ids
    ]


def test_every_setting_is_reachable(page_ids):
    # Visitors of the page name no files of the server.
    files = {name for name, one in options_of(GenerateSettings).items() if one.names_file}
    page_ids = page_ids | files.difference(ROLES)
    for command, elsewhere in (("generate", set()), ("batch", OF_MANY)):
        given = {*parameters(command), *elsewhere}
        assert missing(GenerateSettings, given, FIELDS, page_ids) == []
        assert missing(HighresSettings, given, FIELDS, page_ids, "highres-") == []
    assert "highres-rope-time" in page_ids


def test_a_setting_that_is_not_reachable_is_found(page_ids):
    @dataclasses.dataclass(frozen=True)
    class More(HighresSettings):
        sharpness: float = option(1.0, help="of the clip.")

    assert missing(More, parameters("generate"), FIELDS, page_ids, "highres-") == ["sharpness"]

    @dataclasses.dataclass(frozen=True)
    class Undeclared(HighresSettings):
        sharpness: float = 1.0

    with pytest.raises(TypeError, match=r"Undeclared.sharpness declares no option"):
        options_of(Undeclared)


def test_a_new_field_is_an_option_and_a_control():
    """One field is all that it takes."""
    from tilewise.ui.web.forms.option_controls import control, given_values, said_values

    @dataclasses.dataclass(frozen=True)
    class Settings:
        grain: str | None = option(None, help="Film grain.", choices=("fine", "coarse"), shown_default="none")
        amount: int = option(3, help="How much.")
        even: bool = option(False, help="Alike everywhere.")

    options = options_of(Settings)
    got = []
    command = typer.Typer()
    command.command()(declared_options(options.values())(lambda options: got.append(options)))
    from typer.testing import CliRunner

    result = CliRunner().invoke(command, ["--grain", "fine", "--amount", "7", "--even"])
    assert result.exit_code == 0, result.output
    assert got == [{"grain": "fine", "amount": 7, "even": True}]
    assert Settings(**field_values(Settings, got[0])) == Settings("fine", 7, True)
    words = " ".join(CliRunner().invoke(command, ["--help"], env={"COLUMNS": "120"}).output.split())
    assert "Film grain. One of fine, coarse." in words and "(3)" in words
    with gr.Blocks():
        made = [control(one) for one in options.values()]
    assert [type(each).__name__ for each in made] == ["Radio", "Number", "Checkbox"]
    said = said_values(options, Settings("coarse", 4))
    assert given_values(options, said) == {"grain": "coarse", "amount": 4, "even": False}
    assert given_values(options, {"grain": "auto", "amount": None}) == {}


def test_choices_are_what_is_served():
    """Declarations do without PyTorch, and so without the modules that serve these names."""
    assert set(ROPE) == set(SPATIAL)
    assert set(ROPE_TIME) == set(TEMPORAL)
    assert set(PRECISIONS) == set(CONFIG_PRECISIONS)
    assert set(UPSCALES) == {*FRAMES, "latent"}


@pytest.mark.parametrize("name", sorted({*CLIP_OPTIONS, *TWO_STAGE_OPTIONS, *STREAM_OPTIONS}))
def test_every_option_has_help(name):
    shown = parameters("generate")[name].help
    assert shown and shown[0].isalnum() and shown.rstrip().endswith((".", ")"))


@pytest.mark.parametrize("text", ["480", "480x", "x832", "480x832x3", "²x3", "-1x4", "1e3x4", "9" * 30 + "x4", ""])
def test_sizes_that_cannot_be(text):
    from tilewise.pipelines.options import parse_size

    with pytest.raises(ConfigError, match="takes a height and width such as 480x832"):
        parse_size(text)
