"""Seconds of clips with caches and 8 bits, added up of forwards; and the tables of clips and of few steps."""

from types import SimpleNamespace

import pytest

pytest.importorskip("scipy")

import torch

from benchmarks import clips, few_steps, render
from tilewise.plugins.config import Config


class Forwards:
    """Of a model with 10 layers, in ms: dense 100, sparse 40, half of it in 8 bits; 20 where a cache reuses."""

    bench = SimpleNamespace(device=torch.device("cuda"))
    layers = 10

    def __call__(self, config):
        if config is None:
            return {False: 120.0}
        assert config.steps == (0.0, 1.0) and config.blocks == ":" and config.precision == config.dense_precision
        ms = (100.0 if config.method.name == "dense" else 40.0) / (1 if config.precision is None else 2)
        return {False: ms, **({} if config.cache is None else {True: 20.0})}


def seconds(variant, steps):
    row = clips.clip(variant, steps, Forwards())
    assert row["stock_seconds"] == pytest.approx(clips.CLIPS[steps][0] * steps * 0.12)
    assert row["speedup"] == pytest.approx(row["stock_seconds"] / row["seconds"])
    return row["seconds"]


def test_a_clip_is_added_up_of_its_forwards():
    variant = clips.Variant
    assert seconds(variant(), 50) == pytest.approx(2 * 50 * 0.1)
    # sta-balanced: 10 of 50 steps dense, and one block of ten in the others.
    sparse = 0.9 * 0.04 + 0.1 * 0.1
    assert seconds(variant(sparse=True), 50) == pytest.approx(2 * (10 * 0.1 + 40 * sparse))
    assert seconds(variant(sparse=True, eight_bits=True), 50) == pytest.approx(10 * 0.1 + 40 * sparse)
    # taylor computes 3 steps, and then one in three: again from where attention becomes sparse.
    reused = 2 * (47 // 3) + 1
    assert seconds(variant(cache=clips.TAYLOR), 50) == pytest.approx(
        2 * ((50 - reused) * 0.1 + reused * 0.02), rel=0.02
    )
    both = clips.clip(variant(sparse=True, cache=clips.TAYLOR), 50, Forwards())
    assert both["reused_steps"] < reused and both["dense_steps"] == 10
    half = seconds(variant(sparse=True, cache=clips.FIRST_BLOCK), 50)
    assert half == pytest.approx(2 * (5 * 0.1 + 5 * 0.02 + 20 * sparse + 20 * 0.02))
    assert seconds(variant(sparse=True), 4) == pytest.approx(0.1 + 3 * sparse)  # draft-few-steps, without guidance


def test_tables():
    rows = [
        {"name": f"Wan 480p, {steps} steps: {one.name}", "model": "Wan 480p", **clips.clip(one, steps, Forwards())}
        for steps in clips.CLIPS
        for one in clips.VARIANTS
    ]
    head = {"device": "GPU", "date": "2026-01-01", "versions": {}, "commands": ["python -m benchmarks.clips"]}
    table = render.tables({**head, "sections": {"clips": rows}}, ["clips"])
    assert "|  | Wan 480p, 50 steps | Wan 480p, 4 steps |" in table and "| stock | 12.0 s | 0.5 s |" in table
    assert "| dense | 10.0 s (1.20 ×) | 0.4 s (1.20 ×) |" in table
    scores = dict.fromkeys(("count", "colour", "shape", "motion", "background", "everything"), 0.5)
    few = [
        {"name": f"4 steps: {what}", "steps": 4, "what": what, "density": 0.4, "psnr": {"mean": 30.0}, "scores": scores}
        for what in ("dense", "draft 0.4")
    ]
    table = render.tables({**head, "sections": {"few steps": few}}, ["few_steps"])
    assert "| 4 | draft 0.4 | 0.40 | 30.0 | +0.0" in table
    for data in few_steps.CONFIGS.values():
        assert Config.from_dict(data)
