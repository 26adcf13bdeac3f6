"""Read videos that a clip is made from, frame by frame: files of ffmpeg's, and animations in a format of pictures."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re
import subprocess
import tempfile
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

from PIL import Image

from tilewise.pipelines.media.files import LEAST_FPS, MOST_FPS
from tilewise.pipelines.media.input_picture import check_sides, is_picture, picture_facts, read_animation
from tilewise.pipelines.media.video import ffmpeg_path, tail
from tilewise.plugins.errors import ConfigError
from tilewise.plugins.text_format import counted

# No playlists and no devices: what they name would be read too.
CONTAINERS = "mov,matroska,avi,mpegts,mpeg,ogg,flv,asf,mxf,h264,hevc,ivf,m4v"


@dataclasses.dataclass(frozen=True)
class VideoFacts:
    """Of a video. height, width: pixels, the right way up. frames: that can be decoded, counted up to a limit. fps: None where it
    does not say. notes: what is wrong with it, for users."""

    height: int
    width: int
    frames: int
    fps: float | None
    notes: tuple[str, ...]


def video_facts(path: Path, most: int) -> VideoFacts:
    """Size and length of a video, which is decoded as far as its first `most` frames.

    Raises ConfigError for what is no video, has no frames or one alone where it is a picture, has sides that no picture may have
    (`check_sides`), or is of a codec that the ffmpeg here does not know; FFmpegError without ffmpeg.
    """
    facts = path.stat()
    return _facts(path, most, facts.st_mtime_ns, facts.st_size)


def read_video(path: Path, most: int) -> Iterator[Image.Image]:
    """The first `most` frames in RGB; those before the damage, if there is any. Raises as `video_facts`."""
    facts = video_facts(path, most)
    if is_picture(path):
        yield from itertools.islice(read_animation(path), facts.frames)
        return
    with tempfile.TemporaryFile() as log:
        size = facts.width * facts.height * 3
        command = _command(path, facts.frames, ["-f", "rawvideo", "-"])
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, start_new_session=True)
        assert process.stdout is not None
        try:
            for number in range(facts.frames):
                data = process.stdout.read(size)
                if len(data) < size:
                    log.seek(0)
                    raise ConfigError(f"{path} broke off at frame {number}: {tail(log.read())}")
                yield Image.frombytes("RGB", (facts.width, facts.height), data)
        finally:
            process.kill()
            process.stdout.close()
            process.wait()


@functools.lru_cache(maxsize=1024)
def _facts(path: Path, most: int, changed: int, size: int) -> VideoFacts:
    """changed, size: of the file, as which it is known again."""
    if is_picture(path):
        picture = picture_facts(path)
        if picture.frames == 1:
            raise ConfigError(f"{path} is one picture and no video")
        return VideoFacts(picture.height, picture.width, min(picture.frames, most), picture.fps, picture.notes)
    # Frames as lines of text: their times and sizes, and no pixels.
    result = subprocess.run(_command(path, most, ["-f", "framecrc", "-"]), capture_output=True, check=False)
    lines = result.stdout.decode("utf-8", "replace").splitlines()
    header = dict(line[1:].split(" 0: ", 1) for line in lines if " 0: " in line)
    frames = [line.split(",") for line in lines if line and not line.startswith("#")]
    if not frames:
        raise ConfigError(f"{path} {_why_none(result.stderr)}")
    width, height = (int(side) for side in header["dimensions"].split("x"))
    check_sides(path, height, width)
    notes = []
    if len(frames) < most and (result.returncode != 0 or result.stderr.strip()):
        frames = frames[: max(1, len(frames) - 1)]  # the last one may be made up in part
        whole = counted(len(frames), "frame")
        notes.append(f"{path.name} is damaged after {whole}, which are used ({tail(result.stderr)[-120:]})")
    seconds = (int(frames[-1][2]) - int(frames[0][2])) * Fraction(header["tb"])
    fps = float((len(frames) - 1) / seconds) if seconds > 0 else 0.0
    known = round(fps, 3) if LEAST_FPS <= fps <= MOST_FPS else None
    return VideoFacts(height, width, len(frames), known, tuple(notes))


def _command(path: Path, frames: int, output: list[str]) -> list[str]:
    """ffmpeg with the first frames of a file, up to the first that is damaged. One thread: several would keep now more, now fewer
    of those before the damage."""
    command = [ffmpeg_path(), "-hide_banner", "-loglevel", "error", "-nostdin", "-xerror", "-threads", "1"]
    command += ["-protocol_whitelist", "file", "-format_whitelist", CONTAINERS, "-i", f"file:{path.absolute()}"]
    return [*command, "-map", "0:v:0", "-frames:v", str(frames), "-fps_mode", "passthrough",
            "-c:v", "rawvideo", "-pix_fmt", "rgb24", *output]  # fmt: skip


def _why_none(log: bytes) -> str:
    said = tail(log)
    if "matches no streams" in said:
        return "holds no video frames, as a file of sound does"
    if re.search(r"no decoder found|Unknown decoder|Decoder .* not found", said):
        return f"is of a codec that this ffmpeg does not know; convert it to H.264 first ({said[-200:]})"
    return f"cannot be read as a video: no frame of it decodes ({said[-200:]})"
