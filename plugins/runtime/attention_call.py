"""One attention call of a patched layer, once its plans are made: each group of samples by its own, and what is told of it."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from tilewise.kernels.attention.block_compensation import add_skipped
from tilewise.kernels.attention.dispatch import Choice, block_sparse_attention, choose_backend
from tilewise.kernels.attention.dispatch_8bit import VALUES as PRECISIONS
from tilewise.kernels.attention.dispatch_8bit import block_sparse_attention_8bit, misfit_8bit, missing_8bit
from tilewise.kernels.plans.block_plan import BlockPlan
from tilewise.kernels.plans.layout import Layout, cached_layout
from tilewise.plugins.masks.additive_padding_mask import add_weighed, attend_all
from tilewise.plugins.masks.padding_mask import Group
from tilewise.plugins.methods.base import Planned

QKV = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclasses.dataclass(frozen=True)
class AttentionCall:
    """What ``Step.watchers`` are told of one attention call, after it ran.

    Attributes:
        denoiser, layer, block: where; names and the number of the transformer block.
        step: of the denoising schedule, from 0; None while a CUDA graph is being captured.
        branch: number of the forward within its step: 0 and 1 are conditional and unconditional where a pipeline runs both.
        kind: "sparse", "dense step" and so on, as in ``summary``.
        layout: the token order of a sparse call, with the text that this plan is for; None if the call was dense.
        plan: None if the call was dense.
        draft: (B, H, N, N) float32, the attention mass that a dynamic method expected of each pair of blocks, or None.
        query, key, value: (B, S, H, D) of the samples that the plan is for, in the layout's order; of a dense call, as they came.
    """

    denoiser: str
    layer: str
    block: int
    step: int | None
    branch: int
    kind: str
    layout: Layout | None
    plan: BlockPlan | None
    draft: torch.Tensor | None
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor


def with_text(layout: Layout, text: int) -> Layout:
    """The layout with another number of text tokens."""
    if text == layout.grid.text:
        return layout
    return cached_layout(dataclasses.replace(layout.grid, text=text), layout.tile, layout.max_block_rows)


def part_of(group: Group, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> QKV:
    """What of each (B, S, H, D) tensor belongs to a group: views where that is possible."""

    def part(x: torch.Tensor) -> torch.Tensor:
        if group.samples is not None:
            x = x.index_select(0, group.samples)
        if isinstance(group.tokens, slice):
            return x[:, group.tokens]
        return x if group.tokens is None else x.index_select(1, group.tokens)

    return part(query), part(key), part(value)


def shares_of(groups: list[Group], query: torch.Tensor) -> list[float]:
    """What part of the batch each group of samples is."""
    samples = [query.shape[0] if group.samples is None else len(group.samples) for group in groups]
    return [n / sum(samples) for n in samples]


def mean_density(planned: list[tuple[Group, Planned]], query: torch.Tensor) -> float:
    """Kept ÷ all token pairs, over the samples of a batch."""
    shares = shares_of([group for group, _ in planned], query)
    return sum(share * p.plan.density for share, (_, p) in zip(shares, planned, strict=True))


def measured(planned: list[tuple[Group, Planned]], query: torch.Tensor) -> dict[str, torch.Tensor]:
    """What dynamic plans know of themselves, over the samples of a batch: () tensors on the device by name."""
    shares = shares_of([group for group, _ in planned], query)
    found: dict[str, list[torch.Tensor]] = {}
    for share, (_, p) in zip(shares, planned, strict=True):
        values = {"density": p.plan.device_density, "recall": p.recall, "probe": p.probe, "broken": p.broken}
        for name, value in values.items():
            if value is not None:
                found.setdefault(name, []).append(value if name == "broken" or share == 1 else share * value)
    return {name: sum(values[1:], values[0]) for name, values in found.items() if len(values) == len(planned)}


def choose(qkv: QKV, plan: BlockPlan, precision: str | None) -> tuple[Choice, str]:
    """What runs a plan, and why not in the 8-bit ``precision`` that was asked for; "" if it does, or if none was.

    Raises:
        TypeError, ValueError, RuntimeError: where no kernel takes the call; see ``choose_backend``.
    """
    choice = choose_backend(*qkv, plan)
    if precision is None:
        return choice, ""
    q, k, _ = qkv
    why = "needs a Hopper GPU" if q.device.type == "cpu" else missing_8bit(q.device) or misfit_8bit(q, k, plan)
    if why:
        return choice, f"not in {precision}: {why}"
    return Choice(precision, "asked for"), ""


def run_plan(part: QKV, plan: BlockPlan, choice: Choice, scale: float | None, return_lse: bool = False) -> Any:
    """The kernel that was chosen, 16 bits or 8."""
    if choice.backend in PRECISIONS:
        precision: Any = choice.backend
        return block_sparse_attention_8bit(*part, plan, precision=precision, scale=scale, return_lse=return_lse)
    kernel: Any = block_sparse_attention
    return kernel(*part, plan, scale=scale, return_lse=return_lse, backend=choice)


def attend_planned(
    part: QKV,
    planned: Planned,
    layout: Layout,
    choice: Choice,
    scale: float | None,
    weighed: tuple[torch.Tensor, torch.Tensor, float] | None = None,
) -> torch.Tensor:
    """Attention by one plan, what stands for the blocks that it skips, and keys that a mask weighs down by eᶜ, with values."""
    if planned.skipped is None and weighed is None:
        return run_plan(part, planned.plan, choice, scale)
    out, lse = run_plan(part, planned.plan, choice, scale, return_lse=True)
    if weighed is not None:
        keys, values, weight = weighed
        out, lse = add_weighed(part[0], keys, values, out, lse, weight, scale, layout)
    if planned.skipped is None:
        return out
    s = planned.skipped
    scale = part[0].shape[-1] ** -0.5 if scale is None else scale
    return add_skipped(part[0], out, lse, s.key_mean, s.value_mean, s.bias, layout, scale)


def attend_groups(
    layout: Layout,
    planned: list[tuple[Group, Planned]],
    parts: list[QKV],
    chosen: list[Choice],
    whole: QKV,
    scale: float | None,
) -> torch.Tensor:
    """Each group of the ``whole`` call by its own plan; tokens that a mask hides get 0."""
    if len(planned) == 1 and planned[0][0].tokens is None:
        return attend_planned(parts[0], planned[0][1], layout, chosen[0], scale)
    out = torch.zeros_like(whole[0], memory_format=torch.contiguous_format)
    for (group, plan), qkv, choice in zip(planned, parts, chosen, strict=True):
        weighed = None
        if group.weighed is not None:
            positions, weight = group.weighed
            others = dataclasses.replace(group, tokens=positions)
            theirs, everything = part_of(others, *whole), part_of(dataclasses.replace(group, tokens=None), *whole)
            weighed = theirs[1], theirs[2], weight
            put_part(out, others, attend_all(theirs[0], everything[1], everything[2], scale))
        put_part(out, group, attend_planned(qkv, plan, with_text(layout, group.text), choice, scale, weighed))
    return out


def put_part(out: torch.Tensor, group: Group, part: torch.Tensor) -> None:
    """Write a group's outputs where ``part_of`` took its tokens from."""
    if group.samples is not None and isinstance(group.tokens, torch.Tensor):
        out[group.samples[:, None], group.tokens[None]] = part
    elif group.samples is not None:
        out[group.samples, slice(None) if group.tokens is None else group.tokens] = part
    else:
        out[:, slice(None) if group.tokens is None else group.tokens] = part
