"""Context parallelism on the denoisers of a pipeline in one call."""

from __future__ import annotations

import functools
from contextlib import nullcontext
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from tilewise.plugins.context_parallel.head_exchange import gather, gather_size
from tilewise.plugins.diffusers_compat import (
    RESOLVE_PARALLEL,
    ContextParallel,
    context_parallel,
    gather_hooks,
    is_sharded,
    set_up_on_cpu,
)
from tilewise.plugins.errors import ConfigError, UnsupportedModelError
from tilewise.plugins.hooks.temporary_attribute import temporary_attribute
from tilewise.plugins.models.common.denoisers import denoisers_of
from tilewise.plugins.models.common.registry import attention_layers

T = TypeVar("T")


def enable_context_parallel(target: T, *, mesh: Any = None) -> T:
    """Split the sequence of a pipeline's denoisers over the processes of ``torchrun``: diffusers' ``enable_parallelism`` with
    Ulysses, for any sequence length. Each process calls it, before or after ``tilewise.patch``.

    Args:
        target: a diffusers pipeline or a denoiser, the same in all processes.
        mesh: a device mesh with the dimensions "ring", of size 1, and "ulysses": the processes that share a
            sequence. Default: all.

    Returns:
        ``target``.

    Raises:
        ConfigError: there is no process group, only one process, or more of them than attention heads.
        UnsupportedModelError: a model that context parallelism does not serve.
        In each case nothing was changed.
    """
    denoisers = denoisers_of(target)
    if not dist.is_available() or not dist.is_initialized():
        raise ConfigError(
            "context parallelism needs one process a GPU: start the script with `torchrun --nproc-per-node N script.py`, and "
            "call torch.distributed.init_process_group() first"
        )
    ranks = dist.get_world_size() if mesh is None else mesh["ulysses"].size()
    if ranks < 2:
        raise ConfigError("context parallelism needs 2 processes or more: torchrun --nproc-per-node 2 …")
    for name, denoiser in denoisers.items():
        check_denoiser(name, denoiser, ranks)
    for denoiser in denoisers.values():
        _enable(denoiser, ranks, mesh)
    return target


def check_denoiser(name: str, denoiser: nn.Module, ranks: int) -> None:
    """Raises ConfigError or UnsupportedModelError for a denoiser that cannot run over so many ranks."""
    heads = min(layer.heads for layer in attention_layers(denoiser, name))
    if ranks > heads:
        raise ConfigError(
            f"context parallelism over {ranks} ranks: each needs a head, and {name} has {heads} in a layer. Use at most {heads}"
        )
    if is_sharded(denoiser):
        raise ConfigError(f"context parallelism: it is enabled on {name} already")
    if getattr(denoiser, "_cp_plan", None) is None:
        raise UnsupportedModelError(
            f"context parallelism: diffusers has no plan for {name}, a {type(denoiser).__name__}, to split its sequence"
        )


def _enable(denoiser: Any, ranks: int, mesh: Any) -> None:
    from diffusers import ContextParallelConfig

    config = ContextParallelConfig(ulysses_degree=ranks, ulysses_anything=True, mesh=mesh)
    on_cpu = functools.partial(set_up_on_cpu, denoiser)
    cpu = not torch.accelerator.device_count()
    with temporary_attribute(denoiser, RESOLVE_PARALLEL, on_cpu) if cpu else nullcontext():
        denoiser.enable_parallelism(config=config)
    if cpu:
        at = context_parallel(denoiser)
        assert at is not None
        for reference, axes in gather_hooks(denoiser):
            reference.post_forward = functools.partial(_gather, axes, at)


def _gather(axes: list[int | None], at: ContextParallel, module: nn.Module, output: Any) -> Any:
    """What diffusers' hook does, of parts of different lengths, which gloo does not gather."""
    parts = [output] if isinstance(output, torch.Tensor) else output
    found = []
    for part, axis in zip(parts, axes, strict=True):
        if axis is None:
            found.append(part)
            continue
        sizes = gather_size(part.shape[axis], part.device, at.ulysses, at.group)
        found.append(gather(part, axis, sizes, at.rank, at.group))
    return found[0] if isinstance(output, torch.Tensor) else tuple(found)
