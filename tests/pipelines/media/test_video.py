"""Clips on disk: what is written comes back, and a file is whole or absent."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from tilewise.pipelines.errors import FFmpegError, OutputError, OutputPathError
from tilewise.pipelines.media.files import check_sidecar, check_writable, replacing, write_text
from tilewise.pipelines.media.video import even, read_frames, read_settings, to_uint8, write_settings, write_video
from tilewise.pipelines.quality.metrics import psnr

SETTINGS = {
    "prompt": 'a "red" circle; a=b \\ back\nslash # 円 – é',
    "seed": 7,
    "method": {"window": [3, 3, 3], "density": None},
}


def smooth_clip(frames: int = 9, height: int = 64, width: int = 96) -> np.ndarray:
    """Slow colour gradients that move: chroma subsampling and H.264 hardly touch them."""
    t, y, x = np.meshgrid(np.arange(frames), np.arange(height), np.arange(width), indexing="ij")
    clip = np.stack([(x + 4 * t) / (width + 40), y / height, 1 - x / width], axis=-1)
    return np.round(clip * 255).astype(np.uint8)


def test_round_trip_keeps_frames_size_and_colours(tmp_path):
    clip = smooth_clip()
    path = write_video(tmp_path / "clip.mp4", clip, 8)
    back = read_frames(path)
    assert back.shape == clip.shape
    assert back.dtype == np.uint8
    assert psnr(back, clip) > 38


@pytest.mark.parametrize("colour", [(220, 40, 40), (40, 170, 60), (40, 80, 220), (240, 240, 240), (20, 20, 20)])
def test_flat_colours_do_not_shift(tmp_path, colour):
    clip = np.broadcast_to(np.array(colour, np.uint8), (2, 32, 32, 3))
    back = read_frames(write_video(tmp_path / "flat.mp4", clip, 8))
    assert np.abs(back.astype(int) - clip).max() <= 4


@pytest.mark.parametrize("frames", [1, 2, 17])
def test_every_frame_is_there(tmp_path, frames):
    assert len(read_frames(write_video(tmp_path / "clip.mp4", smooth_clip(frames, 16, 16), 8))) == frames


def test_floats_are_clipped_and_rounded():
    clip = np.array([-0.5, 0.0, 0.5, 1.0, 2.0, 0.999]).reshape(1, 1, 2, 3)
    assert to_uint8(clip).ravel().tolist() == [0, 0, 128, 255, 255, 255]


def test_settings_live_in_the_file_and_beside_it(tmp_path):
    path = write_video(tmp_path / "clip.mp4", smooth_clip(2, 16, 16), 8, settings=SETTINGS)
    assert read_settings(path) == SETTINGS
    assert json.loads((tmp_path / "clip.json").read_text()) == SETTINGS
    path.rename(tmp_path / "moved.mp4")
    assert read_settings(tmp_path / "moved.mp4") == SETTINGS


@pytest.mark.parametrize("text", ["x", "=;#\\\n", "\n[STREAM]\ncomment=other\n", '\r\n\t"é円🎬\u2028', "\\"])
def test_long_settings_survive(tmp_path, text):
    """Longer than one argument of a command may be, in characters that ffmpeg's metadata format gives a meaning."""
    settings = {"prompt": text * (1 + 250_000 // len(text)), text: [text]}
    path = write_video(tmp_path / "clip.mp4", smooth_clip(1, 16, 16), 8, settings=settings)
    assert path.stat().st_size > 200_000
    assert read_settings(path) == settings
    assert json.loads((tmp_path / "clip.json").read_text()) == settings


def test_other_settings_for_a_clip(tmp_path):
    path = write_video(tmp_path / "clip.mp4", smooth_clip(), 8, settings={"a": "=;#\\\n"})
    frames = read_frames(path)
    write_settings(path, SETTINGS)
    assert read_settings(path) == SETTINGS
    assert json.loads((tmp_path / "clip.json").read_text()) == SETTINGS
    assert (read_frames(path) == frames).all()
    assert sorted(os.listdir(tmp_path)) == ["clip.json", "clip.mp4"]


def test_other_settings_for_what_is_no_clip(tmp_path):
    path = tmp_path / "clip.mp4"
    path.write_text("not a clip")
    with pytest.raises(OutputError, match="could not read"):
        write_settings(path, SETTINGS)
    assert path.read_text() == "not a clip"
    assert os.listdir(tmp_path) == ["clip.mp4"]


def test_the_settings_are_there_before_the_clip(tmp_path, monkeypatch):
    names = []
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda part, path: (names.append(Path(path).name), replace(part, path)))
    write_video(tmp_path / "clip.mp4", smooth_clip(1, 16, 16), 8, settings=SETTINGS)
    assert names == ["clip.json", "clip.mp4"]


def test_no_settings(tmp_path):
    path = write_video(tmp_path / "clip.mp4", smooth_clip(1, 16, 16), 8)
    assert read_settings(path) is None
    assert os.listdir(tmp_path) == ["clip.mp4"]


def test_odd_sizes_are_padded_and_said(tmp_path):
    clip = smooth_clip(2, 33, 35)
    with pytest.warns(UserWarning, match="33x35 to 34x36"):
        path = write_video(tmp_path / "odd.mp4", clip, 8)
    back = read_frames(path)
    assert back.shape == (2, 34, 36, 3)
    assert psnr(back[:, :33, :35], clip) > 35


def test_even_repeats_the_last_row_and_column():
    clip = smooth_clip(1, 3, 5)
    with pytest.warns(UserWarning, match="padded"):
        padded = even(clip)
    assert (padded[:, :3, :5] == clip).all()
    assert (padded[:, 3, :5] == clip[:, 2]).all()
    assert (padded[:, :3, 5] == clip[:, :, 4]).all()
    assert even(padded) is padded


@pytest.mark.parametrize(
    "frames",
    [np.zeros((0, 8, 8, 3), np.uint8), np.zeros((8, 8, 3)), np.zeros((1, 8, 8, 4)), np.zeros((1, 8, 8, 3), int)],
)
def test_refuses_what_is_no_clip(tmp_path, frames):
    with pytest.raises(ValueError, match="clip"):
        write_video(tmp_path / "clip.mp4", frames, 8)
    assert os.listdir(tmp_path) == []


def test_refuses_nan_and_bad_rates(tmp_path):
    with pytest.raises(ValueError, match="NaN"):
        write_video(tmp_path / "clip.mp4", np.full((1, 8, 8, 3), np.nan), 8)
    for fps in (0, -1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="fps"):
            write_video(tmp_path / "clip.mp4", smooth_clip(1, 8, 8), fps)


def test_a_failing_encoder_leaves_the_old_file(tmp_path, monkeypatch):
    encoder = tmp_path / "ffmpeg"
    encoder.write_text('#!/bin/sh\nfor last; do :; done\necho half > "$last"\necho "No space left" >&2\nexit 1\n')
    encoder.chmod(0o755)
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(encoder))
    path = tmp_path / "out" / "clip.mp4"
    path.parent.mkdir()
    path.write_text("old")
    with pytest.raises(OutputError, match="ffmpeg stopped with status 1: No space left"):
        write_video(path, smooth_clip(2, 64, 64), 8, settings=SETTINGS)
    assert path.read_text() == "old"
    assert os.listdir(path.parent) == ["clip.mp4"]


