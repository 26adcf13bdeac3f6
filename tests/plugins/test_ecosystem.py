"""Life with the rest of diffusers: what users put on a pipeline before the patch, or after it, works in both orders.

Each case puts something on a tiny pipeline and can take it off again. A patch whose window holds everything must then give what
stock gives with the same thing on, and unpatch must give stock's bits, whichever came first.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import global_state
import pytest
import tiny_wan
import torch
from diffusers import (
    FirstBlockCacheConfig,
    FlowMatchEulerDiscreteScheduler,
    PyramidAttentionBroadcastConfig,
    WanPipeline,
    WanTransformer3DModel,
)
from diffusers.hooks import apply_group_offloading
from peft import LoraConfig

import tilewise
from tilewise.plugins.runtime.call_stats import SPARSE

FULL = tilewise.STA(window=(99, 99, 99), tile=(2, 3, 3))
SMALL = tilewise.STA(window=(1, 1, 1), tile=(2, 3, 3))


def latents(pipe: Any, steps: int = 4, **kwargs: Any) -> torch.Tensor:
    options = {"height": 64, "width": 64, "num_frames": 9, "max_sequence_length": 16, **kwargs}
    return pipe(
        "a red circle moving right", num_inference_steps=steps, guidance_scale=3.0, output_type="latent",
        generator=torch.Generator().manual_seed(0), **options,
    ).frames  # fmt: skip


@contextmanager
def group_offload(pipe: Any, kind: str) -> Any:
    cpu = torch.device("cpu")
    apply_group_offloading(
        pipe.transformer, onload_device=cpu, offload_device=cpu, offload_type=kind, num_blocks_per_group=1
    )
    yield
    for module in pipe.transformer.modules():
        if registry := getattr(module, "_diffusers_hook", None):
            for name in list(registry.hooks):
                registry.remove_hook(name, recurse=False)


@contextmanager
def sequential_offload(pipe: Any) -> Any:
    from accelerate import cpu_offload
    from accelerate.hooks import remove_hook_from_module

    cpu_offload(pipe.transformer, torch.device("cpu"))
    yield
    remove_hook_from_module(pipe.transformer, recurse=True)


@contextmanager
def cache(pipe: Any, config: Any) -> Any:
    pipe.transformer.enable_cache(config(pipe))
    yield
    pipe.transformer.disable_cache()


@contextmanager
def lora(pipe: Any, fused: bool = False) -> Any:
    torch.manual_seed(5)
    config = LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, target_modules=["to_q", "to_k", "to_v", "to_out.0"])
    pipe.transformer.add_adapter(config, "style")
    if fused:
        pipe.transformer.fuse_lora()
        yield
        pipe.transformer.unfuse_lora()
    else:
        yield
    pipe.transformer.delete_adapters("style")


@contextmanager
def attention_backend(pipe: Any) -> Any:
    with global_state.restored():  # resetting a model's backend leaves the default of every model as it was set
        pipe.transformer.set_attention_backend("_native_math")
        yield
    pipe.transformer.reset_attention_backend()


@contextmanager
def vae_tiling(pipe: Any) -> Any:
    pipe.vae.enable_tiling()
    yield
    pipe.vae.disable_tiling()


CASES: dict[str, Callable[[Any], AbstractContextManager[Any]]] = {
    "group offload by block": lambda pipe: group_offload(pipe, "block_level"),
    "group offload by leaf": lambda pipe: group_offload(pipe, "leaf_level"),
    "sequential offload": sequential_offload,
    "first block cache": lambda pipe: cache(pipe, lambda pipe: FirstBlockCacheConfig(threshold=50.0)),
    "pyramid attention broadcast": lambda pipe: cache(
        pipe,
        lambda pipe: PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2, spatial_attention_timestep_skip_range=(0, 1001),
            spatial_attention_block_identifiers=("blocks",), current_timestep_callback=lambda: pipe.current_timestep,
        ),
    ),
    "LoRA": lora,
    "fused LoRA": lambda pipe: lora(pipe, fused=True),
    "attention backend": attention_backend,
    "VAE tiling": vae_tiling,
}  # fmt: skip
CHANGES = {"first block cache", "pyramid attention broadcast", "LoRA", "fused LoRA"}


@pytest.mark.parametrize("first", ["patch", "feature"])
@pytest.mark.parametrize("name", list(CASES))
@pytest.mark.slow
def test_in_both_orders(tiny_pipe, name, first):
    feature = CASES[name]
    plain = latents(tiny_pipe, steps=6)
    with feature(tiny_pipe):
        stock = latents(tiny_pipe, steps=6)
    assert torch.equal(latents(tiny_pipe, steps=6), plain) or name == "fused LoRA"
    if name in CHANGES:
        assert not torch.equal(stock, plain), "the feature must do something for this test to mean anything"

    if first == "patch":
        tilewise.patch(tiny_pipe, FULL, steps=(0, 1), strict=True)
        with feature(tiny_pipe):
            torch.testing.assert_close(latents(tiny_pipe, steps=6), stock, atol=1e-4, rtol=1e-4)
            assert {row.kind for row in tilewise.summary(tiny_pipe).rows} == {SPARSE}
            tilewise.unpatch(tiny_pipe)
            torch.testing.assert_close(
                latents(tiny_pipe, steps=6), stock, atol=0 if name != "fused LoRA" else 1e-5, rtol=0
            )
    else:
        with feature(tiny_pipe):
            tilewise.patch(tiny_pipe, FULL, steps=(0, 1), strict=True)
            torch.testing.assert_close(latents(tiny_pipe, steps=6), stock, atol=1e-4, rtol=1e-4)
            assert {row.kind for row in tilewise.summary(tiny_pipe).rows} == {SPARSE}
        torch.testing.assert_close(latents(tiny_pipe, steps=6), plain, atol=1e-4, rtol=1e-4)
        tilewise.unpatch(tiny_pipe)
    torch.testing.assert_close(latents(tiny_pipe, steps=6), plain, atol=0 if name != "fused LoRA" else 1e-5, rtol=0)


@pytest.mark.parametrize("first", ["patch", "casting"])
def test_layerwise_casting(tiny_pipe, first):
    """Weights kept in 8 bits, each turned back during its layer's own forward. diffusers cannot take that off again."""

    def cast(pipe: Any) -> None:
        pipe.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)

    other = tiny_wan.tiny_pipeline()
    plain = latents(other)
    cast(other)
    stock = latents(other)
    assert not torch.allclose(stock, plain, atol=1e-2)
    for step in ("patch", "cast") if first == "patch" else ("cast", "patch"):
        if step == "cast":
            cast(tiny_pipe)
        else:
            tilewise.patch(tiny_pipe, FULL, steps=(0, 1), strict=True)
    torch.testing.assert_close(latents(tiny_pipe), stock, atol=1e-4, rtol=1e-4)
    tilewise.unpatch(tiny_pipe)
    assert torch.equal(latents(tiny_pipe), stock)


