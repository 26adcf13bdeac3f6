"""LoRAs of diffusers' loader on a patched pipeline: each step of their life gives what it gives on the stock pipeline.

The steps are diffusers' own: load, load another, switch, weigh, hot-swap, fuse, unfuse, unload. A patch is on from before the
first one, or put on at each of them. Wan's fused kernels run throughout: here their naive formulas, on a CPU."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import tiny_wan
import torch

import tilewise
from tilewise.plugins.runtime.attention_call import AttentionCalls

FULL = tilewise.STA(window=(99, 99, 99), tile=(2, 3, 3))
PLACES = ["attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "attn2.to_v", "ffn.net.0.proj", "ffn.net.2"]


def lora(model: Any, seed: int, rank: int = 4) -> dict[str, torch.Tensor]:
    """A LoRA of all blocks, as a file of one has it."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for number, block in enumerate(model.blocks):
        for place in PLACES:
            out, into = block.get_submodule(place).weight.shape
            name = f"transformer.blocks.{number}.{place}"
            found[f"{name}.lora_A.weight"] = torch.randn(rank, into, generator=generator) / into**0.5
            found[f"{name}.lora_B.weight"] = torch.randn(out, rank, generator=generator) * 0.3
    return found


def copied(file: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As read from the file again: a model keeps the tensors, and a hot-swap writes into them."""
    return {name: tensor.clone() for name, tensor in file.items()}


STEPS: dict[str, Callable[[Any, list[dict[str, torch.Tensor]]], Any]] = {
    "nothing": lambda pipe, files: None,
    "load": lambda pipe, files: pipe.load_lora_weights(copied(files[0]), adapter_name="a"),
    "hot-swap": lambda pipe, files: pipe.load_lora_weights(copied(files[2]), adapter_name="a", hotswap=True),
    "load another": lambda pipe, files: pipe.load_lora_weights(copied(files[1]), adapter_name="b"),
    "switch": lambda pipe, files: pipe.set_adapters("a"),
    "both, weighed": lambda pipe, files: pipe.set_adapters(["a", "b"], [0.3, 0.9]),
    "disable": lambda pipe, files: pipe.disable_lora(),
    "enable": lambda pipe, files: pipe.enable_lora(),
    "fuse": lambda pipe, files: pipe.fuse_lora(adapter_names=["a"], lora_scale=0.5),
    "unfuse": lambda pipe, files: pipe.unfuse_lora(),
    "delete": lambda pipe, files: pipe.delete_adapters("a"),
    "unload": lambda pipe, files: pipe.unload_lora_weights(),
}


@torch.no_grad()
def output(pipe: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, tiny_wan.Z_CHANNELS, 5, 16, 16, generator=generator)
    text = torch.randn(1, 16, tiny_wan.TEXT_DIM, generator=generator)
    return pipe.transformer(latents, torch.tensor([500.0]), text).sample


@pytest.fixture(scope="module")
def files() -> list[dict[str, torch.Tensor]]:
    model = tiny_wan.tiny_transformer()
    return [lora(model, seed) for seed in (1, 2, 3)]


@pytest.fixture(scope="module")
def stock(files) -> dict[str, torch.Tensor]:
    pipe = tiny_wan.tiny_pipeline()
    found = {}
    for name, step in STEPS.items():
        step(pipe, files)
        found[name] = output(pipe)
    changed = list(found)
    for before, after in itertools.pairwise(changed):
        assert (found[before] - found[after]).abs().max() > 1e-2, f"{after} must do something"
    torch.testing.assert_close(found["unload"], found["nothing"], atol=2e-5, rtol=2e-5)  # fused and unfused between
    return found


@pytest.fixture
def fused(monkeypatch) -> None:
    monkeypatch.setattr(AttentionCalls, "fused_here", lambda self, x: self.state.config.fuse)


def agrees(pipe: Any, name: str, want: torch.Tensor) -> None:
    torch.testing.assert_close(output(pipe), want, atol=2e-5, rtol=2e-5, msg=lambda text: f"after {name}: {text}")
    counted = tilewise.summary(pipe, reset=True)
    assert not counted.fallbacks and counted.fused_calls == counted.calls == 2
    # The kernel with the GELU inside reads one weight; a layer with an adapter has more, and is called.
    adapted = any("lora" in type(block.ffn.net[0].proj).__module__ for block in pipe.transformer.blocks)
    said = [note for note in counted.notes if "GELU one by one in 2 of 2 blocks: its first layer is a Linear" in note]
    assert len(said) == len(counted.notes) == int(adapted)


@pytest.mark.usefixtures("fused")
def test_a_patch_from_before_the_first_lora(files, stock):
    pipe = tiny_wan.tiny_pipeline()
    tilewise.patch(pipe, FULL, steps=(0, 1), strict=True)
    for name, step in STEPS.items():
        step(pipe, files)
        agrees(pipe, name, stock[name])
    tilewise.unpatch(pipe)
    torch.testing.assert_close(output(pipe), stock["unload"], atol=0, rtol=0)


@pytest.mark.usefixtures("fused")
def test_a_patch_put_on_at_each_step(files, stock):
    pipe = tiny_wan.tiny_pipeline()
    for name, step in STEPS.items():
        step(pipe, files)
        with tilewise.patched(pipe, FULL, steps=(0, 1), strict=True):
            agrees(pipe, name, stock[name])
        assert torch.equal(output(pipe), stock[name])


@pytest.mark.usefixtures("fused")
def test_a_lora_under_a_step_cache_and_taken_off_with_it_on(files):
    """What a cache kept with one LoRA is not reused with another: each run begins with an empty one."""
    pipe = tiny_wan.tiny_pipeline()

    def latents() -> torch.Tensor:
        return pipe(
            "a red circle", num_inference_steps=4, guidance_scale=3.0, output_type="latent", height=64, width=64,
            num_frames=9, max_sequence_length=16, generator=torch.Generator().manual_seed(0),
        ).frames  # fmt: skip

    cache = {"name": "first-block", "threshold": 50.0}
    wanted = []
    for number in (0, 1):
        STEPS["load"](pipe, files[number:])
        with tilewise.patched(pipe, "dense", cache=cache):
            wanted.append(latents())
            assert tilewise.summary(pipe).cache[0].reused
        pipe.unload_lora_weights()
    assert not torch.allclose(*wanted, atol=1e-2)
    with tilewise.patched(pipe, "dense", cache=cache):
        for number in (0, 1):
            STEPS["load"](pipe, files[number:])
            torch.testing.assert_close(latents(), wanted[number], atol=1e-4, rtol=1e-4)
            pipe.unload_lora_weights()
