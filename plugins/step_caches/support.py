"""Whether a step cache can run on a denoiser: all that would fail in mid-denoise is refused before."""

from __future__ import annotations

from typing import Any

from torch import nn

from tilewise.plugins.context_parallel.halves import halves_of
from tilewise.plugins.diffusers_compat import is_sharded
from tilewise.plugins.diffusers_compat import step_cache as cache_on
from tilewise.plugins.errors import ConfigError, UnsupportedModelError
from tilewise.plugins.models.common.registry import family_of
from tilewise.plugins.step_caches import diffusers_compat as compat
from tilewise.plugins.step_caches.options import FirstBlock, MagCache, SeaCache, StepCache, TaylorSeer

MEASURES = "that several processes share: calibrate=true would measure the part of each"
SPLIT = "whose tokens context parallelism splits over processes: diffusers' SeaCache goes by whole sequences"


def check_cache(name: str, denoiser: nn.Module, cache: StepCache | None, own: Any = None) -> None:
    """Raises UnsupportedModelError for a denoiser that cannot run a step cache, ConfigError where another one is on already or
    an option is missing.

    name: the denoiser's, for messages. own: the diffusers config of the cache that a patch of ours has put on, which will go.
    """
    if cache is None:
        return
    if (why := _unsupported(denoiser, cache)) is not None:
        raise UnsupportedModelError(
            f"cache {cache.name}: {name} is a {type(denoiser).__name__}, {why}. Nothing was patched; leave the cache out, or "
            "try another"
        )
    mine = own is not None and getattr(denoiser, compat.CACHE_CONFIG, None) is own
    if not mine and (there := cache_on(denoiser)):
        raise ConfigError(
            f"cache {cache.name}: {name} has a step cache already ({there}). Disable it first, or leave cache= out: a cache that "
            "you enabled yourself runs beside a patch as it is"
        )
    if isinstance(cache, MagCache) and cache.mag_ratios is None and not cache.calibrate and not _is_flux(denoiser):
        raise ConfigError(
            f"cache mag: there are no mag_ratios for a {type(denoiser).__name__}. Run once with "
            'cache="mag:calibrate=true": summary then shows them, to be given as mag_ratios'
        )


def foreign_note(name: str, denoiser: nn.Module, config: Any) -> list[str]:
    """What ``explain`` and ``summary`` say of a step cache that is on without ``cache=``: cache-dit's, for instance.

    config: what the denoiser is patched with, or would be.
    """
    there = cache_on(denoiser) if config.cache is None else None
    if there is None:
        return []
    border = (
        "" if config.method.name == "dense" else "; at the first sparse step it may reuse what a dense one computed"
    )
    return [f"{name}: a step cache is on that was enabled beside the patch ({there}), and is not counted{border}"]


def _unsupported(denoiser: nn.Module, cache: StepCache) -> str | None:
    """Why a denoiser cannot run a cache, or None."""
    if not callable(getattr(denoiser, "enable_cache", None)):
        return "which has no step caches in diffusers (no enable_cache)"
    if isinstance(cache, SeaCache) and not compat.sea_cache_serves(denoiser):
        return "whose latents diffusers' SeaCache does not read: it serves Wan's text-to-video models"
    if not isinstance(cache, FirstBlock | MagCache | SeaCache):
        return None
    if why := why_not_divided(cache, denoiser, tokens=is_sharded(denoiser), guidance=halves_of(denoiser) is not None):
        return why
    blocks = compat.blocks_of(denoiser)
    if len(blocks) < 2:
        return f"with {len(blocks)} of the blocks that the cache would skip: it needs two"
    known = {type(block): compat.block_metadata(block) for block in blocks}
    if strange := [kind.__name__ for kind, metadata in known.items() if metadata is None]:
        return f"whose blocks ({', '.join(strange)}) diffusers' step caches do not know"
    if not isinstance(cache, FirstBlock):
        return None
    if not all(map(compat.takes_hidden_states, blocks)):
        return "whose blocks name their hidden states otherwise than diffusers' First Block Cache expects"
    if len({known[type(block)].return_encoder_hidden_states_index is None for block in blocks}) > 1:
        return "whose first and last blocks return text in different ways, which diffusers' First Block Cache does not take"
    return None


def why_not_divided(cache: StepCache | None, denoiser: nn.Module, *, tokens: bool, guidance: bool) -> str | None:
    """Why a denoiser that processes share cannot run a cache, or None. tokens: whether they split its tokens. guidance: its two
    branches of guidance."""
    if tokens and isinstance(cache, SeaCache):
        return SPLIT
    family = family_of(denoiser)
    in_batch = family is not None and family.guidance_in_batch
    measures = isinstance(cache, MagCache) and cache.calibrate
    return MEASURES if measures and (tokens or (guidance and in_batch)) else None


def attention_kinds(denoiser: nn.Module) -> list[str]:
    """Which of the kinds that Pyramid Attention Broadcast tells apart a denoiser has."""
    cross = any(getattr(module, "is_cross_attention", False) for module in denoiser.modules())
    temporal = hasattr(denoiser, "temporal_transformer_blocks")
    return ["spatial", *(["temporal"] if temporal else []), *(["cross"] if cross else [])]


def _is_flux(denoiser: nn.Module) -> bool:
    return type(denoiser).__name__ == "FluxTransformer2DModel"


def taylor_identifiers(denoiser: nn.Module, attention: list[str]) -> list[str] | None:
    """Patterns of the modules that TaylorSeer extrapolates: None for its own, where they match the self-attention layers (by
    name: ``attention``); otherwise these layers. On Wan, LTX and CogVideoX its own match none of them."""
    import re

    patterns = compat.attention_patterns()
    if all(any(re.fullmatch(pattern, name) for pattern in patterns) for name in attention):
        return None
    return [re.escape(name) for name in attention]


def diffusers_config(cache: StepCache, denoiser: nn.Module, attention: list[str], timestep: Any) -> Any:
    """diffusers' config of a cache for a denoiser. attention: names of its self-attention layers."""
    config = cache.to_diffusers(timestep)
    if isinstance(cache, TaylorSeer) and not cache.use_lite_mode:
        config.cache_identifiers = taylor_identifiers(denoiser, attention)
    return config
