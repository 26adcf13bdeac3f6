"""The base class of families: what a family of your own has to say, and what it need not."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tilewise
from tilewise.kernels.plans.layout import Grid
from tilewise.plugins.models.common import registry
from tilewise.plugins.models.common.family import AttentionLayer
from tilewise.plugins.models.common.registry import family_of, register_family, served_streams, streams_of

MODELS = Path(__file__).resolve().parents[3] / "plugins" / "models"


class Mine(nn.Module):
    """A denoiser that no built-in family serves."""


class Minimal(tilewise.Family):
    """Defines what a family must, and nothing else."""

    name = "mine"
    classes = ("Mine",)

    def grid(self, denoiser, args, kwargs):
        return Grid(1, 2, 3)

    def timestep(self, args, kwargs):
        return torch.zeros(1)

    def grid_of_size(self, denoiser, pipe, size):
        return Grid(1, 2, 3)


@pytest.fixture
def families(monkeypatch):
    family_of(Mine())  # the built-in ones are registered first
    monkeypatch.setattr(registry, "_FAMILIES", dict(registry._FAMILIES))


@pytest.mark.usefixtures("families")
def test_what_is_optional_defaults_to_nothing():
    family, layer = Minimal(), AttentionLayer("a", nn.Identity(), 0, 1, 16)
    assert register_family(family) is family
    assert family_of(Mine()) is family
    assert family.refuses(Mine(), (), {}) is None
    assert family.self_attention(layer) is None
    assert family.replace_processor(layer) is None
    assert family.fuse(Mine(), None) == family.hooks(Mine()) == family.notes(Mine(), fuse=True, dense=()) == []
    assert streams_of(Mine()) is None
    assert "Mine" not in served_streams()


@pytest.mark.parametrize("name", sorted(tilewise.Family.__abstractmethods__))
def test_what_is_not_optional_is_missed_at_once(name):
    members: dict[str, Any] = {key: value for key, value in vars(Minimal).items() if callable(value) and key != name}
    with pytest.raises(TypeError, match=name):
        type("Incomplete", (tilewise.Family,), members)()


@pytest.mark.usefixtures("families")
@pytest.mark.parametrize(
    ("given", "says"),
    [
        (type("Duck", (), dict(vars(Minimal)))(), "got a Duck. Derive your class from tilewise.Family"),
        (Minimal, "got the class Minimal. Derive .* and pass an instance"),
    ],
)
def test_only_instances_of_a_family_are_registered(given, says):
    with pytest.raises(TypeError, match=says):
        register_family(given)
    assert family_of(Mine()) is None


def test_a_layers_own_grid():
    grid = Grid(2, 9, 16, text=5)
    assert AttentionLayer("a", nn.Identity(), 0, 1, 16).grid(grid) == grid
    assert AttentionLayer("a", nn.Identity(), 0, 1, 16, downsample=2).grid(grid) == Grid(2, 3, 4, text=5)


def imports(path: Path) -> set[str]:
    tree = ast.parse(path.read_text("utf-8"))
    return {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}


def test_what_families_share_imports_no_family():
    for folder in ("common", "fused"):
        for path in (MODELS / folder).glob("*.py"):
            for module in imports(path):
                assert not module.startswith("tilewise.plugins.models.") or module.split(".")[3] == "common", (
                    path,
                    module,
                )
