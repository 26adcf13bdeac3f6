"""Context parallelism on the denoisers of a pipeline in one call."""

from __future__ import annotations

import functools
import inspect
from contextlib import nullcontext
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from tilewise.plugins.context_parallel.head_exchange import gather, gather_size
from tilewise.plugins.context_parallel.token_shares import tokens_of
from tilewise.plugins.diffusers_compat import (
    RESOLVE_PARALLEL,
    ContextParallel,
    change_arguments,
    context_parallel,
    gather_hooks,
    is_sharded,
    replace_post_forward,
    set_up_on_cpu,
)
from tilewise.plugins.errors import ConfigError, TilewiseError, UnsupportedModelError
from tilewise.plugins.hooks.temporary_attribute import temporary_attribute
from tilewise.plugins.models.common.denoisers import ATTRIBUTE, denoisers_of
from tilewise.plugins.models.common.registry import attention_layers, family_of

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
    ranks = world_size("context parallelism") if mesh is None else mesh["ulysses"].size()
    if ranks < 2:
        raise ConfigError("context parallelism needs 2 processes or more: torchrun --nproc-per-node 2 …")
    for name, denoiser in denoisers.items():
        check_denoiser(name, denoiser, ranks)
    for name, denoiser in denoisers.items():
        _enable(denoiser, ranks, mesh, _plan(name, denoiser))
    return target


def world_size(what: str) -> int:
    """The number of processes. Raises ConfigError where there is no process group, which ``what`` needs."""
    if not dist.is_available() or not dist.is_initialized():
        raise ConfigError(
            f"{what} needs one process a GPU: start the script with `torchrun --nproc-per-node N script.py`, and "
            "call torch.distributed.init_process_group() first"
        )
    return dist.get_world_size()


def check_denoiser(name: str, denoiser: nn.Module, ranks: int) -> None:
    """Raises ConfigError or UnsupportedModelError for a denoiser that cannot run over so many ranks."""
    heads = min(layer.heads for layer in attention_layers(denoiser, name))
    if ranks > heads:
        raise ConfigError(
            f"context parallelism over {ranks} ranks: each needs a head, and {name} has {heads} in a layer. Use at most {heads}"
        )
    if is_sharded(denoiser):
        raise ConfigError(f"context parallelism: it is enabled on {name} already")
    _plan(name, denoiser)


def _plan(name: str, denoiser: nn.Module) -> dict[str, Any]:
    family = family_of(denoiser)
    assert family is not None
    plan = family.context_parallel_plan(denoiser)
    if isinstance(plan, str):
        raise UnsupportedModelError(f"context parallelism: {name} is a {type(denoiser).__name__}: {plan}")
    return plan


def _enable(denoiser: Any, ranks: int, mesh: Any, plan: dict[str, Any]) -> None:
    from diffusers import ContextParallelConfig

    config = ContextParallelConfig(ulysses_degree=ranks, ulysses_anything=True, mesh=mesh)
    on_cpu = functools.partial(set_up_on_cpu, denoiser)
    cpu = not torch.accelerator.device_count()
    with temporary_attribute(denoiser, RESOLVE_PARALLEL, on_cpu) if cpu else nullcontext():
        denoiser.enable_parallelism(config=config, cp_plan=plan)
    family = family_of(denoiser)
    assert family is not None
    for module in (inner for whole in family.whole_attention(denoiser) for inner in whole.modules()):
        processor: Any = getattr(module, "processor", None)
        if is_sharded(processor):
            processor._parallel_config = None
    if family.per_token:
        change_arguments(denoiser, functools.partial(_split_per_token, family.per_token), "tilewise_per_token")
    at = context_parallel(denoiser)
    assert at is not None
    family.on_split(denoiser, functools.partial(tokens_of, ranks=at.ulysses, rank=at.rank))
    if any("controlnet" in name for name in inspect.signature(type(denoiser).forward).parameters):
        change_arguments(denoiser, _refuse_controlnet, "tilewise_no_controlnet")
    if family.split_needs_patch:
        denoiser.register_forward_pre_hook(_needs_patch)
    if cpu:
        for hook, axes in gather_hooks(denoiser):
            replace_post_forward(hook, functools.partial(_gather, axes, at))


def _split_per_token(names: tuple[str, ...], denoiser: nn.Module, given: dict[str, Any]) -> None:
    """A rank's part of arguments with a value for each token of ``hidden_states`` (B, S, C), which is still whole."""
    at, tokens = context_parallel(denoiser), given["hidden_states"].shape[1]
    assert at is not None
    for name in names:
        value = given.get(name)
        if isinstance(value, torch.Tensor) and value.ndim > 1 and value.shape[1] == tokens:
            given[name] = value.tensor_split(at.ulysses, dim=1)[at.rank]


def _refuse_controlnet(denoiser: nn.Module, given: dict[str, Any]) -> None:
    found = [
        name for name, value in given.items() if "controlnet" in name and isinstance(value, torch.Tensor | list | tuple)
    ]
    if found:
        raise TilewiseError(
            f"context parallelism: {found[0]} of {type(denoiser).__name__} are a control network's residuals of all tokens, and "
            "a rank adds them to its own. Use the pipeline without a control network, or CFG parallelism"
        )


def _needs_patch(denoiser: nn.Module, args: tuple) -> None:
    if ATTRIBUTE not in denoiser.__dict__:
        raise TilewiseError(
            f"context parallelism: {type(denoiser).__name__} is split by tilewise's plan, and its stock attention does not "
            'exchange tokens with the other ranks. Call tilewise.patch, with the method "dense" for exact attention'
        )


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
