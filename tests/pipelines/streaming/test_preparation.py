"""A stream is checked, and its memory known, before there are weights."""

from __future__ import annotations

import pytest
import torch
from tiny_wan import save_tiny_pipeline, tiny_pipeline

from tilewise.pipelines.loading.load import load_skeleton
from tilewise.pipelines.streaming.preparation import expected_cache, open_stream, prepare
from tilewise.pipelines.streaming.recipe import CausalRecipe
from tilewise.pipelines.streaming.settings import StreamSettings
from tilewise.plugins.errors import ConfigError, UnsupportedModelError

RECIPE = CausalRecipe(chunk=2, window=6, sink=2, height=32, width=48, fps=8, timesteps=(1000, 500))


def prepared(pipe, recipe=RECIPE, **kwargs):
    options = StreamSettings(recipe="self-forcing", seconds=1)  # of the model's own weights
    return prepare(pipe, "a red circle", options, model="some/model", recipe=recipe, **kwargs)


@pytest.mark.parametrize("changes", [{}, {"guidance": 3}, {"boundary": 0.9}, {"policy": "dual_ema", "guidance": 2}])
def test_memory_that_is_known_without_weights_is_that_of_the_stream(changes, tmp_path):
    more = {"boundary_ratio": 0.9} if "boundary" in changes else {}
    skeleton = load_skeleton(save_tiny_pipeline(tmp_path, **more))
    work = prepared(skeleton, RECIPE.replace(**changes))
    known, reason = expected_cache(skeleton, work, torch.float32)
    with open_stream(tiny_pipeline(**more), work) as video:
        assert known == video.cache_bytes and known["total"] > known["latent"] > 0
    assert reason == ""
    assert expected_cache(skeleton, work, torch.bfloat16)[0]["latent"] == known["latent"] // 2


def test_what_a_pipeline_cannot_stream_is_found_before():
    pipe = tiny_pipeline()
    assert prepared(pipe).settings.frames == 8
    with pytest.raises(ConfigError, match="has a boundary, and this pipeline one transformer"):
        prepared(pipe, RECIPE.replace(boundary=0.9))
    pipe.vae = torch.nn.Linear(1, 1)
    with pytest.raises(UnsupportedModelError, match="Linear cannot decode"):
        prepared(pipe)
