"""``auto``: what is measured, how a budget is divided, and what a patched pipeline does with it."""

from __future__ import annotations

import itertools
import json
import math

import pytest
import test_hunyuan_video as hunyuan
import test_unet as unet
import tiny_wan
import torch
from family_checks import forward
from torch import nn

import tilewise
from tilewise.kernels.plans.layout import Grid
from tilewise.pipelines.calibration.profile import head_errors
from tilewise.plugins.methods.auto import LEVELS, Auto
from tilewise.plugins.methods.base import make_method
from tilewise.plugins.methods.draft import Draft
from tilewise.plugins.methods.dynamic.head_budget import HeadBudget, LayerGains, hull_gains
from tilewise.plugins.methods.dynamic.head_rankings import RANKINGS, rank, rank_by_head
from tilewise.plugins.methods.dynamic.sampled_errors import projection_gram, sampled_errors
from tilewise.plugins.models.common.family import AttentionLayer

TILE = (1, 4, 4)
AUTO = Auto(density=0.3, tile=TILE, min_tokens=0)


class Layer(nn.Module):
    """An attention layer of which only the output projection is asked for."""

    def __init__(self, channels: int, out: int = 24) -> None:
        super().__init__()
        self.to_out = nn.ModuleList([nn.Linear(channels, out)])


def clips(pipe, steps: int = 3) -> torch.Tensor:
    """Two of them, with guidance."""
    made = pipe(
        ["a red circle", "a blue square"], num_inference_steps=steps, generator=torch.Generator().manual_seed(0), height=64,
        width=64, num_frames=9, guidance_scale=3.0, max_sequence_length=16, output_type="np",
    )  # fmt: skip
    return torch.from_numpy(made.frames)


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# ── what is measured ─────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("key_heads", "weighed"), [(4, True), (2, True), (2, False)])
def test_errors_of_all_queries_are_those_of_the_sparse_call(key_heads, weighed, monkeypatch):
    if key_heads == 2:  # a key head at a time
        monkeypatch.setattr("tilewise.plugins.methods.dynamic.sampled_errors.AT_ONCE", 1)
    densities = (0.05, 0.2, 0.5, 1.0)
    base = Draft(tile=TILE, min_tokens=0, each=True)
    layout = base.layout(Grid(3, 8, 8))
    q = 2 * random(2, layout.grid.tokens, 4, 16, seed=0)
    k, v = (random(2, layout.grid.tokens, key_heads, 16, seed=seed) for seed in (1, 2))
    module = Layer(64) if weighed else None
    maps = base.maps_of(layout, q, k, v, 0.25)
    found = sampled_errors(maps, (q, k, v), 0.25, densities, RANKINGS[:2], module, sample=(layout.blocks, 16))
    assert found.shape == (2, 4, 2, 4)
    for b, (n, by) in itertools.product(range(2), enumerate(("error", "mass"))):
        one, gram = slice(b, b + 1), projection_gram(module, 4)
        ranked = Draft(tile=TILE, min_tokens=0, each=True, rank=by)
        whole = head_errors(ranked, densities, layout, (q[one], k[one], v[one]), 0.25, gram)
        torch.testing.assert_close(found[b, :, n], (whole.errors / whole.output).float(), rtol=1e-4, atol=1e-6)


def test_each_head_has_its_ranking():
    base = Draft(tile=TILE, min_tokens=0, each=True)
    layout = base.layout(Grid(3, 8, 8))
    candidates = base.maps_of(layout, *(random(2, 192, 4, 16, seed=seed) for seed in range(3)), 0.25).candidates
    which = torch.tensor([[0, 1, 2, 1], [2, 2, 0, 1]])
    found, every = rank_by_head(candidates, which), torch.arange(layout.blocks)
    for b, h in itertools.product(range(2), range(4)):
        assert torch.equal(found[b, h], rank(candidates, RANKINGS[which[b, h]], every)[b, h])
    more = found[0, 2] - candidates.ranked[0, 2]
    apart = (layout.block_tile[:, None] - layout.block_tile).abs().sum(-1)
    torch.testing.assert_close(more, (apart <= 1).float(), rtol=0, atol=1e-4)


