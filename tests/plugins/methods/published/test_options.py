"""Published rules: options that cannot be, what they refuse to do, and what holds for every one of them."""

import math
from pathlib import Path

import pytest
import torch
from chosen_blocks import blocks_of, planned, tensors

import tilewise
from examples.list_methods import page
from tilewise.kernels.plans.layout import Grid, Layout
from tilewise.kernels.plans.window_keys import WindowKeys
from tilewise.plugins.errors import ConfigError
from tilewise.plugins.methods.base import DynamicMethod, make_method, method_class
from tilewise.plugins.methods.dynamic.map_method import MapMethod
from tilewise.plugins.methods.dynamic.reordered import ReorderedMethod

ROOT = Path(__file__).parents[4]
TILE = (1, 4, 4)
PUBLISHED = [name for name in tilewise.methods() if ".published." in method_class(name).__module__]
CHOOSING = [name for name in PUBLISHED if issubclass(method_class(name), MapMethod)]
PLACED = [name for name in CHOOSING if not issubclass(method_class(name), ReorderedMethod)]

BAD = [
    ("sol", {"density": 0.5, "tau": 1.0}, "density or tau, not both"),
    ("sol", {"tau": "high"}, "tau must be a number"),
    ("sol", {"spread": "wide"}, "diag, exact"),
    ("moba", {"density": 0}, "density must be in"),
    ("moba", {"tile": (2, 8, 16)}, "256 tokens"),
    ("hip", {"density": 1.5}, "density must be in"),
    ("less-is-more", {"recent": 2}, "recent must be in"),
    ("dhsa", {"cuts": 0}, "cuts must be in"),
    ("flexprefill", {"gamma": 0}, "gamma must be in"),
    ("flexprefill", {"gamma": 0.9, "density": 0.1}, "density or gamma, not both"),
    ("flexprefill", {"threshold": -1}, "threshold must be in"),
    ("foreground", {"mask": ((0, 1), (0,))}, "rows of the same length"),
    ("foreground", {"mask": ((0, 2),)}, r"numbers in \[0, 1\]"),
    ("foreground", {"mask": "middle"}, "rows of the same length"),
    ("foreground", {"words": (3, 1)}, "the first and the last"),
    ("foreground", {"words": (1, 2), "mask": ((1,),)}, "not both"),
    ("foreground", {"boost": 0.5}, "boost must be"),
    ("foreground", {"words": (1, 2), "share": 0}, "share must be"),
    ("svg2", {"clusters": 0}, "clusters must be"),
    ("svg2", {"rounds": 0}, "rounds must be"),
    ("routing", {"clusters": "many"}, "clusters must be"),
    ("hyper", {"bits": 31}, "at most 30"),
    ("power", {"window": (2, 1, 1)}, "odd numbers"),
    ("power", {"window": (1, 1)}, "three whole numbers"),
    ("power", {"window": (1, 1, 1), "density": 0.2}, "not both"),
    ("power", {"cell": (1, 2, 2)}, "option of far"),
    ("duo", {"retrieval": 2}, "share of the heads"),
    ("duo", {"retrieval": 0.5, "heads": ((1,),)}, "not both"),
    ("duo", {"heads": "1"}, "numbers of heads"),
    ("duo", {"heads": ((-1,),)}, "numbers of heads"),
    ("duo", {"local": 0, "retrieval": 0.5}, "local must be in"),
    ("duo", {"sink": -1}, "sink must be"),
    ("delta", {"every": 1}, "every must be"),
    ("delta", {"base": {"name": "dense"}}, "a sparse method"),
    ("delta", {"base": {"name": "delta"}}, "a sparse method"),
    ("delta", {"base": {"name": "shifted-windows"}}, "a sparse method"),
    ("delta", {"base": {"name": "stq"}}, "Did you mean 'sta'"),
]


@pytest.mark.parametrize(("name", "options", "message"), BAD, ids=[f"{name} {options}" for name, options, _ in BAD])
def test_bad_options(name, options, message):
    with pytest.raises(ConfigError, match=message):
        make_method(name, options)


