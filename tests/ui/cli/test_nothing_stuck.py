"""What cannot fit is refused with numbers before it is begun; out-of-memory, unsafe weights and signals end in a sentence."""

from __future__ import annotations

import json
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from tilewise.pipelines.memory import fit
from tilewise.ui.cli import generate as generating
from tilewise.ui.cli.app import app

SMALL = ["--height", 32, "--width", 32, "--frames", 1, "--steps", 1]


class Print:
    """A pickle of it calls `print`."""

    def __reduce__(self):
        return print, ("EXECUTED",)


def run(*words: object):
    return CliRunner().invoke(app, list(map(str, words)))


def message(result, code: int) -> str:
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.stderr and "TILEWISE_DEBUG" not in result.stderr
    return result.stderr


LARGE = {"height": 2048, "width": 2048, "frames": 101}  # a forward of the tiny model takes 6.6 GiB


@pytest.fixture
def one_gib(monkeypatch) -> None:
    monkeypatch.setattr(fit, "device_bytes", lambda device: 2**30)


@pytest.mark.usefixtures("one_gib")
@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
def test_a_clip_that_cannot_fit_is_refused_with_numbers(dry, tiny_pipe_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    size = [word for name, value in LARGE.items() for word in (f"--{name}", value)]
    size += ["--method", "dense"]
    told = message(run("generate", "x", "--model", tiny_pipe_dir, *size, *dry), 2)
    assert re.search(
        r"a clip of 2048×2048 pixels and 101 frames does not fit: it needs about 6\.61 GiB, and cpu has 1\.00 GiB \(weights "
        r"0\.00 GiB, then 6\.61 GiB denoising, .* decoding\); give a smaller size or fewer frames", told
    )  # fmt: skip
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("one_gib")
def test_every_line_of_a_batch_that_cannot_fit_is_named_before_any_is_made(tiny_pipe_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = [{"prompt": "a"}, {"prompt": "b", "method": "dense", **LARGE}, {"prompt": "c"}]
    Path("p.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    told = message(run("batch", "p.jsonl", "--model", tiny_pipe_dir, *SMALL), 2)
    assert re.search(r"line 2: a clip of 2048×2048 pixels .* does not fit: it needs about", told)
    assert "line 1" not in told and "line 3" not in told and not Path("outputs").exists()


def test_more_tokens_than_any_device_holds(tiny_pipe_dir):
    told = message(run("explain", "--model", tiny_pipe_dir, "--height", 16384, "--width", 16384, "--frames", 17), 2)
    assert "16384×16384 pixels and 17 frames are 37,748,736 tokens, which no device can hold" in told


@pytest.mark.parametrize("command", ["generate", "batch"])
def test_a_dry_run_shows_the_estimate(command, tiny_pipe_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("p.txt").write_text("x\n")
    result = run(command, "p.txt" if command == "batch" else "x", "--model", tiny_pipe_dir, *SMALL, "--dry-run")
    estimate = (
        r"memory: about [\d.]+ GiB of [\d.]+ GiB \(weights [\d.]+ GiB, then [\d.]+ GiB denoising, [\d.]+ GiB decoding\)"
    )
    assert re.search(estimate, result.stdout), result.output


def test_what_would_fit_with_less_is_made_where_less_may_be_taken(tiny_pipe_dir, tmp_path, monkeypatch):
    """With weights and a forward there, and no room for the decode in one piece, only --retry-oom is left."""
    monkeypatch.chdir(tmp_path)
    Path("p.txt").write_text("x\n")
    monkeypatch.setattr(fit, "device_bytes", lambda device: 10**6)
    words = ["batch", "p.txt", "--model", tiny_pipe_dir, *SMALL, "--dry-run"]
    monkeypatch.setattr(fit, "estimate_memory", lambda *_, **__: fit.MemoryEstimate(10**5, 10**5, 10**8, ()))
    assert "does not fit" in message(run(*words), 2)
    assert "does not fit" not in run(*words, "--retry-oom").stderr


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has"), "(20.00 GiB more"),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:1] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
                      "allocate 800000000000 bytes. Error code 12"), "(800000000000 bytes more"),
        (MemoryError(), "out of memory: give fewer frames"),
    ],
)  # fmt: skip
def test_out_of_memory_is_one_sentence_that_says_what_to_lower(error, told, tiny_pipe_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def fail(*_):
        raise error

    monkeypatch.setattr(generating, "generate", fail)
    said = message(run("generate", "x", "--model", tiny_pipe_dir, *SMALL), 1)
    line = next(line for line in said.splitlines() if line.startswith("tilewise: "))
    assert told in line and "fewer frames or a smaller size" in line and said.endswith(line + "\n")


@pytest.mark.parametrize("kind", ["pickle of a function", "damaged"])
def test_a_text_encoder_that_is_no_plain_weights_is_not_loaded(kind, tiny_pipe_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = shutil.copytree(tiny_pipe_dir, tmp_path / "m")
    (model / "text_encoder" / "model.safetensors").unlink()
    file = model / "text_encoder" / "pytorch_model.bin"
    if kind == "damaged":
        file.write_bytes(b"garbage")
    else:
        torch.save({"w": Print()}, file)
    result = run("generate", "x", "--model", model, *SMALL)
    told = message(result, 3)
    assert "could not load the model" in told and "Take the model as .safetensors" in told
    assert "weights_only" not in result.output and "EXECUTED" not in result.output


def test_a_plot_that_runs_the_model_shows_how_far_it_is(tiny_pipe_dir, tmp_path):
    words = ["--model", tiny_pipe_dir, "--method", "draft", "--set", "min_tokens=0", "--plot", tmp_path / "p.png"]
    result = run("explain", *words)
    assert result.exit_code == 0, result.output
    assert "denoise 4/4" in result.stderr and (tmp_path / "p.png").is_file()


def test_a_termination_is_one_sentence(tiny_pipe_dir, tmp_path, monkeypatch):
    from tilewise.ui.common import exit_codes

    def terminated(*_):
        exit_codes._terminate(signal.SIGTERM, None)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(generating, "generate", terminated)
    result = run("generate", "x", "--model", tiny_pipe_dir, *SMALL)
    assert result.exit_code == 143
    assert [line for line in result.stderr.splitlines() if line.startswith("tilewise")] == [
        "tilewise: terminated; nothing was left half-written"
    ]