def test_no_ffmpeg(tmp_path, monkeypatch):
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(tmp_path / "nowhere"))
    with pytest.raises(FFmpegError, match="IMAGEIO_FFMPEG_EXE"):
        write_video(tmp_path / "clip.mp4", smooth_clip(1, 8, 8), 8)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_replacing_is_all_or_nothing(tmp_path, error):
    path = tmp_path / "a.json"
    write_text(path, "old")

    def fail_halfway() -> None:
        with replacing(path) as part:
            assert part.name.endswith(".part")
            part.write_text("half")
            raise error

    with pytest.raises(error):
        fail_halfway()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.json"]
    write_text(path, "new")
    assert path.read_text() == "new"


def test_reading_what_is_no_clip(tmp_path):
    (tmp_path / "text.mp4").write_text("not a clip")
    for read in (read_frames, read_settings):
        with pytest.raises(OutputError, match="could not read"):
            read(tmp_path / "text.mp4")
        with pytest.raises(OutputError, match="no file"):
            read(tmp_path / "absent.mp4")


def test_check_writable_creates_the_folder_and_leaves_nothing_in_it(tmp_path):
    path = check_writable(tmp_path / "a" / "b" / "clip.mp4")
    assert path.parent.is_dir()
    assert os.listdir(path.parent) == []


def test_check_writable_without_touching_anything(tmp_path):
    check_writable(tmp_path / "a" / "b" / "clip.mp4", create=False)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("create", [True, False])
def test_check_writable_says_what_is_wrong(tmp_path, create):
    (tmp_path / "file").write_text("")
    (tmp_path / "dir.mp4").mkdir()
    cases = {
        "dir.mp4": "directory",
        "clip.avi": r"\.mp4",
        "clip": r"\.mp4",
        "file/clip.mp4": "file is a file, not a directory",
        "file/sub/clip.mp4": "file is a file, not a directory",
    }
    for name, message in cases.items():
        with pytest.raises(OutputPathError, match=message):
            check_writable(tmp_path / name, create=create)


@pytest.mark.parametrize("create", [True, False])
def test_check_sidecar(tmp_path, create):
    (tmp_path / "dir.json").mkdir()
    with pytest.raises(OutputPathError, match=r"dir\.mp4: its settings go to .*dir\.json, which is a directory"):
        check_sidecar(tmp_path / "dir.mp4", create=create)
    config = tmp_path / "clip.json"
    check_sidecar(tmp_path / "clip.mp4", keep=config, create=create)  # neither is there yet
    config.write_text("{}")
    (tmp_path / "link.json").symlink_to(config)
    for name in ("clip.mp4", "link.mp4"):
        with pytest.raises(OutputPathError, match="the config that --method names"):
            check_sidecar(tmp_path / name, keep=config, create=create)
    check_sidecar(tmp_path / "clip.mp4", create=create)  # a clip of before: it is replaced
    check_sidecar(tmp_path / "other.mp4", keep=config, create=create)
    assert config.read_text() == "{}"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
@pytest.mark.parametrize("create", [True, False])
def test_a_read_only_file_is_kept(tmp_path, create):
    for name in ("clip.mp4", "clip.json"):
        (tmp_path / name).write_text("")
        (tmp_path / name).chmod(0o400)
    for check in (check_writable, check_sidecar):
        with pytest.raises(OutputPathError, match="read-only"):
            check(tmp_path / "clip.mp4", create=create)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
@pytest.mark.parametrize("create", [True, False])
def test_check_writable_without_permission(tmp_path, create):
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(OutputPathError, match="Permission denied"):
        check_writable(tmp_path / "locked" / "clip.mp4", create=create)


def test_check_writable_on_a_file_system_that_takes_no_files():
    with pytest.raises(OutputPathError, match="cannot write"):
        check_writable("/proc/clip.mp4")
