"""LoRAs of a request: merged into the weights at load, against W + weight · B A; stored with the clip; or refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import tiny_wan
import torch
from causal_checkpoints import save_lora, small_lora, with_lora
from safetensors.torch import save_file
from typer.testing import CliRunner

import tilewise
from tilewise.pipelines.batch.job import Job
from tilewise.pipelines.errors import ModelError
from tilewise.pipelines.generation.generate import generate
from tilewise.pipelines.generation.resolve import resolve_settings
from tilewise.pipelines.loading.load import load_pipeline, load_skeleton
from tilewise.pipelines.loading.loras import LoraChoice, check_loras, merged_loras, resolve_lora
from tilewise.pipelines.media.video import read_settings
from tilewise.ui.cli.app import app

SMALL = ["--method", "dense", "--steps", "1", "--frames", "5", "--guidance", "1"]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> list[Path]:
    """Two LoRAs of the tiny model."""
    folder = tmp_path_factory.mktemp("loras")
    return [save_lora(folder / f"style {seed}.safetensors", seed) for seed in (1, 2)]


@pytest.mark.parametrize(
    ("said", "path", "weight"),
    [
        ("a.safetensors", "a.safetensors", 1.0),
        ("/b/a.pt:0.8", "/b/a.pt", 0.8),
        ("C:/b/a.pt:-1", "C:/b/a.pt", -1.0),
        ("a:b.safetensors", "a:b.safetensors", 1.0),
        (f" a b:.5@sha256:{'0' * 64}", "a b", 0.5),
    ],
)
def test_a_lora_is_a_path_and_a_weight(said, path, weight):
    choice = LoraChoice.parse(said)
    assert (choice.path, choice.weight) == (Path(path), weight)
    assert LoraChoice.parse(str(choice)) == choice


def test_they_are_merged_and_leave_the_modules_as_they_were(files, tiny_pipe_dir):
    stock = load_pipeline(tiny_pipe_dir, device="cpu")
    pipe = load_pipeline(tiny_pipe_dir, device="cpu", loras=[f"{files[0]}:0.5", str(files[1])])
    assert [type(module) for module in pipe.transformer.modules()] == [type(m) for m in stock.transformer.modules()]
    wanted = with_lora(with_lora(stock.transformer.state_dict(), small_lora(1), 0.5), small_lora(2))
    for name, weight in pipe.transformer.state_dict().items():
        torch.testing.assert_close(weight.double(), wanted[name].double(), rtol=1e-5, atol=1e-5)
    said = resolve_settings(pipe, "a red circle").lora
    assert said == merged_loras(pipe) == (resolve_lora(f"{files[0]}:0.5"), resolve_lora(str(files[1])))
    # settings of other LoRAs than the pipeline has would tell a lie
    for settings in (resolve_settings(stock, "x", lora=said), resolve_settings(pipe, "x", lora=said[:1])):
        with pytest.raises(tilewise.ConfigError, match=r"load_pipeline\(model, loras=settings.lora\)"):
            generate(stock if settings.lora == said else pipe, settings)


def test_a_clip_says_them_and_is_made_again(files, tiny_pipe_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["generate", "a red circle", "--model", str(tiny_pipe_dir), *SMALL]
    loras = ["--lora", f"{files[0]}:0.5", "--lora", str(files[1])]
    for more in ([*loras, "--out", "a.mp4"], ["--out", "b.mp4"]):
        result = CliRunner().invoke(app, [*words, *more])
        assert result.exit_code == 0, result.output
    with_them, without = read_settings("a.mp4"), read_settings("b.mp4")
    assert with_them["lora"] == [resolve_lora(f"{files[0]}:0.5"), resolve_lora(str(files[1]))]
    assert without["lora"] == []
    assert with_them["run"]["frames_sha256"] != without["run"]["frames_sha256"]
    again = CliRunner().invoke(app, ["generate", "--from", "a.mp4", "--out", "again.mp4"])
    assert "the same, bit for bit" in " ".join(again.stdout.split()), again.output


def test_both_stages_of_a_large_clip_have_them(files, tiny_pipe_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    size = ["--highres", "--height", "80", "--width", "64", "--frames", "5", "--steps", "2", "--global-path", "none"]
    words = ["generate", "a red circle", "--model", str(tiny_pipe_dir), *size]
    for more in (["--lora", f"{files[0]}:0.5", "--out", "a.mp4"], ["--out", "b.mp4"]):
        result = CliRunner().invoke(app, [*words, *more])
        assert result.exit_code == 0, result.output
    for ending in ("", "-native"):
        with_it, without = (read_settings(f"{name}{ending}.mp4") for name in "ab")
        assert (with_it["lora"], without["lora"]) == ([resolve_lora(f"{files[0]}:0.5")], [])
        assert with_it["run"]["frames_sha256"] != without["run"]["frames_sha256"]
    again = CliRunner().invoke(app, ["generate", "--from", "a.mp4", "--out", "again.mp4"])
    assert "the same, bit for bit" in " ".join(again.stdout.split()), again.output


def test_lines_of_a_batch_have_their_own(files, tiny_pipe_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": "x"}, {"prompt": "x", "lora": [f"{files[0]}:0.5"]}]
    Path("p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    result = CliRunner().invoke(app, ["batch", "p.jsonl", "--model", str(tiny_pipe_dir), "--out", "o", *SMALL])
    assert result.exit_code == 0, result.output
    found = [read_settings(path) for path in sorted(Path("o").glob("*.mp4"))]
    assert [len(one["lora"]) for one in found] == [0, 1]
    assert found[0]["run"]["frames_sha256"] != found[1]["run"]["frames_sha256"]


def test_a_job_is_known_by_what_is_in_the_file(files, tiny_pipe_dir, tmp_path):
    copy = tmp_path / "other name.safetensors"
    copy.write_bytes(files[0].read_bytes())
    skeleton = load_skeleton(tiny_pipe_dir)

    def key(*loras: str) -> str:
        settings = resolve_settings(skeleton, "x", lora=loras)
        return Job(0, (1,), (), settings, "float32", "r", 1.0).key

    assert key(str(files[0])) == key(f"{copy}:1.0")
    assert len({key(), key(str(files[0])), key(f"{files[0]}:0.5"), key(str(files[1]))}) == 4


def test_what_is_no_lora_for_a_model(files, tiny_pipe_dir, tiny_pipe, tmp_path, monkeypatch):
    skeleton = load_skeleton(tiny_pipe_dir)
    for said, error, words in (
        ("", tilewise.ConfigError, "lora takes PATH or PATH:WEIGHT"),
        (str(tmp_path / "absent.safetensors"), ModelError, "there is no LoRA file"),
        (str(tmp_path), ModelError, "it is a folder"),
        (
            f"{files[0]}@sha256:{'0' * 64}",
            tilewise.ConfigError,
            "another file than the LoRA that the clip was made with",
        ),
    ):
        with pytest.raises(error, match=words):
            resolve_settings(skeleton, "x", lora=[said])
    (tmp_path / "half.safetensors").write_bytes(files[0].read_bytes()[:1000])
    with pytest.raises(ModelError, match="damaged or incomplete"):
        resolve_settings(skeleton, "x", lora=[str(tmp_path / "half.safetensors")])
    other = {"unet.down.lora_A.weight": torch.zeros(2, 4), "unet.down.lora_B.weight": torch.zeros(4, 2)}
    save_file(other, tmp_path / "other.safetensors")
    with pytest.raises(ModelError, match="no LoRA for this model"):
        load_pipeline(tiny_pipe_dir, device="cpu", loras=[str(tmp_path / "other.safetensors")])
    two = tiny_wan.tiny_pipeline()
    two.transformer_2 = two.transformer
    with pytest.raises(tilewise.UnsupportedModelError, match="two denoisers"):
        check_loras(two, ["x"])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(tilewise.pipelines.errors.SetupError, match="pip install peft"):
        check_loras(tiny_pipe, ["x"])


def test_settings_take_lists_of_texts_alone(tiny_pipe_dir):
    settings = resolve_settings(load_skeleton(tiny_pipe_dir), "x")
    for wrong in ("a.safetensors", (1,)):
        with pytest.raises(tilewise.ConfigError, match="lora must be a list of texts"):
            dataclasses.replace(settings, lora=wrong)
