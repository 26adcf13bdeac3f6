"""patch and unpatch: a few removable parts on each denoiser, and nothing anywhere else.

1. a forward pre-hook on the denoiser reads the grid and decides whether this step runs the method;
2. attention processors stand in for the stock ones and answer their attention calls.

Where the model's family has fused kernels for the rest of the step, a third puts them on its blocks. A pipeline's
``AutoencoderKLWan`` gets some of its own (``autoencoders/patched_vae.py``).

One attribute on the denoiser, ``_tilewise``, holds all state; another, ``__deepcopy__``, makes copies patched ones of their own
(``deepcopy.py``). ``unpatch`` removes them, the hooks and the processors.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import nn

from tilewise.plugins.additions.base import AddLike, additions_text
from tilewise.plugins.autoencoders.patched_vae import VaePatch, patch_on, vae_of
from tilewise.plugins.config import Config, MethodLike, resolve, select_blocks
from tilewise.plugins.diffusers_compat import is_sharded
from tilewise.plugins.errors import ConfigError, UnsupportedModelError
from tilewise.plugins.models.common.denoisers import ATTRIBUTE, denoisers_of, find_denoisers
from tilewise.plugins.models.common.registry import attention_layers
from tilewise.plugins.runtime.other_threads import refuse_while_running
from tilewise.plugins.runtime.patched_denoiser import Patch
from tilewise.plugins.schedule.steps import Steps
from tilewise.plugins.step_caches.options import CacheLike
from tilewise.plugins.step_caches.support import check_cache
from tilewise.plugins.torch_compat import forget_compiled, is_compiled_module, runs_compiled
from tilewise.plugins.tuning.in_use import load as load_tuned

T = TypeVar("T")


def is_compiled(target: Any, name: str, denoiser: nn.Module) -> bool:
    """Whether calls of a target's denoiser, or of a module in it, run compiled code."""
    wrapped = (target, getattr(target, name, None))  # as torch.compile(module) returned it
    return any(map(is_compiled_module, wrapped)) or any(map(runs_compiled, denoiser.modules()))


def patch(
    target: T,
    method: MethodLike,
    *,
    steps: Steps | None = None,
    blocks: str | None = None,
    strict: bool | None = None,
    fuse: bool | None = None,
    precision: str | None = None,
    dense_precision: str | None = None,
    min_tokens: int | None = None,
    vae: bool | None = None,
    cache: CacheLike | None = None,
    keep: str | None = None,
    add: AddLike | None = None,
) -> T:
    """Replace the attention of a pipeline's denoisers in one call. Weights and classes stay untouched.

    Args:
        target: a diffusers pipeline, anything with ``transformer``, ``transformer_2`` or ``unet``, or a denoiser module.
        method: a method name ("sta", "dense"), a preset ("sta-balanced", "auto-fast"; see ``presets``), a ``.json`` file as
            ``save_config`` and ``tilewise calibrate`` write it, a method object such as ``STA(window=(3, 3, 3))``, or a
            ``Config``.
        steps: (from, to), the fraction of the denoising schedule that runs the method; dense outside. Or a slice of step numbers,
            such as "1:". Default: what the preset or config says, otherwise (0.25, 1.0). The step is that of the diffusers
            pipeline which runs the denoiser, the patched one or another, by its scheduler's timesteps. For a bare denoiser, which
            takes fractions only, it is read from the timestep's value (one host synchronisation a forward on a GPU). An attention
            mask is read once a forward, which waits for the GPU too.
        blocks: which transformer blocks run it, such as "2:". Default: what the preset or config says, otherwise ":".
        strict: raise ``FallbackError`` instead of falling back to dense where a call cannot run the method.
        fuse: run norms, rotary embedding, modulation and gates in exact fused kernels where the model's family has them and they
            can run. Default: what the preset or config says, otherwise True: ``patch(pipe, "dense")`` is exact attention in
            a faster step.
        precision: "int8" or "fp8": the method's attention calls with 8-bit products; see ``Config``.
        dense_precision: the same for what the method leaves dense, on a Hopper GPU.
        min_tokens: attention calls over fewer tokens stay dense, counted as "short"; see ``Config``.
        vae: take a pipeline's ``AutoencoderKLWan`` along: it decodes and encodes in exact fused kernels, where they can run.
            Default: what the preset or config says, otherwise True.
        cache: a step cache of diffusers, put on and taken off with the patch: "first-block", "taylor", "mag", "sea", "pab", or
            one with options, as in "first-block:threshold=0.1" or ``{"name": "first-block", "threshold": 0.1}``. It never reuses
            at a sparse step what a dense one computed, or the other way round. Default: what the config says, otherwise none;
            "none" leaves out the config's.
        keep: "condition": the first latent frame, which an image-to-video model is given, sees all and is seen by all; "ends":
            the last one too. Default: what the config says, otherwise none.
        add: what else is put on the denoisers and taken off with the patch, such as "raunet" or "broadway:alpha=0.6"; see
            ``Config``. Default: what the config says, otherwise nothing; "none" leaves out the config's.

    Returns:
        ``target``. Patching a patched target replaces the earlier patch; ``unpatch`` always restores the original.

    Raises:
        ConfigError: unknown method, preset or option, or a value that cannot be.
        UnsupportedModelError: a target without a denoiser, or with one that no family serves, without self-attention,
            whose attention another library has fused or replaced, or that cannot run the cache or an addition.
        FallbackError: ``strict`` and a layer whose processor cannot be taken over.
        TilewiseError: another thread is in a forward of a denoiser. Threads may run a patched denoiser, each in a pipeline
            with a scheduler of its own, but not patch it.
        In each case nothing was changed.
    """
    load_tuned()
    config = resolve(
        method,
        steps=steps,
        blocks=blocks,
        strict=strict,
        fuse=fuse,
        precision=precision,
        dense_precision=dense_precision,
        min_tokens=min_tokens,
        vae=vae,
        cache=cache,
        keep=keep,
        add=add,
    )
    denoisers = denoisers_of(target)
    for name, denoiser in denoisers.items():
        attention_layers(denoiser, name)
    configs = {name: config.prepare(target, denoiser) for name, denoiser in denoisers.items()}
    for name, denoiser in denoisers.items():
        check_config(name, denoiser, configs[name])
    refuse_while_running("patch", denoisers)
    previous = _configs(denoisers), patch_on(vae_of(target)) is not None
    unpatch(target)
    try:
        _put_on(target, denoisers, configs, config.vae)
    except BaseException:
        unpatch(target)
        _put_on(target, denoisers, *previous)
        raise
    for denoiser in denoisers.values():  # compiled code does not look for hooks that come or go
        forget_compiled(denoiser)
    return target


