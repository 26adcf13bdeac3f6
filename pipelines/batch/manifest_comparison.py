"""Compare clips of one or more manifests that differ in their attention method only, with the dense clip as reference."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tilewise.pipelines.batch.manifest import NAME, Line, Note, clip_path, is_whole, read_manifest, spent
from tilewise.pipelines.conditioning.inputs import files_of
from tilewise.pipelines.errors import OutputError
from tilewise.pipelines.generation.clip_metadata import cost_of
from tilewise.pipelines.highres.settings import HighresSettings
from tilewise.pipelines.loading.loras import LoraChoice
from tilewise.pipelines.media.video import read_frames
from tilewise.pipelines.quality.metrics import SMALLEST, psnr, ssim
from tilewise.plugins.additions.base import additions, additions_text
from tilewise.plugins.errors import ConfigError
from tilewise.plugins.step_caches.options import step_cache


@dataclasses.dataclass(frozen=True)
class ComparedClip:
    """A clip next to the dense one of its group.

    psnr (dB, infinite for the same pixels), ssim: of the mp4s' pixels; None without a dense clip. speedup: of the denoising,
    dense seconds / own; None where device or dtype differ. shown: the share of what the prompt says that the clip shows, for
    models that the detector can judge. damaged: the file is not as the manifest says; it is then not measured.
    counted: whether the detector found as many objects as the prompt says, None where it cannot say. stages: of a clip past the
    training size, what its metadata says of both stages (``HighresClip.to_dict``).
    """

    path: Path
    line: Line
    method: str
    psnr: float | None = None
    ssim: float | None = None
    speedup: float | None = None
    shown: float | None = None
    damaged: bool = False

    @property
    def is_dense(self) -> bool:
        config = self.line["method"]
        return config["method"]["name"] == "dense" and config.get("cache") is None and config.get("add") is None

    @property
    def counted(self) -> bool | None:
        return (self.line["run"]["content"] or {}).get("count")

    @property
    def stages(self) -> Mapping[str, Any] | None:
        return self.line["run"].get("highres")


@dataclasses.dataclass(frozen=True)
class Group:
    """Clips of one prompt, seed, size, model and LoRAs: the same but for the method; the dense one first, if there is one."""

    clips: list[ComparedClip]


@dataclasses.dataclass(frozen=True)
class MethodRow:
    """One method over all groups; medians, None where nothing could be measured. speedups: of each clip that was measured. same:
    clips with exactly dense's pixels, which the PSNR (infinite there) leaves out."""

    method: str
    clips: int
    density: float
    cost: float
    seconds: float
    speedups: tuple[float, ...]
    psnr: float | None
    same: int
    ssim: float | None
    shown: float | None
    fallbacks: int

    @property
    def speedup(self) -> float | None:
        """The median."""
        return _median(self.speedups)


def read_groups(manifests: Sequence[Path], note: Note = lambda text: None) -> list[Group]:
    """The clips of manifests (files, or folders that hold one), grouped. Raises ConfigError if there is none at all.

    note: told of lines that cannot be read, and are left out.
    """
    groups: dict[str, dict[str, tuple[Path, Line]]] = {}
    for given in manifests:
        folder = given if given.is_dir() else given.parent
        if not given.is_dir() and given.name != NAME:
            raise ConfigError(f"{given} is no manifest: give {NAME}, or the folder that holds it")
        for key, line in read_manifest(folder, note).items():
            path = clip_path(folder, line)
            if line["status"] == "done" and path is not None:
                groups.setdefault(_same_but_method(line), {})[key] = (path, line)
    if not groups:
        raise ConfigError(f"no clip to compare: {', '.join(map(str, manifests))} tells of none")
    following = _following(line for group in groups.values() for _, line in group.values())
    return [Group(_ordered(list(group.values()), following)) for group in groups.values()]


