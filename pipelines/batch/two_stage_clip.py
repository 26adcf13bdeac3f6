"""Make one two-stage clip of a batch. The native clip is written beside it as soon as it is finished, and is kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tilewise.pipelines.generation.clip_metadata import clip_metadata
from tilewise.pipelines.generation.generate import Clip, Progress
from tilewise.pipelines.highres.preparation import Work, few_steps
from tilewise.pipelines.highres.two_stages import HighresClip, add_content_score, make, warm_up
from tilewise.pipelines.loading.model_defaults import model_defaults
from tilewise.pipelines.media.rescue import write_or_rescue
from tilewise.pipelines.quality.content_detection import analyse
from tilewise.pipelines.quality.content_score import parse_prompt


class TwoStages:
    """Makes one clip. path: where it will go. work: what was decided. run: what the metadata of both clips says of the run.
    on_native: called with the native clip's metadata as soon as that is on disk."""

    def __init__(
        self,
        path: Path,
        work: Work,
        run: Mapping[str, Any],
        on_native: Callable[[Mapping[str, Any]], None] = lambda metadata: None,
    ) -> None:
        self.work, self.run, self.on_native = work, run, on_native
        self.native_path = path.with_stem(f"{path.stem}-native")
        self.made: HighresClip | None = None
        self.objects: dict[str, int] | None = None

    @property
    def measures(self) -> list[str]:
        """What the plan does to save memory, in the words of `memory`."""
        plan = self.work.plan
        return [name for name, on in (("vae-tiling", plan.vae_tiling), ("offload", plan.offload)) if on]

    def kernels(self, pipe: Any) -> str:
        """Equal for clips that are warmed up together."""
        few = few_steps(pipe, self.work)
        return repr((few.native, few.target, few.options))

    def warm_up(self, pipe: Any, progress: Progress) -> float:
        return warm_up(pipe, self.work, progress)

    def make(self, pipe: Any, progress: Progress) -> Clip:
        """The clip at the target; the native one is on disk then. Raises as `highres`, and OutputError."""
        self.made = make(pipe, self.work, progress, lambda clip: self.on_native(self._write_native(clip)))
        return self.made.clip

    def score_content(self, pipe: Any) -> Clip:
        """The clip with what it shows of the prompt; also the native one's metadata says it then, and objects are counted."""
        assert self.made is not None
        self.made = add_content_score(pipe, self.made)
        if self.made.native.content is not None:
            self._write_native(self.made.native)
        self.objects = count_objects(pipe, self.made)
        return self.made.clip

    def to_dict(self) -> dict[str, Any]:
        """`HighresClip.to_dict` for a manifest, with the native clip's file and the objects that were counted (None: not this
        model's world)."""
        assert self.made is not None
        told = self.made.to_dict()
        native = {**told["native"], "file": self.native_path.name}
        return {**told, "native": native, "objects": self.objects}

    def _write_native(self, clip: Clip) -> dict[str, Any]:
        metadata = clip_metadata(clip, self.run)
        write_or_rescue(self.native_path, clip.frames, clip.settings.fps, settings=metadata, beside=False)
        return metadata


def count_objects(pipe: Any, made: HighresClip) -> dict[str, int] | None:
    """Objects that the detector finds in the "clip" and in the "native" stage, and those that the prompt "asked" for; None for
    models whose world it does not know."""
    if model_defaults(pipe).world != "shapes":
        return None
    asked = len(parse_prompt(made.clip.settings.prompt).objects)
    return {"asked": asked, "clip": analyse(made.frames).count, "native": analyse(made.native.frames).count}
