"""Refuse a clip that its own estimate says cannot fit into the memory of the device, before it waits or loads anything."""

from __future__ import annotations

from tilewise.pipelines.generation.resolve import explain_settings
from tilewise.pipelines.generation.settings import GenerateSettings
from tilewise.pipelines.loading.device import resolve_dtype
from tilewise.pipelines.memory.estimate import estimate_memory
from tilewise.pipelines.memory.plan import device_bytes
from tilewise.ui.web.common.media import size
from tilewise.ui.web.common.safety import RefusedError
from tilewise.ui.web.jobs.models import Models


def check_fits(models: Models, settings: GenerateSettings) -> None:
    """Raises RefusedError, with the numbers, for a clip that needs more memory than the device has for this process."""
    skeleton = models.skeleton(settings.model)
    dtype = resolve_dtype(models.dtype, models.device)
    memory = estimate_memory(skeleton, settings, explain_settings(skeleton, settings), dtype)
    there = device_bytes(models.device)
    if memory.total <= there:
        return
    decode = "unknown" if memory.decode is None else size(memory.decode)
    raise RefusedError(
        f"this clip needs about {size(memory.total)} (weights {size(memory.weights)}, then {size(memory.denoise)} for denoising, "
        f"{decode} for decoding), and there are {size(there)}: take a smaller size or fewer frames"
    )
