"""Which recipe a checkpoint gets: by its name, by a file beside it, by the call."""

from __future__ import annotations

import json

import pytest
import torch
from causal_checkpoints import random_weights, wan_names
from tiny_wan import tiny_pipeline

import tilewise
from tilewise import CausalRecipe
from tilewise.pipelines.errors import ModelError
from tilewise.pipelines.streaming.checkpoints.known import RECIPES


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline(attention_head_dim=128)


@pytest.fixture(scope="module")
def weights():
    return wan_names(random_weights(1))


@pytest.fixture
def load(tmp_path_factory, pipe, weights):
    """Loads a file that has the name and returns its recipe."""
    folder = tmp_path_factory.mktemp("x")

    def recipe_of(name="weights.pt", beside=None, **options):
        torch.save(weights, folder / name)
        for file, content in (beside or {}).items():
            (folder / file).write_text(content if isinstance(content, str) else json.dumps(content))
        return tilewise.load_causal_checkpoint(folder / name, pipe, **options)[1]

    return recipe_of


# name: chunk, timesteps, warped, shift, window, sink, policy, solver
TABLE = {
    "self-forcing": (3, (1000, 750, 500, 250), True, 5, 21, 0, "fixed", "renoise"),
    "self-forcing-a14b": (3, (1000, 850, 700, 550, 350, 275, 200, 125), True, 12, 21, 0, "fixed", "renoise"),
    "rolling-forcing": (3, (1000, 800, 600, 400, 200), True, 5, 24, 3, "fixed", "renoise"),
    "reward-forcing": (3, (1000, 750, 500, 250), True, 5, 9, 3, "ema", "renoise"),
    "longlive": (3, (1000, 750, 500, 250), True, 5, 12, 3, "fixed", "renoise"),
    "longlive-2": (8, (999, 749.25, 499.5, 249.75), True, 5, 32, 8, "shot", "unipc"),
    "causal-forcing": (3, (1000, 750, 500, 250), True, 5, 21, 0, "fixed", "renoise"),
    "causal-forcing-framewise": (1, (1000, 750, 500, 250), True, 5, 21, 0, "fixed", "renoise"),
    "causal-forcing-2step": (1, (1000, 500), True, 5, 21, 0, "fixed", "renoise"),
    "causal-forcing-1step": (1, (1000,), True, 5, 21, 0, "fixed", "renoise"),
    "causal-forcing-long": (3, (1000, 750, 500, 250), True, 5, 24, 3, "fixed", "renoise"),
    "causvid": (3, (1000, 757, 522), False, 8, 21, 0, "fixed", "renoise"),
    "causvid-4step": (3, (1000, 750, 500, 250), True, 8, 21, 0, "fixed", "renoise"),
    "streamdiffusion-v2": (1, (700, 500, 400, 200), False, 8, 6, 3, "adaptive", "renoise"),
    "krea": (3, (1000, 937, 833, 625), False, 5, 6, 0, "fixed", "renoise"),
}


def test_every_published_recipe():
    assert {
        name: (r.chunk, r.timesteps, r.warp, r.shift, r.window, r.sink, r.policy, r.solver)
        for name, r in RECIPES.items()
    } == TABLE
    assert all(r.name == name and r.guidance == 1 and r.context_noise == 0 for name, r in RECIPES.items())
    for name in ("causal-forcing-1step", "causal-forcing-2step"):
        assert RECIPES[name].first_timesteps == (1000, 750, 500, 250)
    assert (RECIPES["longlive-2"].height, RECIPES["longlive-2"].width, RECIPES["longlive-2"].fps) == (704, 1280, 24)


def test_a_file_that_is_not_known_by_name(load):
    with pytest.raises(tilewise.ConfigError, match=r"known by its name.*recipe=.*self-forcing.*ordinary Wan model"):
        load()
    assert load(recipe="reward-forcing") == RECIPES["reward-forcing"]
    assert load(recipe=CausalRecipe("mine", chunk=2)) == CausalRecipe("mine", chunk=2)
    assert load(recipe={"name": "mine", "chunk": 2}) == CausalRecipe("mine", chunk=2)


def test_fields_of_the_call(load, pipe):
    recipe = load("self_forcing_dmd.pt", chunk=1, window=7, timesteps=[1000, 500])
    assert recipe == RECIPES["self-forcing"].replace(chunk=1, window=7, timesteps=(1000, 500))
    assert json.loads(json.dumps(pipe.transformer._tilewise_recipe)) == recipe.to_dict()


def test_a_recipe_beside_the_file_wins_over_the_name_and_the_call_over_both(load):
    beside = {"recipe.json": {"chunk": 5}}
    assert load("self_forcing_dmd.pt", beside) == CausalRecipe("self_forcing_dmd", chunk=5)
    beside = {"self_forcing_dmd.pt.recipe.json": {"name": "mine", "chunk": 6}}
    assert load("self_forcing_dmd.pt", beside, window=9) == CausalRecipe("mine", chunk=6, window=9)
    assert load("self_forcing_dmd.pt", recipe="causvid").name == "causvid"


def test_a_bad_recipe_beside_the_file(load):
    with pytest.raises(tilewise.ConfigError, match=r"recipe\.json: .*Did you mean 'chunk'"):
        load(beside={"recipe.json": {"chunck": 5}})
    with pytest.raises(ModelError, match=r"recipe\.json is damaged"):
        load(beside={"recipe.json": "no"})
