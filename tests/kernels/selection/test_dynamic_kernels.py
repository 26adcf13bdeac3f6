"""The kernels under dynamic methods against naive float64 formulas: the CPU path here, then Triton in its CPU interpreter, and
what compiles ahead of time for a GPU. Ragged blocks, text, batches, grouped heads, NaN around the data."""

from __future__ import annotations

import os

import pytest
import torch
from plan_cases import two_layouts

from tilewise.kernels.attention.block_compensation import add_block_compensation, add_block_compensation_reference
from tilewise.kernels.attention.dispatch import block_sparse_attention
from tilewise.kernels.plans.block_plan import plan_from_block_map
from tilewise.kernels.plans.dynamic_plan import dynamic_plan
from tilewise.kernels.plans.layout import Grid, Layout
from tilewise.kernels.selection.block_scores import block_logits, error_logits, summary_bias
from tilewise.kernels.selection.block_share import block_share, torch_block_share
from tilewise.kernels.selection.block_stats import block_stats, block_stats_reference
from tilewise.kernels.selection.select import select_rows, select_rows_reference

pytestmark = pytest.mark.interpreted
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DTYPES = [torch.float16] if INTERPRETED else [torch.float32, torch.float16, torch.bfloat16]
LAYOUTS = [
    Layout(Grid(3, 5, 7), (1, 4, 4), 16),
    Layout(Grid(1, 1, 1), (1, 1, 1), 16),
    Layout(Grid(2, 9, 4, 19), (2, 4, 4), 32),
    Layout(Grid(2, 3, 11, 5, text_first=True), (1, 3, 5), 16),
]
SHARES = [(dtype, spread, queries) for dtype in DTYPES for spread in (1.0, 4.0) for queries in (128, 8)]
if INTERPRETED:  # slow: a few of each
    LAYOUTS = LAYOUTS[3:]
    SHARES = [(torch.float32, 1.0, 128), (torch.float32, 4.0, 8), (torch.float16, 4.0, 128)]
CPU = torch.device("cpu")


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def blocks_of(layout: Layout) -> list[slice]:
    return [slice(int(s), int(s + n)) for s, n in zip(layout.block_start, layout.block_rows, strict=True)]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_block_stats(layout, dtype):
    B, S, H, D = 2, layout.grid.tokens, 3, 24
    room = torch.full((B, S + 2, H, D + 8), torch.nan, dtype=dtype)
    x = room[:, 1:-1, :, :D]
    x.copy_(random(B, S, H, D, dtype=dtype) + 3)
    start, rows, _ = layout.block_table(CPU)
    got = block_stats(x, start, rows, variance=True)
    parts = [x[:, block].double() for block in blocks_of(layout)]
    torch.testing.assert_close(got.mean.double(), torch.stack([p.mean(1) for p in parts], 1), rtol=1e-5, atol=1e-5)
    want = torch.stack([p.var(1, unbiased=False) for p in parts], 1)
    assert got.variance is not None
    torch.testing.assert_close(got.variance.double(), want, rtol=1e-4, atol=1e-5)
    assert block_stats(x, start, rows).variance is None


@pytest.mark.parametrize("usual", [5, 128])
def test_block_stats_of_any_runs(usual):
    """Blocks may overlap, leave tokens out, come in any order, and be longer than what a kernel reads at once."""
    x, start, rows = random(1, 300, 2, 16), torch.tensor([12, 0, 3, 20]), torch.tensor([8, 5, 1, 280])
    got = block_stats(x, start.int(), rows.int(), variance=True, usual=usual)
    parts = [x[0, s : s + n] for s, n in zip(start, rows, strict=True)]
    torch.testing.assert_close(got.mean[0], torch.stack([p.mean(0) for p in parts]))
    assert got.variance is not None
    torch.testing.assert_close(got.variance[0], torch.stack([p.var(0, unbiased=False) for p in parts]))


