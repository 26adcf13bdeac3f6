"""The documentation's Python runs, block after block of a page, and its links lead somewhere.

Pipelines that a page loads from the hub are stood in for: by the tiny Wan pipeline, or by a tiny random denoiser of the
class that the real one has. A call of theirs is made small, and checked for what the page's lines ask of the real one.
"""

from __future__ import annotations

import importlib
import re
import shlex
import sys
import types
from pathlib import Path
from typing import Any

import diffusers
import pytest
import tiny_wan
import torch
import typer
from typer.testing import CliRunner

import tilewise
from benchmarks import family_inputs
from tilewise.pipelines.media.video import read_frames
from tilewise.plugins.methods import base
from tilewise.ui.cli.app import app
from tilewise.ui.common.options import method_config

DOCS = Path(__file__).parents[1] / "docs"
PAGES = sorted(DOCS.glob("*.md"))
RUN = [*PAGES, DOCS.parent / "README.md"]
WRITTEN = [*RUN, DOCS.parent / "CONTRIBUTING.md"]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
SHELL = re.compile(r"^```\n(.*?)^```$", re.DOTALL | re.MULTILINE)
RESULTS = re.compile(r"<!-- results .*?<!-- /results -->", re.DOTALL)
FILE = re.compile(r"(?<![\w/.-])(?:kernels|plugins|pipelines|ui|src|tests|examples|benchmarks|docs)/[\w/.-]*\w/?")
NAME = re.compile(r"(?<![\w/.-])tilewise\.(?:kernels|plugins|pipelines|ui)(?:\.\w+)+")
LINK = re.compile(r"\]\((?!https?:|#)([^)#]+)(?:#[^)]*)?\)")
SMALL = {"height": 64, "width": 64, "num_frames": 9, "num_inference_steps": 4}
STAND_INS = {
    "HunyuanVideoPipeline": "HunyuanVideoTransformer3DModel",
    "LTXPipeline": "LTXVideoTransformer3DModel",
    "CogVideoXPipeline": "CogVideoXTransformer3DModel",
    "FluxPipeline": "FluxTransformer2DModel",
}


class StandIn:
    """What a page may do with a pipeline: move it, patch it, call it. Each call runs the denoiser once."""

    def __init__(self, kind: str) -> None:
        self.work = next(work for work in family_inputs.TINY if work.model == STAND_INS[kind])
        self.transformer = self.work.build(torch.device("cpu"), torch.float32)

    def to(self, *where: Any) -> StandIn:
        return self

    def __call__(self, prompt: str, **arguments: int) -> Any:
        # The page's size must be one that the real pipeline takes: explain refuses others.
        call = family_inputs.Call(torch.device("cpu"), torch.float32, self.work.size, self.work.text, self.transformer)
        with torch.no_grad():
            self.transformer(**self.work.inputs(call), return_dict=False)
        return types.SimpleNamespace(frames=[None], images=[None])


@pytest.fixture
def no_downloads(monkeypatch, tmp_path):
    """Everything from the hub is tiny and random, files are written to a folder that goes away."""

    def wan(*_: Any, **__: Any) -> Any:
        pipe = tiny_wan.tiny_pipeline()
        pipe.set_progress_bar_config(disable=False)  # as diffusers loads one
        kind = type(pipe)

        def small(self: Any, prompt: str, **arguments: Any) -> Any:
            return kind.__call__(self, prompt, **{**arguments, **SMALL})

        pipe.__class__ = type(kind.__name__, (kind,), {"__call__": small, "to": lambda self, *_: self})
        return pipe

    monkeypatch.setattr(diffusers.WanPipeline, "from_pretrained", wan)
    for name in STAND_INS:
        monkeypatch.setattr(getattr(diffusers, name), "from_pretrained", lambda *_, name=name, **__: StandIn(name))
    monkeypatch.chdir(tmp_path)
    torch.save({"generator": tiny_wan.tiny_transformer(seed=1).state_dict()}, "self_forcing_dmd.pt")


