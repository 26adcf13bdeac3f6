"""UNets in the high-resolution tab: their pictures are made in one stage, by the preset ``hidiffusion`` (one_stage.py)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tilewise.pipelines.generation.settings import GenerateSettings
from tilewise.pipelines.highres.one_stage import in_one_stage, one_stage, refuse_stages
from tilewise.pipelines.highres.preparation import SHARED_BY_STAGES
from tilewise.ui.web.common.safety import Limits
from tilewise.ui.web.forms.form_parsing import _whole, settings_from, settings_of
from tilewise.ui.web.forms.highres_form import FIELDS, OPTIONS
from tilewise.ui.web.forms.option_controls import given_values
from tilewise.ui.web.jobs.clips import Studio
from tilewise.ui.web.jobs.fit import check_fits
from tilewise.ui.web.jobs.job import Job
from tilewise.ui.web.jobs.models import Models
from tilewise.ui.web.tabs.generate import made_again

SETTINGS = "settings"  # in the values of a job: those of a clip in one stage


class OneStage:
    """Makes a UNet's pictures into the folder of the page's clips."""

    def __init__(self, models: Models, limits: Limits, outputs: Path) -> None:
        self.models, self.limits = models, limits
        self.studio = Studio(models, outputs)

    def serves(self, model: str) -> bool:
        """Whether a model's pictures are made in one stage. Raises as `Models.skeleton`."""
        return in_one_stage(self.models.skeleton(model))

    def settings(self, values: Mapping[str, Any], own: Sequence[Any]) -> GenerateSettings:
        """The checked settings at the target's size. The method is the preset's, whatever is chosen beside the tab.

        values: of the shared controls. own: of FIELDS. Raises ConfigError for what cannot be, RefusedError beyond the caps.
        """
        said = dict(zip(FIELDS, own, strict=True))
        refuse_stages(list(given_values(OPTIONS, said)))
        native = settings_of(self.models, self.limits, values)
        height, width = (_whole(f"target {name}", said[name]) or 0 for name in ("height", "width"))
        shared = {name: getattr(native, name) for name in SHARED_BY_STAGES}
        skeleton = self.models.skeleton(native.model)
        return self._checked(one_stage(skeleton, native.prompt, height, width, None, shared))

    def work(self, values: Mapping[str, Any], job: Job) -> dict[str, Any]:
        """Makes the clip of a job."""
        settings = self._checked(settings_from(values[SETTINGS], self.models, self.limits))
        return {"clip": self.studio.name(self.studio.clip(settings, job))}

    def result(self, job: Job) -> list[Any]:
        """Result, summary, settings, command, program."""
        return made_again(self.studio.find(job.result["clip"]), self.models)

    def _checked(self, settings: GenerateSettings) -> GenerateSettings:
        self.limits.check(settings)
        check_fits(self.models, settings)
        return settings
