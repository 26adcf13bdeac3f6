"""What a stream would do is told before: density and layers as the running stream has them, and what its policy copies."""

from __future__ import annotations

import json
import math
import re

import pytest
import torch
from tiny_wan import tiny_pipeline

import tilewise
from tilewise.kernels.plans.layout import Grid
from tilewise.pipelines.memory.estimate import _LiveTensors
from tilewise.pipelines.streaming.recipe import CausalRecipe
from tilewise.plugins.streaming.causal_denoiser import CausalDenoiser
from tilewise.plugins.streaming.kv_cache import KVCache
from tilewise.plugins.streaming.policies.base import policies, policy

RECIPE = CausalRecipe(chunk=2, window=6, sink=2, height=32, width=48, fps=8, timesteps=(1000, 750, 500, 250))
PROMPT = "a red circle moving left"


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline()


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        (tilewise.STA(window=(1, 1, 1), tile=(2, 2, 2)), {}),
        (tilewise.STA(density=0.5, tile=(2, 2, 2)), {"policy": "dual_ema"}),
        (tilewise.Draft(density=0.25, tile=(2, 2, 2), min_tokens=0, compensate=False, select="topk"), {"sink": 0}),
    ],
)
def test_the_density_is_that_of_the_running_stream(pipe, method, changes):
    recipe = RECIPE.replace(**changes)
    told = tilewise.explain_stream(pipe, recipe=recipe, method=method).rows[0]
    with tilewise.stream(pipe, PROMPT, recipe=recipe, method=method) as video:
        for _ in range(4):
            next(video)
        with tilewise.watch(pipe) as calls:
            next(video)  # over a full window
    plans = [call.plan for call in calls if call.plan is not None]
    found = [float(plan.density if plan.device_density is None else plan.device_density) for plan in plans]
    assert found == pytest.approx([told.density] * len(plans), abs=0.03) and told.density < 1
    assert len(plans) == 2 * told.sparse_passes == 8 and told.passes == 5  # two layers; the first pass is before steps=
    assert (
        told.keys == told.tokens // 2 * (6 + video.source.sampler.denoisers[0].memory) and told.sparse_blocks == "0-1"
    )


def test_layers_that_stay_dense_are_told_with_the_reason(pipe):
    def told(method="sta", **changes):
        return tilewise.explain_stream(pipe, recipe=RECIPE.replace(**changes), method=method).rows[0]

    assert told("dense").why_dense == "the method is dense" and told("dense").density == 1
    assert "a sink of 1 latent frames" in told(sink=1).why_dense
    assert "first chunk of 4" in told(first_chunk=4).why_dense
    assert "pays from" in told("draft-fast").why_dense
    half = told(tilewise.resolve("sta", blocks="1:"))
    assert (half.sparse_blocks, half.dense_blocks, half.why_dense) == ("1", "0", "blocks='1:'")
    assert math.isnan(told(tilewise.Draft(recall=0.9, tile=(1, 2, 2), min_tokens=0)).density)


def test_it_reads_well_and_is_json(pipe):
    recipe = RECIPE.replace(guidance=2, policy="dual_ema")
    told = tilewise.explain_stream(pipe, recipe=recipe, cache=KVCache(4, 2, policy="dual_ema"), method="sta", height=64)
    text = re.sub(r"[\s│]+", " ", str(told))
    for words in (
        "window in latent frames 4, sink 2 (clamped), memory 4, policy dual_ema",
        "float32, 2 lanes",
        "free",
    ):
        assert words in text
    data = json.loads(json.dumps(told.to_dict()))
    assert data["size"] == {"height": 64, "width": 48} and data["cache"]["memory"] == 4
    assert data["cache_bytes"]["total"] == data["memory"]["cache"] == data["denoisers"][0]["cache"]["total"]
    assert not tilewise.is_patched(pipe)
    assert tilewise.explain_stream(pipe, height=64, width=64).recipe.way == "renoised"  # without a causal recipe


@torch.no_grad()
@pytest.mark.parametrize("name", policies())
def test_what_a_policy_copies_between_chunks_is_foreseen(pipe, name):
    cache, grid = KVCache(window=6, sink=2, policy=name), Grid(2, 8, 12)
    video, text = torch.randn(1, 4, 2, 16, 24), torch.randn(1, 6, 32)
    most = 0
    with tilewise.patched(pipe.transformer, "dense") as model, CausalDenoiser(model, cache, grid=grid) as causal:
        for _ in range(6):
            with _LiveTensors() as begun:
                causal.begin()
            causal(video, torch.zeros(1), text)
            with _LiveTensors() as done:
                causal.commit()
            # What was there before is seen by views, and counts.
            most = max(most, begun.peak - causal.nbytes, done.peak - causal.nbytes)
        foreseen = causal.cache_plan().between_chunks(2, policy(name).events)
    assert 0.5 * foreseen <= most <= 1.05 * foreseen, most / foreseen