def blocks_of(page: Path) -> list[str]:
    """The page's Python, with less work of the same kind."""
    less = {
        "width=256, steps=20": "width=256, steps=2, frames=5",
        "steps=20": "steps=2",
        "height=256, width=256": "height=144, width=160",
    }
    blocks = BLOCK.findall(page.read_text())
    for large, small in less.items():
        blocks = [block.replace(large, small) for block in blocks]
    return blocks


@pytest.mark.parametrize("page", [page for page in RUN if blocks_of(page)], ids=lambda page: page.stem)
def test_code_runs(page, no_downloads, monkeypatch, capsys):
    module = types.ModuleType("docs_" + page.stem.replace("-", "_"))
    monkeypatch.setitem(sys.modules, module.__name__, module)  # where dataclasses look for their names
    monkeypatch.setattr(base, "_REGISTRY", {name: base._REGISTRY[name] for name in base.methods()})
    names = module.__dict__
    for number, block in enumerate(blocks_of(page)):
        before = names.get("pipe")
        exec(compile(block, f"{page.name}, block {number}", "exec"), names)
        pipe = names.get("pipe")
        if isinstance(pipe, StandIn) and pipe is not before:
            report = tilewise.summary(pipe)
            assert report.calls
            assert not report.fallbacks
            assert not report.skipped_layers
    if page.stem == "README":
        assert read_frames("cake.mp4").shape == (9, 64, 64, 3)
        assert "4/4" in capsys.readouterr().err
    if page.stem == "getting-started":
        assert read_frames("circle.mp4").shape == (17, 128, 128, 3)
        assert "2/2" in capsys.readouterr().err  # the bar of the denoising steps


def commands_of(page: Path) -> list[list[str]]:
    """The `tilewise …` lines of a page's blocks, as words; "…" stands for a prompt or a model."""
    lines = [line for block in SHELL.findall(RESULTS.sub("", page.read_text())) for line in block.splitlines()]
    found = [shlex.split(line, comments=True) for line in lines if line.strip().startswith("tilewise ")]
    return [words[1:] for words in found]


@pytest.mark.parametrize("page", WRITTEN, ids=lambda page: page.stem)
def test_commands_that_a_page_shows_can_be_given(page, monkeypatch):
    """Every option is one of the command's, of its type, and one that the method has."""
    asked: list[dict[str, Any]] = []
    for name in ("generate_request", "dry_run_request"):
        monkeypatch.setattr(f"tilewise.ui.cli.generate.{name}", lambda request: asked.append(request.options))
    for name in ("batch_request", "dry_run_batch"):
        monkeypatch.setattr(f"tilewise.ui.cli.batch.{name}", lambda request: asked.append(request.options))
    for name in ("explain.explain_command", "explain_stream.explain_stream_command"):
        monkeypatch.setattr(f"tilewise.ui.cli.{name}", lambda options, **_: asked.append(options))
    for words in commands_of(page):
        if words[0] not in ("generate", "batch", "explain"):
            typer.main.get_command(app).commands[words[0]].make_context(words[0], words[1:])
            continue
        result = CliRunner().invoke(app, words)
        assert result.exit_code == 0, f"tilewise {shlex.join(words)}: {result.output}"
        options = asked.pop()
        of_method = {key: value for key, value in options.items() if key != "window" or not options.get("stream")}
        method = options.get("method", "sta-balanced")
        if not str(method).endswith(".json"):
            method_config(method, of_method)


@pytest.mark.parametrize("page", WRITTEN, ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    for link in LINK.findall(page.read_text()):
        assert (page.parent / link).exists(), link


@pytest.mark.parametrize("page", WRITTEN, ids=lambda page: page.stem)
def test_files_and_names_that_a_page_mentions_exist(page):
    """Paths from the repository's root, in text and in pictures, and dotted names inside the package."""
    text = RESULTS.sub("", page.read_text())
    missing = [path for path in FILE.findall(text) if not (DOCS.parent / path).exists()]
    for name in NAME.findall(text):
        module, _, attribute = name.rpartition(".")
        try:
            importlib.import_module(name)
        except ModuleNotFoundError:
            if not hasattr(importlib.import_module(module), attribute):
                missing.append(name)
    assert not missing


def test_every_page_is_in_the_index():
    index = (DOCS / "index.md").read_text()
    assert {page.name for page in PAGES} - {"index.md"} <= set(LINK.findall(index))
