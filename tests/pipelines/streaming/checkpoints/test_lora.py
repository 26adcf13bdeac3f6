"""LoRAs on a causal checkpoint or alone, against W + B A in float64."""

from __future__ import annotations

import pytest
import torch
from causal_checkpoints import pairs, random_lora, random_weights, wan_names, with_lora
from safetensors.torch import save_file
from tiny_wan import tiny_pipeline

import tilewise


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline(attention_head_dim=128)


@pytest.fixture
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("x") / "longlive_models"
    path.mkdir()
    return path


def close(module, wanted):
    for name, weight in module.state_dict().items():
        torch.testing.assert_close(weight.double(), wanted[name].double(), rtol=1e-5, atol=1e-5)


def peft(lora, name):
    return {"generator_lora": lora, "critic_lora": {}} if name == "container" else lora


@pytest.mark.parametrize("container", ["container", "bare"])
def test_on_top_of_a_checkpoint(folder, pipe, container):
    weights, lora = random_weights(1), random_lora(2)
    torch.save({"generator": wan_names(weights, "model.")}, folder / "longlive_base.pt")
    torch.save(peft(lora, container), folder / "lora.pt")
    _, recipe = tilewise.load_causal_checkpoint(folder / "longlive_base.pt", pipe, lora=folder / "lora.pt")
    close(pipe.transformer, with_lora(weights, lora))
    assert (recipe.name, recipe.window, recipe.sink, recipe.sink_position) == ("longlive", 12, 3, "absolute")
    # The folder with both, and another weight of the LoRA.
    tilewise.load_causal_checkpoint(folder, pipe, lora_scale=0.25)
    close(pipe.transformer, with_lora(weights, lora, 0.25))


def test_base_and_lora_in_one_file(folder, pipe):
    weights, lora = random_weights(3), random_lora(4)
    torch.save({"generator": wan_names(weights, "model."), "generator_lora": lora}, folder / "both.pt")
    tilewise.load_causal_checkpoint(folder / "both.pt", pipe)
    close(pipe.transformer, with_lora(weights, lora))


def test_alone_on_a_pipeline(folder, pipe):
    weights, lora = random_weights(5), random_lora(6, rank=2)
    pipe.transformer.load_state_dict(weights)
    torch.save(lora, folder / "lora.pt")
    _, recipe = tilewise.load_causal_checkpoint(folder / "lora.pt", pipe)
    close(pipe.transformer, with_lora(weights, lora))
    assert recipe.name == "longlive"
    with pytest.raises(tilewise.ConfigError, match="holds a LoRA alone"):
        tilewise.load_causal_checkpoint(folder / "lora.pt")


def test_names_of_other_tools(folder, pipe):
    """lora_down and lora_up with an alpha, and differences stored in full; diffusers' names."""
    weights, lora = random_weights(7), random_lora(8, rank=4)
    named = {}
    for name, tensor in lora.items():
        name = name.replace("base_model.model.", "diffusion_model.")
        named[name.replace("lora_A", "lora_down").replace("lora_B", "lora_up")] = tensor
        if "lora_A" in name:
            named[name.replace("lora_A.weight", "alpha")] = torch.tensor(2.0)
    wanted = with_lora(weights, lora, scale=2.0 / 4)
    for wan, kind in (("blocks.0.self_attn.q.bias", "diff_b"), ("blocks.1.norm3.weight", "diff")):
        change = torch.randn(256)
        named[f"diffusion_model.{wan.rpartition('.')[0]}.{kind}"] = change
        wanted[pairs()[wan]] += change.double()
    save_file(named, folder / "lora.safetensors")
    pipe.transformer.load_state_dict(weights)
    tilewise.load_causal_checkpoint(folder / "lora.safetensors", pipe)
    close(pipe.transformer, wanted)

    modules = {wan.removesuffix(".weight"): name.removesuffix(".weight") for wan, name in pairs().items()}
    by_diffusers = {}
    for name, tensor in lora.items():
        module, _, side = name.removeprefix("base_model.model.").partition(".lora_")
        by_diffusers[f"transformer.{modules[module]}.lora_{side}"] = tensor
    save_file(by_diffusers, folder / "lora2.safetensors")
    pipe.transformer.load_state_dict(weights)
    tilewise.load_causal_checkpoint(folder / "lora2.safetensors", pipe)
    close(pipe.transformer, with_lora(weights, lora))


def drop(lora):
    del lora["base_model.model.blocks.1.ffn.0.lora_B.weight"]


def rank(lora):
    lora["base_model.model.blocks.1.ffn.0.lora_B.weight"] = torch.zeros(64, 5)


def strange(lora):
    lora["base_model.model.blocks.1.ffn.0.dora"] = torch.zeros(2)


def block(lora):
    lora["base_model.model.blocks.7.ffn.0.lora_A.weight"] = torch.zeros(3, 256)
    lora["base_model.model.blocks.7.ffn.0.lora_B.weight"] = torch.zeros(64, 3)


@pytest.mark.parametrize(
    ("lora", "change", "message"),
    [
        (random_lora(9), drop, r"only one of the two matrices of blocks\.1\.ffn\.0"),
        (random_lora(9), rank, r"A is \(3, 256\), B is \(64, 5\)"),
        (random_lora(9), strange, r"1 weights that are no part of one: .*dora"),
        (random_lora(9), block, r"no weight blocks\.7\.ffn\.net\.0\.proj\.weight in the denoiser"),
        (random_lora(9, width=128), None, r"to_q\.weight is \(256, 256\), its LoRA \(128, 128\)"),
    ],
)
def test_one_that_does_not_fit_changes_nothing(folder, pipe, lora, change, message):
    lora = dict(lora)
    if change:
        change(lora)
    torch.save(wan_names(random_weights(10)), folder / "longlive_base.pt")
    torch.save(lora, folder / "lora.pt")
    before = {name: w.clone() for name, w in pipe.transformer.state_dict().items()}
    with pytest.raises(tilewise.TilewiseError, match=message):
        tilewise.load_causal_checkpoint(folder, pipe)
    assert all(torch.equal(w, before[name]) for name, w in pipe.transformer.state_dict().items())


def test_a_checkpoint_given_as_the_lora(folder, pipe):
    torch.save(wan_names(random_weights(11)), folder / "longlive_base.pt")
    with pytest.raises(tilewise.TilewiseError, match="is no LoRA"):
        tilewise.load_causal_checkpoint(folder / "longlive_base.pt", pipe, lora=folder / "longlive_base.pt")
