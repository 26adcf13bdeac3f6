"""The stage `stream-windows`: clips of each column have their windows where they say, and are measured once."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import tilewise
from examples.train_demo_model import windowed
from examples.train_demo_model.__main__ import main
from examples.train_demo_model.causal.measures import measure_clip
from examples.train_demo_model.evaluation import held_out_prompts
from examples.train_demo_model.scenes import take
from examples.train_demo_model.windowed import column_options, make, source_video
from tests.helpers.tiny_wan import save_tiny_pipeline
from tilewise.pipelines.loading.load import load_pipeline


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    native = {"height": 32, "width": 32, "frames": 9, "steps": 1, "clean_frames": 2}
    return save_tiny_pipeline(tmp_path_factory.mktemp("tiny") / "m", native=native)


def test_clips_of_all_columns_have_one_length(model):
    pipe = load_pipeline(model)
    scene = take(held_out_prompts(4)[1], np.array([1]))
    made = {
        column: make(
            pipe, "a red circle", column, {"windows": 3, "frames": None, "steps": None, "overlap": 2}, 0, scene
        )
        for column in ("prefix", "renoised adain=1 sink=2", "renoised strength=0.0", "clips", "frozen")
    }
    assert {name: (len(clip), at) for name, (clip, at, _) in made.items()} == {
        "prefix": (21, [9, 15]),
        "renoised adain=1 sink=2": (21, [5, 11]),
        "renoised strength=0.0": (21, [5, 11]),
        "clips": (21, [9, 18]),
        "frozen": (21, [9, 15]),
    }
    first = made["prefix"][0][:9]
    assert np.array_equal(made["clips"][0][:9], first) and np.array_equal(made["frozen"][0][:9], first)
    assert (made["frozen"][0][9:] == first[-1]).all() and not np.array_equal(made["clips"][0][9:18], first)
    told = made["renoised adain=1 sink=2"][2]
    assert (told["adain"], told["sink"]) == (1, 2) and column_options("prefix prefix_noise=0.02")[
        "prefix_noise"
    ] == 0.02
    # A video that is changed: without noise it comes out as it went in, which has another background than the scene.
    video, wanted = source_video(scene, 21, 32), source_video(scene, 40, 32)
    assert np.array_equal(video, wanted[:21]) and np.array_equal(wanted[:17], wanted[32:15:-1])
    with tilewise.stream(
        pipe, "a red circle", way="prefix", window=21, overlap=1, video=[video], strength=0.0
    ) as stream:
        (whole,) = stream
    assert np.abs(made["renoised strength=0.0"][0].astype(int) - whole.frames).max() <= 1


def test_jumps_are_counted_where_windows_begin():
    """A square that moves 2 pixels a frame, and 12 at frame 9."""
    clip = np.zeros((29, 64, 64, 3), np.uint8)
    clip[:] = (30, 60, 220)
    for frame in range(29):
        left = 2 + frame + (6 if frame >= 9 else 0)
        clip[frame, 24:36, left : left + 12] = (220, 30, 30)
    prompt = "a red square moving right on a blue background"
    assert measure_clip(prompt, clip, at=[9])["border_steps"] == 0.0
    assert measure_clip(prompt, clip, at=[9])["inner_steps"] == 1.0
    assert measure_clip(prompt, clip, at=[9, 20])["border_steps"] == 0.5


@pytest.mark.parametrize("workers", [1, 2])
def test_a_report_goes_on(model, tmp_path, workers, monkeypatch):
    """Workers are one thread here: a process takes seconds to begin, and diffusers cannot load in two threads at once."""
    monkeypatch.setattr(
        windowed,
        "ProcessPoolExecutor",
        lambda count, _, begin, given: ThreadPoolExecutor(1, initializer=begin, initargs=given),
    )
    words = ["stream-windows", "--run", str(tmp_path), "--device", "cpu", "--model", str(model), "--windows", "2"]
    words += ["--prompts", "1", "--columns", "prefix,frozen", "--workers", str(workers)]
    assert main([*words, "--seconds", "-1"]) == 0 and not (tmp_path / "windows_evaluation.json").exists()
    assert main(words) == 0
    report = json.loads((tmp_path / "windows_evaluation.json").read_text())
    assert {name: column["clips"] for name, column in report["columns"].items()} == {"prefix": 1, "frozen": 1}
    assert report["columns"]["prefix"]["recipe"]["way"] == "prefix"
    assert main(words) == 0
    assert json.loads((tmp_path / "windows_evaluation.json").read_text()) == report
