"""Wrong files and wrong calls: what is said, and that nothing is changed."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
import torch
from causal_checkpoints import random_weights, wan_names
from safetensors.torch import save_file
from tiny_wan import tiny_pipeline

import tilewise
from tilewise.pipelines.errors import ModelError


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline(attention_head_dim=128)


@pytest.fixture
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("x") / "self_forcing"
    path.mkdir()
    return path


@pytest.fixture
def refused(folder, pipe):
    """Loads what is given into the pipeline, which must be refused and change nothing."""

    def check(content, message, name="model.pt", error=ModelError, **options):
        path = folder / name
        torch.save(content, path) if path.suffix == ".pt" else save_file(content, path)
        before = {key: w.clone() for key, w in pipe.transformer.state_dict().items()}
        with pytest.raises(error, match=message):
            tilewise.load_causal_checkpoint(path, pipe, **options)
        assert all(torch.equal(w, before[key]) for key, w in pipe.transformer.state_dict().items())

    return check


def test_missing_and_too_much(refused):
    weights = wan_names(random_weights(1), "model.")
    del weights["model.blocks.1.self_attn.q.weight"], weights["model.head.modulation"]
    weights["model.blocks.1.extra.weight"] = torch.zeros(1)
    refused(
        {"generator": weights},
        r"2 weights missing: scale_shift_table, blocks\.1\.attn1\.to_q\.weight; 1 weight too much: "
        r"model\.blocks\.1\.extra\.weight\. Nothing was changed",
    )


def test_another_number_of_layers_and_other_sizes(refused):
    refused(wan_names(random_weights(1, num_layers=3)), r"27 weights too much: blocks\.2\.modulation.*, …")
    refused(
        wan_names(random_weights(1, ffn_dim=96)),
        r"6 weights of another size: blocks\.0\.ffn\.net\.0\.proj\.weight is \(96, 256\), not \(64, 256\).*another model size",
    )


def test_another_model(refused):
    refused({"layer.weight": torch.zeros(2)}, "None of its weights is one of a Wan denoiser", name="a.safetensors")
    refused({"step": 3}, "holds no weights")
    refused([torch.zeros(2)], "holds a list, not names and tensors")
    refused(torch.zeros(2), "holds a Tensor")


def test_the_same_weight_twice(refused):
    weights = wan_names(random_weights(1))
    weights["model.head.head.bias"] = weights["head.head.bias"]
    refused(weights, r"head\.head\.bias twice")


def test_averaged_weights_that_are_not_there(refused):
    refused({"generator": wan_names(random_weights(1))}, "has no generator_ema, only generator", ema=True)
    refused({"generator_ema": wan_names(random_weights(1))}, "has no generator, only generator_ema", ema=False)
    refused(wan_names(random_weights(1)), "has no generator_ema", ema=True)


@pytest.mark.parametrize(("ema", "seed"), [(True, 1), (False, 2)])
def test_averaged_weights_that_are_asked_for(folder, pipe, ema, seed):
    torch.save(
        {"generator": wan_names(random_weights(2)), "generator_ema": wan_names(random_weights(1))}, folder / "model.pt"
    )
    tilewise.load_causal_checkpoint(folder / "model.pt", pipe, ema=ema)
    assert torch.equal(pipe.transformer.proj_out.weight, random_weights(seed)["proj_out.weight"])


class Code:
    """Runs a command when it is unpickled."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder / "ran"),)


@pytest.mark.parametrize("archive", [True, False])
def test_a_pickle_with_code_is_not_run(folder, pipe, archive):
    content = {"generator": wan_names(random_weights(1)), "settings": Code(folder)}
    torch.save(content, folder / "model.pt", _use_new_zipfile_serialization=archive)
    with pytest.raises(ModelError, match=r"Python objects.*safetensors"):
        tilewise.load_causal_checkpoint(folder / "model.pt", pipe)
    assert not (folder / "ran").exists()


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_damaged_files(folder, pipe, suffix):
    file = folder / f"model{suffix}"
    weights = wan_names(random_weights(1))
    torch.save(weights, file) if suffix == ".pt" else save_file(weights, file)
    file.write_bytes(file.read_bytes()[:-3000])
    with pytest.raises(ModelError, match="damaged"):
        tilewise.load_causal_checkpoint(file, pipe)
    file.write_bytes(b"")
    with pytest.raises(ModelError, match="damaged"):
        tilewise.load_causal_checkpoint(file, pipe)
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    with pytest.raises(ModelError, match="git lfs pull"):
        tilewise.load_causal_checkpoint(file, pipe)


