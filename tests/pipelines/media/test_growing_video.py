"""A file that plays while it is written, and after whatever ends the writing."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from tilewise.pipelines.errors import FFmpegError, OutputError, OutputPathError
from tilewise.pipelines.media.fragments import FragmentCutter
from tilewise.pipelines.media.growing_video import GrowingVideo
from tilewise.pipelines.media.video import read_frames, read_settings, write_settings
from tilewise.pipelines.quality.metrics import psnr

FPS = 16  # half a second is 8 frames
SETTINGS = {"prompt": 'a "red" circle; a=b \\ back\nslash # 円', "seed": 7, "long": "x" * 200_000}


def gradients(frames: int, height: int = 32, width: int = 48, first: int = 0) -> np.ndarray:
    """Slow colour gradients that move, with no edge in any frame: chroma subsampling and H.264 hardly touch them."""
    t, y, x = np.meshgrid(np.arange(first, first + frames), np.arange(height), np.arange(width), indexing="ij")
    clip = np.stack([abs((x + t) % 400 - 200) / 200, y / height, 1 - x / width], axis=-1)
    return np.round(clip * 255).astype(np.uint8)


def noise(frames: int, size: int = 64) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (frames, size, size, 3), np.uint8)


def write_all(path: Path, *chunks: np.ndarray | BaseException) -> None:
    """Chunks of frames, and what is raised between them."""
    first = chunks[0]
    assert isinstance(first, np.ndarray)
    with GrowingVideo(path, FPS, *first.shape[1:3]) as video:
        for chunk in chunks:
            if isinstance(chunk, BaseException):
                raise chunk
            video.write(chunk)


def until(condition, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.01)


def boxes(data: bytes) -> list[bytes]:
    names, at = [], 0
    while at < len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        assert size >= 8
        names.append(data[at + 4 : at + 8])
        at += size
    assert at == len(data)
    return names


def test_every_frame_is_there_and_right(tmp_path):
    clip = gradients(21)
    with GrowingVideo(tmp_path / "a.mp4", FPS, 32, 48, metadata=SETTINGS) as video:
        for chunk in (clip[:1], clip[1:9], clip[9:9], clip[9:]):
            video.write(chunk)
        assert video.frames_written == 21
    assert video.frames_written == 21
    back = read_frames(tmp_path / "a.mp4")
    assert back.shape == clip.shape
    assert min(psnr(a, b) for a, b in zip(back, clip, strict=True)) > 35
    assert read_settings(tmp_path / "a.mp4") == SETTINGS
    assert os.listdir(tmp_path) == ["a.mp4"]
    # A fragment every 8 frames, and settings that are known at the end only.
    assert boxes((tmp_path / "a.mp4").read_bytes()).count(b"moof") == 3
    write_settings(tmp_path / "a.mp4", {"frames": 21})
    assert read_settings(tmp_path / "a.mp4") == {"frames": 21}
    assert (read_frames(tmp_path / "a.mp4") == back).all()


def test_it_plays_while_it_is_written(tmp_path):
    """With its settings, and with all but the last half a second of what was written."""
    path, pieces = tmp_path / "a.mp4", []
    clip = gradients(40)
    with GrowingVideo(path, FPS, 32, 48, metadata=SETTINGS, sink=pieces.append) as video:
        video.write(clip[:20])
        until(lambda: len(pieces) == 3)
        back = read_frames(path)
        assert len(back) == 16
        assert psnr(back, clip[:16]) > 35
        assert read_settings(path) == SETTINGS
        video.write(clip[20:])
        until(lambda: len(pieces) == 5)
        assert len(read_frames(path)) == 32
    assert len(read_frames(path)) == 40
    # The sink has seen the file: the header, then whole fragments, each of which starts with a picture of its own.
    assert b"".join(pieces) == path.read_bytes()
    names = [boxes(piece) for piece in pieces]
    assert names[0] == [b"ftyp", b"moov"]
    assert names[1:6] == [[b"moof", b"mdat"]] * 5
    (tmp_path / "late.mp4").write_bytes(pieces[0] + pieces[3])  # who comes late
    late = read_frames(tmp_path / "late.mp4")
    assert psnr(late, clip[16:24]) > 35


def test_a_fragment_is_out_with_the_frame_after_it(tmp_path):
    """Whoever watches is half a second behind, and not as long as ffmpeg likes to look at a video before it begins."""
    pieces: list[bytes] = []
    with GrowingVideo(tmp_path / "a.mp4", 4, 32, 48, sink=pieces.append) as video:
        video.write(gradients(3))  # two frames are a fragment
        until(lambda: len(pieces) == 2)


def test_no_metadata(tmp_path):
    with GrowingVideo(tmp_path / "a.mp4", FPS, 16, 16) as video:
        video.write(gradients(1, 16, 16))
    assert read_settings(tmp_path / "a.mp4") is None
    assert len(read_frames(tmp_path / "a.mp4")) == 1


@pytest.mark.parametrize(("fps", "frames", "fragments"), [(1.5, 3, 3), (24000 / 1001, 23, 3), (60, 31, 2)])
def test_fragments_are_half_a_second_at_most(tmp_path, fps, frames, fragments):
    pieces = []
    with GrowingVideo(tmp_path / "a.mp4", fps, 16, 16, sink=pieces.append) as video:
        video.write(gradients(frames, 16, 16))
    assert sum(b"moof" in boxes(piece) for piece in pieces) == fragments
    assert len(read_frames(tmp_path / "a.mp4")) == frames


@pytest.mark.filterwarnings("error")
def test_odd_sizes_are_padded_and_said_once(tmp_path):
    clip = gradients(4, 33, 47)
    with pytest.warns(UserWarning, match="33x47 to 34x48") as said:
        video = GrowingVideo(tmp_path / "a.mp4", FPS, 33, 47)
    for chunk in (clip[:2], clip[2:]):
        video.write(chunk)  # a second warning would be an error
    video.close()
    assert len(said) == 1
    assert Path(said[0].filename) == Path(__file__)
    back = read_frames(tmp_path / "a.mp4")
    assert back.shape == (4, 34, 48, 3)
    assert psnr(back[:, :33, :47], clip) > 33


def test_refuses_before_any_work(tmp_path, monkeypatch):
    for fps in (0, -1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="fps"):
            GrowingVideo(tmp_path / "a.mp4", fps, 16, 16)
    with pytest.raises(ValueError, match="0x16"):
        GrowingVideo(tmp_path / "a.mp4", FPS, 0, 16)
    with pytest.raises(ValueError, match="JSON"):
        GrowingVideo(tmp_path / "a.mp4", FPS, 16, 16, metadata={"a": float("nan")})
    with pytest.raises(OutputPathError, match=r"\.mp4"):
        GrowingVideo(tmp_path / "a.avi", FPS, 16, 16)
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(tmp_path / "nowhere"))
    with pytest.raises(FFmpegError, match="IMAGEIO_FFMPEG_EXE"):
        GrowingVideo(tmp_path / "a.mp4", FPS, 16, 16)
    assert os.listdir(tmp_path) == []


def test_other_frames_are_refused_and_leave_the_file_as_it_is(tmp_path):
    clip = gradients(3)
    with GrowingVideo(tmp_path / "a.mp4", FPS, 32, 48) as video:
        video.write(clip)
        for wrong in (clip[0], clip[:, :30], clip[..., :1], clip.astype(np.float32)):
            with pytest.raises(ValueError, match=r"takes frames of shape \(F, 32, 48, 3\)"):
                video.write(wrong)
        video.write(clip[:, :, ::-1])  # of any strides
    with pytest.raises(ValueError, match="is closed"):
        video.write(clip)
    video.close()
    back = read_frames(tmp_path / "a.mp4")
    assert psnr(back, np.concatenate([clip, clip[:, :, ::-1]])) > 35


def test_a_file_without_a_frame_is_removed(tmp_path):
    (tmp_path / "a.mp4").write_text("of before")
    with GrowingVideo(tmp_path / "a.mp4", FPS, 16, 16):
        pass
    assert os.listdir(tmp_path) == []


def test_an_exception_leaves_a_whole_file(tmp_path):
    with pytest.raises(ZeroDivisionError):
        write_all(tmp_path / "a.mp4", gradients(11), ZeroDivisionError())
    assert len(read_frames(tmp_path / "a.mp4")) == 11


def test_a_write_interrupted_within_a_frame(tmp_path):
    """Ctrl-C while the encoder is behind: the frames before are in the file, and no half of one."""
    go = threading.Event()
    clip = noise(200, 256)

    def interrupt() -> None:
        before = -1
        # Until the write waits: within a frame, as one has more bytes than a pipe holds.
        while video.frames_written != before:
            before = video.frames_written
            time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGINT)

    with GrowingVideo(tmp_path / "a.mp4", FPS, 256, 256, sink=lambda _: go.wait(20)) as video:
        watcher = threading.Thread(target=interrupt)
        watcher.start()
        with pytest.raises(KeyboardInterrupt):
            video.write(clip)
        go.set()
        watcher.join()
        with pytest.raises(OutputError, match="interrupted within a frame"):
            video.write(clip)
    assert 8 <= video.frames_written < 200
    assert len(read_frames(tmp_path / "a.mp4")) == video.frames_written


def test_a_slow_sink_holds_the_writer(tmp_path):
    """No queue grows: with a sink that takes nothing, only as much is written as the encoder and the pipes hold."""
    go, written = threading.Event(), []
    clip = noise(300, 128)
    with GrowingVideo(tmp_path / "a.mp4", FPS, 128, 128, sink=lambda _: go.wait(20)) as video:
        writer = threading.Thread(target=lambda: (video.write(clip), written.append(True)))
        writer.start()
        before = -1
        while video.frames_written != before:
            before = video.frames_written
            time.sleep(0.3)
        assert before < 200
        assert not written
        go.set()
        writer.join()
    assert len(read_frames(tmp_path / "a.mp4")) == 300


def test_a_sink_that_raises(tmp_path):
    def sink(piece: bytes) -> None:
        raise ConnectionError("the browser has gone")

    go_on = np.broadcast_to(gradients(1), (20_000, 32, 48, 3))
    video = GrowingVideo(tmp_path / "a.mp4", FPS, 32, 48, sink=sink)
    with pytest.raises(OutputError, match=r"the sink of .*a\.mp4 failed: ConnectionError: the browser has gone"):
        video.write(go_on)
    video.close()
    assert 0 < video.frames_written < 20_000
    assert len(read_frames(tmp_path / "a.mp4")) == video.frames_written
    # found by close
    video = GrowingVideo(tmp_path / "b.mp4", FPS, 32, 48, sink=sink)
    video.write(gradients(1))
    with pytest.raises(OutputError, match="the sink"):
        video.close()
    video.close()
    assert len(read_frames(tmp_path / "b.mp4")) == 1


def test_a_full_disk(tmp_path):
    """A file may not grow past 60 KB: what fits plays."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    video = GrowingVideo(tmp_path / "a.mp4", FPS, 64, 64)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, limits[1]))
    try:
        for _ in range(2):
            with pytest.raises(OutputError, match=r"could not write .*a\.mp4: .*File too large"):
                video.write(noise(400))
        video.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert len(read_frames(tmp_path / "a.mp4")) == 8 * (boxes((tmp_path / "a.mp4").read_bytes()).count(b"moof"))
    assert (tmp_path / "a.mp4").stat().st_size > 20_000