def test_another_dtype_before_and_after(tiny_pipe):
    tilewise.patch(tiny_pipe, FULL, steps=(0, 1), strict=True)
    tiny_pipe.to(torch.bfloat16)
    ours = latents(tiny_pipe).float()
    assert {row.kind for row in tilewise.summary(tiny_pipe).rows} == {SPARSE}
    tilewise.unpatch(tiny_pipe)
    stock = latents(tiny_pipe).float()
    assert float((ours - stock).norm() / stock.norm()) < 0.05


def test_saving_while_patched_saves_the_stock_model(tiny_pipe, tmp_path):
    stock = latents(tiny_pipe)
    tilewise.patch(tiny_pipe, SMALL, steps=(0, 1))
    tiny_pipe.transformer.save_pretrained(tmp_path)
    loaded = WanTransformer3DModel.from_pretrained(tmp_path)
    assert not tilewise.is_patched(loaded)
    assert loaded.state_dict().keys() == tilewise.unpatch(tiny_pipe).transformer.state_dict().keys()
    tiny_pipe.transformer = loaded.eval()
    torch.testing.assert_close(latents(tiny_pipe), stock, atol=1e-4, rtol=1e-4)


def test_two_pipelines_patched_differently_at_once(tiny_pipe):
    other = tiny_wan.tiny_pipeline()
    other.set_progress_bar_config(disable=True)
    alone = [
        latents(tilewise.patch(pipe, method, steps=(0, 1))) for pipe, method in ((tiny_pipe, SMALL), (other, FULL))
    ]
    for _ in range(2):
        assert torch.equal(latents(tiny_pipe), alone[0])
        assert torch.equal(latents(other), alone[1])
    assert tilewise.summary(tiny_pipe).density < tilewise.summary(other).density


