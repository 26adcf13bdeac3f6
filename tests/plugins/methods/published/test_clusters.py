"""Methods that bring tokens into an order of their own: orders, choices and outputs against plain loops."""

import dataclasses

import pytest
import torch
from chosen_blocks import blocks_of, planned, tensors

import tilewise
from tests.helpers.tiny_wan import tiny_transformer
from tilewise.kernels.attention.dispatch import choose_backend
from tilewise.kernels.attention.naive import masked_attention
from tilewise.kernels.plans.layout import Grid
from tilewise.kernels.selection.select import GOLDEN
from tilewise.plugins.errors import ConfigError
from tilewise.plugins.methods.base import make_method, method_class
from tilewise.plugins.methods.dynamic.kmeans import kmeans, spread_over
from tilewise.plugins.methods.dynamic.reordered import ReorderedMethod
from tilewise.plugins.methods.published.hyper import hashed
from tilewise.plugins.runtime.sparse_call import run_planned

TILE = (1, 4, 4)
GRIDS = [Grid(2, 9, 14), Grid(2, 9, 10, text=5, text_first=True)]
NAMES = [name for name in tilewise.methods() if issubclass(method_class(name), ReorderedMethod)]
SMALL = {"svg2": {"clusters": 5, "rounds": 3}, "routing": {"clusters": 5, "rounds": 3}, "hyper": {"bits": 4}}