def test_no_room_for_anything(tmp_path):
    (tmp_path / "a.mp4").symlink_to("/dev/full")
    with pytest.raises(OutputError, match=r"the disk mounted at \S+ is full \(No space left on device\)"):
        write_all(tmp_path / "a.mp4", noise(4))
    assert os.listdir(tmp_path) == []


def test_an_encoder_that_is_killed(tmp_path):
    pieces = []
    with GrowingVideo(tmp_path / "a.mp4", FPS, 32, 48, sink=pieces.append) as video:
        video.write(gradients(20))
        until(lambda: len(pieces) == 3)
        video._process.kill()
        video._process.wait()
        with pytest.raises(OutputError, match=r"a\.mp4: ffmpeg stopped with status -9"):
            video.write(gradients(20))
    assert len(read_frames(tmp_path / "a.mp4")) == 16


def test_an_encoder_that_fails(tmp_path, monkeypatch):
    encoder = tmp_path / "ffmpeg"
    encoder.write_text("#!/bin/sh\nhead -c 100 >/dev/null\necho 'no such codec' >&2\nexit 3\n")
    encoder.chmod(0o755)
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(encoder))
    (tmp_path / "out").mkdir()
    video = GrowingVideo(tmp_path / "out" / "a.mp4", FPS, 256, 256)
    with pytest.raises(OutputError, match="ffmpeg stopped with status 3: no such codec"):
        video.write(noise(2, 256))
    video.close()
    # an error of its own stays the first; what close found is a note to it
    with pytest.raises(ZeroDivisionError) as caught:
        write_all(tmp_path / "out" / "a.mp4", noise(1, 2), ZeroDivisionError())
    assert "no such codec" in caught.value.__notes__[0]
    assert os.listdir(tmp_path / "out") == []


