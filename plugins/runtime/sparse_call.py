"""Running the plans of one attention call: each group of samples by its own plan.

A plan's kernel answers most calls alone. Two things are merged into its softmax by their log-sum-exp where there are any: the
means that stand for the blocks that a dynamic method skips or for what a window leaves out, and keys that a mask weighs down.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tilewise.kernels.attention.block_compensation import BlockCompensation, add_block_compensation
from tilewise.kernels.attention.dispatch import (
    Choice,
    block_sparse_attention,
    block_sparse_attention_with_means,
    choose_backend,
    takes_means,
)
from tilewise.kernels.attention.dispatch_8bit import VALUES as PRECISIONS
from tilewise.kernels.attention.dispatch_8bit import (
    block_sparse_attention_8bit,
    block_sparse_attention_8bit_with_means,
    takes_hopper_8bit,
    unavailable_8bit,
    unsupported_8bit,
)
from tilewise.kernels.fused.reorder import reorder_tokens
from tilewise.kernels.plans.block_plan import BlockPlan
from tilewise.kernels.plans.layout import Layout
from tilewise.kernels.selection.block_stats import block_stats
from tilewise.plugins.masks.additive_padding_mask import add_weighed, attend_all
from tilewise.plugins.masks.padding_mask import Group, shares_of
from tilewise.plugins.methods.base import Planned

QKV = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Part:
    """One group of samples of a call, and what answers it.

    layout: the order of its tokens, with as much text as the group keeps. choice: the backend.
    """

    group: Group
    layout: Layout
    planned: Planned
    choice: Choice

    @property
    def plan(self) -> BlockPlan:
        return self.planned.plan


def reordered(qkv: QKV, order: torch.Tensor) -> QKV:
    """Query, key and value, (B, S, H, D) each, with token i from where ``order`` (S,) has it."""
    query, key, value = reorder_tokens(qkv, order)
    return query, key, value


def choose(qkv: QKV, plan: BlockPlan, precision: str | None) -> tuple[Choice, str]:
    """What runs a plan, and why not in the 8-bit ``precision`` that was asked for; "" if it does, or if none was.

    Raises:
        UnsupportedPlanError: no kernel takes the call.
    """
    choice = choose_backend(*qkv, plan)
    if precision is None:
        return choice, ""
    q, k, _ = qkv
    wanted: Any = precision
    if why := unavailable_8bit(q.device, wanted) or unsupported_8bit(q, plan):
        return choice, f"not in {precision}: {why}"
    return Choice(precision, "asked for", takes_hopper_8bit(q, k, plan) is None), ""


def run_plan(qkv: QKV, plan: BlockPlan, choice: Choice, scale: float | None, return_lse: bool = False) -> Any:
    """The kernel that was chosen, 16 bits or 8."""
    if choice.backend in PRECISIONS:
        precision: Any = choice.backend
        return block_sparse_attention_8bit(*qkv, plan, precision=precision, scale=scale, return_lse=return_lse)
    kernel: Any = block_sparse_attention
    return kernel(*qkv, plan, scale=scale, return_lse=return_lse, backend=choice)


def run_part(
    qkv: QKV, part: Part, scale: float | None, weighed: Sequence[tuple[torch.Tensor, torch.Tensor, float]] = ()
) -> torch.Tensor:
    """Attention by one plan, the means of the blocks that it skips, and further keys, with values, each weighed down by eᶜ."""
    if not weighed:
        return run_planned(qkv, part.planned, part.choice, part.layout, scale)
    if (around := part.planned.around) is not None:
        inner = dataclasses.replace(part, planned=dataclasses.replace(part.planned, around=None))
        return around.after(qkv, run_part(around.before(qkv), inner, scale, weighed), scale)
    skipped = part.planned.compensation or far_means(qkv, part.plan)
    out, lse = run_plan(qkv, part.plan, part.choice, scale, return_lse=True)
    for keys, values, weight in weighed:
        out, lse = add_weighed(qkv[0], keys, values, out, lse, weight, scale, part.layout)
    return out if skipped is None else add_means(qkv[0], out, lse, skipped, part.layout, scale)


def run_planned(qkv: QKV, planned: Planned, choice: Choice, layout: Layout, scale: float | None) -> torch.Tensor:
    """All of what a method decided for a call: its plan, the means of what that skips, and what is done before and after it."""
    around = planned.around
    inner = qkv if around is None else around.before(qkv)
    out = run_with_means(inner, planned.plan, choice, layout, scale, planned.compensation)
    return out if around is None else around.after(qkv, out, scale)


def run_with_means(
    qkv: QKV,
    plan: BlockPlan,
    choice: Choice,
    layout: Layout,
    scale: float | None,
    skipped: BlockCompensation | None = None,
) -> torch.Tensor:
    """Attention by a plan, and means of the keys that it does not show: in one launch where the kernel takes them.

    skipped: the means; None: those of the plan's far field, if it has one. layout: of the queries.
    """
    at_once = takes_means(*qkv, choice)
    means = skipped or far_means(qkv, plan, qkv[0].dtype if at_once else None)
    if means is None:
        return run_plan(qkv, plan, choice, scale)
    if at_once and choice.backend in PRECISIONS:
        precision: Any = choice.backend
        return block_sparse_attention_8bit_with_means(*qkv, plan, means, precision=precision, scale=scale)
    if at_once:
        return block_sparse_attention_with_means(*qkv, plan, means, scale)
    out, lse = run_plan(qkv, plan, choice, scale, return_lse=True)
    return add_means(qkv[0], out, lse, means, layout, scale)


def add_means(
    query: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    means: BlockCompensation,
    layout: Layout,
    scale: float | None,
) -> torch.Tensor:
    """Merge means that stand for keys which a plan did not show into its output. layout: of the queries."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return add_block_compensation(query, out, lse, means.key_mean, means.value_mean, means.bias, layout, scale)


