"""Compare how coherent clips past the training size are, method by method, from manifests.

Nothing is read but the manifests: repetition and sharpness against the native stage were measured when a clip was made, on its
own pixels, and so was the number of objects, for models whose world the detector knows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from tilewise.pipelines.batch.manifest_comparison import ComparedClip, Group, mean


@dataclasses.dataclass(frozen=True)
class CoherenceRow:
    """One method over all groups; damaged clips are left out.

    excess, sharpness: means over its clips of two stages, None where it has none: repetition beyond the native stage's, and
    sharpness against the native stage scaled up. right: clips with exactly as many objects as the prompt says, of `counted`.
    native_right: the same of the native stages, of `native_counted`.
    """

    method: str
    excess: float | None
    sharpness: float | None
    right: int
    counted: int
    native_right: int
    native_counted: int

    def __str__(self) -> str:
        told = []
        if self.excess is not None:
            told.append(f"repetition {self.excess:+.4f} against the native stage")
        if self.sharpness is not None:
            told.append(f"{self.sharpness:.3f} × as sharp as that scaled up")
        if self.counted:
            told.append(f"objects as asked in {_share(self.right, self.counted)}")
        if self.native_counted:
            told.append(f"native stages {_share(self.native_right, self.native_counted)}")
        return f"{self.method}: {', '.join(told) or 'nothing to measure'}"


def coherence_rows(groups: Sequence[Group]) -> list[CoherenceRow]:
    """A row for each method, in the order in which they come; none where no clip is of two stages."""
    by_method: dict[str, list[ComparedClip]] = {}
    for group in groups:
        for clip in group.clips:
            if not clip.damaged:
                by_method.setdefault(clip.method, []).append(clip)
    if not any(clip.stages for clips in by_method.values() for clip in clips):
        return []
    return [_row(method, clips) for method, clips in by_method.items()]


def coherence_words(clip: ComparedClip) -> list[str]:
    """The same of one clip; nothing of one that has no native stage and cannot be counted."""
    if clip.stages is None:
        return [] if clip.counted is None else [f"objects {'' if clip.counted else 'not '}as asked"]
    found, objects = clip.stages["coherence"], clip.stages.get("objects")
    words = [f"repetition {found['excess']:+.4f} against its native stage"]
    if found["sharpness"] is not None:
        words.append(f"{found['sharpness']:.3f} × as sharp as that scaled up")
    if objects is not None:
        words.append(f"{objects['clip']} objects, native {objects['native']}, asked {objects['asked']}")
    return words


def _row(method: str, clips: Sequence[ComparedClip]) -> CoherenceRow:
    stages = [clip.stages for clip in clips if clip.stages is not None]
    found = [told["coherence"] for told in stages]
    counts = [clip.counted for clip in clips if clip.counted is not None]
    natives = [objects for told in stages if (objects := told.get("objects")) and objects["asked"]]
    return CoherenceRow(
        method,
        mean([one["excess"] for one in found]),
        mean([one["sharpness"] for one in found]),
        sum(counts),
        len(counts),
        sum(objects["native"] == objects["asked"] for objects in natives),
        len(natives),
    )


def _share(part: int, whole: int) -> str:
    return f"{part} of {whole} ({100 * part / whole:.0f} %)"