PROGRAM = """
import sys
import numpy as np
from tilewise.pipelines.media.growing_video import GrowingVideo
from test_growing_video import gradients
with GrowingVideo(sys.argv[1], 16, 32, 48, metadata={"seed": 1}) as video:
    for first in range(0, 100_000, 4):
        video.write(gradients(4, first=first))
        print(video.frames_written, flush=True)
"""


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT])
def test_a_program_that_is_stopped(tmp_path, sent):
    """SIGKILL: the file plays up to the last fragment. Ctrl-C in a terminal reaches the whole process group: it is complete."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    path = tmp_path / "a.mp4"
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, path], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        env=environment, start_new_session=True,
    )  # fmt: skip
    assert process.stdout is not None
    try:
        for line in process.stdout:
            if int(line) >= 120:
                os.killpg(process.pid, sent)
                break
        written = [int(line), *map(int, process.stdout)][-1]
    finally:
        process.kill()
        process.wait()
    found = len(read_frames(path))
    if sent == signal.SIGINT:
        assert written <= found <= written + 4
    else:
        assert found >= 64
        assert found % 8 == 0
    assert psnr(read_frames(path), gradients(found)) > 35
    assert read_settings(path) == {"seed": 1}


@pytest.mark.parametrize("step", [1, 7, 10_000])
def test_pieces_are_the_same_however_the_bytes_come(step):
    def box(name: bytes, content: bytes = b"", long: bool = False) -> bytes:
        if long:
            return b"\x00\x00\x00\x01" + name + (16 + len(content)).to_bytes(8, "big") + content
        return (8 + len(content)).to_bytes(4, "big") + name + content

    header = box(b"ftyp", b"isom") + box(b"moov", b"moof" * 9)
    fragments = [box(b"moof", b"1") + box(b"mdat", b"22", long=True), box(b"styp") + box(b"moof") + box(b"mdat", b"3")]
    index = box(b"mfra", b"mdat")
    data = header + b"".join(fragments) + index
    for cut, rest in ((len(data), index), (len(data) - 1, b"")):
        cutter, pieces = FragmentCutter(), []
        for at in range(0, cut, step):
            pieces += cutter.feed(data[at : min(at + step, cut)])
        assert pieces == [header, *fragments]
        assert cutter.rest() == rest
