"""An mp4 file that plays while it is written: what streaming writes, chunk by chunk.

One ffmpeg process encodes to fragmented mp4 (the settings in a header at the front, then fragments of half a second, each of
which starts with a keyframe). A thread takes whole fragments from it and appends them, so the file ends with a whole fragment at
any time: after a full disk, a failing encoder or SIGKILL it plays up to there.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import tempfile
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from tilewise.pipelines.errors import FFmpegError, OutputError
from tilewise.pipelines.media.files import check_writable, could_not_write
from tilewise.pipelines.media.fragments import FragmentCutter, with_comment
from tilewise.pipelines.media.video import (
    COLOUR,
    check_fps,
    ffmpeg_path,
    padded,
    tail,
    warn_of_padding,
)

FRAGMENT_SECONDS = 0.5
# A frame in is a frame out: no B-frames, no look-ahead. veryfast: 90 frames of 480×832 a second and core; ultrafast makes 140, of
# more than twice the bytes at the same quality.
ENCODER = ["-an", "-c:v", "libx264", "-preset", "veryfast", "-tune", "zerolatency", "-pix_fmt", "yuv420p", *COLOUR]
# Otherwise ffmpeg looks at some twenty frames before it encodes the first: seconds, of a video that is watched while it is made.
AT_ONCE = ["-probesize", "32", "-analyzeduration", "0"]
# No tags (bitexact) and no index at the end (skip_trailer): the comment that is put into the header moves what follows it.
FRAGMENTED = ["-movflags", "+frag_keyframe+empty_moov+default_base_moof+skip_trailer", "-map_metadata", "-1"]
FRAGMENTED += ["-fflags", "+bitexact", "-flush_packets", "1", "-f", "mp4", "pipe:1"]


class GrowingVideo:
    """Writes frames to `path` as they come; a context manager that completes the file on the way out, also after an exception.

    fps: frames a second, above 0. height, width: of every frame in pixels; odd sizes are padded by one row or column that
    repeats the last one, with a UserWarning.
    metadata: anything JSON can hold, as `write_video` stores its settings; `read_settings` finds it from the first fragment on.
    What is known at the end only can be put into the complete file with `write_settings`.
    sink: receives the same bytes after they are in the file: the header, then whole fragments. It is called in a thread of its
    own, and while it blocks, `write` soon blocks too.
    crf: H.264 quality, 0 (lossless) to 51.

    Raises OutputPathError if the file cannot be written there, FFmpegError without ffmpeg, ValueError for an impossible size or
    fps, all before any work. A file of that name is replaced at once.
    """

    def __init__(
        self,
        path: str | Path,
        fps: float,
        height: int,
        width: int,
        *,
        metadata: Mapping[str, Any] | None = None,
        sink: Callable[[bytes], None] | None = None,
        crf: int = 16,
    ) -> None:
        check_fps(fps)
        if height < 1 or width < 1:
            raise ValueError(f"frames have at least one pixel, not {height}x{width}")
        self._comment = None if metadata is None else json.dumps(metadata, allow_nan=False)
        program = ffmpeg_path()
        self.path = check_writable(path)
        warn_of_padding(height, width, stacklevel=3)
        self.height, self.width = height, width
        self._sink = sink
        self._frames = 0
        self._error: OutputError | None = None  # found by the thread, raised by the next call
        self._told = self._interrupted = self._closed = False
        self._length = 0  # bytes of whole pieces in the file
        try:
            self._file: BinaryIO = open(self.path, "wb", buffering=0)  # noqa: SIM115
        except OSError as error:
            raise OutputError(could_not_write(self.path, error)) from error
        self._log = tempfile.TemporaryFile()  # noqa: SIM115
        gop = max(1, int(fps * FRAGMENT_SECONDS))
        frames = f"{width + width % 2}x{height + height % 2}"
        command = [program, "-hide_banner", "-loglevel", "error"]
        command += [*AT_ONCE, "-f", "rawvideo", "-pix_fmt", "rgb24", "-s", frames, "-r", f"{fps:g}", "-i", "pipe:0"]
        command += [
            *ENCODER,
            "-crf",
            str(crf),
            "-g",
            str(gop),
            "-keyint_min",
            str(gop),
            "-sc_threshold",
            "0",
            *FRAGMENTED,
        ]
        try:
            # A session of its own: Ctrl-C in the terminal must reach us alone, or ffmpeg would stop by itself.
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                bufsize=0,
                start_new_session=True,
            )
        except OSError as error:
            self._file.close()
            self.path.unlink()
            raise FFmpegError(f"could not start {program}: {error}") from error
        # A daemon: a program that forgets to close ends all the same.
        self._thread = threading.Thread(target=self._append, name="tilewise-growing-video", daemon=True)
        self._thread.start()

    @property
    def frames_written(self) -> int:
        """Frames handed to the encoder. The last half a second of them is in the file after `close`."""
        return self._frames

    def write(self, frames: NDArray[np.uint8]) -> None:
        """Appends uint8 (F, H, W, 3); returns once ffmpeg has taken them, so that a slow encoder, disk or sink slows the caller.

        Raises ValueError for other frames or after `close`, OutputError once the file cannot go on: a full disk, an encoder that
        stopped, a sink that raised. What is in the file by then plays.
        """
        frames = np.asarray(frames)
        if frames.ndim != 4 or frames.shape[1:] != (self.height, self.width, 3) or frames.dtype != np.uint8:
            raise ValueError(
                f"{self.path} takes frames of shape (F, {self.height}, {self.width}, 3) and uint8, "
                f"not {frames.shape} of {frames.dtype}"
            )
        if self._closed:
            raise ValueError(f"{self.path} is closed")
        if self._interrupted:
            raise OutputError(f"could not write {self.path}: an earlier write was interrupted within a frame; close it")
        assert self._process.stdin is not None
        try:
            for frame in padded(frames):
                if self._error is not None:
                    raise self._error
                rest = memoryview(np.ascontiguousarray(frame).data).cast("B")
                while rest:
                    rest = rest[self._process.stdin.write(rest) :]
                self._frames += 1
        except BrokenPipeError:  # ffmpeg is gone, or the thread has closed its end
            self._raise_failure()
            raise OutputError(f"could not write {self.path}: ffmpeg takes no more frames") from None
        except OutputError:
            self._told = True
            raise
        except BaseException:
            self._interrupted = True
            raise

    def close(self) -> None:
        """Completes the file. A second call does nothing; a file without a frame is removed.

        Raises OutputError if the encoder, the disk or the sink failed and no `write` has said so.
        """
        if self._closed:
            return
        self._closed = True
        try:
            if self._frames == 0:
                self._process.kill()
            self._finish()
        except OutputError:
            raise
        except BaseException:  # Ctrl-C while waiting
            self._told = True
            self._process.kill()
            self._finish(patience=1.0)
            raise
        finally:
            self._file.close()
            self._log.close()
            if self._frames == 0 or self._length == 0:
                self.path.unlink(missing_ok=True)

    def __enter__(self) -> GrowingVideo:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except OutputError as failure:
            if error is None:
                raise
            error.add_note(str(failure))  # the first error is the cause

    def _finish(self, patience: float | None = None) -> None:
        """Waits until ffmpeg and the thread are through. patience: seconds for the thread; None: as long as it takes."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._thread.join(patience)
        self._process.wait()
        if not self._told and not self._interrupted and self._frames:
            self._raise_failure()

    def _raise_failure(self) -> None:
        """Raises what went wrong in the thread or in ffmpeg, once both are through; returns if nothing did."""
        self._thread.join()
        status = self._process.wait()
        if self._error is None and status != 0:
            self._log.seek(0)
            said = tail(self._log.read())
            self._error = OutputError(f"could not write {self.path}: ffmpeg stopped with status {status}: {said}")
        if self._error is not None:
            self._told = True
            raise self._error

    def _append(self) -> None:
        """In the thread: whole pieces from ffmpeg to the file, then to the sink."""
        cutter = FragmentCutter()
        assert self._process.stdout is not None
        with self._process.stdout as pipe:  # closed early, it stops ffmpeg, and that stops a write that waits
            try:
                while data := pipe.read(1 << 16):
                    for piece in cutter.feed(data):
                        self._append_piece(piece)
                if rest := cutter.rest():
                    self._append_piece(rest)
                os.fsync(self._file.fileno())
            except (OSError, ValueError) as error:  # ValueError: closed by a `close` that was interrupted
                self._error = OutputError(f"{could_not_write(self.path, error)}; what is in it plays")
                self._error.__cause__ = error
                with contextlib.suppress(OSError, ValueError):
                    self._file.truncate(self._length)  # a fragment that did not fit

    def _append_piece(self, piece: bytes) -> None:
        if self._length == 0 and self._comment is not None:
            piece = with_comment(piece, self._comment)
        rest = memoryview(piece)
        while rest:
            rest = rest[self._file.write(rest) :]
        self._length += len(piece)
        if self._sink is None:
            return
        try:
            self._sink(piece)
        except Exception as error:
            self._sink = None
            self._error = OutputError(f"the sink of {self.path} failed: {type(error).__name__}: {error}")
            self._error.__cause__ = error
