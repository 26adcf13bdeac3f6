"""Refuse clips that cannot fit, with the numbers, before weights are read."""

from __future__ import annotations

from typing import Any

import torch

from tilewise.pipelines.generation.settings import GenerateSettings
from tilewise.pipelines.memory.estimate import MemoryEstimate, cache_bytes, estimate_memory
from tilewise.pipelines.memory.options import NOTHING_SAVED, MemoryOptions
from tilewise.pipelines.memory.plan import device_bytes
from tilewise.pipelines.memory.units import gib
from tilewise.plugins.errors import ConfigError
from tilewise.plugins.explain import Explanation
from tilewise.plugins.text_format import counted

SLACK = 1.1  # by which the estimate may be too large: a clip that fits is not refused


def check_fit(
    skeleton: Any,
    settings: GenerateSettings,
    explanation: Explanation,
    dtype: torch.dtype,
    device: torch.device,
    memory: MemoryOptions = NOTHING_SAVED,
    gpus: int = 1,
) -> None:
    """Raises ConfigError, with the numbers, for a clip that needs more memory than the device has now.

    skeleton, dtype, gpus: as for `estimate_memory`. explanation: of these settings. memory: what may be saved.
    """
    limit = device_bytes(device)
    on_gpu = device.type == "cuda"
    quick = estimate_memory(skeleton, settings, explanation, dtype, decode=False, gpus=gpus)
    most = _most_of_a_decode(settings)
    if quick.weights + max(quick.denoise, most) <= limit:
        return
    found = (
        quick
        if _least(quick, memory, on_gpu) > SLACK * limit
        else estimate_memory(skeleton, settings, explanation, dtype, gpus=gpus)
    )
    need = _least(found, memory, on_gpu)
    if need <= SLACK * limit:
        return
    size = f"{settings.width}×{settings.height} pixels and {counted(settings.frames, 'frame')}"
    if found.weights > limit and memory.offload == "none":
        what = "--offload keeps weights off a GPU, and --dtype bfloat16 halves them"
    else:
        what = "give a smaller size or fewer frames"
    if (cache := settings.method.step_cache) is not None:
        kept = cache_bytes(skeleton, settings, max(row.tokens for row in explanation.rows), dtype)
        what += f"; the step cache {cache.name} keeps about {gib(kept)}"
    raise ConfigError(
        f"a clip of {size} does not fit: it needs about {gib(need)}, and {device} has {gib(limit)} ({memory_words(found)}); "
        f"{what}"
    )


def memory_words(memory: MemoryEstimate) -> str:
    """The parts of an estimate, in a line."""
    decode = "unknown" if memory.decode is None else gib(memory.decode)
    return f"weights {gib(memory.weights)}, then {gib(memory.denoise)} denoising, {decode} decoding"


def _least(estimate: MemoryEstimate, memory: MemoryOptions, on_gpu: bool) -> int:
    """What a clip needs at least where memory is saved. Counted as nothing: a decode in tiles, and weights that come module by
    module, which are small beside the rest."""
    weights = estimate.weights
    if on_gpu and (memory.offload == "model" or memory.retry_oom):
        weights = estimate.largest
    if memory.offload in ("group", "sequential"):
        weights = 0
    decode = 0 if memory.vae_tiling or memory.retry_oom else estimate.decode or 0
    return weights + max(estimate.denoise, decode)


def _most_of_a_decode(settings: GenerateSettings) -> int:
    """More than any VAE's decode takes: running one on the meta device takes a second, which small clips are spared."""
    return settings.height * settings.width * (2**16 + settings.frames * 2**12)
