"""Clips of one frame: what image models make, as png files, through the library, the command line and a batch."""

from __future__ import annotations

import json

import numpy as np
import pytest
import test_models as models
import tiny_wan
import torch
from diffusers import FluxPipeline
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel
from typer.testing import CliRunner

from tilewise.pipelines.batch.manifest import read_manifest
from tilewise.pipelines.errors import OutputError
from tilewise.pipelines.generation.compare import compare
from tilewise.pipelines.generation.generate import generate
from tilewise.pipelines.generation.resolve import resolve_settings
from tilewise.pipelines.generation.stock_call import call_arguments
from tilewise.pipelines.loading.load import cast_skeleton, load_pipeline, load_skeleton
from tilewise.pipelines.media.files import suffix_of
from tilewise.pipelines.media.image import read_still, write_still
from tilewise.pipelines.media.video import read_frames, read_settings, write_settings, write_video
from tilewise.ui.cli.app import app
from tilewise.ui.web.forms.snippets import python_program


@pytest.mark.parametrize("kind", [models.flux, models.sd3, models.qwen_image], ids=lambda kind: kind.__name__)
def test_image_pipelines_make_clips_of_one_frame(kind):
    pipe, size = kind()
    pipe.set_progress_bar_config(disable=True)
    settings = resolve_settings(pipe, "a star", method="sta", height=size["height"], width=size["width"], steps=4)
    assert settings.frames == 1
    clip = generate(pipe, settings)
    assert clip.frames.shape == (1, size["height"], size["width"], 3)
    assert clip.summary.density <= 1
    both = compare(pipe, settings)
    assert np.array_equal(both.sparse.frames, clip.frames)


def test_an_image_model_from_a_folder_in_half_precision(tmp_path):
    """Its pipeline gives latents to the VAE as they are: in one type, or not at all."""
    pipe, _ = models.flux()
    clip = CLIPTextConfig(
        vocab_size=64, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    t5 = T5Config(vocab_size=64, d_model=12, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    short = tiny_wan.tiny_tokenizer()
    short.model_max_length = clip.max_position_embeddings
    FluxPipeline(
        pipe.scheduler, pipe.vae, CLIPTextModel(clip), short, T5EncoderModel(t5), tiny_wan.tiny_tokenizer(), pipe.transformer
    ).save_pretrained(tmp_path / "flux")  # fmt: skip
    loaded = load_pipeline(tmp_path / "flux", device="cpu", dtype="bfloat16")
    assert {part.dtype for part in (loaded.vae, loaded.transformer, loaded.text_encoder)} == {torch.bfloat16}
    planned = cast_skeleton(load_skeleton(tmp_path / "flux"), torch.bfloat16)
    assert {part.dtype for part in (planned.vae, planned.transformer)} == {torch.bfloat16}
    size = ("--height", "32", "--width", "48", "--steps", "2", "--device", "cpu")
    for dtype in ("bfloat16", "float32"):
        words = ("--model", tmp_path / "flux", *size, "--dtype", dtype, "--out", tmp_path / f"{dtype}.png")
        done = command("generate", "a star", "--method", "sta", *words)
        assert done.exit_code == 0, done.output
        assert read_frames(tmp_path / f"{dtype}.png").shape == (1, 32, 48, 3)


def test_a_picture_and_its_settings(tmp_path):
    frames = np.random.default_rng(0).integers(0, 256, (1, 33, 35, 3), np.uint8)  # odd sizes stay as they are
    path = write_video(tmp_path / "a.PNG", frames, 8, settings={"prompt": "ä = ;\n"})
    assert np.array_equal(read_frames(path), frames)
    assert read_settings(path) == {"prompt": "ä = ;\n"}
    assert json.loads((tmp_path / "a.PNG.json").read_text("utf-8")) == {"prompt": "ä = ;\n"}
    write_settings(path, {"seed": 1})
    assert np.array_equal(read_frames(path), frames)
    assert read_settings(path) == {"seed": 1}
    assert {file.name for file in tmp_path.iterdir()} == {"a.PNG", "a.PNG.json"}
    plain = write_video(tmp_path / "b.png", frames, 8)
    assert read_settings(plain) is None
    assert not (tmp_path / "b.png.json").exists()


def test_guidance_by_its_other_name():
    """Qwen-Image: without it, one forward a step; with it two, and another picture. Flux keeps its second forward off."""
    pipe, size = models.qwen_image()
    pipe.set_progress_bar_config(disable=True)
    sizes = {"height": size["height"], "width": size["width"], "steps": 2, "method": "dense"}
    assert resolve_settings(pipe, "a star", **sizes).guidance == 4.0
    count, made = [], []
    pipe.transformer.register_forward_pre_hook(lambda *_: count.append(1))
    for guidance in (1.0, 2.0, 6.0):
        made.append((generate(pipe, resolve_settings(pipe, "a star", guidance=guidance, **sizes)).frames, len(count)))
        count.clear()
    assert [forwards for _, forwards in made] == [2, 4, 4]
    assert not np.array_equal(made[1][0], made[2][0])
    assert "true_cfg_scale" not in call_arguments(models.flux()[0], resolve_settings(pipe, "a star", **sizes))


@pytest.mark.parametrize(("kind", "ending"), [(models.flux, "png"), (models.ltx, "mp4")], ids=["image", "clip"])
def test_the_pages_program_runs(kind, ending, tmp_path, monkeypatch):
    pipe, size = kind()
    pipe.set_progress_bar_config(disable=True)
    given = {"height": size["height"], "width": size["width"], "frames": size["frames"], "steps": 2}
    text = python_program(pipe, resolve_settings(pipe, "a star", method="sta", model="tiny", **given), "float32")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tilewise.pipelines.loading.load.load_pipeline", lambda *_, **__: pipe)
    exec(compile(text, "program", "exec"), {})
    assert read_frames(tmp_path / f"clip.{ending}").shape == (size["frames"], size["height"], size["width"], 3)


def test_where_there_is_a_picture_there_are_its_settings(tmp_path):
    frames = np.zeros((1, 4, 4, 3), np.uint8)
    (tmp_path / "a.png.json").mkdir()
    with pytest.raises(OutputError, match=r"could not write .*a\.png"):
        write_video(tmp_path / "a.png", frames, 8, settings={})
    assert [file.name for file in tmp_path.iterdir()] == ["a.png.json"]


def test_what_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"holds one frame, and the clip has 2; give a name that ends in \.mp4"):
        write_still(tmp_path / "a.png", np.zeros((2, 4, 4, 3), np.uint8), None)
    (tmp_path / "b.png").write_text("no picture")
    with pytest.raises(OutputError, match=r"could not read .*b\.png as a picture"):
        read_still(tmp_path / "b.png")
    with pytest.raises(OutputError, match="could not read"):
        read_still(tmp_path / "missing.png")
    Image.new("RGB", (4, 4)).save(tmp_path / "c.png")
    assert read_still(tmp_path / "c.png")[1] is None
    assert (suffix_of(1), suffix_of(2)) == (".png", ".mp4")


SMALL = ("--frames", "1", "--steps", "2", "--device", "cpu")


def command(*words):
    return CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)