def measured(groups: Sequence[Group]) -> Iterator[Group]:
    """Each group with its clips measured against the dense one; reads the clips, one group at a time."""
    for group in groups:
        yield Group(list(_measure(group)))


def method_rows(groups: Sequence[Group]) -> list[MethodRow]:
    """The table: one row a method, dense first, then by density."""
    by_method: dict[str, list[ComparedClip]] = {}
    for group in groups:
        for clip in group.clips:
            by_method.setdefault(clip.method, []).append(clip)
    rows = []
    for method, clips in by_method.items():
        finite = [clip.psnr for clip in clips if clip.psnr is not None and math.isfinite(clip.psnr)]
        row = MethodRow(
            method,
            len(clips),
            statistics.median(clip.line["run"]["density"] for clip in clips),
            statistics.median(cost_of(clip.line["run"]) for clip in clips),
            statistics.median(spent(clip.line, "denoise") for clip in clips),
            tuple(clip.speedup for clip in clips if clip.speedup is not None),
            _median(finite),
            sum(clip.psnr is not None and math.isinf(clip.psnr) for clip in clips if not clip.is_dense),
            _median([clip.ssim for clip in clips]),
            mean([clip.shown for clip in clips]),
            sum(sum(clip.line["run"]["fallbacks"].values()) for clip in clips),
        )
        rows.append((not clips[0].is_dense, -row.density, method, row))
    return [row for *_, row in sorted(rows, key=lambda entry: entry[:3])]


def method_name(line: Line) -> str:
    """A method with the options that it was given and its schedule, in a few words; of two stages, how each is made; of a stream,
    also its cache."""
    stages, stream = line["run"].get("highres"), line["run"].get("stream")
    if stream is not None:
        return stream_name(line["method"], stream)
    return _config_name(line["method"]) if stages is None else stages_name(stages)


def stream_name(config: Mapping[str, Any], stream: Mapping[str, Any]) -> str:
    """How a stream is made (``StreamWork.to_dict``). config: attention in the window."""
    recipe, storage = stream["recipe"], stream["settings"].get("storage", "model")
    if "way" in recipe:
        guards = [f"{name} {recipe[name]:g}" for name in ("adain", "prefix_noise") if recipe[name]]
        kept = [recipe["way"], f"window {recipe['window']}", f"overlap {recipe['overlap']}", *guards]
        return ", ".join(["stream", _config_name(config), *kept])
    kept = [f"window {recipe['window']}", f"sink {recipe['sink']}", f"policy {recipe['policy']}"]
    return ", ".join(["stream", _config_name(config), *kept, *([storage] if storage != "model" else [])])


def _config_name(config: Mapping[str, Any]) -> str:
    name = config["method"]["name"]
    cache = config.get("cache")
    cached = [] if cache is None else [f"cache {step_cache(cache)}"]
    cached += [f"with {additions_text(additions(config['add']))}"] if config.get("add") is not None else []
    if name == "dense":
        return ", ".join([name, *cached])
    options = [
        f"{key} {_plain(value)}" for key, value in config["method"].items() if key != "name" and value is not None
    ]
    return ", ".join(
        [" ".join([name, *options]), f"steps {_steps(config['steps'])}", f"blocks {config['blocks']}", *cached]
    )


def _steps(steps: str | Sequence[float]) -> str:
    return steps if isinstance(steps, str) else f"{steps[0]:g}–{steps[1]:g}"


def stages_name(stages: Mapping[str, Any], of_its_shape: bool = False) -> str:
    """How a clip of two stages is made (``HighresClip.to_dict``), without what is as usual and the memory it was made in.

    of_its_shape: say that of the native stage, and not its size."""
    usual = {**HighresSettings().to_dict(), "max_memory": stages["options"].get("max_memory")}
    always = ("strength", "refresh", "global_path", "guided", "flow_shift")
    told = [
        f"{key.replace('_', ' ')} {_plain(value)}"
        for key, value in stages["options"].items()
        if (key in always and value is not None) or value != usual.get(key)
    ]
    native = stages["native"]
    method = _config_name(native["method"])
    size = "a size of its shape" if of_its_shape else f"{native['height']}×{native['width']}"
    first = size + ("" if method == "dense" else f" by {method}")
    return f"highres from {first}, {', '.join(told)}"


