"""How a run begins, and what a clip's metadata says of that."""

from __future__ import annotations

import datetime
import time
from types import SimpleNamespace

import numpy as np
import tiny_wan
import torch

from tilewise.pipelines.generation.clip_metadata import begin_run, clip_metadata
from tilewise.pipelines.generation.generate import Clip
from tilewise.pipelines.generation.resolve import resolve_settings


def test_a_run_begins_by_loading_the_model():
    events = []

    def load():
        events.append("load")
        time.sleep(0.02)
        return SimpleNamespace(device=torch.device("cpu"))

    pipe, run = begin_run("demo", "float32", load, events.append)
    assert events == ["demo", "load"]
    assert pipe.device.type == run["device"] == run["device_name"] == "cpu"
    assert run["dtype"] == "float32" and run["versions"]["torch"]
    assert 0.02 <= run["load"] < 10
    assert datetime.datetime.fromisoformat(run["started"]).tzinfo is not None


def test_the_seconds_of_loading_are_among_the_others():
    settings = resolve_settings(tiny_wan.tiny_pipeline(), "a red circle", method="dense", height=64, width=64, frames=5)
    clip = Clip(np.zeros((5, 64, 64, 3), np.uint8), {"denoise": 2.0, "total": 2.5}, None, settings)
    run = {"load": 1.5, "dtype": "float32"}
    metadata = clip_metadata(clip, run)
    assert metadata["run"]["seconds"] == {"load": 1.5, "denoise": 2.0, "total": 2.5}
    assert "load" not in metadata["run"] and metadata["run"]["dtype"] == "float32"
    assert run == {"load": 1.5, "dtype": "float32"}
    assert clip_metadata(clip, {})["run"]["seconds"] == clip.seconds
    assert clip_metadata(clip, {"seconds": {"total": 9.0}, "load": 1.0})["run"]["seconds"] == {"total": 9.0}
