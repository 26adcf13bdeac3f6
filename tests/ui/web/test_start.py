"""The start of the page: it answers before diffusers is imported; whatever needs that waits."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

pytest.importorskip("gradio", reason="the page needs Gradio: pip install -e '.[ui]'")

from tilewise.pipelines.errors import ModelError
from tilewise.pipelines.loading.load import load_skeleton
from tilewise.ui.web.jobs import models as models_module
from tilewise.ui.web.jobs.models import Models
from tilewise.ui.web.server import make_skeletons

# Holds the import back until the page has answered.
ANSWERS = """
import sys, threading, urllib.request
from pathlib import Path
from tilewise.ui.web import server
from tilewise.ui.web.common.safety import Address, Limits

answered, make_skeletons = threading.Event(), server.make_skeletons
def held_back(models):
    assert answered.wait(60)
    make_skeletons(models)
server.make_skeletons = held_back
with server.serving(["demo"], Path(sys.argv[1]), Address(port=0), Limits(), device="cpu") as url:
    with urllib.request.urlopen(url, timeout=60) as answer:
        print(answer.status, sorted({"diffusers", "transformers", "torch._dynamo"} & set(sys.modules)))
    answered.set()
print("diffusers" in sys.modules)
"""


def test_it_answers_before_diffusers_is_imported(tmp_path):
    command = [sys.executable, "-c", ANSWERS, str(tmp_path / "outputs")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split("\n") == ["200 []", "True", ""]


def test_a_skeleton_is_made_once_by_whoever_asks_first(monkeypatch):
    made, both = [], threading.Barrier(2)

    def slow(name):
        made.append(name)
        return load_skeleton(name)

    monkeypatch.setattr(models_module, "load_skeleton", slow)
    begun = []
    models = Models(["demo"], device="cpu", before_import=lambda: begun.append(list(made)))
    assert models.defaults("demo").height == 128
    assert not made and not begun

    def ask(_):
        both.wait(60)
        return models.skeleton("demo")

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(ask, range(2))
    assert first is second
    assert (made, begun) == (["demo"], [[]])


def test_other_models_are_read_at_once(tiny_pipe_dir, monkeypatch):
    made = []
    monkeypatch.setattr(models_module, "load_skeleton", lambda name: made.append(name) or load_skeleton(name))
    models = Models([str(tiny_pipe_dir), "demo"], device="cpu")
    assert made == [str(tiny_pipe_dir)]
    assert (models.defaults(str(tiny_pipe_dir)).height, models.defaults("demo").height) == (64, 128)


def test_a_model_that_cannot_be_read_is_told_and_asked_again(monkeypatch, caplog):
    def refuse(name):
        raise ModelError(f"could not read the configs of {name}")

    monkeypatch.setattr(models_module, "load_skeleton", refuse)
    models = Models(["demo"], device="cpu")
    with caplog.at_level(logging.WARNING, "tilewise.ui"):
        make_skeletons(models)
    assert [record.getMessage() for record in caplog.records] == ["could not read the configs of demo"]
    with pytest.raises(ModelError, match="configs of demo"):
        models.skeleton("demo")
    monkeypatch.setattr(models_module, "load_skeleton", load_skeleton)
    assert models.skeleton("demo").transformer is not None
