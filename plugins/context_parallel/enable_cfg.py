"""CFG parallelism on the denoisers of a pipeline in one call."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import nn

from tilewise.plugins.context_parallel.cfg_batch import CfgBatch
from tilewise.plugins.context_parallel.cfg_forwards import CfgForwards
from tilewise.plugins.context_parallel.enable import check_denoiser, enable_context_parallel, world_size
from tilewise.plugins.context_parallel.halves import NAME, Halves, halves_of
from tilewise.plugins.diffusers_compat import is_sharded, step_cache_hooks, wrap_forward
from tilewise.plugins.errors import ConfigError
from tilewise.plugins.models.common.denoisers import denoisers_of
from tilewise.plugins.models.common.registry import attention_layers, family_of
from tilewise.plugins.torch_compat import is_compiled_module, runs_compiled

T = TypeVar("T")


def enable_cfg_parallel(target: T, *, mesh: Any = None) -> T:
    """Compute the two branches of classifier-free guidance at the same time, one in each half of the processes of ``torchrun``.
    Where a half has several processes, they split the sequence (``enable_context_parallel``). Each process calls it, before or
    after ``tilewise.patch``, and then the pipeline with the same arguments and seed.

    A pipeline that calls its denoiser twice a step has one of the two calls in each half; one that has both branches in a batch
    has half of it in each. Without guidance there is nothing to divide: the first step raises TilewiseError.

    Args:
        target: a diffusers pipeline or a denoiser, the same in all processes.
        mesh: a device mesh with the dimensions "cfg", of size 2, "ring", of size 1, and "ulysses". Default: all processes.

    Returns:
        ``target``.

    Raises:
        ConfigError: there is no process group, an odd number of processes, or a denoiser that is divided already or compiled as
            a whole.
        UnsupportedModelError: with four processes or more, a model that context parallelism does not serve.
        In each case nothing was changed.
    """
    denoisers = denoisers_of(target)
    count = world_size("CFG parallelism") if mesh is None else mesh.size()
    for name, denoiser in denoisers.items():
        check_cfg(name, denoiser, count)
        if is_compiled_module(getattr(target, name, target)) or runs_compiled(denoiser):
            raise ConfigError(
                f"CFG parallelism: {name} is compiled as a whole, and exchanges between GPUs are no part of that. Compile its "
                "blocks instead (compile_repeated_blocks)"
            )
    if mesh is None:
        from torch.distributed.device_mesh import init_device_mesh

        device = torch.accelerator.current_accelerator() if torch.accelerator.device_count() else None
        kind = "cpu" if device is None else device.type
        mesh = init_device_mesh(kind, (2, 1, count // 2), mesh_dim_names=("cfg", "ring", "ulysses"))
    if mesh["ulysses"].size() > 1:
        enable_context_parallel(target, mesh=mesh)
    for name, denoiser in denoisers.items():
        wrap_forward(denoiser, _halves(name, denoiser, mesh["cfg"]), NAME)
    return target


def check_cfg(name: str, denoiser: nn.Module, ranks: int) -> None:
    """Raises ConfigError or UnsupportedModelError for a denoiser whose guidance so many ranks cannot divide."""
    if ranks < 2 or ranks % 2:
        raise ConfigError(
            f"CFG parallelism needs an even number of processes, a half for each branch of guidance, not {ranks}"
        )
    attention_layers(denoiser, name)
    if is_sharded(denoiser) or halves_of(denoiser) is not None:
        raise ConfigError(
            f"CFG parallelism: {name} is divided between processes already. Call enable_cfg_parallel alone: with four processes "
            "or more it splits the sequence too"
        )
    if any(
        module is denoiser for module, _, _ in step_cache_hooks(denoiser)
    ):  # its removal would take the hook of this along
        raise ConfigError(
            f"CFG parallelism: a step cache has hooks on {name} itself. Enable CFG parallelism first, and then "
            "patch with the cache"
        )
    if ranks > 2:
        check_denoiser(name, denoiser, ranks // 2)


def _halves(name: str, denoiser: nn.Module, mesh: Any) -> Halves:
    family = family_of(denoiser)
    assert family is not None
    half, group = mesh.get_local_rank(), mesh.get_group()
    return CfgBatch(name, half, group, family.per_frame) if family.guidance_in_batch else CfgForwards(name, half, group)
