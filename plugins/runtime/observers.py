"""What observers are told of every attention call: ``watch`` and the pictures of ``explain`` are made from it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch

from tilewise.kernels.plans.block_plan import BlockPlan
from tilewise.kernels.plans.layout import Layout


@dataclass(frozen=True)
class ObservedCall:
    """One attention call, after it ran.

    Attributes:
        denoiser, layer, block: where: names, and the number of the transformer block.
        step: of the denoising schedule, from 0; None while a CUDA graph is being captured.
        branch: number of the forward within its step: 0 and 1 are conditional and unconditional where a pipeline runs both.
        kind: "sparse", "dense step" and so on, as in ``summary``.
        query, key, value: (B, S, H, D) of the samples that the plan is for, in the layout's order; of a dense call, as they came.
            Over the window of a KV cache the keys and values are the window's, in its order.
        layout: the token order of a sparse call, with the text that this plan is for; None if the call was dense, or over
            a window.
        plan: None if the call was dense, or sparse with the tokens of each head in an order of its own.
        draft: (B, H, Nq, Nk) float32, the attention mass that a dynamic method expected of each pair of blocks, or None.
    """

    denoiser: str
    layer: str
    block: int
    step: int | None
    branch: int
    kind: str
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    layout: Layout | None = None
    plan: BlockPlan | None = None
    draft: torch.Tensor | None = None


Observer: TypeAlias = Callable[[ObservedCall], None]