def naive_share(q, means, variances, layout, scale, queries=128):
    """Query by query, in float64."""
    rows, heads, groups = layout.block_rows.double(), q.shape[2], q.shape[2] // means.shape[2]
    share = torch.zeros(len(q), heads, layout.blocks, layout.blocks, dtype=torch.float64)
    for h in range(heads):
        mean, variance = (x[:, :, h // groups].double() for x in (means, variances))
        for i, block in enumerate(blocks_of(layout)):
            n = block.stop - block.start
            drafted = (
                [block.start + k * n // queries for k in range(queries)]
                if n > queries
                else range(block.start, block.stop)
            )
            for b, s in ((b, s) for b in range(len(q)) for s in drafted):
                one = scale * q[b, s, h].double()
                sigma = (one.square() * variance[b]).sum(-1).sqrt()
                edge = (2 * rows.log()).sqrt()
                correction = torch.where(sigma <= edge, sigma**2 / 2, sigma * edge - rows.log())
                share[b, h, i] += ((mean[b] * one).sum(-1) + rows.log() + correction).softmax(-1) / len(drafted)
    return share


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize(("dtype", "spread", "queries"), SHARES, ids=str)
def test_block_share(layout, dtype, spread, queries):
    """Of smooth keys, and of keys whose spread lies beyond the tangent."""
    B, S, H, D = 2, layout.grid.tokens, 4, 24
    room = torch.full((B, S + 2, H, D + 8), torch.nan, dtype=dtype)
    q = room[:, 1:-1, :, :D]
    q.copy_(2 * random(B, S, H, D, dtype=dtype))
    keys = spread * random(B, S, 2, D, dtype=dtype, seed=1)
    start, rows, _ = layout.block_table(CPU)
    stats = block_stats(keys, start, rows, variance=True)
    assert stats.variance is not None
    got = block_share(q, stats.mean, stats.variance, start, rows, D**-0.5, queries)
    want = naive_share(q, stats.mean, stats.variance, layout, D**-0.5, queries)
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2 * spread
    torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance / 10)
    torch.testing.assert_close(got.sum(-1), torch.ones_like(got[..., 0]), rtol=1e-5, atol=1e-5)
    plain = block_share(q, stats.mean, None, start, rows, D**-0.5, queries)
    want = naive_share(q, stats.mean, torch.zeros_like(stats.mean), layout, D**-0.5, queries)
    torch.testing.assert_close(plain.double(), want, rtol=tolerance, atol=tolerance / 10)


def test_block_share_tells_of_what_is_not_finite():
    layout = LAYOUTS[-1]
    start, rows, _ = layout.block_table(CPU)
    q, keys = random(1, layout.grid.tokens, 1, 16), random(1, layout.grid.tokens, 1, 16, seed=1)
    q[0, 3] = torch.nan
    share = block_share(q, block_stats(keys, start, rows).mean, None, start, rows, 0.25)
    assert share.isnan().any(-1).sum() == 1
    with pytest.raises(ValueError, match="power of two"):
        block_share(q, keys.mean(1, keepdim=True), None, start[:1], rows[:1], 0.25, queries=12)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_block_share_of_large_queries(dtype):
    """Squares that float16 does not hold leave the map finite."""
    layout = LAYOUTS[0]
    start, rows, _ = layout.block_table(CPU)
    q = 400 * random(1, layout.grid.tokens, 2, 16, dtype=dtype)
    keys = block_stats(0.1 * random(1, layout.grid.tokens, 2, 16, dtype=dtype, seed=1), start, rows, variance=True)
    share = block_share(q, keys.mean, keys.variance, start, rows, 1.0)
    torch.testing.assert_close(share.sum(-1), torch.ones_like(share[..., 0]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_maps_of_block_pairs(layout):
    """Against the formulas in float64; s² small and large, 0, and not a number."""
    B, H, N = 2, 4, layout.blocks
    _, rows, _ = layout.block_table(CPU)
    dot = random(B, H, N, N)
    s2 = random(B, H, N, N, seed=1).square() * 10.0 ** random(B, H, N, N, seed=2).clamp(-3, 1)
    s2[0, 0, 0, 0], s2[1, 1, 0, -1] = 0, torch.nan
    spread = random(B, 2, N, seed=3).square()
    spread[0, 0, 0] = 0
    seen = random(B, H, N, N, seed=4) > 0.5
    got = [
        block_logits(dot, s2, rows, 0.3), block_logits(dot, None, rows, 0.3), error_logits(dot, s2, spread),
        summary_bias(s2, rows, seen),
    ]  # fmt: skip
    exact, n, wide = s2.double(), rows.double().log(), spread.double().repeat_interleave(2, 1)[:, :, None]
    term = torch.where(exact <= 2 * n, exact / 2, exact.sqrt() * (2 * n).sqrt() - n)
    logits = 0.3 * dot.double() + n
    error = dot + 0.5 * torch.log(torch.expm1(exact.clamp_min(1e-12))) + 0.5 * wide.clamp_min(1e-30).log()
    want = [logits + term, logits, error, (n + term).masked_fill(seen, -torch.inf)]
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.double(), b.expand_as(a), rtol=1e-5, atol=2e-5, equal_nan=True)
    with pytest.raises(ValueError, match="block_logits: needs maps"):
        block_logits(dot, s2[:1], rows, 0.3)
    with pytest.raises(ValueError, match="error_logits"):
        error_logits(dot, s2, random(B, 3, N))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("sets", [(1, 1), (2, 3)])
def test_dynamic_plan_is_the_plan_of_the_map(layout, sets):
    N = layout.blocks
    kept = random(*sets, N, N) > 0.3
    got, want = dynamic_plan(layout, kept), plan_from_block_map(layout, kept)
    assert torch.equal(got.ends, want.ends)
    longest = want.index.shape[-1]
    used = torch.arange(longest) < want.ends[..., 2:]
    assert torch.equal(got.index[..., :longest][used], want.index[used])
    assert torch.equal(got.key_start[..., :longest][used], want.key_start[used])
    assert got.index.min() >= 0
    assert got.index.max() < N
    assert got.device_density is not None
    assert float(got.device_density) == pytest.approx(want.density, rel=1e-6)
    assert got.block == want.block
    q, k, v = (random(sets[0], layout.grid.tokens, 3, 16, seed=seed) for seed in range(3))
    assert torch.equal(block_sparse_attention(q, k, v, got), block_sparse_attention(q, k, v, want))


def naive_row(logits, always, weight, aim, floor, cap):
    """One row by the definition, in plain Python."""
    kept = {j for j, given in enumerate(always) if given}
    total = sum(weight[j] for j in kept)
    order = sorted(
        (j for j in range(len(logits)) if j not in kept and logits[j] > -torch.inf), key=lambda j: -logits[j]
    )
    for j in order:
        if (total >= aim and len(kept) >= floor) or len(kept) >= cap:
            break
        kept.add(j)
        total += weight[j]
    return kept or set(range(len(logits)))


@pytest.mark.parametrize("target", [{"recall": 0.7}, {"density": 0.3}, {"recall": 0.95}, {"density": 0.05}], ids=str)
@pytest.mark.parametrize(("floor", "cap"), [(4, 6)] if INTERPRETED else [(1, None), (4, 6), (0, 3)])
def test_rows_keep_the_smallest_set_that_is_enough(target, floor, cap):
    N = 11 if INTERPRETED else 21
    heads = 1 if INTERPRETED else 2
    logits = 2 * random(2, heads, N, N, seed=3)
    logits[0, 0, :, :3] = -torch.inf
    logits[1, -1, 4] = 0.25  # all equal
    rows = torch.randint(1, 17, (N,), generator=torch.Generator().manual_seed(1), dtype=torch.int32)
    always = torch.eye(N, dtype=torch.bool)
    kept = select_rows(logits, always, rows, **target, floor=floor, cap=cap)
    p = logits.double().softmax(-1)
    for b, h, i in [(b, h, i) for b in range(2) for h in range(heads) for i in range(N)]:
        weight = p[b, h, i] if "recall" in target else rows.double() / int(rows.sum())
        aim = target.get("recall") or target["density"] - i * 0.6180339887498949 % 1 / N
        want = naive_row(logits[b, h, i].tolist(), always[i].tolist(), weight.tolist(), aim, floor, cap or N)
        assert set(kept[b, h, i].nonzero().flatten().tolist()) == want, (b, h, i)


def test_equal_rows_come_out_at_the_density_asked_for():
    N = 20 if INTERPRETED else 40
    logits, rows = random(1, 1 if INTERPRETED else 4, N, N), torch.full((N,), 128, dtype=torch.int32)
    nothing = torch.zeros(N, N, dtype=torch.bool)
    for density in (0.1,) if INTERPRETED else (0.05, 0.1, 0.26, 0.5, 1.0):
        kept = select_rows(logits, nothing, rows, density=density)
        assert float(kept.double().mean()) == pytest.approx(density, rel=0.02)
        same = select_rows(torch.zeros_like(logits), nothing, rows, density=density)
        assert float(same.double().mean()) == pytest.approx(density, rel=0.02)


def test_each_head_keeps_by_its_own_density():
    N, densities = 6 if INTERPRETED else 21, (0.05, 0.4, 1.0)
    logits = random(2, 3, N, N, seed=5)
    logits[:, 2, :, 4] = -torch.inf
    rows = torch.randint(1, 17, (N,), generator=torch.Generator().manual_seed(2), dtype=torch.int32)
    always = torch.eye(N, dtype=torch.bool)
    kept = select_rows(logits, always, rows, density=torch.tensor(densities))
    for h, density in enumerate(densities[:2]):
        assert torch.equal(kept[:, h : h + 1], select_rows(logits[:, h : h + 1], always, rows, density=density))
    assert torch.equal(kept[:, 2], (logits[:, 2] > -torch.inf) | always)  # of a density of 1: all that may be kept
    of_samples = torch.tensor([densities, densities[::-1]])
    each = select_rows(logits, always, rows, density=of_samples)
    for b, own in enumerate(of_samples):
        assert torch.equal(each[b : b + 1], select_rows(logits[b : b + 1], always, rows, density=own))
    with pytest.raises(ValueError, match="a density for each of 3 heads"):
        select_rows(logits, always, rows, density=torch.tensor(densities[:2]))


def test_a_row_is_never_empty():
    N = 9
    whole = random(1, 1, N, N)
    logits = whole.clone()
    logits[..., 0, :] = -torch.inf
    logits[..., 1, 4] = torch.nan
    logits[..., 2, 0] = torch.inf
    kept = select_rows(
        logits, torch.zeros(N, N, dtype=torch.bool), torch.ones(N, dtype=torch.int32), recall=0.3, floor=0
    )
    assert kept[0, 0, :3].all()
    assert kept.any(-1).all()
    assert not kept[0, 0, 3:].all(-1).any()
    others = select_rows(
        whole, torch.zeros(N, N, dtype=torch.bool), torch.ones(N, dtype=torch.int32), recall=0.3, floor=0
    )
    assert torch.equal(kept[0, 0, 3:], others[0, 0, 3:])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "recall or density"),
        ({"recall": 0.5, "density": 0.5}, "recall or density"),
        ({"recall": 0.0}, "must be in"),
        ({"density": 1.5}, "must be in"),
        ({"recall": 0.5, "floor": 4, "cap": 2}, "floor"),
    ],
)
def test_select_rows_refuses(arguments, message):
    N = 4
    with pytest.raises(ValueError, match=message):
        select_rows(
            torch.zeros(1, 1, N, N), torch.eye(N, dtype=torch.bool), torch.ones(N, dtype=torch.int32), **arguments
        )


