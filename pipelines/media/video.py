"""Clips as mp4 files: H.264 for any player, with the settings that made the clip inside the file. A clip of one frame, what image
models make, may also be a png (``still``): every function here takes either, and goes by the name's ending."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilewise.pipelines.errors import FFmpegError, OutputError
from tilewise.pipelines.media.files import (
    LEAST_FPS,
    MOST_FPS,
    could_not_write,
    is_still,
    replacing,
    sidecar,
    write_text,
)
from tilewise.pipelines.media.image import read_still, write_still

# RGB is converted by the rules of HD video and labelled so; without labels players guess by size, and colours shift.
COLOUR = ["-vf", "scale=out_color_matrix=bt709:out_range=tv"]
COLOUR += ["-colorspace", "bt709", "-color_primaries", "bt709", "-color_trc", "bt709", "-color_range", "tv"]

MP4 = ["-movflags", "+faststart", "-f", "mp4"]


def write_video(
    path: str | Path,
    frames: NDArray,
    fps: float,
    *,
    settings: Mapping[str, Any] | None = None,
    beside: bool = True,
    crf: int = 16,
) -> Path:
    """Writes a clip as H.264 mp4 (a NAME.png as png) and, with `settings`, the settings as JSON beside it; returns the path.

    frames: (T, H, W, 3), uint8 in 0..255 or float in 0..1 (values outside are clipped). fps: frames a second, above 0.
    settings: anything JSON can hold; kept in the file's comment tag, where `read_settings` finds it.
    beside: False leaves the JSON file out, where something else keeps the settings (a batch's manifest).
    crf: H.264 quality, 0 (lossless) to 51.

    The pixel format (yuv420p, the one that every player takes) needs even sizes: an odd height or width is padded by
    one row or column that repeats the last one, with a UserWarning. Both files appear whole or not at all, the clip last:
    where there is a clip, there are its settings.

    Raises ValueError for frames that are no clip, FFmpegError without ffmpeg, OutputError when the encoder fails.
    """
    path = Path(path)
    if is_still(path):
        write_still(path, to_uint8(frames), settings, lambda: _write_sidecar(path, settings if beside else None))
        return path
    clip = even(to_uint8(frames))
    check_fps(fps)
    height, width = clip.shape[1:3]
    command = [ffmpeg_path(), "-hide_banner", "-loglevel", "error", "-y"]
    command += ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", f"{fps:g}", "-i", "-"]
    encode = ["-an", "-c:v", "libx264", "-crf", str(crf), "-pix_fmt", "yuv420p", *COLOUR, *MP4]
    try:
        with _metadata(settings) as (metadata, handles), replacing(path) as part:
            _feed([*command, *metadata, *encode, str(part.absolute())], clip, handles)
            if beside:
                _write_sidecar(path, settings)
    except OSError as error:
        raise OutputError(could_not_write(path, error)) from error
    return path


def write_settings(path: str | Path, settings: Mapping[str, Any], *, beside: bool = True) -> None:
    """Puts other settings into and beside a clip that `write_video` wrote; the pictures are not encoded again.

    beside: also in a JSON file beside it.

    Raises OutputError if that fails, and leaves the clip as it was; FFmpegError without ffmpeg.
    """
    path = Path(path)
    if is_still(path):
        write_still(path, read_still(path)[0], settings, lambda: _write_sidecar(path, settings) if beside else None)
        return
    try:
        with _metadata(settings) as (metadata, handles), replacing(path) as part:
            copy = ["-y", "-i", str(path.absolute()), *metadata, "-map", "0", "-c", "copy", *MP4]
            _run([*copy, str(part.absolute())], path, handles)
            if beside:
                _write_sidecar(path, settings)
    except OSError as error:
        raise OutputError(could_not_write(path, error)) from error


def read_settings(path: str | Path) -> dict[str, Any] | None:
    """The settings inside a file written by `write_video`; None if the file holds none.

    Raises OutputError if the file is no clip, FFmpegError without ffmpeg.
    """
    if is_still(path):
        return read_still(path)[1]
    text = _run(["-i", str(Path(path).absolute()), "-f", "ffmetadata", "-"], path).decode("utf-8", "replace")
    comment = _ffmetadata(text).get("comment")
    if comment is None:
        return None
    try:
        settings = json.loads(comment)
    except (ValueError, RecursionError):
        return None  # someone else's comment
    return settings if isinstance(settings, dict) else None


def read_frames(path: str | Path) -> NDArray[np.uint8]:
    """Every frame of a clip, uint8 (T, H, W, 3).

    Raises OutputError if the file is no clip, FFmpegError without ffmpeg.
    """
    if is_still(path):
        return read_still(path)[0]
    return _decoded(path, ["-fps_mode", "passthrough"])


def read_first_frame(path: str | Path) -> NDArray[np.uint8]:
    """The first frame of a clip, uint8 (H, W, 3). Raises as `read_frames`."""
    return read_still(path)[0][0] if is_still(path) else _decoded(path, ["-frames:v", "1"])[0]


def _decoded(path: str | Path, which: list[str]) -> NDArray[np.uint8]:
    """Frames (T, H, W, 3) of a video file. which: arguments for ffmpeg that choose them."""
    # A PPM picture is a header and the raw pixels: sizes come with the frames, none is parsed out of ffmpeg's log.
    arguments = ["-i", str(Path(path).absolute()), *which]
    data = _run([*arguments, "-c:v", "ppm", "-pix_fmt", "rgb24", "-f", "image2pipe", "-"], path)
    frames = []
    position = 0
    while position < len(data):
        magic, size, peak, pixels = data[position : position + 64].split(b"\n", 3)
        width, height = (int(n) for n in size.split())
        if magic != b"P6" or peak != b"255":
            raise OutputError(f"{path}: ffmpeg gave {magic!r} where a frame was expected")
        start = position + len(data[position : position + 64]) - len(pixels)
        position = start + width * height * 3
        frames.append(np.frombuffer(data[start:position], np.uint8).reshape(height, width, 3))
    if not frames:
        raise OutputError(f"{path} holds no video frames")
    return np.stack(frames)


def check_fps(fps: float) -> None:
    """Raises ValueError for frames a second that no file is written with."""
    if not LEAST_FPS <= fps <= MOST_FPS:
        raise ValueError(f"fps must be from {LEAST_FPS:g} to {MOST_FPS:g}, not {fps}")


def to_uint8(frames: NDArray) -> NDArray[np.uint8]:
    """A clip (T, H, W, 3) in 0..255, from one of uint8 (as it is) or of floats in 0..1 (clipped and rounded).

    Raises ValueError for another shape or dtype, an empty clip, or values that are not numbers.
    """
    frames = np.asarray(frames)
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.size == 0:
        raise ValueError(f"a clip has shape (T, H, W, 3) and at least one frame, not {frames.shape}")
    if frames.dtype == np.uint8:
        return frames
    if not np.issubdtype(frames.dtype, np.floating):
        raise ValueError(f"a clip is uint8 in 0..255 or float in 0..1, not {frames.dtype}")
    if not np.isfinite(frames).all():
        raise ValueError("the clip holds NaN or infinite values: the model's output is not a picture")
    return np.round(np.clip(frames.astype(np.float32), 0, 1) * 255).astype(np.uint8)


def even(frames: NDArray) -> NDArray:
    """Pads an odd height or width of a clip (T, H, W, 3) by repeating the last row or column, with a warning."""
    warn_of_padding(*frames.shape[1:3], stacklevel=4)
    return padded(frames)


def padded(frames: NDArray) -> NDArray:
    """``even`` without the warning."""
    height, width = frames.shape[1:3]
    if height % 2 == 0 and width % 2 == 0:
        return frames
    return np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")


def warn_of_padding(height: int, width: int, *, stacklevel: int) -> None:
    """Says to what size frames of an odd height or width are padded."""
    if height % 2 or width % 2:
        warnings.warn(
            f"padded the clip from {height}x{width} to {height + height % 2}x{width + width % 2}: H.264 needs even sizes",
            stacklevel=stacklevel,
        )


@contextmanager
def _metadata(settings: Mapping[str, Any] | None) -> Iterator[tuple[list[str], tuple[int, ...]]]:
    """Arguments that give ffmpeg the settings as its second input, for one argument could not hold more than 128 KiB; and the
    handles that it inherits for that. The file has no name, so that it is gone however this process ends."""
    if settings is None:
        yield [], ()
        return
    # Its own escape: a backslash before the characters that mean something in the format, line ends among them.
    comment = re.sub(r"[=;#\\\n]", r"\\\g<0>", json.dumps(settings, allow_nan=False))
    with tempfile.TemporaryFile("w", encoding="utf-8") as file:
        file.write(f";FFMETADATA1\ncomment={comment}\n")
        file.flush()
        yield ["-f", "ffmetadata", "-i", f"/dev/fd/{file.fileno()}", "-map_metadata", "1"], (file.fileno(),)


def _write_sidecar(path: Path, settings: Mapping[str, Any] | None) -> None:
    if settings is not None:
        write_text(sidecar(path), json.dumps(settings, indent=2, allow_nan=False) + "\n")


def _feed(command: list[str], clip: NDArray[np.uint8], handles: tuple[int, ...] = ()) -> None:
    # A session of its own: Ctrl-C in the terminal must reach us alone, or ffmpeg would finish a shorter file by itself.
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=log,
            start_new_session=True,
            pass_fds=handles,
        )
        assert process.stdin is not None
        try:
            try:
                for frame in clip:
                    process.stdin.write(frame.tobytes())
                process.stdin.close()
            except BrokenPipeError:
                pass  # ffmpeg stopped; its exit status and message say why
            status = process.wait()
        except BaseException:
            process.kill()
            process.wait()
            raise
        if status != 0:
            log.seek(0)
            raise OutputError(f"ffmpeg stopped with status {status}: {tail(log.read())}")


def _run(arguments: list[str], path: str | Path, handles: tuple[int, ...] = ()) -> bytes:
    if not os.path.isfile(path):
        raise OutputError(f"there is no file {path}")
    command = [ffmpeg_path(), "-hide_banner", "-loglevel", "error", "-nostdin", *arguments]
    result = subprocess.run(command, capture_output=True, check=False, pass_fds=handles)
    if result.returncode != 0:
        raise OutputError(f"could not read {path} as a clip: {tail(result.stderr)}")
    return result.stdout


def ffmpeg_path() -> str:
    """The ffmpeg program in use; raises FFmpegError if there is none. Cheap: ask before long work."""
    import imageio_ffmpeg

    try:
        exe = shutil.which(imageio_ffmpeg.get_ffmpeg_exe())
    except RuntimeError:
        exe = None
    if exe is None:
        raise FFmpegError("there is no ffmpeg: `pip install imageio-ffmpeg`, or name a good one in IMAGEIO_FFMPEG_EXE")
    return exe


def tail(log: bytes) -> str:
    """The end of what ffmpeg said."""
    return log.decode("utf-8", "replace").strip()[-500:] or "(it said nothing)"


def _ffmetadata(text: str) -> dict[str, str]:
    """The global tags of ffmpeg's metadata format: key=value lines, where a backslash protects the next character."""
    tags: dict[str, str] = {}
    key: str | None = None
    word = ""
    characters = iter(text)
    for c in characters:
        if c == "\\":
            word += next(characters, "")
        elif c == "=" and key is None:
            key, word = word, ""
        elif c == "\n":
            if key is not None:
                tags[key.lower()] = word
            elif word.startswith("["):
                break  # a section: streams and chapters have tags of their own
            key, word = None, ""
        else:
            word += c
    return tags
