"""The bundled model streams: after more chunks than the window holds its prompt is there, and a new one is followed."""

from __future__ import annotations

import numpy as np
import pytest

import tilewise
from tilewise.pipelines.loading.load import load_pipeline
from tilewise.pipelines.loading.model_folder import DEMO_FOLDER
from tilewise.pipelines.quality.content_detection import analyse


@pytest.mark.slow
def test_the_bundled_model_streams_and_follows_its_prompt():
    pipe = load_pipeline("demo", device="cpu", dtype="float32")
    pipe, recipe = tilewise.load_causal_checkpoint(DEMO_FOLDER / "causal" / "causal_lora.safetensors", pipe)
    assert recipe.name == "demo-causal" and recipe.window == 12
    chunks = []
    with tilewise.stream(pipe, "a red circle bouncing on a blue striped background", seconds=41 / 8, seed=1) as video:
        for chunk in video:
            chunks.append(chunk)
            if len(chunks) == 4:
                video.set_prompt("a green circle bouncing on a blue striped background")
    frames = np.concatenate([chunk.frames for chunk in chunks]) / 255
    assert len(frames) == 41
    (before,) = analyse(frames[6:23]).objects
    (after,) = analyse(frames[-6:]).objects  # the third chunk with the new prompt
    assert (before.colour, before.shape, before.motion) == ("red", "circle", "bouncing")
    assert (after.colour, after.shape) == ("green", "circle")
