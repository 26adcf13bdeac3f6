"""Published rules: the blocks that each method keeps are those of a plain re-implementation, row by row in double precision."""

import itertools
import math

import pytest
import torch
from chosen_blocks import blocks_of, planned, tensors

from tilewise.kernels.plans.layout import Grid
from tilewise.plugins.methods.base import make_method
from tilewise.plugins.methods.published.dhsa import chunks

GRIDS = [Grid(2, 9, 14), Grid(2, 6, 9, text=5, text_first=True), Grid(2, 8, 9, text=19)]
TILE = (1, 4, 4)
HEADS, SHARE = 4, 2  # query heads, and how many of them share a key head


class Case:
    """A call, and what every plain rule needs of it, in double precision."""

    def __init__(self, grid, name, seed=0, size=2.0, **options):
        self.method = make_method(name, {"tile": TILE, "min_tokens": 0, **options})
        self.layout = layout = self.method.layout(grid)
        self.qkv = tensors(grid, seed=seed, size=size)
        self.rows, self.text = layout.block_rows.tolist(), layout.is_text.tolist()
        self.N, self.S, self.scale = layout.blocks, grid.tokens, 0.25
        self.video = [j for j in range(self.N) if not self.text[j]]
        q, k, _ = self.qkv
        self.q, self.k = (self._means(x) for x in (q, k))
        # What a row of video keeps for the whole to keep the density: text sees everything.
        density = getattr(self.method, "density", None)
        share = grid.text / grid.tokens
        self.row_density = None if density is None else max((density - share) / (1 - share), 1 / grid.tokens)

    def _means(self, x):
        starts = self.layout.block_start.tolist()
        return torch.stack([x[:, a : a + n].double().mean(1) for a, n in zip(starts, self.rows, strict=True)], 1)

    def score(self, b, h, i, j):
        return self.scale * float(self.q[b, i, h] @ self.k[b, j, h // SHARE])

    def scores(self, b, h):
        return [[self.score(b, h, i, j) for j in range(self.N)] for i in range(self.N)]

    def always(self, i):
        return [j for j in range(self.N) if i == j or self.text[j] or self.text[i]]

    def best(self, i, score, first=()):
        """Those of ``always`` and ``first``, then by falling score until there are ⌊density · N⌉."""
        count = max(1, round(self.row_density * self.N))
        kept = sorted({*self.always(i), *first})
        for j in sorted(range(self.N), key=lambda j: -score[j]):
            if len(kept) < count and j not in kept and score[j] > -math.inf:
                kept.append(j)
        return kept

    def check(self, choose):
        """choose(b, h): for each row, the blocks to be kept."""
        kept = blocks_of(self.layout, planned(self.method, self.layout, *self.qkv).plan, HEADS)
        for b in range(2):
            for h in range(HEADS):
                for i, wanted in enumerate(choose(b, h)):
                    assert set(kept[b, h, i].nonzero().flatten().tolist()) == set(wanted), (b, h, i)


def best_pairs(case, scores, heads, density):
    """The best pairs of some heads together: scores of (h, i, j); with what is always kept, and the best of each row."""
    total = density * len(heads) * case.S**2
    pairs = [(h, i, j) for h in heads for i in range(case.N) for j in range(case.N)]
    first = [p for p in pairs if p[2] in case.always(p[1])]
    rest = sorted(set(pairs) - set(first), key=lambda p: (-scores[p], p))
    kept, summed = set(), 0.0
    for h, i, j in first + rest:
        weight = case.rows[i] * case.rows[j]
        if summed + weight / 2 >= total and (h, i, j) not in first:
            break
        kept.add((h, i, j))
        summed += weight
    return {h: [[j for j in range(case.N) if (h, i, j) in kept] for i in range(case.N)] for h in heads}


def standardized(case, b, h, spread):
    rows = case.scores(b, h)
    keys = torch.stack([case.k[b, j, h // SHARE] for j in case.video])
    found = {}
    for i, row in enumerate(rows):
        of_video = torch.tensor([row[j] for j in case.video], dtype=torch.float64)
        variance = of_video.var(unbiased=False)
        if spread == "diag":
            variance = ((case.scale * case.q[b, i, h]) ** 2 * keys.var(0, unbiased=False)).sum()
        for j in range(case.N):
            found[h, i, j] = (row[j] - float(of_video.mean())) / math.sqrt(float(variance) + 1e-6)
    return found


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize(
    ("spread", "options"), [("diag", {"tau": 1.0}), ("exact", {"tau": 0.5}), ("diag", {"density": 0.3})]
)
def test_sol(grid, spread, options):
    case = Case(grid, "sol", spread=spread, **options)

    def choose(b, h):
        if "density" in options:
            together = {k: v for head in range(HEADS) for k, v in standardized(case, b, head, spread).items()}
            return best_pairs(case, together, range(HEADS), 0.3)[h]
        z = standardized(case, b, h, spread)
        return [[j for j in range(case.N) if z[h, i, j] > options["tau"] or j in case.always(i)] for i in range(case.N)]

    case.check(choose)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_moba(grid):
    case = Case(grid, "moba", density=0.3)
    case.check(lambda b, h: [case.best(i, row) for i, row in enumerate(case.scores(b, h))])


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("density", [0.12, 0.3, 0.7])
def test_hip(grid, density):
    case = Case(grid, "hip", density=density)
    first, count = case.video[0], len(case.video)
    k = min(count, max(1, round(case.row_density * case.N)))

    def search(row):
        ranges = [(first + m * count // k, first + (m + 1) * count // k) for m in range(k)]
        while any(b - a > 1 for a, b in ranges):
            halves = [(a, (a + b + 1) // 2) for a, b in ranges] + [((a + b + 1) // 2, b) for a, b in ranges]
            halves = [(a, b) for a, b in halves if a < b]
            ranges = sorted(halves, key=lambda r: -row[(r[0] + r[1]) // 2])[:k]
        return [a for a, _ in ranges]

    def choose(b, h):
        rows = []
        for i, row in enumerate(case.scores(b, h)):
            found = search(row)
            rows.append(case.best(i, [x if j in found else -math.inf for j, x in enumerate(row)]))
        return rows

    case.check(choose)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("recent", [0.0, 0.5])
def test_less_is_more(grid, recent):
    case = Case(grid, "less-is-more", density=0.35, recent=recent)
    tiles = (case.layout.block_tile * torch.tensor(TILE)).double()
    draft = case.method.draft(case.layout, *case.qkv[:2], case.scale)
    mass = draft.logits.softmax(-1).mean(1)

    def choose(b, _):
        scores = [case.scores(b, head) for head in range(HEADS)]
        rows = []
        for i in range(case.N):
            ranks = [sorted(range(case.N), key=lambda j: -scores[h][i][j]) for h in range(HEADS)]
            lowest = [min(rank.index(j) for rank in ranks) for j in range(case.N)]
            order = sorted(range(case.N), key=lambda j: (lowest[j], -float(mass[b, i, j])))
            near = sorted(case.video, key=lambda j: float((tiles[i] - tiles[j]).norm()))
            near = near[: round(recent * case.row_density * case.N)]
            rows.append(case.best(i, [-order.index(j) for j in range(case.N)], near if not case.text[i] else ()))
        return rows

    case.check(choose)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_dhsa(grid):
    case = Case(grid, "dhsa", density=0.3, cuts=0.4)

    def chunk_numbers(b, h):
        keys = [case.k[b, j, h // SHARE] for j in range(case.N)]
        alike = [float(a @ b / a.norm() / b.norm()) for a, b in itertools.pairwise(keys)]
        cut = sorted(range(case.N - 1), key=lambda j: alike[j])[: round(0.4 * (case.N - 1))]
        return [sum(j < at for j in cut) for at in range(case.N)]

    def total(means, members):
        n = sum(case.rows[j] for j in members)
        return sum(case.rows[j] * means[j] for j in members) / math.sqrt(n)

    def choose(b, h):
        chunk = chunk_numbers(b, h)
        members = [[j for j in range(case.N) if chunk[j] == c] for c in range(max(chunk) + 1)]
        queries, keys = ([total(x, m) for m in members] for x in (case.q[b, :, h], case.k[b, :, h // SHARE]))
        rows = []
        for i in range(case.N):
            score = [case.scale * float(queries[chunk[i]] @ keys[chunk[j]]) for j in range(case.N)]
            kept = case.always(i)
            aim = case.row_density - (i * 0.6180339887498949 % 1) / case.N
            for j in sorted(range(case.N), key=lambda j: (-score[j], j)):
                if sum(case.rows[j] for j in kept) / case.S < aim and j not in kept:
                    kept.append(j)
            rows.append(kept)
        return rows

    case.check(choose)


def test_every_block_is_a_chunk_where_everything_is_cut():
    keys = torch.randn(1, 2, 9, 4)
    assert chunks(keys, 1.0).tolist() == [[list(range(9))] * 2]
    assert int(chunks(keys, 0.01).max()) == 0


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize(
    ("threshold", "options"), [(0.0, {"gamma": 0.6}), (1.0, {"gamma": 0.6}), (0.4, {"density": 0.3})]
)
def test_flexprefill(grid, threshold, options):
    case = Case(grid, "flexprefill", threshold=threshold, size=1.0, **options)
    middle = case.video[(len(case.video) - 1) // 2]
    starts = case.layout.block_start.tolist()
    patterns = set()

    def before(mass):
        """Mass of what comes first, for each key of a dictionary."""
        found, summed = {}, 0.0
        for key in sorted(mass, key=lambda key: -mass[key]):
            found[key] = summed
            summed += mass[key]
        return found

    def places(b, h):
        q, k = case.qkv[0][b, :, h].double(), case.qkv[1][b, :, h // SHARE].double()
        own = q[starts[middle] : starts[middle] + case.rows[middle]]
        mass = (case.scale * own @ k.T).softmax(-1).mean(0)
        exact = torch.stack([mass[a : a + n].sum() for a, n in zip(starts, case.rows, strict=True)])
        pooled = torch.tensor(case.scores(b, h), dtype=torch.float64).softmax(-1)
        half = (exact + pooled[middle]) / 2
        js = sum(float((p * (p / half).log2()).sum()) for p in (exact, pooled[middle])) / 2
        by_content = math.sqrt(js) < threshold
        patterns.add(by_content)
        if by_content:
            mass = {(i, j): float(pooled[i, j]) / case.N for i in range(case.N) for j in range(case.N)}
            return before(mass), pooled
        column = before({j: float(exact[j]) for j in range(case.N)})
        along = {
            (i, j): min(column[j], column.get(j - i + middle, math.inf)) for i in range(case.N) for j in range(case.N)
        }
        return along, pooled

    def choose(b, h):
        place, _ = places(b, h)
        if "density" in options:
            return best_pairs(case, {(h, *pair): -x for pair, x in place.items()}, [h], 0.3)[h]
        return [
            [j for j in range(case.N) if place[i, j] < options["gamma"] or j in case.always(i)] for i in range(case.N)
        ]

    case.check(choose)
    assert patterns == ({threshold > 0.5} if threshold in (0.0, 1.0) else patterns)
