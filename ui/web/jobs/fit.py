"""Refuse a clip that its own estimate says cannot fit into the memory of the device, before it waits or loads anything."""

from __future__ import annotations

from tilewise.pipelines.generation.resolve import explain_settings
from tilewise.pipelines.generation.settings import GenerateSettings
from tilewise.pipelines.loading.device import resolve_dtype
from tilewise.pipelines.memory.fit import check_fit
from tilewise.plugins.errors import ConfigError
from tilewise.ui.web.common.safety import RefusedError
from tilewise.ui.web.jobs.models import Models


def check_fits(models: Models, settings: GenerateSettings) -> None:
    """Raises RefusedError, with the numbers, for a clip that needs more memory than the device has now; and ConfigError or
    UnsupportedModelError for one that the page's processes cannot make together."""
    skeleton = models.skeleton(settings.model)
    if models.shared is not None:
        models.shared.check(skeleton, settings)
    dtype = resolve_dtype(models.dtype, models.device)
    try:
        check_fit(skeleton, settings, explain_settings(skeleton, settings), dtype, models.device, gpus=models.parts)
    except ConfigError as error:
        raise RefusedError(str(error)) from error