def test_commands(tiny_pipe_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = ("--model", tiny_pipe_dir)
    done = command("generate", "a red circle", *model, *SMALL, "--method", "sta", "--compare", "dense")
    assert done.exit_code == 0, done.output
    made = tmp_path / "outputs" / "a-red-circle-0.png"
    assert read_frames(made).shape == (1, 64, 64, 3)
    assert read_frames(made.with_stem(made.stem + "-side-by-side")).shape[2] >= 128
    again = command("generate", "--from", made, "--out", "again.png", "--device", "cpu")
    assert again.exit_code == 0, again.output
    assert np.array_equal(read_frames("again.png"), read_frames(made))
    large = command(
        "generate", "a star", *model, *SMALL, "--highres", "--height", "96", "--width", "64", "--out", "large.png"
    )
    assert large.exit_code == 0, large.output
    assert read_frames("large.png").shape == (1, 96, 64, 3)
    refused = command("generate", "a star", *model, "--frames", "5", "--device", "cpu", "--out", "many.png")
    assert refused.exit_code != 0
    assert "the output is a .mp4 file" in " ".join(refused.output.split())


def test_batch_and_report(tiny_pipe_dir, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red circle\n")
    folder = tmp_path / "out"
    words = ("--model", tiny_pipe_dir, *SMALL, "--sweep", "method=dense,sta", "--out", folder)
    done = command("batch", tmp_path / "prompts.txt", *words)
    assert done.exit_code == 0, done.output
    lines = read_manifest(folder).values()
    assert {line["file"].rsplit(".")[-1] for line in lines} == {"png"}
    assert all(read_frames(folder / line["file"]).shape == (1, 64, 64, 3) for line in lines)
    assert command("batch", tmp_path / "prompts.txt", *words).exit_code == 0  # all done: nothing is made again
    report = command("compare", folder, "--out", tmp_path / "report.html")
    assert report.exit_code == 0, report.output
    text = (tmp_path / "report.html").read_text("utf-8")
    assert text.count("data:image/png") == 2
    assert "data:video" not in text