def test_select_rows_takes_the_ends_of_its_ranges():
    logits, always, rows = random(1, 1, 4, 4), torch.zeros(4, 4, dtype=torch.bool), torch.ones(4, dtype=torch.int32)
    assert select_rows(logits, always, rows, recall=1.0).all()
    assert (select_rows(logits, always, rows, density=1e-9, floor=2, cap=2).sum(-1) == 2).all()
    kept = select_rows(logits, always, rows, density=0.5)
    assert kept[0, 0, 0].sum() == 2  # the first row aims at exactly the density, and two blocks of four reach it
    assert (select_rows(logits, always, rows, density=1.0, floor=0, cap=1).sum(-1) == 1).all()
    for bad in (
        (logits[0], always, rows),
        (logits[..., :3], always, rows),
        (logits, always[:3], rows),
        (logits, always, rows[:3]),
    ):
        with pytest.raises(ValueError, match="needs logits"):
            select_rows(*bad, recall=0.5)
    with pytest.raises(ValueError, match="float32"):
        select_rows(logits.double(), always, rows, recall=0.5)
    with pytest.raises(ValueError, match="cap of at least 1"):
        select_rows(logits, always, rows, recall=0.5, floor=0, cap=0)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda x, start, rows: (x[0], start, rows), ValueError),
        (lambda x, start, rows: (x.expand(-1, -1, -1, 2).repeat(1, 1, 1, 257), start, rows), ValueError),
        (lambda x, start, rows: (x.repeat(1, 1, 1, 32)[..., ::2], start, rows), ValueError),
        (lambda x, start, rows: (x.long(), start, rows), TypeError),
        (lambda x, start, rows: (x, start[:1], rows), ValueError),
        (lambda x, start, rows: (x, start[None], rows[None]), ValueError),
        (lambda x, start, rows: (x, start.to("meta"), rows), ValueError),
        (lambda x, start, rows: (x, start, rows.to("meta")), ValueError),
    ],
)
def test_block_stats_and_shares_refuse(change, error):
    start, rows = torch.tensor([0, 4], dtype=torch.int32), torch.tensor([4, 4], dtype=torch.int32)
    x, start, rows = change(random(1, 8, 1, 1), start, rows)
    with pytest.raises(error, match="block_stats: "):
        block_stats(x, start, rows)
    means = torch.zeros(1, 2, 1, x.shape[-1])
    with pytest.raises(error, match="block_share: "):
        block_share(x, means, None, start, rows, 1.0)


