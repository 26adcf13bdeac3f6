"""Values that cannot be are refused alike wherever they are given, in a sentence, before weights are read."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from tilewise.pipelines.generation.resolve import resolve_settings
from tilewise.pipelines.loading.load import load_skeleton
from tilewise.pipelines.media.image import write_still
from tilewise.plugins.config import Config
from tilewise.plugins.errors import ConfigError
from tilewise.ui.cli.app import app

PROMPT = "a red circle"
TOO_MUCH = {  # name, value, what is said
    "text tokens": ("max_sequence_length", 10**9, "max_sequence_length must be at most 8,192"),
    "fps": ("fps", 1e308, "fps must be a number from 0.01 to 1000"),
    "slow": ("fps", 1e-9, "fps must be a number from 0.01 to 1000"),
    "steps": ("steps", 10**9, "steps must be at most 1,000,000"),
    "frames": ("frames", 10**9, "frames must be at most 10,000,000"),
    "height": ("height", 2**40, "height must be at most 65,536"),
    "half a character": ("negative", "a \ud800", "no valid Unicode: '\\ud800' at position 3"),
    "half a prompt": ("prompt", "a \udcff", "no valid Unicode: '\\udcff' at position 3"),
    "long": ("negative", "x" * 50_001, "50,001 characters; at most 50,000"),
    "no block": ("method", {"method": "sta", "blocks": "9:"}, "selects none of the 2 blocks"),
    "blocks": ("method", {"method": "sta", "blocks": ",".join(map(str, range(100_000)))}, "at most 1,000 are taken"),
}
OTHER = [None, -1, "x", [], {}, True, [1, 2], {"name": "sta"}, "0" * 100_000]
RUN = {
    "dtype": [5, [1], {"a": 1}],
    "memory_saving": [5, "x", [1]],
    "highres": [5, [], {}, "x", {"native": 5}],
    "stream": [5, {}],
}


def generate(*words: object):
    return CliRunner().invoke(app, ["generate", *map(str, words), "--dry-run"])


def refused(result, *words: str) -> None:
    assert result.exit_code in (2, 3), result.output
    assert result.stdout == "" and "Traceback" not in result.stderr and "TILEWISE_DEBUG" not in result.stderr
    assert len(result.stderr) < 2000
    for word in words:
        assert word in result.stderr


@pytest.fixture(scope="module")
def told(tiny_pipe_dir) -> dict:
    size = {"height": 32, "width": 32, "frames": 1, "steps": 1}
    settings = resolve_settings(load_skeleton(tiny_pipe_dir), PROMPT, method="sta", model=str(tiny_pipe_dir), **size)
    return {**settings.to_dict(), "run": {"dtype": "float32", "memory_saving": []}}


def again(folder: Path, told: dict, *words: object):
    write_still(folder / "clip.png", np.zeros((1, 32, 32, 3), np.uint8), told)
    return generate("--from", folder / "clip.png", *words)


@pytest.mark.parametrize("surface", ["python", "command line", "batch", "from"])
@pytest.mark.parametrize("kind", TOO_MUCH)
def test_too_much(kind, surface, told, tiny_pipe_dir, tmp_path):
    name, value, words = TOO_MUCH[kind]
    if surface == "python":
        pipe, given = load_skeleton(tiny_pipe_dir), {"prompt": PROMPT, "method": {"method": "sta"}, name: value}
        with pytest.raises(ConfigError) as error:
            resolve_settings(pipe, **{**given, "method": Config.from_dict(given["method"])})
        assert words in str(error.value)
    elif surface == "command line":
        if name == "method":
            file = tmp_path / "c.json"
            file.write_text(json.dumps(value))
            value = file
        given = [value] if name == "prompt" else [PROMPT, f"--{name.replace('_', '-')}", value]
        refused(generate(*given, "--model", tiny_pipe_dir), words)
    elif surface == "batch":
        (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": PROMPT, **{name: value}}))
        words_of = ["batch", tmp_path / "p.jsonl", "--model", tiny_pipe_dir, "--dry-run"]
        refused(CliRunner().invoke(app, list(map(str, words_of))), words)
    else:
        refused(again(tmp_path, {**told, name: value}), words)


@pytest.mark.parametrize("name", ["height", "fps", "seed", "method", "max_sequence_length", "model", "guidance"])
def test_a_clip_with_settings_of_another_kind(name, told, tmp_path):
    for value in OTHER:
        if (name, value) == ("max_sequence_length", None):
            continue
        refused(again(tmp_path, {**told, name: value}))


@pytest.mark.parametrize("name", RUN)
def test_a_clip_whose_run_is_told_in_another_kind(name, told, tmp_path):
    for value in RUN[name]:
        refused(again(tmp_path, {**told, "run": {**told["run"], name: value}}))


@pytest.mark.parametrize("name", ["blocks", "precision", "steps", "fuse", "method"])
def test_a_clip_whose_method_is_of_another_kind(name, told, tmp_path):
    for value in [5, [], {}, [1, 2, 3], "0" * 100_000]:
        refused(again(tmp_path, {**told, "method": {**told["method"], name: value}}))


@pytest.mark.parametrize("where", ["clip", "config", "batch"])
def test_json_that_is_nested_too_deep(where, tiny_pipe_dir, tmp_path):
    deep = "[" * 100_000
    if where == "clip":
        from PIL import Image, PngImagePlugin

        chunk = PngImagePlugin.PngInfo()
        chunk.add_itxt("tilewise", deep)
        Image.new("RGB", (8, 8)).save(tmp_path / "a.png", pnginfo=chunk)
        refused(generate("--from", tmp_path / "a.png"), "holds no settings of tilewise")
    elif where == "config":
        (tmp_path / "c.json").write_text(deep)
        refused(generate(PROMPT, "--method", tmp_path / "c.json"), "not a JSON file")
    else:
        (tmp_path / "p.jsonl").write_text(deep)
        refused(CliRunner().invoke(app, ["batch", str(tmp_path / "p.jsonl"), "--dry-run"]), "malformed JSON")
