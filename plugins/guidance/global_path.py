"""What a global path can be beside a denoiser (dual_path.py), and what it takes: known before anything runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from torch import nn

from tilewise.kernels.plans.layout import Layout
from tilewise.plugins.config import Config
from tilewise.plugins.context_parallel.checks import refuse_split
from tilewise.plugins.diffusers_compat import step_cache
from tilewise.plugins.errors import ConfigError, UnsupportedModelError
from tilewise.plugins.methods.base import DynamicMethod
from tilewise.plugins.methods.draft import Draft
from tilewise.plugins.models.common.registry import family_of, served_streams, streams_of
from tilewise.plugins.patching import denoisers_of, is_compiled

GlobalPath = Literal["dense", "draft", "pooled"]

DRAFT_DENSITY = 0.25
MAPS = 6  # of block pairs, float32, that a draft holds at once: scores, their variance, shares, ranks, what is kept, biases


def drafting() -> Draft:
    """The method of a global path that drafts itself: a choice anew at each call, with summary rows."""
    return Draft(density=DRAFT_DENSITY, min_tokens=0)


def draft_refuses(layout: Layout) -> str | None:
    """Why a global path by draft cannot be over a layout of the window's, or None."""
    return drafting().refuses_call(layout)


def draft_bytes(layout: Layout, heads: int) -> int:
    """What the maps of such a draft take, for one sample."""
    return MAPS * 4 * heads * layout.blocks**2


def global_paths(target: Any) -> tuple[str, ...]:
    """How a global path may attend beside the denoisers of a pipeline, the usual way first; "none": not at all.

    Where text is part of the sequence it sees the whole picture in every layer, and tells each window of it: there the window
    alone is usual.
    """
    denoisers = denoisers_of(target).values()
    if any(streams_of(denoiser) is None for denoiser in denoisers):
        return ("none",)
    if any(joint(denoiser) for denoiser in denoisers):
        return ("none", "dense")
    return ("dense", "draft", "pooled", "none")


def joint(denoiser: nn.Module) -> bool:
    """Whether a global path beside a denoiser guides within the attention that text and picture share."""
    streams = streams_of(denoiser)
    return streams is not None and streams.joint


def kept_bytes(denoiser: nn.Module, video: int, itemsize: int) -> int:
    """What one text's global path keeps from one refresh to the next: of each block a tensor like its attention's output over
    ``video`` tokens, and where text is part of the sequence a float32 a head and token beside it."""
    family = family_of(denoiser)
    assert family is not None
    layers = family.layers(denoiser)
    heads, width = max(layer.heads for layer in layers), max(layer.heads * layer.head_dim for layer in layers)
    each = width * itemsize + (4 * heads if joint(denoiser) else 0)
    return len({layer.block for layer in layers}) * video * each


def check_denoisers(target: Any, configs: Mapping[str, Config], global_path: str) -> None:
    """Raises UnsupportedModelError or ConfigError for a target whose denoisers, patched with these configs, cannot have this full
    path."""
    for name, denoiser in denoisers_of(target).items():
        if is_compiled(target, name, denoiser):
            raise UnsupportedModelError(
                f"two paths: {name} is compiled, which two calls of a block do not follow; give the module as it was before "
                "torch.compile. highres with global_path='none' runs compiled"
            )
        _check(name, denoiser, configs[name], global_path)


def _check(name: str, denoiser: nn.Module, config: Config, global_path: str) -> None:
    streams = streams_of(denoiser)
    if streams is None:
        raise UnsupportedModelError(
            f"two paths: {name} is a {type(denoiser).__name__}; served are {', '.join(served_streams())}. The global path guides "
            "the window path through what each block's attention gives to the text, and how its blocks are called has to be known"
        )
    # With cross-attention each process keeps what it gave for its own tokens; the rest of the two paths is of whole sequences.
    if global_path != "dense":
        refuse_split(
            "two paths", {name: denoiser}, f"a global path that is {global_path} sees whole sequences; dense runs"
        )
    if streams.joint:
        refuse_split(
            "two paths", {name: denoiser}, "what the global path gives to text in the sequence is of whole sequences"
        )
    if config.step_cache is not None:
        raise UnsupportedModelError(
            f"two paths: the step cache {config.step_cache} skips blocks of {name}, which the global path has to run. "
            "Leave cache= out; in highres the first stage's method may have one"
        )
    for one in config.additions:
        if one.forwards > 1:
            raise ConfigError(
                f"two paths: {one.name} runs {one.forwards} forwards a step, and the global path would guide them as one; leave "
                f"{one.name} out"
            )
    if config.keep is not None:
        raise ConfigError(
            f"two paths: keep={config.keep!r} is for one path: the global path sees all frames. Leave keep out"
        )
    if cache := step_cache(denoiser):
        raise UnsupportedModelError(f"two paths: {name} has a step cache that skips blocks ({cache}); disable it first")
    if streams.joint and global_path != "dense":
        raise ConfigError(
            f"two paths: global_path={global_path!r} is for denoisers with cross-attention to the text; {name} has its text in "
            "the same sequence as the picture, where the global path is dense"
        )
    if streams.joint and isinstance(config.method, DynamicMethod):
        raise ConfigError(
            f"two paths: {name} has its text in the same sequence as the picture; patch it with a method that has windows, not "
            f"{config.method.name}"
        )