@pytest.mark.parametrize(
    "change",
    [
        lambda mean: mean[0],
        lambda mean: mean[:, :1],
        lambda mean: mean[..., :8],
        lambda mean: mean.repeat(1, 1, 3, 1),
        lambda mean: mean.double(),
        lambda mean: mean.repeat(1, 1, 1, 2)[..., ::2],
    ],
)
def test_shares_refuse_means_that_do_not_fit(change):
    x = random(1, 8, 2, 16)
    start, rows = torch.tensor([0, 4], dtype=torch.int32), torch.tensor([4, 4], dtype=torch.int32)
    mean = block_stats(x, start, rows).mean
    for means in ((change(mean), None), (mean, change(mean))):
        with pytest.raises(ValueError, match=r"block_share: key_(mean|variance) must be"):
            block_share(x, *means, start, rows, 1.0)
    for queries in (0, 256, 3):
        with pytest.raises(ValueError, match="power of two"):
            block_share(x, mean, None, start, rows, 1.0, queries=queries)
    for queries in (1, 128):
        torch.testing.assert_close(
            block_share(x, mean, None, start, rows, 1.0, queries=queries),
            torch_block_share(x.double(), mean, None, start, rows, 1.0, queries).float(),
        )


@pytest.mark.skipif(INTERPRETED, reason="needs long rows, which are slow there")
def test_selection_is_the_same_in_one_precision_and_another():
    """The two ways of finding the set agree on rows long enough for rounding to matter."""
    N = 130
    logits, rows = 3 * random(1, 1, N, N, seed=8), torch.full((N,), 64, dtype=torch.int32)
    always = torch.eye(N, dtype=torch.bool)
    for mass, target in ((True, 0.9), (False, 0.25)):
        got = select_rows(logits, always, rows, **{"recall" if mass else "density": target})
        want = select_rows_reference(logits.double(), always, rows, target, mass, 1, N)
        assert (got != want).sum() <= 2  # a tie broken by rounding


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", [(4, 2)] if INTERPRETED else [(2, 2), (4, 2)])
def test_summary_rows_are_merged_exactly(layout, dtype, heads):
    B, S, D, N = 2, layout.grid.tokens, 16, layout.blocks
    H, Hk = heads
    q, k, v = (random(B, S, h, D, dtype=dtype, seed=h) for h in (H, Hk, Hk))
    kept = (random(B, H, N, N) > 0.4) | torch.eye(N, dtype=torch.bool)
    kept[0, 0, 0] = True  # nothing skipped
    plan = dynamic_plan(layout, kept)
    start, rows, is_text = layout.block_table(CPU)
    kept = kept | is_text[:, None] | is_text
    out, lse = block_sparse_attention(q, k, v, plan, return_lse=True)
    means = [block_stats(x, start, rows).mean for x in (k, v)]
    bias = torch.where(kept, -torch.inf, rows.log().expand(B, H, N, N))
    got = add_block_compensation(q, out, lse, *means, bias, layout, D**-0.5)
    # By hand: one softmax over the keys that are seen and a row for each block that is not.
    of_block = torch.repeat_interleave(rows)
    keys, values = (x.double().repeat_interleave(H // Hk, 2).transpose(1, 2) for x in (k, v))
    short_keys, short_values = (x.to(dtype).double().repeat_interleave(H // Hk, 2).transpose(1, 2) for x in means)
    q64 = q.double().transpose(1, 2) * D**-0.5
    seen = kept[:, :, of_block][..., of_block]
    tokens = (q64 @ keys.transpose(2, 3)).masked_fill(~seen, -torch.inf)
    short = q64 @ short_keys.transpose(2, 3) + bias.double()[:, :, of_block]
    weights = torch.cat([tokens, short], -1).softmax(-1)
    want = (weights @ torch.cat([values, short_values], 2)).transpose(1, 2)
    tolerance = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance)
    reference = add_block_compensation_reference(
        q.double(), out.double(), lse.double(), *(x.to(dtype).double() for x in means), bias, layout, D**-0.5
    )
    torch.testing.assert_close(reference, want, rtol=tolerance, atol=tolerance)


def test_one_bias_for_all_samples_and_heads():
    layout, B, H, N = LAYOUTS[-1], 2, 3, 5
    S = layout.grid.tokens
    q, out, lse = random(B, S, H, 16), random(B, S, H, 16, seed=1), random(B, H, S, seed=2)
    means = random(B, N, H, 16, seed=3), random(B, N, H, 16, seed=4)
    bias = random(1, 1, layout.blocks, N, seed=5).expand(B, H, -1, -1)
    got = add_block_compensation(q, out, lse, *means, bias, layout, 0.25)
    want = add_block_compensation(q, out, lse, *means, bias.contiguous(), layout, 0.25)
    torch.testing.assert_close(got, want, rtol=0, atol=0)


@pytest.mark.parametrize("head_dim", [1, 8, 12] if INTERPRETED else [*range(1, 18), 33, 80])
def test_head_dims(head_dim):
    """Means, shares and summary rows of any number of channels; NaN behind each head."""
    layout, (H, Hk) = LAYOUTS[-1], (4, 2)
    start, rows, _ = layout.block_table(CPU)
    x = [random(1, layout.grid.tokens, n, head_dim + 3, seed=seed) for seed, n in enumerate((H, H, Hk, Hk))]
    for each in x:
        each[..., head_dim:] = torch.nan
    q, out, k, v = (each[..., :head_dim] for each in x)
    keys = block_stats(k, start, rows, variance=True)
    parts = [k[0, block].double() for block in blocks_of(layout)]
    assert keys.variance is not None
    torch.testing.assert_close(keys.mean[0].double(), torch.stack([p.mean(0) for p in parts]), rtol=1e-5, atol=1e-5)
    spread = torch.stack([p.var(0, unbiased=False) for p in parts])
    torch.testing.assert_close(keys.variance[0].double(), spread, rtol=1e-4, atol=1e-5)
    share = block_share(q, keys.mean, keys.variance, start, rows, 0.3)
    torch.testing.assert_close(
        share.double(), naive_share(q, keys.mean, keys.variance, layout, 0.3), rtol=1e-5, atol=1e-6
    )
    lse, bias = random(1, H, layout.grid.tokens), random(1, H, layout.blocks, layout.blocks)
    means = keys.mean, block_stats(v, start, rows).mean
    got = add_block_compensation(q, out.contiguous(), lse, *means, bias, layout, 0.3)
    exact = (y.double() for y in (q, out, lse, *means))
    want = add_block_compensation_reference(*exact, bias, layout, 0.3)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("seed", range(6))
def test_lists_of_queries_and_keys_of_two_layouts(seed):
    case = two_layouts(seed)
    plan = dynamic_plan(case.queries, case.full, key_layout=case.keys)
    want = plan_from_block_map(case.queries, case.full, key_layout=case.keys)
    assert torch.equal(plan.ends, want.ends)
    assert torch.equal(plan.to_mask(case.full.shape[1]), want.to_mask(case.full.shape[1]))
    assert float(plan.device_density) == pytest.approx(
        want.to_mask(case.full.shape[1]).double().mean().item(), rel=1e-5
    )


@pytest.mark.parametrize("few", ["queries", "keys"])
def test_scores_of_queries_and_keys_of_two_layouts(few):
    """Each map of queries and keys together is a part of the map of all blocks, whose queries and keys are the same tokens."""
    B, H, Hk, D = (1, 2, 1, 16) if INTERPRETED else (2, 4, 2, 16)
    layout = Layout(Grid(2, 5, 7, text=3), (1, 4, 4), 16)
    start, rows, _ = layout.block_table(CPU)
    half = slice(2, 2 + layout.blocks // 2)
    i, j = (half, slice(None)) if few == "queries" else (slice(None), half)
    q, k = (random(B, layout.grid.tokens, n, D, seed=n) for n in (H, Hk))
    keys = block_stats(k, start, rows, variance=True)
    assert keys.variance is not None
    products = torch.einsum(
        "bihd,bjhd->bhij", block_stats(q, start, rows).mean, keys.mean.repeat_interleave(H // Hk, 2)
    )
    s2, spread = products.square(), keys.variance.sum(-1).transpose(1, 2)
    seen = products > 0
    for found, whole in (
        (block_logits(products[:, :, i, j], s2[:, :, i, j], rows[j], 0.3), block_logits(products, s2, rows, 0.3)),
        (error_logits(products[:, :, i, j], s2[:, :, i, j], spread[..., j]), error_logits(products, s2, spread)),
        (summary_bias(s2[:, :, i, j], rows[j], seen[:, :, i, j]), summary_bias(s2, rows, seen)),
    ):
        assert torch.equal(found, whole[:, :, i, j])
    share = naive_share(q, keys.mean, keys.variance, layout, 0.3)[:, :, i, j]
    part = keys.mean[:, j].contiguous(), keys.variance[:, j].contiguous()
    got = block_share(q, *part, start[i], rows[i], 0.3, queries=128, key_rows=rows[j])
    if few == "queries":  # else each query's share of the keys that are left is another
        torch.testing.assert_close(got.double(), share, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got, torch_block_share(q, *part, start[i], rows[i], 0.3, 128, rows[j]))
    logits, always = 3 * products[:, :, i, j], torch.eye(layout.blocks, dtype=torch.bool)[i, j]
    for b, h, target in ((0, 1, {"recall": 0.8}), (B - 1, 0, {"density": 0.3})):
        kept = select_rows(logits, always, rows[j], **target)[b, h]
        for at, row in enumerate(logits[b, h].double()):
            weight = row.softmax(-1) if "recall" in target else rows[j].double() / int(rows[j].sum())
            aim = target.get("recall") or target["density"] - at * 0.6180339887498949 % 1 / len(row)
            want = naive_row(row.tolist(), always[at].tolist(), weight.tolist(), aim, 1, len(row))
            assert set(kept[at].nonzero().flatten().tolist()) == want, (b, h, at)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_summary_rows_of_keys_of_another_layout(dtype):
    queries, keys = Layout(Grid(1, 5, 7, text=3), (1, 4, 4), 16), Layout(Grid(3, 5, 7, text=20), (2, 3, 4), 32)
    B, H, Hk, D = 2, 4, 2, 16
    q, k, v = (random(B, n.grid.tokens, h, D, dtype=dtype, seed=h) for n, h in ((queries, H), (keys, Hk), (keys, Hk)))
    kept = random(B, H, queries.blocks, keys.blocks) > 0.4
    out, lse = block_sparse_attention(q, k, v, dynamic_plan(queries, kept, key_layout=keys), return_lse=True)
    start, rows, is_text = keys.block_table(CPU)
    kept = kept | queries.is_text[:, None] | is_text
    means = [block_stats(x, start, rows).mean for x in (k, v)]
    bias = torch.where(kept, -torch.inf, rows.log().expand_as(kept))
    got = add_block_compensation(q, out, lse, *means, bias, queries, D**-0.5)
    want = add_block_compensation_reference(
        q.double(), out.double(), lse.double(), *(x.to(dtype).double() for x in means), bias, queries, D**-0.5
    )
    tolerance = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance)
    # One row by hand: one softmax over the keys that it sees and a row for each block that it does not.
    head, row = 3, 17
    block = int(torch.repeat_interleave(queries.block_rows)[row])
    seen = kept[0, head, block][torch.repeat_interleave(rows)]
    all_keys = torch.cat([k[0, seen, head // 2], means[0][0, :, head // 2].to(dtype)]).double()
    all_values = torch.cat([v[0, seen, head // 2], means[1][0, :, head // 2].to(dtype)]).double()
    logits = all_keys @ q[0, row, head].double() * D**-0.5
    logits[int(seen.sum()) :] += bias[0, head, block].double()
    torch.testing.assert_close(
        got[0, row, head].double(), logits.softmax(0) @ all_values, rtol=tolerance, atol=tolerance
    )


def test_what_saw_nothing_is_its_summaries_alone():
    layout = Layout(Grid(1, 1, 8), (1, 1, 4), 16)
    q = random(1, 8, 1, 16)
    out, lse = torch.zeros_like(q), torch.full((1, 1, 8), -torch.inf)
    means = random(1, 2, 1, 16, seed=4), random(1, 2, 1, 16, seed=5)
    got = add_block_compensation(q, out, lse, *means, torch.tensor([[0.0, -torch.inf]] * 2)[None, None], layout, 0.25)
    torch.testing.assert_close(got, means[1][:, :1].expand_as(got).contiguous())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_summaries_far_heavier_than_what_was_seen(dtype):
    """One query of one block in a way that no exponent of its weight fits: that block is merged with a running maximum."""
    layout = Layout(Grid(1, 3, 16), (1, 1, 16))
    q = random(1, 48, 2, 16, dtype=dtype)
    out, lse = random(1, 48, 2, 16, dtype=dtype, seed=1), random(1, 2, 48, seed=2)
    lse[0, 1, 20] = -300.0
    means = random(1, 3, 2, 16, seed=3), random(1, 3, 2, 16, seed=4)
    bias = random(1, 2, 3, 3, seed=5)
    got = add_block_compensation(q, out, lse, *means, bias, layout, 0.25)
    exact = (x.to(dtype).double() for x in means)
    want = add_block_compensation_reference(q.double(), out.double(), lse.double(), *exact, bias, layout, 0.25)
    tolerance = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance)


def test_add_skipped_refuses_other_shapes():
    layout = LAYOUTS[0]
    q = random(1, 8, 1, 16)
    with pytest.raises(ValueError, match="do not fit"):
        add_block_compensation(q, q, torch.zeros(1, 1, 8), q, q, torch.zeros(1, 1, 8, 8), layout, 1.0)


def compiled(kernel, capability: int, constants: dict, types: dict[str, str], warps: int, stages: int = 3):
    from ahead_of_time import compile_for
    from triton.compiler import ASTSource

    signature, attributes = {}, {}
    for position, name in enumerate(kernel.arg_names):
        signature[name] = "constexpr" if name in constants else types.get(name, "i32")
        if signature[name].startswith("*") or (name.startswith("stride_") and name not in constants):
            attributes[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=attributes)
    return compile_for(source, capability, num_warps=warps, num_stages=stages)


@pytest.mark.compile
@pytest.mark.skipif(INTERPRETED, reason="runs once, in the ordinary process")
@pytest.mark.parametrize("capability", [80, 90])
class TestAheadOfTime:
    """Everything compiles for Ampere and Hopper without a GPU, and spills nothing."""

    @pytest.fixture(autouse=True)
    def triton_is_there(self):
        pytest.importorskip("triton")

    def check(self, kernel):
        from ahead_of_time import usage

        used = usage(kernel)
        assert used["spill stores"] == used["spill loads"] == 0, used

    def test_block_stats(self, capability):
        from tilewise.kernels.selection.triton_block_stats import block_stats_kernel

        types = {
            "x_ptr": "*bf16",
            "start_ptr": "*i32",
            "rows_ptr": "*i32",
            "mean_ptr": "*fp32",
            "variance_ptr": "*fp32",
        }
        constants = {"D": 128, "BLOCK_D": 128, "BLOCK": 128}
        self.check(compiled(block_stats_kernel, capability, constants, types, 4))

    @pytest.mark.parametrize(("dtype", "head_dim"), [("bf16", 64), ("bf16", 128), ("fp16", 96), ("bf16", 256)])
    def test_block_share(self, dtype, head_dim, capability):
        from tilewise.kernels.selection.triton_block_share import block_share_kernel, launch_config

        types = dict.fromkeys(["q_ptr", "mean_ptr", "variance_ptr"], f"*{dtype}")
        types |= dict.fromkeys(["share_ptr", "log_rows_ptr"], "*fp32") | dict.fromkeys(
            ["start_ptr", "rows_ptr"], "*i32"
        )
        types |= {"scale": "fp32", "square": "fp32"}
        config = launch_config(head_dim, 2, hopper=capability == 90, queries=32)
        width = 1 << (head_dim - 1).bit_length()
        constants = {"D": head_dim, "BLOCK_D": width, "QUERIES": 32}
        constants |= {name: config[name] for name in ("ROWS", "BLOCK_N")}
        kernel = compiled(block_share_kernel, capability, constants, types, config["num_warps"], config["num_stages"])
        self.check(kernel)
        assert kernel.metadata.shared <= (227 if capability >= 90 else 99) * 1024

    @pytest.mark.parametrize("kind", ["block_logits", "error_logits", "summary_bias"])
    def test_maps(self, kind, capability):
        from tilewise.kernels.selection import triton_block_scores as triton_block_map

        kernel = getattr(triton_block_map, f"{kind}_kernel")
        floats = ["dot_ptr", "logits_ptr", "s2_ptr", "spread_ptr", "out_ptr"]
        types = dict.fromkeys(floats, "*fp32") | {"rows_ptr": "*i32", "seen_ptr": "*u8"}
        types |= dict.fromkeys(["scale", "least_s2", "least"], "fp32")
        types = {name: kind for name, kind in types.items() if name in kernel.arg_names}
        self.check(compiled(kernel, capability, {"CHUNK": 1024}, types, 4))

    def test_lists(self, capability):
        from tilewise.kernels.plans.triton_dynamic_plan import lists_kernel

        types = dict.fromkeys(["start_ptr", "rows_ptr", "index_ptr", "key_start_ptr", "ends_ptr"], "*i32")
        types |= {"kept_ptr": "*u8", "text_ptr": "*u8", "query_text_ptr": "*u8", "tokens_ptr": "*fp32"}
        self.check(compiled(lists_kernel, capability, {"CHUNK": 1024}, types, 4))

    @pytest.mark.parametrize(("by_mass", "by_head"), [(True, False), (False, False), (False, True)])
    @pytest.mark.parametrize("width", [1024, 8192])
    def test_select_rows(self, by_mass, by_head, width, capability):
        from tilewise.kernels.selection.triton_select import ROUNDS, select_rows_kernel, warps_of

        types = {
            "logits_ptr": "*fp32",
            "always_ptr": "*u8",
            "rows_ptr": "*i32",
            "kept_ptr": "*u8",
            "tokens_ptr": "*fp32",
        }
        types |= {"target": "*fp32" if by_head else "fp32", "golden": "fp32"}
        constants = {"BY_MASS": by_mass, "BY_HEAD": by_head, "BLOCK_N": width, "ROUNDS": ROUNDS}
        self.check(compiled(select_rows_kernel, capability, constants, types, warps_of(width)))

    @pytest.mark.parametrize(("dtype", "head_dim"), [("bf16", 64), ("bf16", 128), ("fp16", 96), ("bf16", 256)])
    def test_add_block_compensation(self, dtype, head_dim, capability):
        from tilewise.kernels.attention.triton_block_compensation import add_block_compensation_kernel, launch_config

        types = dict.fromkeys(["q_ptr", "seen_ptr", "key_ptr", "value_ptr", "out_ptr"], f"*{dtype}")
        types |= {"lse_ptr": "*fp32", "bias_ptr": "*fp32", "start_ptr": "*i32", "rows_ptr": "*i32", "heavy_ptr": "*i8"}
        types |= {"scale_log2": "fp32", "log2e": "fp32"}
        width = 1 << (head_dim - 1).bit_length()
        config = launch_config(head_dim, 2, hopper=capability == 90)
        constants = {"D": head_dim, "BLOCK_D": width, "BLOCK_M": 128, "BLOCK_N": config["BLOCK_N"]}
        for online in (False, True):
            constants["ONLINE"] = online
            launch = config["num_warps"], config["num_stages"]
            kernel = compiled(add_block_compensation_kernel, capability, constants, types, *launch)
            self.check(kernel)
            assert (
                kernel.metadata.shared <= (227 if capability >= 90 else 99) * 1024
            )  # consumer GPUs go by Ampere's rules


@pytest.mark.gpu
@pytest.mark.parametrize(
    "layout", [Layout(Grid(5, 45, 80), (1, 8, 16)), Layout(Grid(9, 30, 52, 200), (3, 5, 8))], ids=str
)
def test_on_a_gpu(layout):
    """Real widths, against the naive formulas on the same device."""
    device, N, B, H, D = torch.device("cuda"), layout.blocks, 2, 4, 128
    q, k, v = (random(B, layout.grid.tokens, H, D, seed=seed).to(device, torch.bfloat16) for seed in range(3))
    k[:, :, 1] *= 3
    start, rows, is_text = layout.block_table(
        k.device
    )  # made once a layout: the one time that the device is waited for
    stats = block_stats(k, start, rows, variance=True)
    want = block_stats_reference(k.double(), start, rows, True)
    torch.testing.assert_close(stats.mean.double(), want.mean, rtol=1e-5, atol=1e-5)
    assert stats.variance is not None
    torch.testing.assert_close(stats.variance.double(), want.variance, rtol=1e-4, atol=1e-5)
    share = block_share(q, stats.mean, stats.variance, start, rows, D**-0.5)
    wanted = torch_block_share(q.double(), stats.mean, stats.variance, start, rows, D**-0.5)
    torch.testing.assert_close(share.double(), wanted, rtol=5e-2, atol=1e-5)
    means = block_stats(q, start, rows).mean
    logits = torch.einsum("bihd,bjhd->bhij", means, stats.mean) * 20
    always = torch.eye(N, dtype=torch.bool, device=device)
    for mass, target in ((True, 0.9), (False, 0.25)):
        kept = select_rows(logits, always, rows, **{"recall" if mass else "density": target})
        reference = select_rows_reference(logits, always, rows, target, mass, 1, N)
        assert (kept != reference).double().mean() < 1e-4
    torch.cuda.set_sync_debug_mode("error")
    try:
        kept = select_rows(logits, always, rows, density=0.25)
        plan = dynamic_plan(layout, kept)
        out, lse = block_sparse_attention(q, k, v, plan, return_lse=True)
        bias = torch.where(kept | is_text[:, None] | is_text, -torch.inf, rows.log())
        merged = add_block_compensation(
            q, out, lse, stats.mean, block_stats(v, start, rows).mean, bias, layout, D**-0.5
        )
    finally:
        torch.cuda.set_sync_debug_mode("default")
    fixed = plan_from_block_map(layout, kept)
    assert plan.device_density is not None
    assert float(plan.device_density) == pytest.approx(fixed.density, rel=1e-5)
    assert torch.equal(plan.ends, fixed.ends)
    assert torch.equal(out, block_sparse_attention(q, k, v, fixed))
    value_mean = block_stats(v, start, rows).mean
    want = add_block_compensation_reference(q, out, lse, stats.mean, value_mean, bias, layout, D**-0.5)
    torch.testing.assert_close(merged.float(), want.float(), rtol=2e-2, atol=2e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("mass", [True, False])
def test_as_many_blocks_as_a_4k_clip_has(mass):
    """21 × 270 × 480 latents of Wan: rows of 5355 blocks."""
    device, N = torch.device("cuda"), 5355
    logits = 3 * torch.randn(1, 2, N, N, device=device, generator=torch.Generator(device).manual_seed(0))
    always = torch.eye(N, dtype=torch.bool, device=device)
    rows = torch.full((N,), 128, dtype=torch.int32, device=device)
    target = 0.9 if mass else 0.25
    kept = select_rows(logits, always, rows, **{"recall" if mass else "density": target})
    reference = select_rows_reference(logits, always, rows, target, mass, 1, N)
    assert (kept != reference).double().mean() < 1e-4
