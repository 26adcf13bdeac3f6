"""Step caches as options: names, texts, objects, JSON, and what is refused."""

from __future__ import annotations

import json

import pytest

import tilewise
from tilewise.plugins.step_caches.options import CACHES, FirstBlock, MagCache, PyramidAttention, TaylorSeer, step_cache


@pytest.mark.parametrize("name", list(CACHES))
def test_every_cache_by_name_text_and_object(name):
    cache = step_cache(name)
    assert type(cache) is CACHES[name] and str(cache) == name
    assert step_cache(cache) is cache
    assert step_cache(cache.to_dict()) == step_cache(json.dumps(cache.to_dict())) == step_cache(str(cache)) == cache
    assert type(cache.to_diffusers(lambda: 0.0)).__module__.startswith("diffusers.hooks")


@pytest.mark.parametrize(
    ("text", "cache"),
    [
        ("first-block:threshold=0.1", FirstBlock(0.1)),
        (" taylor : cache_interval=3 : use_lite_mode=true", TaylorSeer(cache_interval=3, use_lite_mode=True)),
        ("taylor:taylor_factors_dtype=float32", TaylorSeer(taylor_factors_dtype="float32")),
        ("mag:mag_ratios=1,0.98,1.02", MagCache(mag_ratios=(1, 0.98, 1.02))),
        ("pab:spatial_attention_block_skip_range=3:spatial_attention_timestep_skip_range=50,900",
         PyramidAttention(3, spatial_attention_timestep_skip_range=(50, 900))),
        ("none", None),
        ("", None),
    ],
)  # fmt: skip
def test_a_text(text, cache):
    assert step_cache(text) == cache
    assert cache is None or step_cache(str(cache)) == cache


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("first-blok", "Did you mean 'first-block'"),
        ("first-block:treshold=1", "Did you mean 'threshold'"),
        ("first-block:threshold", "OPTION=VALUE"),
        ("first-block:threshold=1:threshold=2", "twice"),
        ("first-block:threshold=much", "must be a number"),
        ("first-block:threshold=-1", "at least 0"),
        ("first-block:threshold=nan", "must be a number"),
        ({"name": "first-block", "threshold": True}, "must be a number"),
        ("taylor:cache_interval=0", "whole number of at least 1"),
        ("taylor:disable_cache_before_step=0", "at least 1"),
        ("taylor:taylor_factors_dtype=int4", "unknown taylor_factors_dtype"),
        ("taylor:use_lite_mode=maybe", "true or false"),
        ({"name": "mag", "mag_ratios": ["a"]}, "list of positive numbers"),
        ({"name": "mag", "mag_ratios": []}, "list of positive numbers"),
        ("mag:calibrate=true:mag_ratios=1,1", "one of them"),
        ("sea:residual_order=2", "from 0 to 1"),
        ("pab:spatial_attention_block_skip_range=none", "at least one"),
        ("pab:spatial_attention_timestep_skip_range=800,100", "two timesteps"),
        ("{not json", "not JSON"),
        ({"threshold": 1}, "must be one of"),
        (5, "must be one of"),
    ],
)
def test_bad_input_has_one_validation(value, said):
    with pytest.raises(tilewise.ConfigError, match=said):
        step_cache(value)
    with pytest.raises(tilewise.ConfigError, match=said):
        tilewise.resolve("sta", cache=value)
    with pytest.raises(tilewise.ConfigError, match=said):
        tilewise.resolve("dense").with_options({"cache": value})
    with pytest.raises(tilewise.ConfigError, match=said):
        tilewise.Config.from_dict({"method": "sta", "cache": value})


def test_a_config_holds_it(tmp_path):
    config = tilewise.resolve("draft-fast", cache="first-block:threshold=0.1")
    assert config.cache == FirstBlock(0.1)
    tilewise.save_config(config, tmp_path / "a.json")
    assert tilewise.load_config(tmp_path / "a.json") == config
    assert tilewise.resolve(config, blocks="1:").cache == FirstBlock(0.1)
    assert tilewise.resolve(config, cache="none") == tilewise.resolve("draft-fast")
    assert "cache" not in tilewise.resolve("draft-fast").to_dict()


def test_dense_takes_a_cache_and_nothing_else():
    assert tilewise.resolve("dense").with_options({"cache": "taylor"}).cache == TaylorSeer()
    with pytest.raises(tilewise.ConfigError, match="Its only ones are cache and add"):
        tilewise.resolve("dense").with_options({"blocks": "1:"})
