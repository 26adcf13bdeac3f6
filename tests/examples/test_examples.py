"""Every example runs, on the bundled demo model, with few steps."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from pathlib import Path

import global_state
import numpy as np
import pytest
from PIL import Image

from tilewise.pipelines.media.video import read_frames

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs an example as a program, in this process: each of their own would import for seconds what is here already."""

    def program(name: str, *options: str) -> str:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [name, *options])
        with global_state.restored():
            runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return program


def test_patch_a_pipeline(tmp_path):
    """In a process of its own, with nothing imported."""
    command = [sys.executable, EXAMPLES / "patch_a_pipeline.py", "--steps", "2"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    said = done.stdout
    assert "what would run" in said
    assert "sparse" in said
    assert read_frames(tmp_path / "outputs/patched.mp4").shape == (17, 128, 128, 3)


def test_compare_with_dense(tmp_path, run):
    said = run("compare_with_dense.py", "--steps", "2", "--frames", "5", "--method", "sta-fast")
    assert "PSNR" in said
    frames = read_frames(tmp_path / "outputs/side-by-side.mp4")
    assert frames.shape[0] == 5
    assert frames.shape[2] >= 256


def test_the_moving_picture_of_the_readme(tmp_path, run):
    run("draw_before_after.py", "picture.webp", "--steps", "2", "--frames", "3", "--method", "sta-fast")
    with Image.open(tmp_path / "picture.webp") as picture:
        assert (picture.n_frames, picture.size) == (3, (2 * 256 + 4, 256 + 16))


def test_add_a_method(run):
    said = run("add_a_method.py", "--steps", "2")
    assert "sparse" in said
    assert "0.556" in said  # 3 slabs: the first sees itself (1/3), the others two of three


def test_high_resolution(tmp_path, run):
    options = ("--steps", "2", "--frames", "1", "--height", "144", "--width", "160", "--no-dense")
    said = run("high_resolution.py", *options)
    assert "repetition" in said
    assert read_frames(tmp_path / "outputs/high-resolution.mp4").shape == (1, 144, 320, 3)


def test_list_models(run):
    assert "| wan | `WanAnimateTransformer3DModel`, `WanTransformer3DModel`" in run("list_models.py")


def test_list_methods(run):
    assert "| [`sol`](#sol) |" in run("list_methods.py")


def test_draw_high_resolution(tmp_path, run):
    said = run("draw_high_resolution.py", "row.png", "--side", "144", "--steps", "2", "--frames", "1")
    assert "row.png" in said
    assert Image.open(tmp_path / "row.png").size == (3 * 144 + 2 * 8, 144)


def test_every_example_is_tested():
    tested = "".join(path.read_text(encoding="utf-8") for path in Path(__file__).parents[1].glob("**/test_*.py"))
    for path in EXAMPLES.glob("*.py"):
        assert re.search(rf"\b{path.stem}\.py|from examples(\.{path.stem} import| import {path.stem}\b)", tested), path


@pytest.mark.parametrize("script", ["draw_methods.py", "draw_additions.py"])
def test_draw_methods(tmp_path, run, script):
    """The pictures of the documentation are what the script draws."""
    run(script, str(tmp_path))
    drawn = sorted(tmp_path.glob("*.*"))
    assert len(drawn) >= 4
    for picture in drawn:
        kept = EXAMPLES.parent / "docs/images" / picture.name
        assert (np.asarray(Image.open(picture).convert("RGB")) == np.asarray(Image.open(kept).convert("RGB"))).all()