def test_paths(folder, pipe):
    with pytest.raises(ModelError, match="there is no causal checkpoint"):
        tilewise.load_causal_checkpoint(folder / "nowhere.pt", pipe)
    with pytest.raises(ModelError, match="holds no checkpoint"):
        tilewise.load_causal_checkpoint(folder, pipe)
    (folder / "notes.txt").write_text("")
    with pytest.raises(ModelError, match=r"ends in none of \.safetensors, \.pt"):
        tilewise.load_causal_checkpoint(folder / "notes.txt", pipe)
    for name in ("a.pt", "b.pt"):
        torch.save({}, folder / name)
    with pytest.raises(ModelError, match=r"give one of its files \(a\.pt, b\.pt\)"):
        tilewise.load_causal_checkpoint(folder, pipe)
    (folder / "x.safetensors.index.json").write_text('{"weight_map": {"a": "x-00001-of-00002.safetensors"}}')
    with pytest.raises(ModelError, match="incomplete: there is no file"):
        tilewise.load_causal_checkpoint(folder, pipe)


def test_one_denoiser_for_a_pipeline_of_two(folder):
    torch.save(wan_names(random_weights(1)), folder / "model.pt")
    two = tiny_pipeline(attention_head_dim=128, boundary_ratio=0.9)
    with pytest.raises(ModelError, match="the checkpoint has one denoiser, the pipeline has two denoisers"):
        tilewise.load_causal_checkpoint(folder / "model.pt", two)


def test_calls(folder, pipe):
    torch.save(wan_names(random_weights(1)), folder / "model.pt")
    for options, message in {
        "base": ({"base": folder}, "a pipeline or base=, not both"),
        "dtype": ({"dtype": "bfloat16"}, "keeps its device and dtype"),
        "recipe": ({"recipe": "longlife"}, "Did you mean 'longlive'"),
        "field": ({"chunks": 3}, "Did you mean 'chunk'"),
        "value": ({"window": 2}, "shorter than a chunk of 3"),
    }.values():
        with pytest.raises(tilewise.ConfigError, match=message):
            tilewise.load_causal_checkpoint(folder / "model.pt", pipe, **options)
    with pytest.raises(tilewise.UnsupportedModelError, match="is Linear, not WanTransformer3DModel"):
        tilewise.load_causal_checkpoint(folder / "model.pt", SimpleNamespace(transformer=torch.nn.Linear(1, 1)))
    with pytest.raises(tilewise.UnsupportedModelError, match="has no transformer"):
        tilewise.load_causal_checkpoint(folder / "model.pt", SimpleNamespace())


def test_pipelines_whose_weights_cannot_be_replaced(folder):
    torch.save(wan_names(random_weights(1)), folder / "model.pt")
    other = tiny_pipeline(attention_head_dim=128)
    other.transformer.fuse_qkv_projections()
    with pytest.raises(ModelError, match="projections are fused"):
        tilewise.load_causal_checkpoint(folder / "model.pt", other)
    other.transformer.to("meta")
    with pytest.raises(tilewise.ConfigError, match="meta device"):
        tilewise.load_causal_checkpoint(folder / "model.pt", other)
    quantized = tiny_pipeline(attention_head_dim=128)
    quantized.transformer.proj_out.weight = torch.nn.Parameter(
        torch.zeros(16, 256, dtype=torch.int8), requires_grad=False
    )
    with pytest.raises(tilewise.ConfigError, match="is quantized"):
        tilewise.load_causal_checkpoint(folder / "model.pt", quantized)
