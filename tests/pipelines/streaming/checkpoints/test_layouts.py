"""Checkpoints in each published layout, keys as published, loaded into a stock pipeline: weights and recipe."""

from __future__ import annotations

import json

import pytest
import torch
from causal_checkpoints import WIDTH, random_weights, wan_names
from diffusers import WanTransformer3DModel
from safetensors.torch import save_file
from tiny_wan import save_tiny_pipeline, tiny_pipeline

import tilewise
from tilewise.pipelines.streaming.checkpoints.known import RECIPES, recognise
from tilewise.pipelines.streaming.checkpoints.sizes import config_of

FSDP = "_fsdp_wrapped_module."


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline(attention_head_dim=128)


@pytest.fixture
def folder(tmp_path_factory):
    """A folder whose own name says nothing about a checkpoint."""
    return tmp_path_factory.mktemp("x")


def same(module, weights):
    state = module.state_dict()
    assert sorted(state) == sorted(weights)
    assert all(torch.equal(state[name], weight) for name, weight in weights.items())


def scattered(weights):
    """FSDP's attribute wherever it may stand."""
    named = {}
    for i, (name, weight) in enumerate(weights.items()):
        first, rest = name.split(".", 1)
        named[(f"model.{FSDP}{name}", f"model.{FSDP}{first}.{FSDP}{rest}", f"{FSDP}model.{name}")[i % 3]] = weight
    return named


def generator(mine, other):
    return {"generator": wan_names(mine, "model."), "generator_ema": wan_names(other, "model."), "step": 600}


def averaged(mine, other):
    return {"generator": wan_names(other, "model."), "generator_ema": scattered(wan_names(mine)), "critic": {}}


# name of the file, what torch.save gets, the recipe
PUBLISHED = [
    ("self_forcing_dmd.pt", averaged, "self-forcing"),
    ("rolling_forcing_dmd.pt", averaged, "rolling-forcing"),
    ("rewardforcing.pt", lambda mine, other: wan_names(mine, "model."), "reward-forcing"),
    ("longlive_models/models/longlive_base.pt", generator, "longlive"),
    ("LongLive-1.3B/base.pt", lambda mine, other: {"model": wan_names(mine, "model.")}, "longlive"),
    ("LongLive-2.0-5B/model_bf16.pt", generator, "longlive-2"),
    ("chunkwise/causal_forcing.pt", generator, "causal-forcing"),
    ("chunkwise/longvideo.pt", averaged, "causal-forcing-long"),
    ("framewise/causal_forcing.pt", averaged, "causal-forcing-framewise"),
    ("causal-forcing++/framewise-1step.pt", averaged, "causal-forcing-1step"),
    ("causal-forcing++/framewise-2step.pt", averaged, "causal-forcing-2step"),
    ("autoregressive_checkpoint/model.pt", lambda m, o: {"generator": scattered(wan_names(m))}, "causvid"),
    ("autoregressive_checkpoint_warp_4step_cfg2/model.pt", generator, "causvid-4step"),
    ("wan_causal_dmd_v2v/model.pt", generator, "streamdiffusion-v2"),
    ("StreamDiffusionV2/a.pt", lambda m, o: {"generator_ema": wan_names(m, "model.")}, "streamdiffusion-v2"),
    ("StreamDiffusionV2/b.pt", lambda m, o: {"state_dict": wan_names(m)}, "streamdiffusion-v2"),
]


@pytest.mark.parametrize(("name", "container", "recipe"), PUBLISHED, ids=[row[0] for row in PUBLISHED])
def test_published_pickles(folder, pipe, name, container, recipe):
    mine, other = random_weights(1), random_weights(2)
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save(container(mine, other), file)
    got, chosen = tilewise.load_causal_checkpoint(file, pipe)
    assert got is pipe
    same(pipe.transformer, mine)
    assert chosen == RECIPES[recipe]
    assert tilewise.CausalRecipe.from_dict(pipe.transformer._tilewise_recipe) == chosen


