"""The request of `tilewise generate`, and the checks that one-stage and two-stage clips share."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from tilewise.pipelines.generation.clip_metadata import ClipMetadata, frames_sha256, read_clip_metadata
from tilewise.pipelines.generation.generate import Clip
from tilewise.pipelines.generation.settings import GenerateSettings
from tilewise.pipelines.loading.device import resolve_device, resolve_dtype
from tilewise.pipelines.media.files import check_sidecar, check_writable
from tilewise.pipelines.media.output_names import Outputs
from tilewise.pipelines.media.video import ffmpeg_path
from tilewise.pipelines.memory.options import MemoryOptions, memory_options
from tilewise.pipelines.options import options_of
from tilewise.plugins.errors import ConfigError
from tilewise.ui.common.options import config_file, default_out, out_suffix
from tilewise.ui.common.terminal import say


@dataclasses.dataclass(frozen=True)
class Request:
    """What the command line said.

    options: those that were given, by name, as `CLIP_OPTIONS`, `TWO_STAGE_OPTIONS` and `STREAM_OPTIONS` declare them.
    source: a clip whose settings stand for what is not given, in place of the usual defaults. runs: of --compare, how often both
    clips are timed. force: replace files that are there. parallel: how several processes divide the clip, one of `WAYS`.
    """

    prompt: str | None
    options: dict[str, Any]
    source: Path | None = None
    out: Path | None = None
    compare: str | None = None
    device: str = "auto"
    runs: int = 1
    force: bool = False
    parallel: str = "context"

    @property
    def settings(self) -> dict[str, Any]:
        """What was given of `GenerateSettings`."""
        return {name: self.options[name] for name in options_of(GenerateSettings) if name in self.options}

    def origin(self) -> ClipMetadata | None:
        """What the clip of --from says."""
        return None if self.source is None else read_clip_metadata(self.source)

    def memory(self, origin: ClipMetadata | None) -> MemoryOptions:
        """What was given of `MemoryOptions`, and tiles of the VAE as for the clip of --from."""
        return memory_options(self.options, None if origin is None else origin.run)

    def dtype(self, origin: ClipMetadata | None) -> str:
        """The dtype of the weights by its full name: as given, else as for the clip of --from."""
        name = self.options.get("dtype") or (origin.run.get("dtype") if origin else None) or "auto"
        return str(resolve_dtype(name, resolve_device(self.device))).removeprefix("torch.")

    def outputs(self, settings: GenerateSettings, *endings: str, create: bool, suffix: str | None = None) -> Outputs:
        """Where the clips go, checked: as --out says, or a name that is free. endings: of those beside it, such as "-dense".

        create: make their folders, but none while another file may be refused. suffix: of a clip that --out does not name;
        default: as its length asks for.
        Raises ConfigError for files that cannot be written or must not be replaced, SetupError without ffmpeg.
        """
        file = self.out or default_out(settings.prompt, settings.seed, settings.frames)
        if suffix is not None and self.out is None:
            file = file.with_suffix(suffix)
        outputs = Outputs(file, endings, given=self.out is not None, force=self.force).free()
        files = outputs.files
        if self.source is not None and any(file.exists() and file.samefile(self.source) for file in files):
            raise ConfigError(f"the clip of --from, {self.source}, would be replaced; give another --out")
        method = self.options.get("method")
        for creating in (False, True) if create else (False,):
            for file in files:
                check_writable(file, suffix=out_suffix(file, settings), create=creating)
                check_sidecar(file, keep=None if method is None else config_file(method), create=creating)
            outputs.check()
        ffmpeg_path()
        return outputs


def print_sameness(clip: Clip, origin: ClipMetadata | None, source: Path | None) -> None:
    """Whether a clip that was made again from another's settings came out as that one."""
    before = None if origin is None else origin.run.get("frames_sha256")
    if origin is None or before is None or clip.settings != origin.settings:
        return
    print_same_frames(frames_sha256(clip.frames), origin, source)


def print_same_frames(sha256: str, origin: ClipMetadata, source: Path | None) -> None:
    """Whether frames with this checksum are those of the clip that they were made again from."""
    same = sha256 == origin.run.get("frames_sha256")
    made = f"it was made on {origin.run.get('device_name')}, {origin.run.get('dtype')}"
    say(f"frames of {source}: {'the same, bit for bit' if same else f'not the same; {made}'}")
