"""A stream is checked, and its memory known, before there are weights."""

from __future__ import annotations

import pytest
import torch
from tiny_wan import save_tiny_pipeline, tiny_pipeline

import tilewise
from tilewise.pipelines.loading.load import cast_skeleton, load_skeleton
from tilewise.pipelines.streaming.explain import explain_stream
from tilewise.pipelines.streaming.preparation import explain_work, open_stream, prepare
from tilewise.pipelines.streaming.recipe import CausalRecipe
from tilewise.pipelines.streaming.settings import StreamSettings
from tilewise.plugins.errors import ConfigError, UnsupportedModelError

RECIPE = CausalRecipe(chunk=2, window=6, sink=2, height=32, width=48, fps=8, timesteps=(1000, 500))


def prepared(pipe, recipe=RECIPE, storage="model", **kwargs):
    options = StreamSettings(recipe="self-forcing", seconds=1, storage=storage)  # of the model's own weights
    return prepare(pipe, "a red circle", options, model="some/model", recipe=recipe, **kwargs)


@pytest.mark.parametrize(
    "changes", [{}, {"guidance": 3}, {"boundary": 0.9}, {"policy": "dual_ema", "guidance": 2, "storage": "fp8"}]
)
def test_memory_that_is_known_without_weights_is_what_the_stream_allocates(changes, tmp_path):
    changes = dict(changes)
    more = {"boundary_ratio": 0.9} if "boundary" in changes else {}
    skeleton = load_skeleton(save_tiny_pipeline(tmp_path, **more))
    storage = changes.pop("storage", "model")
    work = prepared(skeleton, RECIPE.replace(**changes), storage)
    known = explain_work(skeleton, work, torch.device("cpu"))
    pipe = tiny_pipeline(**more)
    with open_stream(pipe, work) as video:
        next(video)
        allocated = [denoiser.nbytes for denoiser in video.source.sampler.denoisers]
        assert [row.cache["total"] for row in known.rows] == allocated and min(allocated) > 0
        assert video.cache_bytes == {"latent": known.latent, "total": known.total} and known.total == sum(allocated)
    assert known.memory.cache == known.total and len(known.rows) == (2 if more else 1)
    weights = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    assert known.memory.weights == sum(weight.nbytes for part in weights for weight in part.parameters())
    halved = explain_work(cast_skeleton(skeleton, torch.bfloat16), work, torch.device("cpu"))
    assert halved.latent == (known.latent if storage == "fp8" else known.latent // 2) and halved.dtype == "bfloat16"


def test_a_stream_without_room_is_refused_before_it_begins(monkeypatch):
    pipe = tiny_pipeline()
    plan = explain_stream(pipe, recipe=RECIPE).memory
    assert plan.weights == 0 and plan.fits  # the weights are there
    assert plan.needed == plan.cache + max(plan.forward, plan.decode)
    monkeypatch.setattr("tilewise.pipelines.memory.stream_plan.free_bytes", lambda device: plan.needed)
    tilewise.stream(pipe, "a red circle", recipe=RECIPE).close()
    for short, told in ((1, "it has 6 now, 5 have room"), (3 * plan.latent, "even the fewest, 4, have no room")):
        monkeypatch.setattr("tilewise.pipelines.memory.stream_plan.free_bytes", lambda device: plan.needed - short)  # noqa: B023
        with pytest.raises(ConfigError, match=f"does not fit: .*KV cache .* free. Give a smaller window .*{told}"):
            tilewise.stream(pipe, "a red circle", recipe=RECIPE)
        assert not tilewise.is_patched(pipe)
    assert not explain_stream(pipe, recipe=RECIPE).memory.fits
    assert explain_stream(pipe, recipe=RECIPE, decode_device="meta").memory.decode == 0


def test_what_a_pipeline_cannot_stream_is_found_before():
    pipe = tiny_pipeline()
    assert prepared(pipe).settings.frames == 8
    with pytest.raises(ConfigError, match="has a boundary, and this pipeline one transformer"):
        prepared(pipe, RECIPE.replace(boundary=0.9))
    pipe.vae = torch.nn.Linear(1, 1)
    with pytest.raises(UnsupportedModelError, match="Linear cannot decode"):
        prepared(pipe)
