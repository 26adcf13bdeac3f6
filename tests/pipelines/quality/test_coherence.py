"""The repetition score: one object against the same several times, on different backgrounds, sizes and dtypes."""

from __future__ import annotations

import numpy as np
import pytest
from torch.nn.functional import conv2d

from tilewise.pipelines.batch.manifest_comparison import ComparedClip, Group
from tilewise.pipelines.highres.upscale import upscale_frames
from tilewise.pipelines.media.video import write_video
from tilewise.pipelines.quality.coherence import CHUNK, MOST, coherence, repetition
from tilewise.ui.cli.compare import repetition_lines


def star(side, centres, radius, background="plain"):
    """A clip (1, side, side, 3) of a five-pointed shape at each centre (0 … 1), in colour."""
    y, x = np.mgrid[0:side, 0:side] / side
    frame = np.stack([0.2 + 0 * x, 0.3 + 0 * x, 0.7 + 0 * x], -1)
    if background == "gradient":
        frame = frame * (0.6 + 0.4 * x[..., None])
    elif background == "striped":
        frame = frame * np.where(np.sin(x * 40) > 0, 1, 0.7)[..., None]
    for cy, cx in centres:
        angle, distance = np.arctan2(y - cy, x - cx), np.hypot(y - cy, x - cx)
        frame[distance < radius * (0.7 + 0.3 * np.cos(5 * angle))] = (0.9, 0.2, 0.1)
    return frame[None].astype(np.float32)


@pytest.mark.parametrize("background", ["plain", "gradient", "striped"])
def test_more_of_the_same_scores_higher(background):
    one = star(128, [(0.5, 0.5)], 0.22, background)
    large = star(256, [(0.5, 0.5)], 0.22, background)
    four = star(256, [(0.27, 0.24), (0.25, 0.73), (0.71, 0.26), (0.74, 0.72)], 0.14, background)
    good, bad = coherence(large, one), coherence(four, one)
    assert abs(good.excess) < 0.03
    assert bad.excess > good.excess + 0.1
    assert bad.to_dict()["excess"] == bad.repetition - bad.native


def test_flat_clips_and_dtypes():
    assert repetition(np.zeros((1, 64, 64, 3), np.uint8)) == 0
    clip = star(128, [(0.4, 0.6)], 0.2)
    assert repetition((clip * 255).round().astype(np.uint8)) == pytest.approx(repetition(clip), abs=1e-2)
    assert repetition(clip[:, :64]) > 0  # any aspect
    for wrong in (clip[0], clip[..., :2], clip[:0]):
        with pytest.raises(ValueError, match="a clip is"):
            repetition(wrong)


def test_strips_cost_no_more_than_their_length(monkeypatch):
    """Each patch is looked for in all of the frame: without a limit a strip's cost grows by the square of its length."""
    asked = []

    def counted(frame, templates):
        asked.append(len(templates))
        return conv2d(frame, templates)

    monkeypatch.setattr("tilewise.pipelines.quality.coherence.conv2d", counted)
    noise = np.random.default_rng(0).integers(0, 255, (1, 24, 480, 3), dtype=np.uint8)
    score = repetition(noise)
    assert 0 < score < 1
    assert (sum(asked), max(asked)) == (MOST, CHUNK)
    asked.clear()
    repetition(noise[:, :, :40])  # of usual shapes every patch counts
    assert sum(asked) == 7 * 12
    pattern = np.tile(noise[:, :, :120], (1, 1, 4, 1))
    assert repetition(pattern) > 0.99 > score


def test_sharpness_is_relative_to_scaling_up():
    native = star(128, [(0.5, 0.5)], 0.3)
    scaled = upscale_frames(native, 256, 256)
    assert coherence(scaled, native).sharpness == pytest.approx(1, abs=0.02)
    assert coherence(star(256, [(0.5, 0.5)], 0.3), native).sharpness > 1.02


def test_compare_prints_it(tmp_path):
    def clip(name, method, centres):
        pixels = (star(96, centres, 0.14).repeat(3, 0) * 255).astype(np.uint8)
        path = write_video(tmp_path / f"{name}.mp4", pixels, 8)
        return ComparedClip(path, {"method": {"method": {"name": method}}}, method)

    four = [(0.27, 0.24), (0.25, 0.73), (0.71, 0.26), (0.74, 0.72)]
    gone = ComparedClip(tmp_path / "none.mp4", {"method": {"method": {"name": "sta"}}}, "sta", damaged=True)
    group = Group([clip("a", "dense", [(0.4, 0.6)]), clip("b", "inward", four), gone])
    title, dense, inward = repetition_lines([group])
    assert "against dense" in title
    assert dense.endswith("+0.000")
    assert float(inward.split()[-1]) > 0.05