@pytest.mark.parametrize("name", CHOOSING)
@pytest.mark.parametrize("density", [0.1, 0.5])
def test_density_is_the_one_asked_for(name, density):
    grid = Grid(4, 16, 32)
    method = make_method(name, {"tile": (1, 4, 4), "density": density})
    layout = method.layout(grid)
    plan = planned(method, layout, *tensors(grid, batch=1, heads=2, key_heads=2)).plan
    assert float(plan.device_density) == pytest.approx(density, abs=0.03)
    assert method.expected_density(layout, 2) == density


@pytest.mark.parametrize("name", CHOOSING)
def test_everything_is_kept_at_density_1(name):
    grid = Grid(2, 8, 9, text=5)
    method = make_method(name, {"tile": TILE, "density": 1.0})
    plan = planned(method, method.layout(grid), *tensors(grid)).plan
    assert float(plan.device_density) == 1.0


@pytest.mark.parametrize("name", CHOOSING)
def test_text_sees_and_is_seen_and_no_row_is_empty(name):
    grid = Grid(2, 8, 9, text=5)
    method = make_method(name, {"tile": TILE, "density": 0.05, "always": ()})
    layout = method.layout(grid)
    kept = blocks_of(layout, planned(method, layout, *tensors(grid)).plan, 4)
    assert kept[..., layout.is_text].all()
    assert kept[:, :, layout.is_text].all()
    method = make_method(name, {"tile": TILE, "density": 0.01, "always": ()})
    layout = method.layout(Grid(2, 8, 9))
    assert blocks_of(layout, planned(method, layout, *tensors(layout.grid)).plan, 4).any(-1).all()


@pytest.mark.parametrize("name", PLACED)
def test_nothing_outside_a_window_is_seen(name):
    grid = Grid(2, 12, 12)
    within = tilewise.STA(window=(1, 3, 1))
    method = make_method(name, {"tile": TILE, "density": 0.1, "within": within})
    layout = method.layout(grid)
    plan = planned(method, layout, *tensors(grid)).plan
    bounds = tilewise.STA(window=(1, 3, 1), tile=TILE).plan(layout, 4, torch.device("cpu")).to_mask(4)
    mask = plan.to_mask(4)
    assert not (mask & ~bounds).any()
    assert mask.any(-1).all()


@pytest.mark.parametrize("name", CHOOSING)
def test_a_query_that_is_not_finite_is_reported(name):
    grid = Grid(2, 8, 9)
    method = make_method(name, {"tile": TILE, "density": 0.2})
    layout = method.layout(grid)
    q, k, v = tensors(grid, batch=1)
    q[0, 20, 1] = math.nan
    found = planned(method, layout, q, k, v)
    assert float(found.broken) >= 1
    assert not math.isnan(float(found.recall))


def test_the_page_is_what_the_code_says():
    written = (ROOT / "docs/published-methods.md").read_text(encoding="utf-8")
    assert written == page(), "python -m examples.list_methods > docs/published-methods.md"


@pytest.mark.parametrize("name", PUBLISHED)
def test_source_and_use_are_told(name):
    cls = method_class(name)
    assert "arXiv" in cls.source
    assert cls.use
    assert not cls.use.endswith(".")


@pytest.mark.parametrize("name", CHOOSING)
def test_a_method_over_a_cache_plans_or_says_why_not(name):
    """Over the window of a KV cache there are more keys than queries."""
    method = make_method(name, {"tile": TILE, "density": 0.3, "min_tokens": 0})
    assert isinstance(method, DynamicMethod)
    window = WindowKeys(Layout(Grid(1, 9, 12), TILE), (0, 2, 1, 3), kept=1)
    if method.refuses_window() is not None:
        assert "KV cache" in method.refuses_window()
        return
    q, k, v = tensors(window.layout.grid, batch=1)
    found = method.plan_call(window.chunk, q[:, : window.chunk.grid.tokens], k, v, 0.25, {}, 0, window)
    assert (found.plan.q_len, found.plan.k_len) == (108, 432)
    assert float(found.plan.device_density) == pytest.approx(method.expected_density(window.chunk, 4, window), abs=0.06)