def _same_but_method(line: Line) -> str:
    names = (
        "prompt",
        "negative",
        "height",
        "width",
        "frames",
        "steps",
        "guidance",
        "seed",
        "fps",
        "max_sequence_length",
        "decode",
        "strength",
    )
    files = [[role, *(file.sha256 for file in several)] for role, several in files_of(line).items()]
    loras = [(one.sha256, one.weight) for one in map(LoraChoice.parse, line.get("lora") or ())]
    same = [
        *(line.get(name) for name in names),
        files,
        loras,
        line["run"]["batch"]["revision"],
        "stream" in line["run"],
    ]
    return json.dumps(same)


def _following(lines: Iterable[Line]) -> set[str]:
    """Names of ways of two stages in which the native one follows the clip's shape, as it does by default.

    Clips of several shapes are made in one such way: each size of clip has one native size, and those are several.
    """
    natives: dict[str, dict[tuple[int, int], set[tuple[int, int]]]] = {}
    for line in lines:
        if (stages := line["run"].get("highres")) is not None:
            sizes = natives.setdefault(stages_name(stages, of_its_shape=True), {})
            native = stages["native"]["height"], stages["native"]["width"]
            sizes.setdefault((line["height"], line["width"]), set()).add(native)
    return {
        name
        for name, sizes in natives.items()
        if len(set.union(*sizes.values())) > 1 and all(len(one) == 1 for one in sizes.values())
    }


def _ordered(members: list[tuple[Path, Line]], following: Container[str]) -> list[ComparedClip]:
    """following: names of ways in which the native stage follows the clip's shape."""

    def name(line: Line) -> str:
        stages = line["run"].get("highres")
        short = "" if stages is None else stages_name(stages, of_its_shape=True)
        return short if short in following else method_name(line)

    clips = [ComparedClip(path, line, name(line), shown=_shown(line)) for path, line in members]
    return sorted(clips, key=lambda clip: (not clip.is_dense, -clip.line["run"]["density"], clip.method))


def _measure(group: Group) -> Iterator[ComparedClip]:
    clips = [dataclasses.replace(clip, damaged=not is_whole(clip.path.parent, clip.line)) for clip in group.clips]
    first = clips[0]
    reference = read_frames(first.path) if first.is_dense and not first.damaged and len(clips) > 1 else None
    for clip in clips:
        if reference is None or clip.damaged or clip.is_dense:
            yield clip
            continue
        frames = read_frames(clip.path)
        if frames.shape != reference.shape:
            raise OutputError(
                f"{clip.path} has frames {frames.shape}, {first.path} {reference.shape}: they cannot be compared"
            )
        like = ssim(frames, reference) if min(frames.shape[1:3]) >= SMALLEST else None
        yield dataclasses.replace(
            clip, psnr=psnr(frames, reference), ssim=like, speedup=_speedup(first.line, clip.line)
        )


def _speedup(dense: Line, line: Line) -> float | None:
    same = all(dense["run"][name] == line["run"][name] for name in ("device_name", "dtype"))
    seconds = spent(line, "denoise")
    return spent(dense, "denoise") / seconds if same and seconds > 0 else None


def _shown(line: Line) -> float | None:
    found = [right for right in (line["run"]["content"] or {}).values() if right is not None]
    return sum(found) / len(found) if found else None


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def mean(values: Sequence[float | None]) -> float | None:
    """Of what is known; None if nothing is."""
    known = [value for value in values if value is not None]
    return statistics.mean(known) if known else None


def _plain(value: Any) -> str:
    return ",".join(_plain(item) for item in value) if isinstance(value, list) else f"{value}"
