"""The rules that pick pairs of blocks: against naive loops, and never an empty row."""

import math

import pytest
import torch

from tilewise.plugins.methods.dynamic.selection import RULES, select


def naive_pairs(logits, always, rows, density, recall, heads_compete):
    """The best pairs of a map (or of all maps of a sample), taken one by one in Python; no floor."""
    B, H, N, _ = logits.shape
    kept = always.expand(B, H, N, N).clone()
    share = logits.double().softmax(-1)
    for b in range(B):
        for pool in [range(H)] if heads_compete else [[h] for h in range(H)]:
            pairs = [(h, i, j) for h in pool for i in range(N) for j in range(N)]
            pairs.sort(key=lambda p: (not bool(always[p[1], p[2]]), -float(share[b, p[0], p[1], p[2]])))

            def size(p, b=b):
                return rows[p[1]] * (rows[p[2]] if density is not None else share[b, p[0], p[1], p[2]])

            whole = sum(float(size(p)) for p in pairs)
            done = 0.0
            for p in pairs:
                one = float(size(p))
                if (done + one / 2 if density is not None else done) >= (density or recall) * whole:
                    break
                kept[b, p[0], p[1], p[2]] = True
                done += one
    return kept


@pytest.mark.parametrize("rule", ["head", "shared"])
@pytest.mark.parametrize("target", [{"density": 0.3}, {"recall": 0.7}])
def test_best_pairs_are_the_naive_ones(rule, target):
    torch.manual_seed(1)
    logits = 2 * torch.randn(2, 3, 7, 7)
    rows = torch.tensor([16, 16, 9, 16, 16, 16, 3], dtype=torch.int32)
    always = torch.eye(7, dtype=torch.bool)
    found = select(rule, logits, always, rows, **target)
    wanted = naive_pairs(logits, always, rows, target.get("density"), target.get("recall"), rule == "shared")
    assert torch.equal(found, wanted)


def test_topk_keeps_equally_many():
    torch.manual_seed(0)
    logits = torch.randn(1, 2, 20, 20)
    kept = select("topk", logits, torch.eye(20, dtype=torch.bool), torch.full((20,), 16), density=0.25)
    assert (kept.sum(-1) == 5).all()
    assert kept.diagonal(dim1=-2, dim2=-1).all()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("seed", range(8))
def test_no_row_is_ever_empty(rule, seed):
    """Maps as steep, flat, closed and broken as they come."""
    generator = torch.Generator().manual_seed(seed)
    N = 5 + 7 * seed
    logits = torch.randn(2, 3, N, N, generator=generator) * 10.0 ** (seed - 2)
    logits[:, 0] = 0  # all equal
    logits[0, 1, 2] = -math.inf  # nothing may be seen
    logits[1, 2, 1, 0] = math.nan
    logits[1, 2, 3, 1] = math.inf
    rows = torch.randint(1, 129, (N,), generator=generator, dtype=torch.int32)
    nothing = torch.zeros(N, N, dtype=torch.bool)
    for always in (nothing, torch.eye(N, dtype=torch.bool)):
        for floor in (1, 3):
            for density in (0.001, 0.3, 1.0):
                kept = select(rule, logits, always, rows, density=density, floor=floor)
                assert kept.any(-1).all()
                assert kept[1, 2, 1].all(), "a row with a nan keeps everything"
                assert kept[1, 2, 3].all()
                assert (kept | ~always).all()
                open_rows = (logits > -math.inf).sum(-1) >= floor
                assert (kept.sum(-1) >= floor)[open_rows].all()


def test_rules_without_the_target_they_need():
    logits, always, rows = torch.zeros(1, 1, 2, 2), torch.eye(2, dtype=torch.bool), torch.tensor([4, 4])
    with pytest.raises(ValueError, match="fixed number"):
        select("topk", logits, always, rows, recall=0.5)
    with pytest.raises(ValueError, match="unknown rule"):
        select("best", logits, always, rows, density=0.5)
