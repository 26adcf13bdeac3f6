"""Pictures and videos that clips are made from: any mode, turned by EXIF, on white; what cannot be used is refused."""

from __future__ import annotations

import subprocess
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_conditioned import picture, video

from tilewise.pipelines.media.input_picture import is_picture, picture_facts, read_picture
from tilewise.pipelines.media.input_video import read_video, video_facts
from tilewise.pipelines.media.video import ffmpeg_path
from tilewise.plugins.errors import ConfigError


def read(path: Path) -> np.ndarray:
    return np.asarray(read_picture(path))


@pytest.mark.parametrize("mode", ["L", "P", "1", "CMYK", "LA"])
def test_any_mode_is_rgb(tmp_path, mode):
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    grey = Image.linear_gradient("L").resize((32, 20))
    grey.convert(mode).save(path)
    assert read(path).shape == (20, 32, 3) and picture_facts(path).notes == ()
    expected = np.asarray(grey.convert(mode).convert("RGB"))
    np.testing.assert_array_equal(read(path), expected)


def test_sixteen_bits_are_scaled_and_not_cut_off(tmp_path):
    grey = np.linspace(0, 65535, 32 * 32).astype(np.uint16).reshape(32, 32)
    Image.fromarray(grey).save(tmp_path / "a.png")
    np.testing.assert_array_equal(read(tmp_path / "a.png")[..., 0], (grey / 257).round().astype(np.uint8))


def test_alpha_is_on_white_and_said(tmp_path):
    pixels = np.zeros((20, 20, 4), np.uint8)
    pixels[:10, :, 3] = 255
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert (read(tmp_path / "a.png")[:10] == 0).all() and (read(tmp_path / "a.png")[10:] == 255).all()
    assert picture_facts(tmp_path / "a.png").notes == ("a.png is transparent in parts, which are shown on white",)
    pixels[..., 3] = 255  # an alpha channel that hides nothing
    Image.fromarray(pixels).save(tmp_path / "b.png")
    assert picture_facts(tmp_path / "b.png").notes == ()


def test_exif_turns_the_picture(tmp_path):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 32, 3), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "a.png", exif=exif)
    facts = picture_facts(tmp_path / "a.png")
    assert (facts.height, facts.width) == (32, 20) and "EXIF" in facts.notes[0]
    np.testing.assert_array_equal(read(tmp_path / "a.png"), np.rot90(np.asarray(image), -1))


@pytest.mark.parametrize(
    ("size", "said"),
    [((1, 1), "1×1 pixels: too small"), ((9000, 20), r"9000×20 pixels: too large. Sides from 16 to 8,192")],
)
def test_sides_out_of_the_limits_are_refused(tmp_path, size, said):
    Image.new("L", size).save(tmp_path / "a.png")
    with pytest.raises(ConfigError, match=said):
        picture_facts(tmp_path / "a.png")


def test_a_picture_of_20000_pixels_is_refused_without_being_decoded(tmp_path, monkeypatch):
    # As a PNG of a few bytes: its header alone is true.
    Image.new("1", (20, 20)).save(tmp_path / "a.png")
    data = bytearray((tmp_path / "a.png").read_bytes())
    import struct
    import zlib

    data[16:24] = struct.pack(">II", 20_000, 20_000)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    (tmp_path / "a.png").write_bytes(data)
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ConfigError, match="too large: sides of at most 8,192"):
            picture_facts(tmp_path / "a.png")


def test_a_damaged_picture_is_refused(tmp_path):
    path = picture(tmp_path / "a.png", (64, 64))
    path.write_bytes(path.read_bytes()[:-3000])
    with pytest.raises(ConfigError, match=r"a.png is damaged and cannot be read as a picture"):
        picture_facts(path)
    path.write_text("no picture")
    assert not is_picture(path)
    with pytest.raises(ConfigError, match=r"a.png is no picture in a format that is read here: PNG, JPEG"):
        picture_facts(path)


def gif(path: Path, frames: int = 3) -> Path:
    pictures = [Image.new("RGB", (32, 16), (80 * n, 0, 0)) for n in range(frames)]
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=250)
    return path


def test_an_animation_is_a_video_too(tmp_path):
    path = gif(tmp_path / "a.gif")
    assert (read(path)[..., 0] == 0).all()
    facts = video_facts(path, 10)
    assert (facts.frames, facts.height, facts.width, facts.fps) == (3, 16, 32, 4)
    assert [np.asarray(frame)[0, 0, 0] for frame in read_video(path, 10)] == [0, 80, 160]
    assert len(list(read_video(path, 2))) == 2


def test_a_video_has_its_frames_size_and_rate(tmp_path):
    path = video(tmp_path / "a.mp4", 12, fps=12)
    facts = video_facts(path, 100)
    assert (facts.height, facts.width, facts.frames, facts.fps, facts.notes) == (32, 48, 12, 12.0, ())
    grey = [int(np.asarray(frame).mean().round()) for frame in read_video(path, 100)]
    assert np.abs(np.subtract(grey, np.arange(12) * 20)).max() <= 2
    assert video_facts(path, 5).frames == 5


def test_a_video_that_breaks_off_keeps_what_came_before(tmp_path):
    path = tmp_path / "a.mp4"
    command = [ffmpeg_path(), "-loglevel", "error", "-f", "lavfi", "-i", "testsrc=size=64x48:rate=12", "-t", "4"]
    subprocess.run([*command, "-pix_fmt", "yuv420p", "-g", "6", "-movflags", "+faststart", str(path)], check=True)
    whole = [np.asarray(frame) for frame in read_video(path, 100)]
    assert len(whole) == 48
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 6 // 10])
    facts = video_facts(path, 100)
    assert 6 < facts.frames < 40 and f"a.mp4 is damaged after {facts.frames} frames, which are used" in facts.notes[0]
    kept = [np.asarray(frame) for frame in read_video(path, 100)]
    np.testing.assert_array_equal(kept, whole[: facts.frames])


def test_what_is_no_video_is_refused(tmp_path):
    def refused(path: Path, said: str) -> None:
        with pytest.raises(ConfigError, match=said):
            video_facts(path, 10)

    (tmp_path / "text.mp4").write_text("hello " * 100)
    refused(tmp_path / "text.mp4", "cannot be read as a video: no frame of it decodes")
    refused(picture(tmp_path / "still.png"), "is one picture and no video")
    sound = tmp_path / "sound.m4a"
    subprocess.run([ffmpeg_path(), "-loglevel", "error", "-f", "lavfi", "-i", "sine=d=0.2", str(sound)], check=True)
    refused(sound, "holds no video frames")
    other = video(tmp_path / "codec.mp4", 3)
    other.write_bytes(other.read_bytes().replace(b"avc1", b"zz99"))
    refused(other, "of a codec that this ffmpeg does not know")
    playlist = tmp_path / "list.m3u8"
    playlist.write_text(f"#EXTM3U\n#EXTINF:1,\n{video(tmp_path / 'in.mp4', 3)}\n")
    refused(playlist, "cannot be read as a video")