def test_the_older_format_of_torch_save(folder, pipe):
    weights = random_weights(3)
    torch.save(wan_names(weights, "net."), folder / "rewardforcing.pt", _use_new_zipfile_serialization=False)
    tilewise.load_causal_checkpoint(folder / "rewardforcing.pt", pipe)
    same(pipe.transformer, weights)


def test_one_safetensors_file_in_bfloat16(folder, pipe):
    weights = {name: w.bfloat16() for name, w in random_weights(4).items()}
    file = folder / "krea-realtime-video-14b.safetensors"
    save_file({name: w.contiguous() for name, w in wan_names(weights, "model.").items()}, file)
    _, recipe = tilewise.load_causal_checkpoint(file, pipe)
    same(pipe.transformer, {name: w.float() for name, w in weights.items()})  # the pipeline keeps its dtype
    assert recipe.sigmas() == (1.0, 0.937, 0.833, 0.625)


@pytest.mark.parametrize("index", [True, False], ids=["index", "no index"])
def test_shards(folder, pipe, index):
    weights = random_weights(5)
    named = list(wan_names(weights, "model.").items())
    shards = {f"model-0000{i + 1}-of-00002.safetensors": dict(named[i::2]) for i in range(2)}
    place = folder / "self-forcing"
    place.mkdir()
    for name, tensors in shards.items():
        save_file(tensors, place / name)
    if index:
        where = {key: name for name, tensors in shards.items() for key in tensors}
        (place / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
        save_file({"x": torch.zeros(1)}, place / "other.safetensors")  # not in the index
    tilewise.load_causal_checkpoint(place, pipe)
    same(pipe.transformer, weights)


def test_a_transformer_folder_with_diffusers_names(folder, pipe):
    weights = random_weights(6)
    place = folder / "SFWan2.1-T2V-1.3B-Diffusers" / "transformer"
    place.mkdir(parents=True)
    save_file(weights, place / "diffusion_pytorch_model.safetensors")
    for path in (place, place.parent):
        pipe.transformer.load_state_dict(random_weights(7))
        _, recipe = tilewise.load_causal_checkpoint(path, pipe)
        same(pipe.transformer, weights)
        assert recipe.name == "self-forcing"


def test_two_denoisers(folder):
    pipe = tiny_pipeline(attention_head_dim=128, boundary_ratio=0.9)
    weights = [random_weights(8), random_weights(9)]
    root = folder / "SFWan2.2-T2V-A14B-Diffusers"
    for name, tensors in zip(("transformer", "transformer_2"), weights, strict=True):
        (root / name).mkdir(parents=True)
        save_file(tensors, root / name / "diffusion_pytorch_model.safetensors")
    _, recipe = tilewise.load_causal_checkpoint(root, pipe)
    same(pipe.transformer, weights[0])
    same(pipe.transformer_2, weights[1])
    assert (recipe.name, recipe.shift, recipe.boundary) == ("self-forcing-a14b", 12, 0.875)
    assert pipe.transformer_2._tilewise_recipe == recipe.to_dict()
    _, other = tilewise.load_causal_checkpoint(root, pipe, recipe="longlive")
    assert other.boundary == 0.9  # the pipeline's own
    with pytest.raises(tilewise.TilewiseError, match="the checkpoint has two denoisers, the pipeline has one"):
        tilewise.load_causal_checkpoint(root, tiny_pipeline(attention_head_dim=128))


def test_image_to_video_names(folder):
    pipe = tiny_pipeline(attention_head_dim=128, image=True)
    weights = random_weights(10, in_channels=10, image_dim=32, added_kv_proj_dim=WIDTH)
    torch.save({"generator": wan_names(weights, "model.", image=True)}, folder / "self_forcing_i2v.pt")
    tilewise.load_causal_checkpoint(folder / "self_forcing_i2v.pt", pipe)
    same(pipe.transformer, weights)


@pytest.mark.parametrize(
    ("path", "latents", "recipe"),
    [
        ("longlive/model.pt", 48, "longlive-2"),
        ("longlive/model.pt", 16, "longlive"),
        ("LongLive2.0/x.pt", None, "longlive-2"),
        ("self_forcing/causvid.pt", 16, "causvid"),  # the file's own name counts most
        ("Causal-Forcing/framewise/causal_forcing.pt", 16, "causal-forcing-framewise"),
        ("wan2.1_t2v_1.3B.safetensors", 16, None),
    ],
)
def test_recognised_by_name_and_channels(folder, path, latents, recipe):
    known = recognise(folder / path, latents=latents)
    assert (known and known.recipe) == recipe


@pytest.mark.parametrize(
    ("dim", "layers", "ffn", "channels", "latents"),
    [(1536, 30, 8960, 16, 16), (3072, 30, 14336, 48, 48), (5120, 40, 13824, 36, 16)],
    ids=["1.3B", "5B", "A14B from an image"],
)
def test_sizes_of_the_published_models(dim, layers, ffn, channels, latents):
    config = {"num_attention_heads": dim // 128, "attention_head_dim": 128, "num_layers": layers, "ffn_dim": ffn}
    config |= {"in_channels": channels, "out_channels": latents}
    with torch.device("meta"):
        model = WanTransformer3DModel(**config)
    found = config_of(model.state_dict())
    assert found == {name: model.config[name] for name in found}
    assert set(config) < set(found)


class TestAPipelineIsBuilt:
    @pytest.fixture(scope="class")
    def base(self, tmp_path_factory):
        return save_tiny_pipeline(tmp_path_factory.mktemp("x") / "base", attention_head_dim=128)

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_from_a_base(self, folder, base, dtype, pipe):
        """Of other sizes than the base's denoiser, whose weights are not even needed."""
        weights = random_weights(11, num_layers=3, ffn_dim=96)
        torch.save({"generator": wan_names(weights, "model.")}, folder / "self_forcing_dmd.pt")
        file = base / "transformer" / "diffusion_pytorch_model.safetensors"
        if file.exists():
            file.rename(base / "unused")
        built, recipe = tilewise.load_causal_checkpoint(
            folder / "self_forcing_dmd.pt", base=base, dtype=dtype, device="cpu"
        )
        config = built.transformer.config
        assert (config.num_layers, config.ffn_dim, config.num_attention_heads) == (3, 96, 2)
        assert (config.in_channels, config.out_channels, config.text_dim, config.freq_dim) == (4, 4, 32, 32)
        assert type(built).__name__ == "WanPipeline" and recipe.name == "self-forcing"
        state = built.transformer.state_dict()
        assert state["blocks.0.attn1.to_q.weight"].dtype == getattr(torch, dtype)
        for exact in ("scale_shift_table", "blocks.2.norm2.weight", "condition_embedder.time_embedder.linear_1.bias"):
            assert state[exact].dtype == torch.float32
        same(built.transformer, {name: w.to(state[name].dtype) for name, w in weights.items()})
        frames = built(
            "a red circle", height=16, width=16, num_frames=3, num_inference_steps=1, output_type="np"
        ).frames
        assert frames.shape == (1, 3, 16, 16, 3)  # the rotary tables are there

    def test_from_a_conversion_that_names_classes_of_another_library(self, folder):
        root = save_tiny_pipeline(folder / "SFWan2.1-T2V-1.3B-Diffusers", attention_head_dim=16)
        weights = random_weights(12, attention_head_dim=16)
        save_file(weights, root / "transformer" / "diffusion_pytorch_model.safetensors")
        index = json.loads((root / "model_index.json").read_text())
        index |= {"_class_name": "WanCausalDMDPipeline", "transformer": ["diffusers", "CausalWanTransformer3DModel"]}
        (root / "model_index.json").write_text(json.dumps(index))
        built, recipe = tilewise.load_causal_checkpoint(root, device="cpu")
        assert type(built).__name__ == "WanPipeline" and recipe.name == "self-forcing"
        assert built.transformer.config.num_attention_heads == 2  # of 16, as its config.json says
        same(built.transformer, weights)

    def test_nothing_says_what_to_build(self, folder):
        torch.save(wan_names(random_weights(13)), folder / "self_forcing_dmd.pt")
        with pytest.raises(tilewise.ConfigError, match=r"denoiser alone.*\(path, pipe\)\) or base="):
            tilewise.load_causal_checkpoint(folder / "self_forcing_dmd.pt")
