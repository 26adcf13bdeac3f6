"""watch: what every attention call of a patched target did, call by call, while a ``with`` block runs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from tilewise.kernels.plans.block_plan import BlockPlan
from tilewise.kernels.plans.layout import Layout
from tilewise.plugins.errors import ConfigError
from tilewise.plugins.patching import patches_of
from tilewise.plugins.runtime.observers import ObservedCall


@dataclass(frozen=True)
class WatchedCall:
    """One attention call. Tensors are on the CPU.

    Attributes:
        denoiser, layer, block: where: names, and the number of the transformer block.
        step: of the denoising schedule, from 0. For a bare denoiser in thousandths of the noise level.
        branch: which forward of its step: 0 and 1 are conditional and unconditional where a pipeline runs both.
        kind: "sparse", "dense step" and so on, as in ``summary``.
        layout, plan: token order and key blocks of a sparse call; None of a dense one. Where an attention mask splits a batch,
            each group of samples is a call.
        draft: (B, H, N, N) float32, share of the attention mass that a dynamic method expected in each pair of blocks, or None.
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


@contextmanager
def watch(
    target: Any, layers: Iterable[int] | None = None, steps: Iterable[int] | None = None
) -> Iterator[list[WatchedCall]]:
    """``with watch(pipe, layers=[4], steps=[10]) as calls: pipe(…)``: a list that grows by each attention call.

    What is kept is copied to the CPU, which waits for the GPU: choose few layers and steps of a large model.

    Args:
        target: a patched pipeline or denoiser.
        layers: numbers of transformer blocks; None: all.
        steps: of the denoising schedule, from 0; None: all.

    Raises:
        ConfigError: if the target is not patched.
    """
    patches = patches_of(target)
    if not patches:
        raise ConfigError("watch: the target is not patched; call tilewise.patch(target, method) first")
    blocks = None if layers is None else set(layers)
    wanted = None if steps is None else set(steps)
    calls: list[WatchedCall] = []

    def told(call: ObservedCall) -> None:
        if (blocks is not None and call.block not in blocks) or (wanted is not None and call.step not in wanted):
            return
        plan = None if call.plan is None else call.plan.to("cpu")
        draft = None if call.draft is None else call.draft.float().cpu()
        calls.append(
            WatchedCall(
                call.denoiser, call.layer, call.block, call.step, call.branch, call.kind, call.layout, plan, draft
            )
        )

    for patch in patches.values():
        patch.state.observers.append(told)
    try:
        yield calls
    finally:
        for patch in patches.values():
            if told in patch.state.observers:
                patch.state.observers.remove(told)