def _put_on(target: Any, denoisers: dict[str, nn.Module], configs: dict[str, Config], vae: bool) -> None:
    for name, config in configs.items():
        Patch(name, denoisers[name], target, config)
    autoencoder = vae_of(target) if vae else None
    if autoencoder is not None:
        on = VaePatch(autoencoder), weakref.ref(autoencoder)
        for name in configs:
            denoisers[name].__dict__[ATTRIBUTE].vae = on


def check_config(name: str, denoiser: nn.Module, config: Config) -> None:
    """Raises ConfigError, or for a cache that cannot run UnsupportedModelError, for what would only come to light in mid-denoise.

    config: prepared for this denoiser.
    """
    layers = attention_layers(denoiser, name)
    blocks = {layer.block for layer in layers}
    if blocks and not blocks & set(select_blocks(config.blocks, max(blocks) + 1)):
        raise ConfigError(f"blocks={config.blocks!r} selects none of the {len(blocks)} blocks of {name}")
    on = denoiser.__dict__.get(ATTRIBUTE)
    check_cache(name, denoiser, config.step_cache, None if on is None or on.cache is None else on.cache.config)
    for heads in sorted({layer.heads for layer in layers}):
        config.method.check(heads)
    if config.add is not None and is_sharded(denoiser):
        raise UnsupportedModelError(
            f"{name} runs under context parallelism, and an addition changes forwards of whole sequences: leave add= out, got "
            f"{additions_text(config.additions)}. Nothing was changed"
        )
    named = [one.name for one in config.additions] + ([] if config.step_cache is None else ["cache"])
    for addition in config.additions:
        addition.check(name, denoiser, config.method, [other for other in named if other != addition.name])


def _configs(denoisers: dict[str, nn.Module]) -> dict[str, Config]:
    return {name: d.__dict__[ATTRIBUTE].config for name, d in denoisers.items() if ATTRIBUTE in d.__dict__}


def unpatch(target: T) -> T:
    """Take the patch off: processors are put back by identity, hooks and state are removed. Harmless if there is none. A VAE that
    was taken along is restored too, also where the pipeline has another one since.

    Raises:
        TilewiseError: another thread is in a forward of a patched denoiser. Nothing was changed.
    """
    on = {name: denoiser for name, denoiser in find_denoisers(target).items() if ATTRIBUTE in denoiser.__dict__}
    refuse_while_running("unpatch", on)
    vae = vae_of(target)
    if vae is not None and (patch := patch_on(vae)) is not None:
        patch.remove(vae)
    for denoiser in on.values():
        if (taken_along := denoiser.__dict__[ATTRIBUTE].vae) is not None:  # it may not be the pipeline's any more
            former = taken_along[1]()
            if (patch := patch_on(former)) is not None and patch is taken_along[0]:
                patch.remove(former)
    for denoiser in on.values():
        forget_compiled(denoiser)  # before, as the patch's own hooks may be compiled too
        denoiser.__dict__[ATTRIBUTE].remove(denoiser)
    return target


def is_patched(target: Any) -> bool:
    """Whether any denoiser of ``target`` is patched."""
    return any(ATTRIBUTE in denoiser.__dict__ for denoiser in find_denoisers(target).values())


def patches_of(target: Any) -> dict[str, Patch]:
    """The patches of a target's denoisers, by denoiser name."""
    return {n: d.__dict__[ATTRIBUTE] for n, d in denoisers_of(target).items() if ATTRIBUTE in d.__dict__}


@contextmanager
def patched(
    target: T,
    method: MethodLike,
    *,
    steps: Steps | None = None,
    blocks: str | None = None,
    strict: bool | None = None,
    fuse: bool | None = None,
    precision: str | None = None,
    dense_precision: str | None = None,
    min_tokens: int | None = None,
    vae: bool | None = None,
    cache: CacheLike | None = None,
    keep: str | None = None,
    add: AddLike | None = None,
) -> Iterator[T]:
    """``with patched(pipe, "sta"): …``: patch for the length of a block, then unpatch.

    A target that was patched before gets its earlier config back, with a new ``summary``.
    """
    denoisers = denoisers_of(target)
    before = _configs(denoisers), patch_on(vae_of(target)) is not None
    patch(
        target,
        method,
        steps=steps,
        blocks=blocks,
        strict=strict,
        fuse=fuse,
        precision=precision,
        dense_precision=dense_precision,
        min_tokens=min_tokens,
        vae=vae,
        cache=cache,
        keep=keep,
        add=add,
    )
    try:
        yield target
    finally:
        unpatch(target)
        _put_on(target, denoisers, *before)