def test_a_few_queries_tell_as_much_over_ragged_tiles_and_text():
    base = Draft(tile=TILE, min_tokens=0, each=True)
    layout = base.layout(Grid(7, 13, 11, text=9))
    q, k, v = (random(1, layout.grid.tokens, 3, 16, seed=seed) for seed in (3, 4, 5))
    k[:, :, 0] *= 0  # the means are exact
    k[:, :, 2] *= 4  # sharp
    maps = base.maps_of(layout, q, k, v, 0.25)
    few = sampled_errors(maps, (q, k, v), 0.25, (0.1, 0.5, 1.0), RANKINGS[:1])[0, :, 0]
    every = sampled_errors(maps, (q, k, v), 0.25, (0.1, 0.5, 1.0), RANKINGS[:1], sample=(layout.blocks, 16))[0, :, 0]
    assert max(few[0].max(), few[:, 2].max()) < 1e-12
    torch.testing.assert_close(few[1:, :2], every[1:, :2], rtol=0.25, atol=0)


# ── how it is divided ────────────────────────────────────────────────────────────────────────────────────────────


def test_a_division_is_the_best_there_is_for_what_it_costs():
    cost = torch.tensor([0.02, 0.02, 0.1, 0.3, 1.0], dtype=torch.float64)
    errors = random(3, 5, 5, seed=6).exp().sort(-1, descending=True).values
    errors[..., 1], errors[..., 4] = errors[..., 0], 0
    budget = HeadBudget(0.3)
    budget.tell("layer", LayerGains(hull_gains(cost, errors), cost.diff(), 0.02, 1, torch.arange(5).expand(3, 5, 5)))
    budget.begin(0)
    levels, rankings = budget.choices("layer")
    assert torch.equal(rankings, levels)
    plans = torch.tensor(list(itertools.product(range(5), repeat=5)))
    costs = cost[plans].sum(-1)
    for b in range(3):
        spent = float(cost[levels[b]].sum())
        made = float(errors[b].gather(1, levels[b, :, None]).sum())
        of_plans = errors[b].expand(len(plans), 5, 5).gather(2, plans[..., None])[..., 0].sum(-1)
        assert made == pytest.approx(float(of_plans[costs <= spent + 1e-9].min()))
        assert abs(spent - 5 * 0.3) < 0.7 / 2 + 1e-9  # within half of the largest step


