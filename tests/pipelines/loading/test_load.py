"""Finding, checking and loading models: clear errors before long work."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import tiny_wan
import torch
from diffusers import DiffusionPipeline, WanPipeline

from tilewise.pipelines.errors import DeviceError, ModelError
from tilewise.pipelines.loading import device as devices
from tilewise.pipelines.loading import model_folder
from tilewise.pipelines.loading.device import resolve_device, resolve_dtype
from tilewise.pipelines.loading.load import load_pipeline, load_skeleton
from tilewise.pipelines.loading.model_defaults import ModelDefaults, folder_defaults, model_defaults
from tilewise.plugins.errors import ConfigError
from tilewise.plugins.models.common.native_size import native_pixels


@pytest.fixture
def folder(tiny_pipe_dir: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(tiny_pipe_dir, tmp_path / "model"))


def test_loads_in_float32_on_a_cpu(tiny_pipe_dir):
    pipe = load_pipeline(tiny_pipe_dir, device="cpu")
    assert {pipe.transformer.dtype, pipe.vae.dtype, pipe.text_encoder.dtype} == {torch.float32}
    assert pipe.device.type == "cpu"


def test_loads_half_precision_weights_as_float32(tmp_path):
    tiny_wan.tiny_pipeline().to(dtype=torch.float16).save_pretrained(tmp_path / "half")
    pipe = load_pipeline(tmp_path / "half", device="cpu")
    assert {pipe.transformer.dtype, pipe.vae.dtype, pipe.text_encoder.dtype} == {torch.float32}


def test_the_vae_stays_in_float32(tiny_pipe_dir):
    pipe = load_pipeline(str(tiny_pipe_dir), device="cpu", dtype="bfloat16")
    assert {pipe.transformer.dtype, pipe.text_encoder.dtype} == {torch.bfloat16}
    assert pipe.vae.dtype == torch.float32


def test_a_second_denoiser_is_loaded(tmp_path):
    pipe = load_pipeline(tiny_wan.save_tiny_pipeline(tmp_path / "two", boundary_ratio=0.9), device="cpu")
    assert pipe.transformer_2 is not None
    assert pipe.config.boundary_ratio == 0.9


def test_native_size_from_the_folder(tiny_pipe_dir):
    expected = ModelDefaults(64, 64, 9, 4, 3.0, 8.0, 16, highres_flow_shift=9.0)
    assert model_defaults(load_pipeline(tiny_pipe_dir, device="cpu")) == expected
    assert model_defaults(load_skeleton(tiny_pipe_dir)) == expected


def test_the_old_name_of_frames_is_still_read(folder):
    """Of `tilewise.json`, and of the two objects that have it."""
    (folder / "tilewise.json").write_text('{"num_frames": 7}')
    pipe = load_skeleton(folder)
    assert model_defaults(pipe).frames == model_defaults(pipe).num_frames == 7
    assert native_pixels(pipe).frames == native_pixels(pipe).num_frames == 7


def test_native_size_from_the_signature(tiny_pipe):
    assert model_defaults(tiny_pipe) == ModelDefaults(480, 832, 81, 50, 5.0, 16.0, 512, highres_flow_shift=9.0)


def test_a_folder_that_states_all_defaults_is_enough(folder):
    assert folder_defaults("demo") == model_defaults(load_skeleton("demo"))
    assert folder_defaults("some/model-of-the-hub") is None
    stated = dataclasses.asdict(folder_defaults("demo"))
    (folder / "tilewise.json").write_text(json.dumps(stated))
    assert folder_defaults(folder) == folder_defaults("demo")
    del stated["steps"]
    (folder / "tilewise.json").write_text(json.dumps(stated))
    assert folder_defaults(folder) is None
    (folder / "tilewise.json").unlink()
    assert folder_defaults(folder) is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"heigth": 64}', "unknown field 'heigth'"),
        ('{"frames": 9, "num_frames": 9}', "num_frames is the old name of frames: give frames alone"),
        ('{"height": "64"}', "positive int"),
        ('{"height": -64}', "positive int"),
        ('{"height": 64.5}', "positive int"),
        ('{"fps": true}', "positive float"),
        ("[1]", "JSON object"),
        ("{", "not JSON"),
    ],
)
def test_bad_native_files_are_named(folder, content, message):
    (folder / "tilewise.json").write_text(content)
    with pytest.raises(ModelError, match=message) as caught:
        model_defaults(load_skeleton(folder))
    assert "tilewise.json" in str(caught.value)


def test_a_skeleton_has_shapes_and_no_weights(tmp_path):
    pipe = load_skeleton(tiny_wan.save_tiny_pipeline(tmp_path / "two", boundary_ratio=0.9))
    for module in (pipe.transformer, pipe.transformer_2, pipe.vae):
        assert all(p.is_meta for p in module.parameters())
    assert (pipe.vae_scale_factor_spatial, pipe.vae_scale_factor_temporal) == (4, 2)
    assert pipe.config.boundary_ratio == 0.9
    assert pipe.scheduler is not None
    assert pipe.tokenizer is None


LOADERS = pytest.mark.parametrize("load", [load_pipeline, load_skeleton])


@LOADERS
def test_missing_models(load, tmp_path, monkeypatch):
    monkeypatch.setattr(model_folder, "DEMO_FOLDER", tmp_path / "no-demo")
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    for model, message in {
        tmp_path / "nowhere": "no model folder",
        "not a model": "no model folder",
        tmp_path / "file": "is a file",
        tmp_path / "empty": "no model_index.json",
        "demo": "demo model is not here",
    }.items():
        with pytest.raises(ModelError, match=message):
            load(model)


def test_a_folder_called_demo_needs_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()
    assert model_folder.find_model("demo") == model_folder.DEMO_FOLDER
    assert model_folder.find_model("./demo") == model_folder.find_model(Path("demo")) == Path("demo")


def test_demo_is_a_folder_beside_the_code():
    assert Path(model_folder.__file__).parents[1] / "demo_model" == model_folder.DEMO_FOLDER


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def garble(file: Path) -> None:
    file.write_bytes(b"\x00" * 200)


def make_pointer(file: Path) -> None:
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")


WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


@LOADERS
@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        (WEIGHTS, cut, "damaged or incomplete"),
        (WEIGHTS, garble, "damaged or incomplete"),
        (WEIGHTS, make_pointer, "git lfs pull"),
        (WEIGHTS, Path.unlink, "no weights"),
        ("text_encoder/model.safetensors", cut, "damaged or incomplete"),
        ("vae/config.json", garble, "not JSON"),
        ("tokenizer/tokenizer.json", cut, "not JSON"),
        ("model_index.json", cut, "not JSON"),
        ("model_index.json", Path.unlink, "no model_index.json"),
        ("scheduler", shutil.rmtree, "no folder"),
    ],
)
def test_damage_is_found_and_named(load, folder, file, damage, message):
    damage(folder / file)
    with pytest.raises(ModelError, match=message) as caught:
        load(folder)
    assert Path(file).parts[0] in str(caught.value)


def test_a_missing_shard_is_named(folder):
    index = {"weight_map": {"a": "part-1-of-2.safetensors", "b": "part-2-of-2.safetensors"}}
    (folder / "transformer" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    (folder / WEIGHTS).rename(folder / "transformer" / "part-1-of-2.safetensors")
    with pytest.raises(ModelError, match="part-2-of-2"):
        load_pipeline(folder)


def test_other_pipeline_classes(folder):
    index = json.loads((folder / "model_index.json").read_text())
    for name, message in {"NoSuchPipeline": "could not", None: "no pipeline class"}.items():
        (folder / "model_index.json").write_text(json.dumps({**index, "_class_name": name}))
        for load in (load_pipeline, load_skeleton):
            with pytest.raises(ModelError, match=message):
                load(folder)


def test_weights_of_another_shape(folder):
    config = json.loads((folder / "transformer/config.json").read_text())
    (folder / "transformer/config.json").write_text(json.dumps({**config, "ffn_dim": 96}))
    with pytest.raises(ModelError, match="could not load"):
        load_pipeline(folder, device="cpu")


@LOADERS
@pytest.mark.parametrize("part", ["vae", "scheduler"])
def test_a_part_that_this_diffusers_does_not_have(load, folder, part):
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, part: ["diffusers", "AutoencoderOf2031"]}))
    with pytest.raises(ModelError, match=r"could not load .*diffusers .* has no class AutoencoderOf2031"):
        load(folder)


@LOADERS
@pytest.mark.parametrize("where", ["load_config", "from_pretrained"])
def test_a_bug_is_not_called_a_model_that_cannot_be_loaded(load, where, tiny_pipe_dir, monkeypatch):
    def fail(*_, **__):
        raise AttributeError("'NoneType' object has no attribute 'shape'")

    if (load, where) != (load_skeleton, "from_pretrained"):
        monkeypatch.setattr(DiffusionPipeline, where, fail)
    else:
        monkeypatch.setattr(WanPipeline, "__init__", fail)
    with pytest.raises(AttributeError, match="has no attribute 'shape'"):
        load(tiny_pipe_dir)


class Offline:
    def model_info(self, *args, **kwargs):
        raise ConnectionError("Name or service not known")


@LOADERS
def test_no_network(load, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.HfApi", Offline)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match=r"no local folder org/name, and the hub cannot be reached.*not known"):
        load("org/name")


def test_without_network_the_cache_will_do(tiny_pipe_dir, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.HfApi", Offline)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, local_files_only: str(tiny_pipe_dir))
    monkeypatch.chdir(tmp_path)
    assert load_pipeline("org/name", device="cpu").transformer is not None


def test_a_folder_wins_over_a_hub_id(tiny_pipe_dir, tmp_path, monkeypatch):
    shutil.copytree(tiny_pipe_dir, tmp_path / "org" / "name")
    monkeypatch.chdir(tmp_path)
    assert load_skeleton("org/name").transformer is not None


def test_devices(monkeypatch):
    assert resolve_device("cpu").type == "cpu"
    with pytest.raises(ConfigError, match="unknown device 'gpu'"):
        resolve_device("gpu")
    with pytest.raises(DeviceError, match="cannot be used"):
        resolve_device("meta")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto").type == "cpu"
    with pytest.raises(DeviceError, match="0 CUDA devices"):
        resolve_device("cuda")


def test_a_missing_device_is_said_before_the_model_is_read():
    with pytest.raises(DeviceError):
        load_pipeline("nowhere", device="cuda:99")


def test_dtypes():
    assert resolve_dtype("auto", torch.device("cpu")) == torch.float32
    assert resolve_dtype("auto", torch.device("cuda")) == torch.bfloat16
    assert resolve_dtype("fp16", torch.device("cpu")) == torch.float16
    with pytest.raises(ConfigError, match="unknown dtype 'int8'"):
        resolve_dtype("int8", torch.device("cpu"))
    assert set(devices.DTYPES.values()) == {torch.float32, torch.bfloat16, torch.float16}