def far_means(qkv: QKV, plan: BlockPlan, dtype: torch.dtype | None = None) -> BlockCompensation | None:
    """The means of the cells, in ``dtype`` (None: float32), that stand for what a plan does not show; None if it has no far
    field."""
    far, (q, k, v) = plan.far, qkv
    if far is None:
        return None
    batch, heads = q.shape[0], q.shape[2]
    sets = far.bias if plan.sets == 1 else far.bias[plan.sets_of_heads(heads).long()]
    key, value = (block_stats(x, far.start, far.rows, usual=far.usual, dtype=dtype).mean for x in (k, v))
    return BlockCompensation(key, value, sets[None].expand(batch, heads, -1, -1), far.lists)


def run_parts(
    parts: list[Part],
    taken: list[QKV],
    whole: QKV,
    scale: float | None,
    earlier: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """Each group of the ``whole`` call, whose tensors are ``taken``, by its own plan; tokens that a mask hides get 0.

    earlier: keys and values (B, n, Hk, D) that all queries see besides.
    """
    if len(parts) == 1 and parts[0].group.is_whole:
        return run_part(taken[0], parts[0], scale, () if earlier is None else [(*earlier, 0.0)])
    out = torch.zeros_like(whole[0], memory_format=torch.contiguous_format)
    for part, qkv in zip(parts, taken, strict=True):
        group, weighed = part.group, []
        own = earlier
        if own is not None and group.samples is not None:
            own = own[0].index_select(0, group.samples), own[1].index_select(0, group.samples)
        if own is not None:
            weighed.append((*own, 0.0))
        if group.weighed is not None:
            positions, weight = group.weighed
            others = dataclasses.replace(group, tokens=positions)
            query, key, value = others.take(*whole)
            _, keys, values = dataclasses.replace(group, tokens=None).take(*whole)
            weighed.append((key, value, weight))
            if own is not None:
                keys, values = torch.cat([keys, own[0]], 1), torch.cat([values, own[1]], 1)
            others.put(out, attend_all(query, keys, values, scale))
        group.put(out, run_part(qkv, part, scale, weighed))
    return out


def mean_density(parts: list[Part], batch: int) -> float:
    """Kept ÷ all token pairs, over the samples of a batch, of which groups may have different numbers of tokens."""
    return _by_pairs(parts, batch, [part.plan.density for part in parts])


def mean_cost(parts: list[Part], batch: int) -> float:
    """The same, pairs of a query and a mean of the far field counted too."""
    return _by_pairs(parts, batch, [part.plan.cost for part in parts])


def _by_pairs(parts: list[Part], batch: int, values: list[float]) -> float:
    shares = shares_of([part.group for part in parts], batch)
    pairs = [share * part.plan.q_len * part.plan.k_len for share, part in zip(shares, parts, strict=True)]
    return sum(n * value for n, value in zip(pairs, values, strict=True)) / sum(pairs)


def means_for_key(parts: list[Part], batch: int) -> float:
    """Means ÷ keys where a dynamic plan has a mean for each block that it skips; 0 where it has none."""
    blocks = [0.0 if part.planned.compensation is None else len(part.plan.k_rows) / part.plan.k_len for part in parts]
    return _by_pairs(parts, batch, blocks)


def density_of_heads(parts: list[Part], batch: int) -> torch.Tensor | None:
    """(heads,) float32 on the device, what each head keeps by plans with lists for each; None if there is another."""
    found = [part.plan.head_density for part in parts if part.plan.head_density is not None]
    if len(found) < len(parts):
        return None
    shares = shares_of([part.group for part in parts], batch)
    pairs = [share * part.plan.q_len * part.plan.k_len for share, part in zip(shares, parts, strict=True)]
    return torch.stack([n / sum(pairs) * each.mean(0) for n, each in zip(pairs, found, strict=True)]).sum(0)


def extra_pairs(parts: list[Part], batch: int) -> float:
    """Token pairs that methods compute beside their plans ÷ all."""
    return _by_pairs(parts, batch, [part.planned.around.pairs if part.planned.around else 0.0 for part in parts])


def measured(parts: list[Part], batch: int) -> dict[str, torch.Tensor]:
    """What dynamic plans know of themselves, over the samples of a batch: () tensors on the device by name.

    A mean over groups: of the density by token pairs, of recall and probe by query rows. ``broken`` is a sum.
    """
    each = [_known(part.planned) for part in parts]
    if len(each) == 1:
        return each[0]
    shares = shares_of([part.group for part in parts], batch)
    rows = [share * part.plan.q_len for share, part in zip(shares, parts, strict=True)]
    pairs = [n * part.plan.k_len for n, part in zip(rows, parts, strict=True)]
    by_rows = [n / sum(rows) for n in rows]
    weights = {"density": [n / sum(pairs) for n in pairs], "broken": [1.0] * len(parts)}
    return {
        name: torch.stack([w * values[name] for w, values in zip(weights.get(name, by_rows), each, strict=True)]).sum()
        for name in each[0]
        if all(name in values for values in each)
    }


def _known(planned: Planned) -> dict[str, torch.Tensor]:
    values = {
        "density": planned.plan.device_density, "recall": planned.recall, "probe": planned.probe, "broken": planned.broken,
    }  # fmt: skip
    return {name: value for name, value in values.items() if value is not None}