def call(name, grid, **options):
    method = make_method(name, {"tile": TILE, "min_tokens": 0, **SMALL[name], **options})
    layout = method.layout(grid)
    qkv = tensors(grid)
    return method, layout, qkv, planned(method, layout, *qkv)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_what_runs_is_the_mask_in_the_order_of_each_head(name, grid):
    _, layout, (q, k, v), found = call(name, grid, density=0.3, compensate=False)
    out = run_planned((q, k, v), found, choose_backend(q, k, v, found.plan), layout, None)
    mask = found.plan.to_mask(4).expand(2, -1, -1, -1)
    back = torch.zeros_like(mask)
    for b in range(2):
        for h in range(4):
            of_query, of_key = found.around.query[b, h], found.around.key[b, h // 2]
            assert sorted(of_query.tolist()) == list(range(grid.tokens))
            back[b, h, of_query[:, None], of_key[None, :]] = mask[b, h]
    torch.testing.assert_close(out, masked_attention(q, k, v, back)[0].float(), rtol=1e-4, atol=1e-5)
    text = torch.arange(grid.text)  # stays where it is
    assert (found.around.query[..., : grid.text] == text).all()


@pytest.mark.parametrize("name", NAMES)
def test_everything_is_dense_attention(name):
    _, layout, (q, k, v), found = call(name, GRIDS[1], density=1.0)
    out = run_planned((q, k, v), found, choose_backend(q, k, v, found.plan), layout, None)
    torch.testing.assert_close(out, masked_attention(q, k, v)[0].float(), rtol=1e-4, atol=1e-5)


def plain_kmeans(x, count, rounds):
    """Labels of tokens (S, D), by loops in double precision."""
    x = x.double()
    means = [x[(2 * c + 1) * len(x) // (2 * count)] for c in range(count)]

    def labels():
        return [min(range(count), key=lambda c: float((token - means[c]).square().sum())) for token in x]

    for _ in range(rounds):
        found = labels()
        for c in range(count):
            own = [token for token, label in zip(x, found, strict=True) if label == c]
            means[c] = torch.stack(own).mean(0) if own else means[c]
    return labels()


def test_kmeans():
    x = torch.randn(2, 3, 40, 6, generator=torch.Generator().manual_seed(2))
    labels, means = kmeans(x, spread_over(x, 5), 3)
    for b in range(2):
        for h in range(3):
            assert labels[b, h].tolist() == plain_kmeans(x[b, h], 5, 3)
    assert means.shape == (2, 3, 5, 6)
    empty = torch.full((1, 1, 2, 6), 100.0)
    empty[:, :, 0] = 0
    assert torch.equal(kmeans(x[:1, :1], empty, 1)[1][0, 0, 1], empty[0, 0, 1])  # an empty cluster stays where it is


def video(grid, x):
    return x[:, grid.text :] if grid.text_first else x[:, : grid.video]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_svg2_orders_queries_and_keys_by_their_own_clusters(grid):
    _, _, (q, k, _), found = call("svg2", grid, density=0.3)
    for x, order, heads in ((q, found.around.query, 4), (k, found.around.key, 2)):
        for h in range(heads):
            labels = plain_kmeans(video(grid, x)[0, :, h], 5, 3)
            wanted = sorted(range(grid.video), key=lambda s: labels[s])
            assert order[0, h, grid.text :].tolist() == [s + grid.text for s in wanted]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_svg2_chooses_as_draft_does_over_its_order(grid):
    method, layout, qkv, found = call("svg2", grid, recall=0.8)
    draft = tilewise.Draft(recall=0.8, tile=TILE, always=(), each=False)
    q, k, v = found.around.before(qkv)
    assert torch.equal(blocks_of(layout, found.plan, 4), blocks_of(layout, planned(draft, layout, q, k, v).plan, 4))
    assert method.expected_density(layout, 4) != method.expected_density(layout, 4)  # a recall: nan


def rows_by_score(layout, density, score, grid):
    """For each row the blocks kept: text, then by falling score until there are enough tokens."""
    N, rows, text = layout.blocks, layout.block_rows.tolist(), layout.is_text.tolist()
    if grid.text:
        density = max((density - grid.text / grid.tokens) / (1 - grid.text / grid.tokens), 1 / grid.tokens)
    found = []
    for i in range(N):
        kept = [j for j in range(N) if text[j] or text[i]]
        for j in sorted(range(N), key=lambda j: (-score[i][j], j)):
            if sum(rows[j] for j in kept) / grid.tokens < density - (i * GOLDEN % 1) / N and j not in kept:
                kept.append(j)
        found.append(set(kept))
    return found


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_routing(grid):
    _, layout, (q, k, _), found = call("routing", grid, density=0.3)
    kept = blocks_of(layout, found.plan, 4)
    unit = torch.nn.functional.normalize
    starts, rows, text = layout.block_start.tolist(), layout.block_rows.tolist(), layout.is_text.tolist()
    for pair in range(2):
        of_queries = [video(grid, q)[0, :, 2 * pair + n] for n in range(2)]
        labels = plain_kmeans(unit(torch.cat([*of_queries, video(grid, k)[0, :, pair]]), dim=-1), 5, 3)
        of_query = [labels[n * grid.video : (n + 1) * grid.video] for n in range(2)]
        of_key = labels[2 * grid.video :]

        def shares(of_tokens):
            ordered = [None] * grid.text + sorted(of_tokens)
            blocks = [ordered[a : a + n] for a, n in zip(starts, rows, strict=True)]
            return [[0.0 if text[i] else b.count(c) / len(b) for c in range(5)] for i, b in enumerate(blocks)]

        for n in range(2):
            queries, keys = shares(of_query[n]), shares(of_key)
            score = [
                [
                    sum(p * r for p, r in zip(a, b, strict=True)) - 1e-4 * abs(i - j) / layout.blocks
                    for j, b in enumerate(keys)
                ]
                for i, a in enumerate(queries)
            ]
            for i, wanted in enumerate(rows_by_score(layout, 0.3, score, grid)):
                assert set(kept[0, 2 * pair + n, i].nonzero().flatten().tolist()) == wanted


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_hyper(grid):
    _, layout, (q, k, _), found = call("hyper", grid, density=0.3)
    planes = torch.randn(16, 4, generator=torch.Generator().manual_seed(0))
    gray = [n ^ (n >> 1) for n in range(16)]
    for x, order, heads in ((q, found.around.query, 4), (k, found.around.key, 2)):
        for h in range(heads):
            codes = [
                sum(2**p for p in range(4) if float(token @ planes[:, p]) > 0) for token in video(grid, x)[1, :, h]
            ]
            wanted = sorted(range(grid.video), key=lambda s: gray.index(codes[s]))
            assert order[1, h, grid.text :].tolist() == [s + grid.text for s in wanted]
    kept = blocks_of(layout, found.plan, 4)
    score = [[-abs(i - j) for j in range(layout.blocks)] for i in range(layout.blocks)]
    for i, wanted in enumerate(rows_by_score(layout, 0.3, score, grid)):
        assert set(kept[1, 3, i].nonzero().flatten().tolist()) == wanted


def test_neighbours_in_the_hash_differ_by_one_bit():
    labels = hashed(torch.tensor([[[[-1.0, -1.0]], [[1.0, -1.0]], [[1.0, 1.0]], [[-1.0, 1.0]]]]), torch.eye(2))
    assert labels.flatten().tolist() == [0, 1, 2, 3]


def test_means_go_on_from_the_step_before():
    method = make_method("svg2", {"tile": TILE, "rounds": 1, "clusters": 6, "density": 0.3})
    layout, (q, k, v) = method.layout(GRIDS[0]), tensors(GRIDS[0])
    memory = {}
    for tick in range(8):
        found = planned(method, layout, q, k, v, memory, tick)
    long = planned(dataclasses.replace(method, rounds=8), layout, q, k, v)
    assert torch.equal(found.around.query, long.around.query)


def test_orders_are_kept_as_long_as_the_choice():
    method = make_method(
        "svg2", {"tile": TILE, "rounds": 1, "clusters": 6, "density": 0.3, "refresh": 2, "drift": None}
    )
    layout, (q, k, v) = method.layout(GRIDS[0]), tensors(GRIDS[0])
    memory, orders = {}, []
    for tick in range(4):
        found = planned(method, layout, q.roll(tick, 1), k.roll(tick, 1), v, memory, tick)
        orders.append((found.around.query, blocks_of(layout, found.plan, 4)))
    assert torch.equal(orders[0][0], orders[1][0])
    assert torch.equal(orders[0][1], orders[1][1])
    assert not torch.equal(orders[1][0], orders[2][0])
    assert torch.equal(orders[2][1], orders[3][1])


@pytest.mark.parametrize("name", NAMES)
def test_in_a_model(name):
    """Samples of a batch and branches have orders of their own; at density 1 the model is the dense one; nothing is drawn."""
    model = tiny_transformer(seed=1)
    inputs = {"hidden_states": torch.randn(2, 4, 5, 16, 16), "encoder_hidden_states": torch.randn(2, 4, 32)}
    seen = []
    with torch.no_grad():
        wanted = model(**inputs, timestep=torch.tensor([500.0, 500.0])).sample
        method = make_method(name, {"density": 1.0, "tile": (1, 2, 4), "min_tokens": 0, **SMALL[name]})
        with tilewise.patched(model, method, steps=":", strict=True):
            model._tilewise.state.observers.append(seen.append)
            out = model(**inputs, timestep=torch.tensor([500.0, 500.0])).sample
            assert tilewise.summary(model).density == 1.0
    torch.testing.assert_close(out, wanted, rtol=1e-4, atol=1e-4)
    assert {told.kind for told in seen} == {"sparse"}
    assert {told.plan for told in seen} == {None}


@pytest.mark.parametrize("name", NAMES)
def test_places_cannot_be_asked_for(name):
    for options in ({"always": ("self",)}, {"within": {"name": "sta", "window": (1, 3, 1)}}):
        with pytest.raises(ConfigError, match="neither always nor within"):
            make_method(name, options)


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_on_a_gpu(name):
    grid = Grid(4, 30, 45, text=77)
    q, k, v = (x.to("cuda", torch.bfloat16) for x in tensors(grid, batch=1, heads=4, key_heads=4, dim=128, size=0.3))
    for density, tolerance in ((1.0, 2e-2), (0.3, 0.5)):
        method = make_method(name, {"density": density, "min_tokens": 0})
        layout = method.layout(grid)
        found = method.plan_call(layout, q, k, v, 128**-0.5, {}, 0)
        out = run_planned((q, k, v), found, choose_backend(q, k, v, found.plan), layout, None)
        wanted = masked_attention(q, k, v)[0]
        assert float((out.double() - wanted).norm() / wanted.norm()) < tolerance
