"""Rules that pick block pairs by their logits: one small function each.

    rows     per query block: the best key blocks that are enough          (kernels/selection/select.py; the default)
    topk     per query block: equally many key blocks
    head     per head: the best pairs of the whole map                     (DraftAttention, arXiv 2505.14708)
    shared   per sample: the best pairs of all heads' maps together, so that a head gets what it needs

All take ``logits`` (B, H, Nq, Nk) float32, the log of the attention mass of query block i in key block j up to a constant of the
row (−inf: may not be kept), ``always`` (Nq, Nk) bool, pairs that are kept in any case and count towards the target, and ``rows``
(Nk,) tokens of each key block; and give (B, H, Nq, Nk) bool. A target is a ``density`` (token pairs kept) or a ``recall``
(mean mass kept over the rows that compete with each other). No row ever has fewer than ``floor`` ≥ 1 blocks, and one with a
logit that is nan or +inf keeps all. None of them waits for the device.
"""

from __future__ import annotations

import torch

from tilewise.kernels.selection.select import select_rows

RULES = ("rows", "head", "topk", "shared")


def select(
    rule: str,
    logits: torch.Tensor,
    always: torch.Tensor,
    rows: torch.Tensor,
    *,
    density: float | torch.Tensor | None = None,
    recall: float | None = None,
    floor: int = 1,
    cap: int | None = None,
    query_rows: torch.Tensor | None = None,
) -> torch.Tensor:
    """The pairs that ``rule`` keeps; see the module's docstring.

    density: for "rows" also (H,) or (B, H) float32, one for each head, or for each head of each sample. cap: most blocks of a
    row, for "rows" only. query_rows: (Nq,) tokens of each query block; None: queries and keys have the same blocks.

    Raises:
        ValueError: an unknown rule, or a target that the rule does not take.
    """
    if rule == "rows":
        return select_rows(
            logits, always, rows, density=density, recall=recall, floor=min(floor, logits.shape[-1]), cap=cap
        )
    if isinstance(density, torch.Tensor):
        raise ValueError(f"select: {rule!r} keeps by one density for all heads")
    if rule == "topk":
        if density is None:
            raise ValueError("select: 'topk' keeps a fixed number of blocks, and takes a density, not a recall")
        return topk(logits, always, density, floor)
    if rule in ("head", "shared"):
        pair_rows = (rows if query_rows is None else query_rows, rows)
        return best_pairs(logits, always, pair_rows, density, recall, floor, across_heads=rule == "shared")
    raise ValueError(f"select: unknown rule {rule!r}; there are {', '.join(RULES)}")


def broken_rows(logits: torch.Tensor) -> torch.Tensor:
    """(B, H, Nq) bool: rows with a logit that is nan or +inf, or with none that is finite."""
    worst = logits.amax(-1)  # nan wins over everything
    return ~worst.isfinite()


def topk(logits: torch.Tensor, always: torch.Tensor, density: float, floor: int = 1) -> torch.Tensor:
    """As many key blocks for every query block: ⌊density · Nk⌉, those of ``always`` first."""
    N = logits.shape[-1]
    count = min(N, max(round(density * N), floor, 1))
    first = logits.masked_fill(always, torch.inf)
    best = first.topk(count, dim=-1).indices
    return _whole(torch.zeros_like(logits, dtype=torch.bool).scatter_(-1, best, True), logits, always)


def best_scores(
    scores: torch.Tensor,
    always: torch.Tensor,
    rows: tuple[torch.Tensor, torch.Tensor],
    density: float,
    *,
    across_heads: bool,
) -> torch.Tensor:
    """The pairs with the highest scores of each head's map, or of all heads' maps of a sample: as many as make the density.

    scores: (B, H, Nq, Nk) float32, comparable over rows; −inf: may not be kept. rows: of query and of key blocks. A row keeps at
    least its best block.
    """
    pairs = (rows[0][:, None] * rows[1][None, :]).to(torch.float32).expand_as(scores)
    target = density * float(scores.shape[1] if across_heads else 1) * rows[0].double().sum() * rows[1].double().sum()
    kept = _to_the_target(scores, always, pairs, target, halfway=True, across_heads=across_heads)
    return _whole(kept | best_of_row(scores, kept), scores, always)


def best_of_row(scores: torch.Tensor, kept: torch.Tensor, count: int = 1) -> torch.Tensor:
    """(B, H, Nq, Nk) bool: the ``count`` best pairs of each row that keeps fewer; nothing of the other rows."""
    best = scores.nan_to_num(nan=-torch.inf).topk(min(count, scores.shape[-1]), dim=-1).indices
    least = torch.zeros_like(kept).scatter_(-1, best, True) & (scores > -torch.inf)
    return least & (kept.sum(-1, keepdim=True) < count)


def _to_the_target(
    scores: torch.Tensor,
    always: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor | float,
    *,
    halfway: bool,
    across_heads: bool,
) -> torch.Tensor:
    """(B, H, Nq, Nk) bool: pairs by falling score until their weights sum to the target; those of ``always`` come first.

    halfway: the pair that crosses the target is taken if more than half of it fits; else it is always taken.
    """
    B, H, M, N = scores.shape
    pools = (B, 1, H * M * N) if across_heads else (B, H, M * N)
    flat = scores.nan_to_num(nan=-torch.inf).masked_fill(always, torch.inf).reshape(pools)
    order = flat.argsort(dim=-1, descending=True, stable=True)
    w = weight.reshape(pools).nan_to_num(nan=0.0).gather(-1, order).double()
    summed = w.cumsum(-1)
    enough = (summed - w / 2 if halfway else summed - w) >= target
    free = flat.gather(-1, order) > -torch.inf
    return torch.zeros_like(free).scatter_(-1, order, ~enough & free).reshape(B, H, M, N)


def best_pairs(
    logits: torch.Tensor,
    always: torch.Tensor,
    rows: tuple[torch.Tensor, torch.Tensor],
    density: float | None,
    recall: float | None,
    floor: int = 1,
    *,
    across_heads: bool,
) -> torch.Tensor:
    """The pairs with the largest share of their row's mass, of each head's map or of all heads' maps of a sample.

    DraftAttention's rule leaves query blocks without any key where a head's map is steep; here such a row gets its ``floor``
    best blocks, which are few and go beyond the target. rows: of query and of key blocks.
    """
    B, H, M, N = logits.shape
    queries, keys = rows
    share = logits.log_softmax(-1)
    pairs = (queries[:, None] * keys[None, :]).to(torch.float32)
    weight = (share.exp() * queries[:, None] if density is None else pairs).expand(B, H, M, N)
    heads = H if across_heads else 1
    whole = float(heads) * queries.double().sum() * (1 if density is None else keys.double().sum())
    target = recall if density is None else density
    assert target is not None
    kept = _to_the_target(share, always, weight, target * whole, halfway=density is not None, across_heads=across_heads)
    if floor > 0:
        kept = kept | best_of_row(logits, kept, floor)
    return _whole(kept, logits, always)


def _whole(kept: torch.Tensor, logits: torch.Tensor, always: torch.Tensor) -> torch.Tensor:
    """With what is always kept, without what may not be, and with everything where the logits are broken."""
    kept = (kept & (logits > -torch.inf)) | always | broken_rows(logits)[..., None]
    return kept | ~kept.any(-1, keepdim=True)
