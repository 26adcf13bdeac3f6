"""Every example runs, on the bundled demo model, with few steps."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from tilewise.pipelines.media.video import read_frames

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def run(name: str, folder: Path, *options: str) -> str:
    command = [sys.executable, EXAMPLES / name, *options]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_patch_a_pipeline(tmp_path):
    said = run("patch_a_pipeline.py", tmp_path, "--steps", "2")
    assert "what would run" in said
    assert "sparse" in said
    assert read_frames(tmp_path / "outputs/patched.mp4").shape == (17, 128, 128, 3)


def test_compare_with_dense(tmp_path):
    said = run("compare_with_dense.py", tmp_path, "--steps", "2", "--frames", "5", "--method", "sta-fast")
    assert "PSNR" in said
    frames = read_frames(tmp_path / "outputs/side-by-side.mp4")
    assert frames.shape[0] == 5
    assert frames.shape[2] >= 256


def test_add_a_method(tmp_path):
    said = run("add_a_method.py", tmp_path, "--steps", "2")
    assert "sparse" in said
    assert "0.556" in said  # 3 slabs: the first sees itself (1/3), the others two of three


def test_high_resolution(tmp_path):
    options = ("--steps", "2", "--frames", "1", "--height", "144", "--width", "160", "--no-dense")
    said = run("high_resolution.py", tmp_path, *options)
    assert "repetition" in said
    assert read_frames(tmp_path / "outputs/high-resolution.mp4").shape == (1, 144, 320, 3)


def test_list_models(tmp_path):
    assert "| wan | `WanAnimateTransformer3DModel`, `WanTransformer3DModel`" in run("list_models.py", tmp_path)


def test_draw_high_resolution(tmp_path):
    said = run("draw_high_resolution.py", tmp_path, "row.png", "--side", "144", "--steps", "2", "--frames", "1")
    assert "row.png" in said
    assert Image.open(tmp_path / "row.png").size == (3 * 144 + 2 * 8, 144)


def test_every_example_is_tested():
    tested = Path(__file__).read_text(encoding="utf-8")
    for path in EXAMPLES.glob("*.py"):
        assert path.name in tested


def test_draw_methods(tmp_path):
    """The pictures of the documentation are what the script draws."""
    run("draw_methods.py", tmp_path, str(tmp_path))
    drawn = sorted(tmp_path.glob("*.png"))
    assert len(drawn) >= 4
    for picture in drawn:
        kept = EXAMPLES.parent / "docs/images" / picture.name
        assert (np.asarray(Image.open(picture).convert("RGB")) == np.asarray(Image.open(kept).convert("RGB"))).all()
