"""What several processes cannot make together, said before weights are read."""

from __future__ import annotations

from typing import Any

import torch

from tilewise import __version__
from tilewise.pipelines.generation.clip_metadata import versions
from tilewise.pipelines.generation.settings import GenerateSettings
from tilewise.pipelines.generation.stock_call import guidance_is_an_input
from tilewise.pipelines.loading.device import device_name
from tilewise.pipelines.parallel.ranks import Ranks
from tilewise.plugins.context_parallel.enable import check_denoiser
from tilewise.plugins.context_parallel.enable_cfg import check_cfg
from tilewise.plugins.context_parallel.ways import CFG, check_way
from tilewise.plugins.errors import ConfigError
from tilewise.plugins.patching import denoisers_of
from tilewise.plugins.step_caches.support import why_not_divided


def check_shared(skeleton: Any, settings: GenerateSettings, ranks: Ranks, way: str) -> None:
    """Raises ConfigError for settings that the processes cannot share, and UnsupportedModelError for such a model.

    way: see ``WAYS``.
    """
    if settings.method.add is not None:
        raise ConfigError(
            f"--add cannot be used with {ranks.count} processes: it changes forwards of whole sequences. Leave it out"
        )
    cfg, parts = way == CFG, ranks.parts(way)
    if cfg and (settings.guidance <= 1 or guidance_is_an_input(skeleton)):
        why = (
            f"guidance {settings.guidance:g} is off"
            if settings.guidance <= 1
            else "the model takes guidance as an input"
        )
        raise ConfigError(
            f"--parallel cfg: {why}, so that each step has one forward, which cannot be divided by branches of guidance. Leave "
            "--parallel out: the processes split the tokens then"
        )
    for name, denoiser in denoisers_of(skeleton).items():
        (check_cfg if cfg else check_denoiser)(name, denoiser, ranks.count)
        why_not = why_not_divided(settings.method.step_cache, denoiser, tokens=parts > 1, guidance=cfg)
        if why_not is not None:
            raise ConfigError(
                f"--cache cannot be used with {ranks.count} processes: {name} is a model {why_not}. Leave it out"
            )


def check_way_for(way: str, ranks: Ranks) -> None:
    """Raises ConfigError for a way that there is not, or that one process cannot take."""
    check_way(way)
    if ranks.count == 1 and way == CFG:
        raise ConfigError(
            "--parallel cfg divides guidance between processes, and there is one: start it with torchrun --nproc-per-node 2 "
            "-m tilewise …"
        )


def machine_facts(device: torch.device, dtype: str, way: str) -> dict[str, Any]:
    """What processes must have in common to make a clip, beside its settings."""
    return {
        "tilewise": __version__,
        **{name: version for name, version in versions().items() if name != "python"},
        "device": device_name(device),
        "dtype": dtype,
        "parallel": way,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }
