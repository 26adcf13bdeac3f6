"""Controls for the pictures and videos that a clip is made from: those that the chosen model takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from tilewise.pipelines.conditioning.files import ROLES, SEVERAL
from tilewise.pipelines.conditioning.inputs import files_of
from tilewise.pipelines.conditioning.roles import roles_of, takes_strength
from tilewise.pipelines.conditioning.sizes import size_of_clip
from tilewise.pipelines.generation.settings import GenerateSettings
from tilewise.pipelines.loading.model_defaults import ModelDefaults
from tilewise.pipelines.options import options_of
from tilewise.plugins.models.common.family import Size
from tilewise.ui.web.common.uploads import Uploads
from tilewise.ui.web.forms.option_controls import control

PICTURES = [".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif"]
VIDEOS = [".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".ts", ".gif"]
TYPES = {"video": VIDEOS, "mask": [*PICTURES, *VIDEOS]}
LABELS = {
    "image": "First picture, or the one to change",
    "last_image": "Last picture",
    "video": "Video to change or to go on from",
    "mask": "Mask: what is white is made anew",
    "reference": "Pictures of what to show",
}
STRENGTH = "strength"


class FileControls:
    """Built inside a gr.Blocks, hidden until `shown` is told of a model that takes any. `components`: by the settings' names."""

    def __init__(self, folder: Path | None) -> None:
        self.components: dict[str, Any] = {}
        with gr.Accordion("Pictures and videos", open=True, visible=False, elem_id="files") as self.box:
            for role in ROLES:
                self.components[role] = gr.File(
                    label=LABELS[role],
                    file_types=TYPES.get(role, PICTURES),
                    file_count="multiple" if role in SEVERAL else "single",
                    type="filepath",
                    height=90,
                    visible=False,
                    elem_id=role.replace("_", "-"),
                )
            self.components[STRENGTH] = control(options_of(GenerateSettings)[STRENGTH])
        self.uploads = Uploads(folder, Path(self.components["image"].GRADIO_CACHE))

    @property
    def shown(self) -> list[Any]:
        """What `show` sets."""
        return [self.box, *self.components.values()]

    def show(self, pipe: Any) -> list[Any]:
        """Which are there for a pipeline, which may be a skeleton; what the others held is gone."""
        taken = roles_of(pipe) if self.uploads.folder is not None else {}
        there = [*taken, *([STRENGTH] if taken and takes_strength(pipe) else [])]
        updates = [
            gr.update(visible=True)
            if name in there
            else gr.update(visible=False, value="" if name == STRENGTH else None)
            for name in self.components
        ]
        return [gr.update(visible=bool(there)), *updates]

    def kept(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """The values of controls with the files that were uploaded in their place. Raises as `Uploads.kept`."""
        kept = dict(values)
        for role in ROLES:
            if kept.get(role):
                one = kept[role]
                kept[role] = (
                    [self.uploads.kept(each) for each in one] if isinstance(one, list) else self.uploads.kept(one)
                )
        return kept

    def size(self, pipe: Any, native: ModelDefaults, files: Sequence[Any]) -> list[Any]:
        """Height, width, frames and rate that follow from files, in the order of ROLES; gr.skip() where they follow from none."""
        named = files_of(self.kept(dict(zip(ROLES, files, strict=True))))
        if not named:
            return [gr.skip()] * 4
        usual = Size(native.height, native.width, native.frames)
        size = size_of_clip(pipe, named, usual, height=None, width=None, frames=None)
        return [size.height, size.width, size.frames, gr.skip() if size.fps is None else size.fps]
