"""``draft`` and ``xattention``: plans against naive double-precision arithmetic, guarantees, compensation, windows, bad input."""

import dataclasses
import math

import pytest
import torch
from chosen_blocks import blocks_of, planned, tensors

import tilewise
from tilewise.kernels.attention.block_compensation import add_block_compensation
from tilewise.kernels.attention.dispatch import block_sparse_attention
from tilewise.kernels.attention.naive import masked_attention
from tilewise.kernels.plans.layout import Grid
from tilewise.kernels.plans.window import window_plan
from tilewise.kernels.selection.select import GOLDEN
from tilewise.plugins.errors import ConfigError
from tilewise.plugins.methods.base import make_method
from tilewise.plugins.methods.draft import Draft
from tilewise.plugins.methods.dynamic.tiles import default_tile
from tilewise.plugins.methods.inward import Inward
from tilewise.plugins.methods.sta import STA
from tilewise.plugins.methods.xattention import XAttention

GRIDS = [
    Grid(3, 9, 20),  # border tiles on both axes
    Grid(2, 21, 6),  # portrait
    Grid(3, 8, 16, text=19),
    Grid(2, 10, 9, text=5, text_first=True),
    Grid(1, 7, 5),
]
IDS = [str(grid) for grid in GRIDS]
TILE = (1, 4, 4)


