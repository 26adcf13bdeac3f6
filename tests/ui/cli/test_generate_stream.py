"""`tilewise generate --stream`: a growing file, changes of the prompt, the same stream again, Ctrl-C, and what is refused."""

from __future__ import annotations

import functools
import hashlib
import io
import json
import re
import resource
import shutil
import signal
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from causal_checkpoints import random_lora, save_causal_pipeline, with_lora
from PIL import Image
from rich.console import Console
from safetensors.torch import save_file
from tiny_conditioned import picture
from typer.testing import CliRunner

import tilewise
from tilewise.pipelines.conditioning.inputs import fitted
from tilewise.pipelines.loading.load import load_pipeline, load_skeleton
from tilewise.pipelines.loading.loras import LoraChoice
from tilewise.pipelines.media.video import read_frames, read_settings, write_video
from tilewise.pipelines.streaming import preparation
from tilewise.pipelines.streaming.record import Progress
from tilewise.pipelines.streaming.settings import StreamSettings
from tilewise.ui.cli import generate_stream
from tilewise.ui.cli.app import app
from tilewise.ui.cli.stream_progress import stream_progress

RED, BLUE = "a red circle moving left", "a blue square moving right"
RECIPE = {"chunk": 2, "window": 6, "sink": 2, "height": 32, "width": 48, "fps": 8, "timesteps": [1000, 500]}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A tiny model with a causal LoRA in its folder."""
    return save_causal_pipeline(tmp_path_factory.mktemp("causal") / "m", RECIPE)


@pytest.fixture(scope="module")
def clip(model, tmp_path_factory) -> Path:
    """A stream of 27 frames whose prompt changes in the middle."""
    file = tmp_path_factory.mktemp("clips") / "clip.mp4"
    words = ["--model", model, "--seconds", 27 / 8, "--prompt-at", f"1.3s={BLUE}", "--seed", 7, "--sink", 1]
    result = run(RED, "--stream", *words, "--out", file)
    assert result.exit_code == 0, result.output
    assert re.search(
        r"stream 3/27 frames, 0\.4 s of 3\.4 s out, [\d.]+ FPS, -?[\d.]+ s (ahead of|behind) playback", result.stderr
    )
    assert "stream 27/27 frames" in result.stderr and f"wrote {file}" in result.stdout
    return file


def run(*words: object):
    return CliRunner().invoke(app, ["generate", *map(str, words)])


def expected(model: Path, **kwargs) -> np.ndarray:
    """The same through the library: a change at 1.3 s is frame 10.4, and the chunk at frame 11 is the first after it."""
    pipe = load_pipeline(model)
    pipe, recipe = tilewise.load_causal_checkpoint(model / "causal" / "causal_lora.safetensors", pipe)
    frames = []
    with tilewise.stream(
        pipe, RED, recipe=recipe.replace(sink=1), seconds=27 / 8, seed=7, max_sequence_length=16
    ) as video:
        for chunk in video:
            frames.append(chunk.frames)
            if video.frames_out == 11:
                video.set_prompt(BLUE)
    return np.concatenate(frames)


def test_the_file_has_the_stream_and_what_makes_it_again(model, clip):
    frames = expected(model)
    written = read_frames(clip)
    assert written.shape == (27, 32, 48, 3)
    luma = np.array([0.2126, 0.7152, 0.0722])  # colours are stored at half the resolution, and these are noise
    assert np.mean((written @ luma - frames @ luma) ** 2) < 255**2 / 10**2.8
    record = read_settings(clip)
    assert record == json.loads(clip.with_suffix(".json").read_text())
    assert (record["prompt"], record["seed"], record["frames"], record["steps"]) == (RED, 7, 27, 2)
    told = record["run"]
    assert told["stream"]["recipe"]["sink"] == 1 and told["stream"]["recipe"]["window"] == 6
    assert told["stream"]["settings"]["prompt_at"] == [f"1.3s={BLUE}"]
    assert told["frames_sha256"] == hashlib.sha256(frames.tobytes()).hexdigest()
    assert set(told["seconds"]) == {"load", "first", "denoise", "decode", "total"} and told["device"] == "cpu"


def test_the_same_stream_again_and_another_one(clip, tmp_path):
    again = run("--from", clip, "--out", tmp_path / "again.mp4")
    assert again.exit_code == 0, again.output
    assert f"frames of {clip}: the same, bit for bit" in again.stdout
    first, second = read_settings(clip), read_settings(tmp_path / "again.mp4")
    assert second["run"]["stream"] == first["run"]["stream"]
    assert second["run"]["frames_sha256"] == first["run"]["frames_sha256"]

    words = ["--from", clip, "--stream", "--method", "sta", "--density", "0.5", "--window", "6", "--sink", 2]
    other = run(*words, "--prompt-change", "flush", "--storage", "fp8", "--out", tmp_path / "other.mp4")
    assert other.exit_code == 0, other.output
    assert "bit for bit" not in other.stdout and "fallbacks" not in other.stderr
    record = read_settings(tmp_path / "other.mp4")
    assert record["seed"] == 7 and record["method"]["method"]["name"] == "sta"
    assert record["run"]["stream"]["recipe"]["sink"] == 2
    told = record["run"]["stream"]["settings"]
    assert (told["prompt_change"], told["storage"]) == ("flush", "fp8") and "stored as fp8" in other.stdout
    assert record["run"]["cache_bytes"]["latent"] < first["run"]["cache_bytes"]["latent"] / 3
    assert record["run"]["frames_sha256"] != first["run"]["frames_sha256"] and record["run"]["summary"] is not None


def test_a_stream_begins_with_a_picture_and_again(model, tmp_path):
    start, out = picture(tmp_path / "start.png", (60, 32)), tmp_path / "c.mp4"
    result = run(RED, "--stream", "--model", model, "--seconds", 1, "--image", start, "--out", out)
    assert result.exit_code == 0, result.output
    assert "start.png is 60×32 and the clip 48×32: 20% of it is cut off at left and right" in result.stderr
    pipe, recipe = tilewise.load_causal_checkpoint(model / "causal" / "causal_lora.safetensors", load_pipeline(model))
    shown = np.asarray(fitted(Image.open(start), 32, 48))
    with tilewise.stream(pipe, RED, recipe=recipe, seconds=1, image=shown, max_sequence_length=16) as video:
        expected = np.concatenate([chunk.frames for chunk in video])
    told = read_settings(out)
    assert told["run"]["frames_sha256"] == hashlib.sha256(expected.tobytes()).hexdigest()
    assert told["image"].startswith(f"{start}@sha256:")
    again = run("--from", out, "--out", tmp_path / "again.mp4")
    assert f"frames of {out}: the same, bit for bit" in again.stdout, again.output
    picture(start, (60, 32), seed=3)
    changed = run("--from", out, "--dry-run")
    assert changed.exit_code == 2 and "start.png has changed" in changed.stderr


def test_a_video_is_changed_and_again(model, tmp_path):
    """A file that is broken in the middle: what comes before is used, and as many frames come out."""
    frames = np.random.default_rng(0).integers(0, 256, (20, 32, 60, 3), np.uint8)
    video, broken, out = (tmp_path / name for name in ("in.mp4", "broken.mp4", "out.mp4"))
    write_video(video, frames, 10)
    data = video.read_bytes()
    at = data.index(b"mdat") + 4
    middle = at + (len(data) - at) // 2
    broken.write_bytes(data[:middle] + bytes(3000) + data[middle + 3000 :])
    result = run(RED, "--stream", "--model", model, "--video", broken, "--strength", 0.4, "--out", out)
    assert result.exit_code == 0, result.output
    told = " ".join(result.stderr.split())
    assert "broken.mp4 is damaged after" in told
    assert "broken.mp4 is 60×32 and the clip 48×32: 20% of it is cut off at left and right" in told
    assert "the video has 10 frames a second, and the model was made for 8: every frame is kept" in told
    assert "strength 0.4, latency of a chunk at most" in result.stdout
    settings = read_settings(out)
    kept = settings["frames"]
    assert 0 < kept < 20 and settings["fps"] == 10 and read_frames(out).shape == (kept, 32, 48, 3)
    assert f"damaged after {kept} frame" in told
    again = run("--from", out, "--out", tmp_path / "again.mp4")
    assert f"frames of {out}: the same, bit for bit" in again.stdout, again.output
    words = ["--video", broken, "--way", "renoised", "--window", 3, "--sink", 1, "--strength", 0.7]
    windows = run(RED, "--stream", "--model", model, *words, "--steps", 2, "--out", tmp_path / "windows.mp4")
    assert windows.exit_code == 0, windows.output
    assert read_frames(tmp_path / "windows.mp4").shape == (kept, 64, 64, 3) and "strength 0.7" in windows.stdout
    again = run("--from", tmp_path / "windows.mp4", "--out", tmp_path / "windows_again.mp4")
    assert "the same, bit for bit" in again.stdout, again.output
    short = run(RED, "--stream", "--model", model, "--video", video, "--seconds", 0.5, "--out", tmp_path / "short.mp4")
    assert short.exit_code == 0 and read_settings(tmp_path / "short.mp4")["frames"] == 5, short.output
    for words, said in (
        (["--strength", 0.5, "--seconds", 1], "give --video too"),
        (["--video", video, "--way", "prefix", "--window", 3, "--overlap", 3], "leaves nothing new in a window of 3"),
        (["--video", video, "--image", picture(tmp_path / "a.png", (32, 32))], "its own first frame"),
    ):
        refused = run(RED, "--stream", "--model", model, *words, "--dry-run")
        assert refused.exit_code == 2 and said in " ".join(refused.stderr.split()), refused.output


def test_a_prompt_that_comes_too_late_is_told(model, tmp_path):
    words = ["--seconds", 1.25, "--prompt-at", f"1.2={BLUE}", "--recipe", "self-forcing", "--chunk", 2, "--window", 4]
    result = run(RED, "--stream", "--model", model, *words, "--height", 32, "--width", 32, "--out", tmp_path / "c.mp4")
    assert result.exit_code == 0, result.output
    assert f"the prompt '{BLUE}' was to come after the last chunk had begun" in result.stderr
    record = read_settings(tmp_path / "c.mp4")
    assert (record["frames"], record["fps"], record["steps"]) == (20, 16, 4)  # the recipe's
    assert record["run"]["stream"]["recipe"]["name"] == "self-forcing"


def test_dry_run_writes_nothing(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["--model", model, "--seconds", 4, "--prompt-at", f"2s={BLUE}", "--dry-run"]
    result = run(RED, "--stream", *words)
    assert result.exit_code == 0, result.output
    for word in ("causal recipe causal_lora", "causal_lora.safetensors", "window", f"from 2 s on: {BLUE}", "32"):
        assert word in result.stdout
    cache = re.search(r"memory: [\d.]+ MiB needed on cpu \(weights .*, KV cache ([\d.]+ KiB), .* free", result.stdout)
    assert cache and "dense blocks 0-1: the method is dense" in re.sub(r"[\s│]+", " ", result.stdout)
    result = run(RED, "--stream", *words, "--method", "sta", "--sink", 1)
    assert "0-1: a sink of 1 latent frames is no multiple of a chunk of 2" in result.stdout
    assert list(tmp_path.iterdir()) == []
    made = run(RED, "--stream", "--model", model, "--seconds", 0.1, "--out", "c.mp4")
    assert f"{cache[1]}, " in made.stdout and read_settings("c.mp4")["run"]["cache_bytes"]["total"] > 0


def test_the_bundled_model_streams_by_itself(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run(RED, "--stream", "--seconds", 4, "--dry-run")
    assert result.exit_code == 0, result.output
    assert "causal recipe demo-causal" in result.stdout and "causal_lora.safetensors" in result.stdout


def test_progress_on_a_terminal_and_in_a_pipe():
    def shown(**kind) -> str:
        out = io.StringIO()
        with stream_progress(Console(file=out, width=100, **kind), fps=8.0) as progress:
            for frames in (3, 7, 8):
                progress(Progress(frames, 8, 4.25, ahead=0.5 - frames / 7))
        return out.getvalue()

    last = "stream 8/8 frames, 1.0 s of 1.0 s out, 4.25 FPS, 0.6 s behind playback"
    assert shown().splitlines() == ["stream 3/8 frames, 0.4 s of 1.0 s out, 4.25 FPS, 0.1 s ahead of playback", last]
    assert last in shown(force_terminal=True)


BAD = {
    "no length": ([], 2, "give --seconds"),
    "years": (["--seconds", "1e308"], 2, "seconds must be at most 10,000,000, not 1e+308"),
    "fps": (["--fps", "1e308"], 2, "fps must be a number from 0.01 to 1000"),
    "no block": (["--method", "sta", "--blocks", "9:"], 2, "selects none of the 2 blocks"),
    "length 0": (["--seconds", "0"], 2, "seconds must be a number above 0"),
    "window below chunk": (["--window", "2", "--chunk", "4"], 2, "a window of 2 latents is shorter than a chunk of 4"),
    "sink too long": (["--sink", "5"], 2, "do not fit into a window of 6"),
    "window of a clip": (["--window", "3,3,3"], 2, "one whole number with --stream"),
    "policy without its sink": (["--policy", "ema", "--sink", "0"], 2, "needs a sink"),
    "unknown policy": (["--policy", "emma"], 2, "Did you mean 'ema'"),
    "sink position": (["--sink-position", "nowhere"], 2, "clamped"),
    "times that fall": (["--prompt-at", "2s=a", "--prompt-at", "1s=b"], 2, "must rise"),
    "time past the end": (["--prompt-at", "4s=a"], 2, "past the end of the video, 4 s"),
    "time 0": (["--prompt-at", "0s=a"], 2, "begins with the first prompt"),
    "no time": (["--prompt-at", "a red circle"], 2, "takes TIME=TEXT"),
    "no text": (["--prompt-at", "1s= "], 2, "takes TIME=TEXT"),
    "change": (["--prompt-change", "cut"], 2, "recache"),
    "size": (["--height", "30"], 2, "nearest is"),
    "picture": (["--out", "c.png"], 2, "written as .mp4"),
    "suffix": (["--out", "c.avi"], 2, ".mp4"),
    "directory": (["--out", "."], 2, "directory"),
    "frames": (["--frames", "9"], 2, "a stream's length is seconds"),
    "steps": (["--steps", "9"], 2, "--steps cannot be used with --stream"),
    "highres": (["--highres"], 2, "--highres cannot be used with --stream"),
    "refresh": (["--refresh", "2"], 2, "--refresh cannot be used with --stream"),
    "compare": (["--compare", "dense"], 2, "--compare cannot be used"),
    "negative": (["--negative", "blurry"], 2, "has no guidance"),
    "recipe": (["--recipe", "self-forcin"], 2, "Did you mean 'self-forcing'"),
    "no such checkpoint": (["--causal", "nowhere.pt"], 3, "there is no causal checkpoint nowhere.pt"),
    "no such lora": (["--lora", "nowhere.pt"], 3, "there is no LoRA file nowhere.pt"),
    "device": (["--decode-device", "cuda:99"], 3, "cuda:99"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case, model, tmp_path, monkeypatch):
    words, code, message = BAD[case]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(preparation, "load_pipeline", lambda *_, **__: pytest.fail("the weights are read"))
    length = [] if "length" in case else ["--seconds", 4]
    refuse(message, code, RED, "--stream", "--model", model, *length, *words)
    assert list(tmp_path.iterdir()) == []


def test_loras_on_top_of_a_causal_checkpoint(model, tmp_path):
    """Each with its weight, after the causal one; the same words as for a clip."""
    lora = {name: 0.1 * weight for name, weight in random_lora(9, width=32).items()}
    save_file(lora, tmp_path / "style.safetensors")
    loras = ["--lora", f"{tmp_path / 'style.safetensors'}:0.5", "--lora", f"{tmp_path / 'style.safetensors'}:0.25"]
    result = run(RED, "--stream", "--model", model, "--seconds", 0.3, *loras, "--out", tmp_path / "a.mp4")
    assert result.exit_code == 0, result.output
    record = read_settings(tmp_path / "a.mp4")
    assert [LoraChoice.parse(said).weight for said in record["lora"]] == [0.5, 0.25]
    skeleton = load_skeleton(model)
    options = StreamSettings(seconds=0.3)
    both = preparation.load(preparation.prepare(skeleton, RED, options, model=str(model), lora=record["lora"]))
    plain = preparation.load(preparation.prepare(skeleton, RED, options, model=str(model)))
    wanted = with_lora(plain.transformer.state_dict(), lora, 0.75)
    for name, weight in both.transformer.state_dict().items():
        torch.testing.assert_close(weight.double(), wanted[name].double(), rtol=1e-5, atol=1e-5)


def refuse(message: str, code: int, *words: object) -> None:
    result = run(*words)
    assert result.exit_code == code, result.output
    assert message in re.sub(r"[\s│]+", " ", result.stderr)
    assert result.stdout == "" and "Traceback" not in result.stderr


def test_models_without_a_causal_checkpoint(model, tiny_pipe_dir, clip, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(preparation, "load_pipeline", lambda *_, **__: pytest.fail("the weights are read"))
    words = [RED, "--stream", "--model", tiny_pipe_dir, "--seconds", 4]
    refuse("give one with --causal", 2, *words, "--policy", "ema")
    refuse("there is no LoRA file", 3, *words, "--recipe", "self-forcing", "--lora", "x.safetensors")
    refuse("give --stream too", 2, RED, "--model", model, "--seconds", 4)
    refuse("give --stream too", 2, RED, "--model", model, "--prompt-at", "1s=a")
    refuse("would be replaced", 2, "--from", clip, "--out", clip)
    damaged = tmp_path / "damaged.safetensors"
    shutil.copy(model / "causal" / "causal_lora.safetensors", damaged)
    damaged.write_bytes(damaged.read_bytes()[:900])
    refuse("damaged.safetensors is damaged", 3, *words, "--causal", damaged, "--recipe", "self-forcing")


def test_a_clip_is_no_stream(tiny_pipe_dir, tmp_path):
    file = tmp_path / "clip.mp4"
    assert (
        run(RED, "--model", tiny_pipe_dir, "--frames", 5, "--steps", 1, "--method", "dense", "--out", file).exit_code
        == 0
    )
    refuse("is no stream", 2, "--from", file, "--stream", "--out", tmp_path / "other.mp4")


def streaming_until(frames: int, then: Callable[[], None], model: Path, file: Path, monkeypatch):
    """The command of an endless stream, in which something happens after so many frames."""

    @contextmanager
    def watched(notes, fps):
        yield lambda at: then() if at.frames == frames else None

    monkeypatch.setattr(generate_stream, "stream_progress", watched)
    changes = ["--prompt-at", f"0.5s={BLUE}", "--prompt-at", f"99999s={RED}"]
    return run(RED, "--stream", "--seconds", 100000, "--model", model, *changes, "--out", file)


def test_ctrl_c_ends_the_stream_after_a_chunk(model, tmp_path, monkeypatch):
    file = tmp_path / "c.mp4"
    result = streaming_until(7, lambda: signal.raise_signal(signal.SIGINT), model, file, monkeypatch)
    assert result.exit_code == 130, result.output
    assert "finishing this chunk" in result.stderr and "Traceback" not in result.stderr
    assert "interrupted after 7 of 800,000 frames; the file is complete" in result.stderr
    assert f"wrote {file}" in result.stdout
    assert len(read_frames(file)) == 7
    record = read_settings(file)
    assert record == json.loads(file.with_suffix(".json").read_text())
    told = record["run"]["stream"]["settings"]
    assert (record["frames"], told["seconds"], told["prompt_at"]) == (7, 7 / 8, [f"0.5s={BLUE}"])
    monkeypatch.undo()
    again = run("--from", file, "--out", tmp_path / "again.mp4")
    assert again.exit_code == 0 and "the same, bit for bit" in again.stdout, again.output


def twice() -> None:
    signal.raise_signal(signal.SIGINT)
    signal.raise_signal(signal.SIGINT)


def terminate() -> None:
    raise SystemExit(143)  # what the program makes of SIGTERM


def fail() -> None:
    raise RuntimeError("the GPU is gone")


@pytest.mark.parametrize(("then", "code"), [(twice, 130), (terminate, 143), (fail, 1)])
def test_what_was_made_is_in_the_file_however_the_stream_ends(then, code, model, tmp_path, monkeypatch):
    file = tmp_path / "c.mp4"
    result = streaming_until(7, then, model, file, monkeypatch)
    assert result.exit_code == code, result.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.json", "c.mp4"]
    assert len(read_frames(file)) == 7
    record = read_settings(file)  # of the whole stream, as it was begun
    assert record == json.loads(file.with_suffix(".json").read_text())
    assert record["frames"] == 800000 and record["run"]["stream"]["settings"]["seconds"] == 100000


def test_a_full_disk_in_mid_stream(model, tmp_path, monkeypatch):
    """No file may grow past 9 KB: ended by one sentence, and what fits plays."""
    limits, file = resource.getrlimit(resource.RLIMIT_FSIZE), tmp_path / "c.mp4"
    try:
        fill = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (9_000, limits[1]))
        result = streaming_until(7, fill, model, file, monkeypatch)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert result.exit_code == 1, result.output
    told = [line for line in result.stderr.splitlines() if not line.startswith("stream ")]
    assert told == [f"tilewise: could not write {file}: [Errno 27] File too large; what is in it plays"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.json", "c.mp4"]
    frames = len(read_frames(file))
    assert frames >= 4 and frames % 4 == 0 and file.stat().st_size <= 9_000  # fragments of half a second
    assert read_settings(file) == json.loads(file.with_suffix(".json").read_text())
