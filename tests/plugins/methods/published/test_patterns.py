"""Patterns of heads and places, and what corrects another method: against plain loops."""

import math

import pytest
import torch
from chosen_blocks import blocks_of, planned, tensors

import tilewise
from tests.helpers.tiny_wan import tiny_transformer
from tilewise.kernels.attention.dispatch import choose_backend
from tilewise.kernels.attention.naive import masked_attention
from tilewise.kernels.plans.layout import Grid
from tilewise.plugins.errors import ConfigError
from tilewise.plugins.methods.base import make_method
from tilewise.plugins.methods.published.power import choose_window
from tilewise.plugins.runtime.sparse_call import run_planned

TILE = (1, 4, 4)
GRIDS = [Grid(3, 11, 14), Grid(2, 9, 10, text=5, text_first=True)]
CPU = torch.device("cpu")


def is_power(n):
    return n > 0 and math.log2(n).is_integer()


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("options", [{}, {"window": (1, 3, 1)}, {"density": 0.6}])
def test_power(grid, options):
    method = make_method("power", {"tile": (1, 2, 2), **options})
    layout = method.layout(grid)
    plan = method.plan(layout, 2, CPU)
    half = [n // 2 for n in method.window_of(layout)]
    tiles, kept = layout.block_tile.tolist(), blocks_of(layout, plan, 1)[0, 0]
    for i, a in enumerate(tiles):
        for j, b in enumerate(tiles):
            apart = [abs(x - y) for x, y in zip(a, b, strict=True)]
            far = [n for n in apart if n]
            wanted = all(n <= h for n, h in zip(apart, half, strict=True)) or (len(far) == 1 and is_power(far[0]))
            assert bool(kept[i, j]) == (wanted or a[0] < 0 or b[0] < 0), (a, b)


def test_power_keeps_at_most_the_density():
    for density in (0.1, 0.3, 0.8, 1.0):
        method = make_method("power", {"density": density, "tile": (1, 2, 3)})
        layout = method.layout(Grid(5, 11, 14))
        found = method.plan(layout, 1, CPU).density
        least = make_method("power", {"tile": (1, 2, 3)}).plan(layout, 1, CPU).density
        assert found <= max(density, least) + 1e-9
        assert found > 0.6 * density
    assert choose_window((5, 11, 14), (1, 2, 3), 0.001) == (1, 1, 1)


def test_power_has_a_far_field():
    method = make_method("power", {"tile": (1, 4, 4), "far": "tiles"})
    plan = method.plan(method.layout(Grid(3, 16, 16)), 2, CPU)
    assert plan.far is not None
    assert plan.cost > plan.density


class Duo:
    """The rule of ``duo``, query block by query block."""

    def __init__(self, grid, **options):
        self.method = make_method("duo", {"tile": TILE, "min_tokens": 0, **options})
        self.layout = self.method.layout(grid)
        self.qkv = tensors(grid)
        self.tiles = (self.layout.block_tile * torch.tensor(TILE)).double()
        self.text = self.layout.is_text.tolist()
        self.video = [j for j, text in enumerate(self.text) if not text]

    def local(self, i, count, sink):
        if self.text[i]:
            return set(range(self.layout.blocks))
        by_distance = sorted(self.video, key=lambda j: float((self.tiles[i] - self.tiles[j]).norm()))
        first = [j for j in by_distance if self.tiles[j, 0] < sink][: count // 2]
        rest = [j for j in by_distance if j not in first]
        texts = {j for j, text in enumerate(self.text) if text}
        return {*first, *rest[: count - len(first)], i, *texts}

    def check(self, full_heads, count, sink):
        """full_heads(b, local): the heads of a sample that see everything."""
        kept = blocks_of(self.layout, planned(self.method, self.layout, *self.qkv).plan, 4)
        local = [self.local(i, count, sink) for i in range(self.layout.blocks)]
        for b in range(2):
            full = full_heads(b, local)
            for h in range(4):
                for i in range(self.layout.blocks):
                    wanted = set(range(self.layout.blocks)) if h in full else local[i]
                    assert set(kept[b, h, i].nonzero().flatten().tolist()) == wanted, (b, h, i)

    def weakest(self, number):
        logits = self.method.draft(self.layout, *self.qkv[:2], 0.25).logits.double().softmax(-1)

        def heads(b, local):
            mass = [
                sum(
                    self.layout.block_rows[i] * logits[b, h, i, sorted(local[i])].sum()
                    for i in range(self.layout.blocks)
                )
                for h in range(4)
            ]
            return sorted(range(4), key=lambda h: mass[h])[:number]

        return heads


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_duo_measures_its_heads(grid):
    duo = Duo(grid, retrieval=0.5, local=0.3)
    duo.check(duo.weakest(2), round(0.3 * duo.layout.blocks), 1)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_duo_takes_the_heads_it_is_told(grid):
    duo = Duo(grid, heads=((1, 3),), local=0.4, sink=0)
    duo.check(lambda b, local: {1, 3}, round(0.4 * duo.layout.blocks), 0)
    assert duo.method.expected_density(duo.layout, 4) == pytest.approx(0.7, abs=0.02)


def test_duo_divides_a_density():
    duo = Duo(Grid(4, 12, 16), density=0.6)
    duo.check(duo.weakest(1), round((0.6 - 0.25) / 0.75 * duo.layout.blocks), 1)


def test_duo_has_heads_for_each_layer():
    model = tiny_transformer(seed=1)
    layers = len(model.blocks)
    method = make_method("duo", {"heads": [[0]] * layers, "local": 0.5}).prepare(model, model)
    assert method.at(1, None).heads == ((0,),)
    with pytest.raises(ConfigError, match=f"has {layers}"):
        make_method("duo", {"heads": [[0]] * (layers + 1)}).prepare(model, model)
    with pytest.raises(ConfigError, match="head 9"):
        make_method("duo", {"heads": [[9]]}).check(4)


@pytest.mark.parametrize("base", [{"name": "draft", "density": 0.2, "tile": TILE, "compensate": False},
                                  {"name": "sta", "window": (1, 3, 1), "tile": TILE}])  # fmt: skip
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_delta(grid, base):
    method = make_method("delta", {"base": base, "every": 5})
    layout = method.layout(grid)
    q, k, v = tensors(grid)
    found = planned(method, layout, q, k, v)
    out = run_planned((q, k, v), found, choose_backend(q, k, v, found.plan), layout, None)
    sparse = masked_attention(q, k, v, found.plan.to_mask(4))[0]
    dense = masked_attention(q, k, v)[0]
    wanted, answered = sparse.clone(), 0
    first, groups = (grid.text if grid.text_first else 0), -(-grid.video // 5)
    for n in range(groups):
        begin, end = (first + grid.video * edge // groups for edge in (n, n + 1))
        middle = (begin + end) // 2
        wanted[:, begin:end] += (dense - sparse)[:, middle : middle + 1]
        answered += 1
    torch.testing.assert_close(out, wanted.float(), rtol=1e-4, atol=1e-5)
    assert found.around.pairs == pytest.approx(answered / grid.tokens)
    assert method.expected_cost(layout, 4) == pytest.approx(method.expected_density(layout, 4) + found.around.pairs)


def test_delta_is_exact_where_the_queries_of_a_group_are_alike():
    grid = Grid(2, 8, 8)
    method = make_method(
        "delta", {"base": {"name": "draft", "density": 0.2, "tile": TILE, "compensate": False}, "every": 4}
    )
    layout = method.layout(grid)
    q, k, v = tensors(grid)
    q = q[:, ::4].repeat_interleave(4, 1)
    found = planned(method, layout, q, k, v)
    out = run_planned((q, k, v), found, choose_backend(q, k, v, found.plan), layout, None)
    torch.testing.assert_close(out, masked_attention(q, k, v)[0].float(), rtol=1e-4, atol=1e-5)


def test_delta_in_a_model_counts_what_it_computes():
    model = tiny_transformer(seed=1)
    call = {"hidden_states": torch.randn(1, 4, 5, 16, 16), "encoder_hidden_states": torch.randn(1, 4, 32)}
    base = tilewise.Draft(density=0.3, tile=(1, 2, 4), compensate=False, min_tokens=0)
    told = []
    for method in (base, make_method("delta", {"base": base, "every": 4})):
        with tilewise.patched(model, method, steps=":", strict=True), torch.no_grad():
            model(**call, timestep=torch.tensor([500.0]))
            told.append(tilewise.summary(model))
    alone, corrected = told
    assert corrected.density == pytest.approx(alone.density)
    assert corrected.cost == pytest.approx(alone.cost + 0.25)