def naive_logits(layout, q, k, variance):
    """The formula of block_logits.py in double precision, one block pair at a time."""
    B, _, H, D = q.shape
    N, scale, share = layout.blocks, D**-0.5, H // k.shape[2]
    starts, rows = layout.block_start.tolist(), layout.block_rows.tolist()
    logits = torch.zeros(B, H, N, N, dtype=torch.float64)
    for b in range(B):
        for h in range(H):
            for i in range(N):
                mean = q[b, starts[i] : starts[i] + rows[i], h].double().mean(0)
                for j in range(N):
                    keys = k[b, starts[j] : starts[j] + rows[j], h // share].double()
                    s2 = float(scale**2 * (mean**2 * keys.var(0, unbiased=False)).sum())
                    limit = 2 * math.log(rows[j])
                    term = s2 / 2 if s2 <= limit else math.sqrt(s2 * limit) - limit / 2
                    logits[b, h, i, j] = scale * float(mean @ keys.mean(0)) + math.log(rows[j]) + variance * term
    return logits


def naive_rows(logits, layout, density=None, recall=None):
    """Row by row: itself first, then the best, until it is enough."""
    N, rows, text = layout.blocks, layout.block_rows.tolist(), layout.is_text.tolist()
    S = layout.grid.tokens
    if density is not None and layout.grid.text:
        density = max((density * S - layout.grid.text) / (S - layout.grid.text), 1 / S)
    kept = torch.zeros(logits.shape, dtype=torch.bool)
    for b in range(logits.shape[0]):
        for h in range(logits.shape[1]):
            for i in range(N):
                mass = logits[b, h, i].softmax(-1).tolist()
                weight = [n / S for n in rows] if recall is None else mass
                target = recall if recall is not None else density - (i * GOLDEN % 1) / N
                chosen = [j for j in range(N) if i == j or text[j] or text[i]]
                total = sum(weight[j] for j in chosen)
                for j in sorted(set(range(N)) - set(chosen), key=lambda j: -mass[j]):
                    if total >= target and chosen:
                        break
                    chosen.append(j)
                    total += weight[j]
                kept[b, h, i, chosen] = True
    return kept


@pytest.mark.parametrize("grid", GRIDS, ids=IDS)
@pytest.mark.parametrize("options", [{"density": 0.3}, {"recall": 0.83}, {"recall": 0.83, "variance": False}])
@pytest.mark.slow
def test_plan_is_the_naive_one(grid, options):
    """Ragged border blocks, text, two samples, grouped queries, portrait."""
    method = Draft(tile=TILE, compensate=False, safety=1.0, each=False, **options)
    layout = method.layout(grid)
    q, k, v = tensors(grid)
    plan = planned(method, layout, q, k, v).plan
    logits = naive_logits(layout, q, k, options.get("variance", True))
    wanted = naive_rows(logits, layout, options.get("density"), options.get("recall"))
    assert torch.equal(blocks_of(layout, plan, 4), wanted)
    rows = layout.block_rows.double()
    kept = float((wanted * rows[:, None] * rows).sum() / wanted.shape[0] / wanted.shape[1]) / grid.tokens**2
    assert float(plan.device_density) == pytest.approx(kept, rel=1e-5)


@pytest.mark.parametrize("select", ["rows", "head", "topk", "shared"])
@pytest.mark.parametrize("density", [0.1, 0.25, 0.5])
def test_density_is_the_one_asked_for(select, density):
    grid = Grid(4, 32, 32) if select == "topk" else Grid(4, 30, 33)  # topk counts blocks, large and small ones alike
    method = Draft(tile=(1, 4, 8), select=select, density=density)
    layout = method.layout(grid)
    plan = planned(method, layout, *tensors(grid, batch=1, heads=2, key_heads=2)).plan
    assert float(plan.device_density) == pytest.approx(density, abs=0.02)


def antidiagonal(layout, q, k, stride):
    """Mass of each block pair of whole groups, from the sums over antidiagonals as the paper writes them."""
    B, S, H, D = q.shape
    n = S // stride
    k = k.repeat_interleave(H // k.shape[2], 2)
    scores = torch.zeros(B, H, n, n, dtype=torch.float64)
    for a in range(n):
        for b in range(n):
            for r in range(stride):
                pair = q[:, a * stride + stride - 1 - r].double() * k[:, b * stride + r].double()
                scores[:, :, a, b] += pair.sum(-1) / stride * D**-0.5
    A = int(layout.block_rows[0]) // stride
    return scores.softmax(-1).unflatten(3, (-1, A)).sum(4).unflatten(2, (-1, A)).mean(3)


def test_xattention_sums_antidiagonals():
    grid = Grid(2, 8, 8)
    method = XAttention(stride=4, tile=TILE)
    layout = method.layout(grid)
    q, k, _ = tensors(grid)
    found = method.draft(layout, q, k, 0.25).logits.exp()
    torch.testing.assert_close(found, antidiagonal(layout, q, k, 4).float(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("grid", GRIDS, ids=IDS)
def test_xattention_takes_any_grid(grid):
    method = XAttention(stride=8, tile=TILE, recall=0.9)
    layout = method.layout(grid)
    found = planned(method, layout, *tensors(grid))
    torch.testing.assert_close(found.draft.sum(-1), torch.ones(found.draft.shape[:-1]))
    assert (found.plan.ends[..., 2] >= 1).all()


@pytest.mark.parametrize("name", ["draft", "xattention"])
def test_what_runs_is_the_mask_and_the_summary_rows(name):
    """The whole call against attention over the kept keys and, beside them, one key for each block that is skipped."""
    grid = Grid(2, 9, 10, text=6)
    method = make_method(name, {"density": 0.3, "tile": TILE})
    layout = method.layout(grid)
    q, k, v = tensors(grid)
    found = planned(method, layout, q, k, v)
    scale = q.shape[-1] ** -0.5
    out, lse = block_sparse_attention(q, k, v, found.plan, return_lse=True)
    mask = found.plan.to_mask(4)
    naive, naive_lse = masked_attention(q, k, v, mask)
    torch.testing.assert_close(out, naive.float(), rtol=1e-4, atol=1e-5)
    s = found.compensation
    merged = add_block_compensation(q, out, lse, s.key_mean, s.value_mean, s.bias, layout, scale)
    of_block = torch.repeat_interleave(layout.block_rows)
    keys, values = (x.repeat_interleave(2, 2).transpose(1, 2).double() for x in (s.key_mean, s.value_mean))
    z = scale * q.double().transpose(1, 2) @ keys.transpose(2, 3) + s.bias.double()[:, :, of_block]
    all_lse = torch.cat([naive_lse[..., None], z], -1).softmax(-1)
    wanted = all_lse[..., :1] * naive.transpose(1, 2) + all_lse[..., 1:] @ values
    torch.testing.assert_close(merged, wanted.transpose(1, 2).float(), rtol=1e-4, atol=1e-5)
    assert torch.equal(s.bias == -math.inf, blocks_of(layout, found.plan, 4))


def test_compensation_is_exact_where_blocks_are_flat():
    """Keys and values that are equal within a block: summary rows stand for them without error."""
    grid = Grid(2, 8, 16)
    method = Draft(tile=TILE, density=0.1)
    layout = method.layout(grid)
    q, k, v = tensors(grid, batch=1)
    of_block = torch.repeat_interleave(layout.block_rows)
    k, v = k[:, of_block * 16], v[:, of_block * 16]
    found = planned(method, layout, q, k, v)
    out, lse = block_sparse_attention(q, k, v, found.plan, return_lse=True)
    s = found.compensation
    merged = add_block_compensation(q, out, lse, s.key_mean, s.value_mean, s.bias, layout, 0.25)
    dense, _ = masked_attention(q, k, v)
    torch.testing.assert_close(merged, dense.float(), rtol=1e-4, atol=1e-5)
    assert (out - dense).abs().max() > 0.05


def test_variance_corrects_the_estimate():
    """Gaussian blocks of 128 keys, scores of standard deviation 2 within and 2 between blocks."""
    torch.manual_seed(0)
    grid = Grid(8, 8, 16)
    layout = Draft(tile=(1, 8, 16)).layout(grid)
    q = torch.randn(1, grid.t, 1, 64).repeat_interleave(128, 1) * 2
    means = torch.randn(1, grid.t, 1, 64).repeat_interleave(128, 1)
    k = means + 2 * torch.rand(1, grid.t, 1, 1).repeat_interleave(128, 1) * torch.randn(1, grid.tokens, 1, 64)
    v = torch.randn_like(k)
    options = {"tile": (1, 8, 16), "recall": 0.6, "probe": 64, "compensate": False, "always": (), "safety": 1.0}
    corrected, plain = (planned(Draft(variance=on, **options), layout, q, k, v) for on in (True, False))
    assert abs(float(corrected.recall - corrected.probe)) < 0.5 * abs(float(plain.recall - plain.probe))


@pytest.mark.parametrize("within", [STA(window=(1, 3, 1)), STA(window=((1, 3, 1), (3, 1, 3))), Inward(native=(7, 9))])
@pytest.mark.parametrize("text", [0, 11])
def test_within_a_window_nothing_outside_is_seen(within, text):
    grid = Grid(3, 12, 14, text=text)
    method = Draft(tile=TILE, within=within, density=0.05)
    layout = method.layout(grid)
    q, k, v = tensors(grid, heads=2)
    plan = planned(method, layout, q, k, v).plan
    window = within if isinstance(within, Inward) else dataclasses.replace(within, tile=TILE)
    bounds = window.plan(layout, 2, torch.device("cpu")).to_mask(2)
    mask = plan.to_mask(2)
    assert not (mask & ~bounds).any()
    assert mask.any(-1).all()
    assert mask.float().mean() < bounds.float().mean()
    assert float(plan.device_density) == pytest.approx(float(mask.double().mean()), rel=1e-5)
    out = block_sparse_attention(q, k, v, plan)
    torch.testing.assert_close(out, masked_attention(q, k, v, mask)[0].float(), rtol=1e-4, atol=1e-5)
    everything = planned(dataclasses.replace(method, density=1.0), layout, q, k, v).plan
    assert torch.equal(everything.to_mask(2), bounds.expand(2, -1, -1, -1))


def test_nan_is_reported_and_keeps_everything():
    grid = Grid(2, 8, 16)
    method = Draft(tile=TILE, density=0.2)
    layout = method.layout(grid)
    q, k, v = tensors(grid, batch=1)
    q[0, 20, 1] = math.nan  # one query: its block's lists of one head
    found = planned(method, layout, q, k, v)
    assert float(found.broken) == 1
    assert (found.plan.ends[0, 1, 1, 2], found.plan.ends[0, 1, 2, 2] < 16) == (16, True)
    assert float(found.recall) < 1
    assert not math.isnan(float(found.recall))


@pytest.mark.parametrize("always", [("self",), ("neighbours",), ("first-frame",), ("self", "first-frame")])
def test_guarantees(always):
    grid = Grid(3, 12, 13)
    method = Draft(tile=TILE, density=0.01, always=always)
    layout = method.layout(grid)
    kept = blocks_of(layout, planned(method, layout, *tensors(grid)).plan, 4)
    tile = layout.block_tile.tolist()
    for i, a in enumerate(tile):
        for j, b in enumerate(tile):
            near = sum(abs(x - y) for x, y in zip(a, b, strict=True)) <= 1
            wanted = {"self": i == j, "neighbours": near, "first-frame": b[0] == 0}
            if any(wanted[name] for name in always):
                assert kept[:, :, i, j].all()


BAD = [
    ({"density": 0}, "density must be in"),
    ({"density": 1.5}, "density must be in"),
    ({"recall": -1}, "recall must be in"),
    ({"density": 0.5, "recall": 0.5}, "not both"),
    ({"tile": (2, 8, 16)}, "256 tokens"),
    ({"tile": (0, 8, 16)}, "tile must be three"),
    ({"select": "best"}, "rows, head, topk, shared"),
    ({"select": "topk", "recall": 0.5}, "density, not recall"),
    ({"floor": 0}, "floor must be"),
    ({"always": "self"}, "list of self"),
    ({"always": ["everything"]}, "one of self"),
    ({"within": STA(tile=(3, 4, 4))}, "tiles of"),
    ({"within": "sta"}, "must be a method with windows"),
    ({"within": Draft()}, "must be a method with windows"),
    ({"within": {"name": "stq"}}, "Did you mean 'sta'"),
    ({"refresh": 0}, "refresh must be"),
    ({"drift": 2}, "drift must be"),
    ({"rank": "best"}, "mass, error"),
    ({"cap": 2, "floor": 3}, "cap=2"),
    ({"safety": 0.5}, "safety must be"),
]


@pytest.mark.parametrize(("options", "message"), BAD, ids=[str(options) for options, _ in BAD])
def test_bad_options(options, message):
    with pytest.raises(ConfigError, match=message):
        Draft(**options)


def test_options_survive_json(tmp_path):
    config = tilewise.Config(
        Draft(recall=0.9, tile=(2, 4, 8), within=STA(window=(3, 3, 3)), always=("self", "first-frame"))
    )
    tilewise.save_config(config, tmp_path / "draft.json")
    assert tilewise.load_config(tmp_path / "draft.json") == config


def test_default_tile_follows_the_grid():
    assert default_tile((21, 45, 80)) == (1, 8, 16)
    assert default_tile((9, 16, 16)) == (1, 4, 8)
    assert math.prod(default_tile((1, 2, 2))) >= 16


def test_summary_rows_show_nothing_from_outside_a_token_window():
    """What lies outside a query's window moves nothing, not even through the mean of a block that is partly inside."""
    grid = Grid(1, 12, 16)
    method = Draft(density=0.1, within=Inward(native=(5, 5), temperature=False), tile=(1, 4, 4), min_tokens=0)
    layout = method.layout(grid)
    q, k, v = (torch.randn(1, grid.tokens, 2, 16, generator=torch.Generator().manual_seed(n)) for n in range(3))
    window = Inward(native=(5, 5), temperature=False)
    bounds = window_plan(layout, [window.window(grid)], unit="token")
    seen = bounds.to_mask(2)[0, 0]

    def output(values):
        planned = method.plan_call(layout, q, k, values, 0.25, {}, 0)
        out, lse = block_sparse_attention(q, k, values, planned.plan, scale=0.25, return_lse=True)
        s = planned.compensation
        return add_block_compensation(q, out, lse, s.key_mean, s.value_mean, s.bias, layout, 0.25)

    at = 100
    outside = (~seen[at]).nonzero()[:, 0]
    moved = v.clone()
    moved[:, outside] += 100.0  # the ranking may change, and with it what is skipped inside the window
    away = (output(moved)[0, at] - output(v)[0, at]).abs().max()
    assert float(away) < 5  # values are of size 1: anything from outside would show as tens


def test_the_probe_counts_within_the_window_alone():
    grid = Grid(1, 12, 16)
    method = Draft(density=1.0, within=Inward(native=(5, 5), temperature=False), tile=(1, 4, 4), min_tokens=0, probe=32)
    q, k, v = (torch.randn(1, grid.tokens, 2, 16, generator=torch.Generator().manual_seed(n)) for n in range(3))
    planned = method.plan_call(method.layout(grid), q, k, v, 0.25, {}, 0)
    assert float(planned.probe) == pytest.approx(1.0, abs=1e-5)


def test_more_blocks_than_there_are_cannot_be_asked_for_by_floor():
    layout = Draft(floor=500, min_tokens=0).layout(Grid(2, 8, 8))
    q, k, v = (torch.randn(1, 128, 1, 16, generator=torch.Generator().manual_seed(n)) for n in range(3))
    assert float(Draft(floor=500, min_tokens=0).plan_call(layout, q, k, v, 0.25, {}, 0).plan.device_density) == 1.0


def test_values_that_are_not_finite_are_reported():
    layout = Draft(density=0.2, min_tokens=0).layout(Grid(2, 8, 8))
    q, k, v = (torch.randn(1, 128, 1, 16, generator=torch.Generator().manual_seed(n)) for n in range(3))
    v[0, 3] = torch.nan
    assert float(Draft(density=0.2, min_tokens=0).plan_call(layout, q, k, v, 0.25, {}, 0).broken) > 0


def test_a_dilated_window_around_a_choice_is_refused():
    """Its token order is another than the blocks of the choice have: it would see tokens outside the window."""
    within = tilewise.Neighborhood(window=(1, 5, 5), dilation=(1, 2, 2))
    for method in (tilewise.Draft, tilewise.XAttention):
        with pytest.raises(ConfigError, match="dilation"):
            method(density=1.0, within=within)
        method(density=1.0, within=tilewise.Neighborhood(window=(1, 5, 5)))