def test_one_denoiser_in_two_pipelines_is_patched_in_both(tiny_pipe):
    other = WanPipeline(**tiny_pipe.components | {"scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0)})
    other.set_progress_bar_config(disable=True)
    stock = latents(other)
    tilewise.patch(tiny_pipe, SMALL, steps=(0, 1))
    assert tilewise.is_patched(other)
    assert not torch.equal(latents(other), stock)
    tilewise.unpatch(other)
    assert not tilewise.is_patched(tiny_pipe)
    assert torch.equal(latents(other), stock)


def test_several_videos_a_prompt(tiny_pipe):
    stock = latents(tiny_pipe, num_videos_per_prompt=2)
    tilewise.patch(tiny_pipe, FULL, steps=(0, 1), strict=True)
    torch.testing.assert_close(latents(tiny_pipe, num_videos_per_prompt=2), stock, atol=1e-4, rtol=1e-4)


def test_an_interrupted_run_leaves_the_next_one_right(tiny_pipe):
    tilewise.patch(tiny_pipe, SMALL, steps=(0.5, 1))
    whole = latents(tiny_pipe)

    def stop(pipe: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = step == 1
        return kwargs

    assert not torch.equal(latents(tiny_pipe, callback_on_step_end=stop), whole)
    assert torch.equal(latents(tiny_pipe), whole)


@pytest.mark.parametrize("between", [True, False], ids=["a forward between", "none between"])
def test_a_processor_that_was_put_away_and_put_back(tiny_pipe, between):
    """As diffusers' fused projections and some guiders do: everything is as if it had never been away."""
    tilewise.patch(tiny_pipe, SMALL, steps=(0, 1))
    patched = latents(tiny_pipe)
    modules = [block.attn1 for block in tiny_pipe.transformer.blocks]
    ours = [module.processor for module in modules]
    for module in modules:
        module.set_processor(type(module.processor.original)())
    if between:
        latents(tiny_pipe)
    for module, processor in zip(modules, ours, strict=True):
        module.set_processor(processor)
    assert torch.equal(latents(tiny_pipe), patched)
    assert not tilewise.summary(tiny_pipe).skipped_layers


def test_a_processor_put_back_after_unpatch_runs_stock_and_can_be_patched_again(tiny_pipe):
    stock = latents(tiny_pipe)
    tilewise.patch(tiny_pipe, SMALL, steps=(0, 1))
    patched = latents(tiny_pipe)
    modules = [block.attn1 for block in tiny_pipe.transformer.blocks]
    stale = [module.processor for module in modules]
    tilewise.unpatch(tiny_pipe)
    for module, processor in zip(modules, stale, strict=True):
        module.set_processor(processor)
    assert torch.equal(latents(tiny_pipe), stock)
    tilewise.patch(tiny_pipe, SMALL, steps=(0, 1))
    assert torch.equal(latents(tiny_pipe), patched)
    assert tilewise.summary(tiny_pipe).calls > 0
    tilewise.unpatch(tiny_pipe)
    assert torch.equal(latents(tiny_pipe), stock)
