"""`StreamSettings`: what it takes, JSON, and names that are kept twice."""

from __future__ import annotations

import dataclasses

import pytest

from tilewise.pipelines.streaming import prompt_plan, settings
from tilewise.pipelines.streaming.recipe import CausalRecipe
from tilewise.pipelines.streaming.settings import StreamSettings, parse_prompt_at
from tilewise.pipelines.streaming.windows.recipe import WindowRecipe
from tilewise.pipelines.streaming.windows.ways.base import ways
from tilewise.plugins.errors import ConfigError
from tilewise.plugins.streaming.policies.base import policies


def test_names_that_are_listed_without_torch_are_those_that_there_are():
    assert prompt_plan.CHANGES == settings.CHANGES
    assert sorted(settings.POLICIES) == policies()
    assert list(settings.WAYS) == list(ways())
    assert set(settings.OF_WINDOWS) <= {field.name for field in dataclasses.fields(WindowRecipe)}
    assert set(settings.OF_RECIPE) <= {field.name for field in dataclasses.fields(CausalRecipe)}


def test_json_and_back():
    made = StreamSettings(seconds=20, sink=0, prompt_at=["10s=a = b", "12.5=c"], prompt_over=2)
    assert StreamSettings.from_dict(made.to_dict()) == made
    assert made.prompts() == [(10.0, "a = b"), (12.5, "c")]
    assert made.until(12).prompt_at == ("10s=a = b",) and made.until(12).seconds == 12
    with pytest.raises(ConfigError, match="Did you mean 'sink'"):
        StreamSettings.from_dict({"sinc": 1})


def test_only_what_is_given_changes_a_recipe():
    recipe = CausalRecipe(chunk=2, window=8, sink=3, policy="ema")
    assert StreamSettings().applied(recipe) == recipe
    assert StreamSettings(sink=0, window=5).applied(recipe) == recipe.replace(sink=0, window=5)


@pytest.mark.parametrize("said", ["10", "=a", "s=a", "10s=", "-1s=a", "1m=a", "1e3s=a"])
def test_changes_that_cannot_be_read(said):
    with pytest.raises(ConfigError, match="TIME=TEXT"):
        parse_prompt_at(said)


@pytest.mark.parametrize(
    "bad",
    [
        {"chunk": 0},
        {"sink": True},
        {"seconds": -1},
        {"prompt_at": "1s=a"},
        {"prompt_over": 0},
        {"storage": "fp4"},
    ],
)
def test_values_that_cannot_be(bad):
    with pytest.raises(ConfigError):
        StreamSettings(**bad)
