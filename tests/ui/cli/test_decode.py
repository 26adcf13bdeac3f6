"""`--decode tiny=PATH`: clips, streams and batches that a tiny autoencoder decodes, and the same again."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import tiny_wan
from causal_checkpoints import random_lora
from safetensors.torch import save_file
from tiny_autoencoders import fitting_pipeline, published_weights
from typer.testing import CliRunner

from tilewise.pipelines.batch.manifest import read_manifest
from tilewise.pipelines.media.video import read_settings
from tilewise.ui.cli.app import app

PROMPT = "a red circle moving left"
RECIPE = {"chunk": 2, "window": 6, "sink": 2, "height": 32, "width": 48, "fps": 8, "timesteps": [1000, 500]}
SMALL = ["--height", 32, "--width", 48, "--frames", 9, "--steps", 1, "--guidance", 1, "--method", "dense"]
KINDS = {"clip": SMALL, "stream": ["--stream", "--seconds", 1.5]}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A tiny model with 8 pixels and 4 frames a latent, and a causal LoRA in its folder."""
    folder = tmp_path_factory.mktemp("fitting") / "m"
    fitting_pipeline().save_pretrained(folder)
    (folder / "tilewise.json").write_text(json.dumps(tiny_wan.NATIVE))
    (folder / "causal").mkdir()
    save_file(random_lora(5, width=32), folder / "causal" / "causal_lora.safetensors")
    (folder / "causal" / "recipe.json").write_text(json.dumps(RECIPE))
    return folder


@pytest.fixture
def file(tmp_path) -> Path:
    save_file(published_weights(1), tmp_path / "taew2_1.safetensors")
    return tmp_path / "taew2_1.safetensors"


def run(*words: object, command: str = "generate"):
    return CliRunner().invoke(app, [command, *map(str, words)], env={"COLUMNS": "400"})


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_clip_again(model, file, tmp_path, kind):
    words = [PROMPT, "--model", model, *KINDS[kind]]
    dry = run(*words, "--decode", f"tiny={file}", "--dry-run")
    assert dry.exit_code == 0 and f"tiny={file}@sha256:" in dry.stdout
    clip = tmp_path / "clip.mp4"
    made = run(*words, "--decode", f"tiny={file}", "--out", clip)
    assert made.exit_code == 0, made.output
    told = read_settings(clip)
    assert told == json.loads(clip.with_suffix(".json").read_text())
    assert told["decode"].startswith(f"tiny={file}@sha256:")
    assert f"SHA-256 {told['decode'].partition('@sha256:')[2][:12]}…" in made.stdout
    again = run("--from", clip, "--out", tmp_path / "again.mp4")
    assert again.exit_code == 0 and f"frames of {clip}: the same, bit for bit" in again.stdout
    save_file(published_weights(2), file)
    changed = run("--from", clip, "--out", tmp_path / "changed.mp4")
    assert changed.exit_code == 2 and "has changed" in changed.stderr and not (tmp_path / "changed.mp4").exists()
    for decode in (f"tiny={file}", "vae"):
        other = run("--from", clip, "--decode", decode, "--dry-run")
        assert other.exit_code == 0 and re.search(rf"decode +│? *{re.escape(decode)}", other.stdout), other.output


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--decode", "taew2_1.pth"], 2, "decode takes vae"),
        (["--decode", "tiny=nowhere.pth"], 3, "there is no file"),
        (["--decode", "tiny=nowhere.pth", "--stream", "--seconds", 1], 3, "there is no file"),
        (["--decode", "tiny=nowhere.pth", "--highres", "--height", 96, "--width", 96], 2, "highres decodes with the model's own"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_said_before_weights_are_read(model, words, code, message):
    result = run(PROMPT, "--model", model, *words, "--dry-run")
    assert result.exit_code == code and message in result.stderr


def test_a_batch_knows_decoders_by_their_contents(model, file, tmp_path):
    moved = tmp_path / "moved" / "taew2_1.safetensors"
    moved.parent.mkdir()
    save_file(published_weights(1), moved)
    other = tmp_path / "other.safetensors"
    save_file(published_weights(2), other)
    lines = [{"decode": f"tiny={path}"} for path in (file, moved, other)] + [{}, {"decode": "vae"}]
    (tmp_path / "in.jsonl").write_text("\n".join(json.dumps({"prompt": PROMPT, **line}) for line in lines))
    out = tmp_path / "out"
    result = run(tmp_path / "in.jsonl", "--model", model, *SMALL, "--out", out, command="batch")
    assert result.exit_code == 0, result.output
    made = list(read_manifest(out).values())
    assert [line["decode"].partition("@")[0] for line in made] == [f"tiny={file}", f"tiny={other}", "vae"]
    assert len({line["run"]["frames_sha256"] for line in made}) == 3