def planted(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Grid]:
    """Heads that need little, some, or all: means that are exact, the own block, 8 of 64 blocks, every key."""
    grid, D = Grid(4, 16, 16), 32
    layout = AUTO.layout(grid)
    N, S = layout.blocks, grid.tokens
    block = torch.repeat_interleave(torch.arange(N), layout.block_rows)
    q, k = (torch.zeros(1, S, 4, D) for _ in range(2))
    v = random(1, S, 4, D, seed=seed)
    codes = random(N, D // 2, seed=seed + 1)
    codes = 9 * codes / codes.norm(dim=-1, keepdim=True)
    noise = random(2, S, D // 2, seed=seed + 2)
    for head, to in ((1, block), (2, block // 8)):  # code of the own block; of one that the own group of 8 shares
        q[0, :, head, : D // 2], k[0, :, head, : D // 2] = codes[to], codes[to]
        q[0, :, head, D // 2 :], k[0, :, head, D // 2 :] = noise[0], noise[1]
    q[0, :, 3], k[0, :, 3] = 2 * random(2, S, D, seed=seed + 3)
    return q, k, v, grid


def test_heads_that_are_planted_get_what_they_need():
    *qkv, grid = planted(seed=0)
    flat = [qkv[0] * 0, qkv[1] * 0, qkv[2]]  # a layer of uniform heads, which need nothing
    layout, run = AUTO.layout(grid), {}
    layers = [AttentionLayer(name, Layer(128), number, 4, 32) for number, name in enumerate(("first", "second"))]
    kept = []
    for tick in range(4):
        plans = [
            AUTO.in_run(layer, lambda run=run: run).plan_call(layout, *of_layer, 0.5, {}, tick).plan
            for layer, of_layer in zip(layers, (qkv, flat), strict=True)
        ]
        kept.append(torch.cat([plan.head_density for plan in plans], 1)[0])
    uniform, own, eighth, all_keys = kept[0][:4]
    # Before the second layer was seen, the first has its own share alone.
    assert kept[0][:4].mean() == pytest.approx(0.3, abs=0.1)
    assert uniform < 0.02 and own < 0.04 and eighth < all_keys
    for later in kept[2:]:
        uniform, own, eighth, all_keys = later[:4]
        assert max(uniform, *later[4:]) < 0.02 and own < 0.04
        assert 0.1 < eighth < 0.4 and all_keys == 1
    # Nothing is left to be gained beyond that, and the budget is not spent.
    assert float(torch.stack(kept).mean()) < 0.3


def test_the_budget_is_kept_over_layers_and_steps():
    layout, run = AUTO.layout(Grid(4, 16, 16)), {}
    layers = [AttentionLayer(f"layer {n}", Layer(64), n, 4, 16) for n in range(3)]
    kept = []
    for tick in range(8):
        for n, layer in enumerate(layers):
            q, k, v = (random(2, 1024, 4, 16, seed=100 * tick + 10 * n + i) for i in range(3))
            q = q * torch.linspace(1, 4, 4)[:, None] * (1 + n)
            plan = AUTO.in_run(layer, lambda run=run: run).plan_call(layout, q, k, v, 0.25, {}, tick).plan
            kept.append(plan.head_density)
    density = torch.stack(kept)  # (calls, samples, heads)
    torch.testing.assert_close(density.mean((0, 2)), torch.full((2,), 0.3), rtol=0, atol=0.01)
    assert density.amax() - density.amin() > 0.1
    assert set(LEVELS) & {round(float(each), 2) for each in density.flatten()}


# ── in a pipeline ────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_run_keeps_its_budget_and_says_so(tiny_pipe, tmp_path):
    """Two samples, guidance, and each clip as it would be alone."""
    tilewise.patch(tiny_pipe, AUTO, steps=(0.3, 1), strict=True)
    both = clips(tiny_pipe, steps=5)
    told = tilewise.summary(tiny_pipe)
    assert told.density == pytest.approx(0.3, abs=0.1) and told.density < told.cost < 0.5
    assert {row.kind for row in told.rows} == {"sparse", "dense step"}
    assert [(row.layer, len(row.density)) for row in told.heads] == [("blocks.0.attn1", 2), ("blocks.1.attn1", 2)]
    mean = sum(sum(row.density) for row in told.heads) / 4
    assert mean == pytest.approx(told.density, rel=1e-5)
    assert "heads keep" in str(told) and json.loads(json.dumps(told.to_dict()))["heads"][0]["block"] == 0
    assert both.isfinite().all()
    tilewise.save_config(AUTO, tmp_path / "auto.json")
    assert tilewise.load_config(tmp_path / "auto.json").method == AUTO
    (row,) = tilewise.explain(tiny_pipe, method=AUTO, height=64, width=64, frames=9).rows
    assert (
        row.density == 0.3 and row.cost > 0.3 and row.options["divided among"] == "all heads, layers and sparse steps"
    )


def test_a_sample_is_planned_as_it_is_alone():
    """Whatever else is in the batch, and whatever a mask hides of others."""
    layout = AUTO.layout(Grid(4, 16, 16))
    layer = AttentionLayer("layer", Layer(64), 0, 4, 16)
    qkv = [3 * random(3, 1024, 4, 16, seed=seed) for seed in range(3)]
    runs, found = ({}, {}), []
    for tick in range(3):
        for run, given in zip(runs, (qkv, [x[1:2] for x in qkv]), strict=True):
            found.append(
                AUTO.in_run(layer, lambda run=run: run).plan_call(layout, *given, 0.25, {}, tick).plan.head_density
            )
        assert torch.equal(found[-2][1:2], found[-1])


def test_layers_with_grids_of_their_own(monkeypatch):
    """A step keeps its budget although its first layers have not seen the last ones."""
    monkeypatch.setattr("tilewise.plugins.config.MIN_MAP_TOKENS", 1)
    model, given = unet.KINDS["2d"](), unet.inputs_of("2d", 16, 12)
    tilewise.patch(model, Auto(density=0.4, tile=TILE, min_tokens=0), steps=(0, 1), strict=True)
    unet.forward(model, given)
    told = tilewise.summary(model)
    assert {row.kind for row in told.rows} == {"sparse"} and told.density == pytest.approx(0.4, abs=0.03)


def test_one_step_and_no_dense_ones(tiny_pipe):
    tilewise.patch(tiny_pipe, AUTO, steps="0:", strict=True)
    clips(tiny_pipe, steps=1)
    told = tilewise.summary(tiny_pipe)
    assert {row.kind for row in told.rows} == {"sparse"} and told.density == pytest.approx(0.3, abs=0.1)


def test_two_denoisers_and_branches_have_budgets_of_their_own():
    pipe = tiny_wan.tiny_pipeline(boundary_ratio=0.8)
    tilewise.patch(pipe, AUTO, strict=True)
    clips(pipe, steps=8)
    rows = [row for row in tilewise.summary(pipe).rows if row.kind == "sparse"]
    for name in ("transformer", "transformer_2"):
        own = [row for row in rows if row.denoiser == name]
        assert sum(row.density * row.pairs for row in own) / sum(row.pairs for row in own) == pytest.approx(
            0.3, abs=0.02
        )


def test_a_density_of_one_is_dense(tiny_pipe):
    stock = clips(tiny_pipe)
    tilewise.patch(tiny_pipe, Auto(density=1, tile=TILE, min_tokens=0), steps=(0, 1), strict=True)
    torch.testing.assert_close(clips(tiny_pipe), stock, rtol=1e-3, atol=1e-3)


def test_text_and_masks():
    model, given = hunyuan.tiny(None), hunyuan.inputs(None, (5, 14, 14), (9, 4))
    tilewise.patch(model, Auto(density=0.5, tile=TILE, min_tokens=0), steps=(0, 1), strict=True)
    forward(model, given)
    assert tilewise.summary(model).density == pytest.approx(0.5, abs=0.1)


def test_activations_that_are_not_finite(tiny_pipe):
    """A bad sample keeps everything it cannot rank; the others go on, and so do later steps."""
    tilewise.patch(tiny_pipe, AUTO, steps=(0, 1), strict=True)
    calls = itertools.count()

    def spoil(module, args, kwargs):
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        if next(calls) == 2:
            hidden[0, 0] = math.nan

    hook = tiny_pipe.transformer.blocks[0].attn1.register_forward_pre_hook(spoil, with_kwargs=True)
    clips(tiny_pipe, steps=3)
    hook.remove()
    told = tilewise.summary(tiny_pipe)
    assert told.broken > 0 and 0 < told.density <= 1


@pytest.mark.compile
def test_a_compiled_denoiser_runs_it(tiny_pipe):
    tilewise.patch(tiny_pipe, AUTO, steps=(0.3, 1))
    wanted = clips(tiny_pipe)
    tiny_pipe.transformer.compile(backend="eager", fullgraph=True)
    tilewise.patch(tiny_pipe, AUTO, steps=(0.3, 1))
    torch.testing.assert_close(clips(tiny_pipe), wanted, rtol=1e-3, atol=1e-3)


# ── what cannot be ───────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"density": 0}, r"auto: density must be in \(0, 1\]"),
        ({"density": 1.2}, r"auto: density must be in \(0, 1\]"),
        ({"density": None}, r"auto: density must be in \(0, 1\]"),
        ({"every": 0}, "auto: every must be a whole number of steps"),
        ({"tile": (8, 8, 8)}, "auto: tile"),
        ({"always": ("itself",)}, "auto: always"),
        ({"recall": 0.9}, "recall"),
    ],
)
def test_options_that_cannot_be(options, words):
    with pytest.raises(tilewise.ConfigError, match=words):
        make_method("auto", options)


def test_a_budget_below_what_is_always_kept(tiny_pipe):
    auto = Auto(density=0.05, tile=TILE, always=("self", "first-frame"), min_tokens=0)
    with pytest.raises(tilewise.ConfigError, match=r"a density of 0.05 of 320 tokens is below 0.24.*Raise the density"):
        tilewise.explain(tiny_pipe, method=auto, height=64, width=64, frames=9)
    tilewise.patch(tiny_pipe, auto)
    with pytest.raises(tilewise.ConfigError, match="what is kept in any case"):
        clips(tiny_pipe)


def test_windows_of_a_cache_stay_dense():
    assert "KV cache" in AUTO.refuses_window()


@pytest.mark.gpu
def test_a_gpu_measures_the_same_and_is_not_waited_for():
    layout, run = AUTO.layout(Grid(9, 24, 24)), {}
    qkv = [random(2, layout.grid.tokens, 4, 64, seed=seed).to("cuda", torch.bfloat16) for seed in range(3)]
    qkv[0] = qkv[0] * torch.tensor([0.0, 1.0, 2.0, 3.0], device="cuda", dtype=torch.bfloat16)[:, None]
    layer = AttentionLayer("layer", Layer(256).to("cuda", torch.bfloat16), 0, 4, 64)

    def plan(tick: int):
        return AUTO.in_run(layer, lambda: run).plan_call(layout, *qkv, 0.125, {}, tick).plan

    plan(0)  # makes what is kept with the layout: the one time that the device is waited for
    torch.cuda.set_sync_debug_mode("error")
    try:
        plans = [plan(tick) for tick in range(1, 6)]  # measured again at the fourth
    finally:
        torch.cuda.set_sync_debug_mode("default")
    density = torch.stack([each.head_density for each in plans])
    torch.testing.assert_close(density.mean((0, 2)).cpu(), torch.full((2,), 0.3), rtol=0, atol=0.08)
    assert (density[..., 0] < 0.05).all()
    found, want = (
        sampled_errors(AUTO.base.maps_of(layout, *given, 0.125), given, 0.125, LEVELS, RANKINGS)
        for given in (tuple(qkv), tuple(x.cpu().float() for x in qkv))
    )
    torch.testing.assert_close(found[:, 1:].cpu(), want[:, 1:], rtol=0.1, atol=1e-4)
