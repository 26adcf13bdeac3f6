"""A clip that cannot be written is saved another way, and killed processes leave nothing for long."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

from tilewise.pipelines.errors import OutputError
from tilewise.pipelines.media.files import check_writable, replacing
from tilewise.pipelines.media.rescue import RescuedError, write_or_rescue

FRAMES = np.arange(3 * 8 * 8 * 3, dtype=np.uint8).reshape(3, 8, 8, 3)


def broken_encoder(tmp_path, monkeypatch) -> None:
    encoder = tmp_path / "ffmpeg"
    encoder.write_text('#!/bin/sh\necho "No space left on device" >&2\nexit 1\n')
    encoder.chmod(0o755)
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(encoder))


def settings_that_are_no_json(tmp_path, monkeypatch) -> dict:
    return {"density": float("nan")}


def folder_that_is_gone(tmp_path, monkeypatch) -> None:
    (tmp_path / "out").rmdir()


def folder_that_became_a_file(tmp_path, monkeypatch) -> None:
    (tmp_path / "out").rmdir()
    (tmp_path / "out").write_text("")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


@pytest.mark.parametrize(
    "break_it", [broken_encoder, settings_that_are_no_json, folder_that_is_gone, folder_that_became_a_file]
)
def test_the_frames_are_saved_and_the_message_says_where(break_it, tmp_path, monkeypatch):
    path = tmp_path / "out" / "clip.mp4"
    path.parent.mkdir()
    settings = break_it(tmp_path, monkeypatch) or {"prompt": "x"}
    with pytest.raises(RescuedError) as caught:
        write_or_rescue(path, FRAMES, 8, settings=settings)
    saved = caught.value.frames
    assert str(saved) in str(caught.value) and "numpy.load" in str(caught.value)
    assert (np.load(saved) == FRAMES).all()
    assert json.loads(saved.with_suffix(".json").read_text()).keys() == settings.keys()
    assert not path.exists()
    if break_it is folder_that_became_a_file:
        assert saved.parent.parent == tmp_path
    else:
        assert saved == path.parent / "clip.frames.npy"
        with pytest.raises(RescuedError) as caught:
            write_or_rescue(path, FRAMES, 8, settings=settings_that_are_no_json(tmp_path, monkeypatch))
        assert caught.value.frames == path.parent / "clip.frames-2.npy"


def test_where_nothing_can_be_saved_all_reasons_are_said(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    folder_that_became_a_file(tmp_path, monkeypatch)
    monkeypatch.setattr(tempfile, "mkdtemp", lambda **_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(
        OutputError, match=r"could not write .*clip\.mp4.*nor could its frames be saved: .*No space left"
    ):
        write_or_rescue(tmp_path / "out" / "clip.mp4", FRAMES, 8)


def test_what_killed_processes_left_half_written_goes_at_the_next_start(tmp_path):
    code = (
        "import os, signal, sys\nfrom tilewise.pipelines.media.files import replacing\n"
        "with replacing(sys.argv[1]) as part:\n    part.write_text('half')\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "clip.mp4")], check=False)
    left = os.listdir(tmp_path)
    assert len(left) == 1 and left[0].endswith(".part")
    (tmp_path / ".mine.part").write_text("mine")
    with replacing(tmp_path / "other.mp4") as at_work:
        at_work.write_text("whole")
        check_writable(tmp_path / "new.mp4")
        assert sorted(os.listdir(tmp_path)) == sorted([".mine.part", at_work.name])
    assert sorted(os.listdir(tmp_path)) == [".mine.part", "other.mp4"]
    assert Path(tmp_path / "other.mp4").read_text() == "whole"
