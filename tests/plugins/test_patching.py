"""patch and unpatch on stock Wan pipelines: exact where it must be, sparse where it says, and gone when taken off."""

from __future__ import annotations

import gc
import inspect
import weakref

import pytest
import tiny_wan
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
    WanPipeline,
    WanVideoToVideoPipeline,
)
from diffusers.models.transformers.transformer_wan import WanAttnProcessor

import tilewise
import tilewise.plugins.models.common.registry
from tilewise.plugins.config import resolve
from tilewise.plugins.runtime.call_stats import DENSE_LAYER, DENSE_STEP, FALLBACK, SPARSE
from tilewise.plugins.runtime.step_index import by_noise_level

FULL = tilewise.STA(window=(99, 99, 99), tile=(2, 3, 3))
SMALL = tilewise.STA(window=(1, 1, 1), tile=(2, 3, 3))


def latents(pipe, steps=4, seed=0, **kwargs):
    options = {"height": 64, "width": 64, "num_frames": 9, "max_sequence_length": 16, **kwargs}
    return pipe(
        "a red circle moving right", num_inference_steps=steps, guidance_scale=3.0, output_type="latent",
        generator=torch.Generator().manual_seed(seed), **options,
    ).frames  # fmt: skip


def state(module):
    """Everything a patch could leave behind: attributes, hooks, buffers and processors of every submodule."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs")
    hooks += ("_forward_hooks_always_called", "_buffers", "_modules")
    return {
        name: (sorted(m.__dict__), [list(getattr(m, h)) for h in hooks], id(getattr(m, "processor", None)))
        for name, m in module.named_modules()
    }


def kinds(pipe):
    counts = {}
    for row in tilewise.summary(pipe).rows:
        counts[row.kind] = counts.get(row.kind, 0) + row.calls
    return counts


VARIANTS = {
    "Wan2.1": {},
    "Wan2.2 5B, a timestep per token": {"expand_timesteps": True},
    "Wan2.2 14B, two denoisers": {"boundary_ratio": 0.8},
    "head dim 32, three blocks": {"num_layers": 3, "attention_head_dim": 32},
}


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_full_window_is_dense_and_unpatch_leaves_no_trace(options):
    pipe = tiny_wan.tiny_pipeline(**options)
    stock = latents(pipe)
    before = [state(m) for m in (pipe.transformer, pipe.transformer_2) if m is not None]

    assert tilewise.patch(pipe, FULL, steps=(0, 1), strict=True) is pipe
    assert tilewise.is_patched(pipe)
    torch.testing.assert_close(latents(pipe), stock, atol=1e-4, rtol=1e-4)
    blocks = pipe.transformer.config.num_layers
    assert kinds(pipe) == {SPARSE: 4 * 2 * blocks}  # steps × (cond, uncond) × blocks
    tilewise.patch(pipe, SMALL, steps=(0, 1))
    assert (latents(pipe) - stock).abs().max() > 1e-2

    tilewise.unpatch(pipe)
    assert not tilewise.is_patched(pipe)
    assert torch.equal(latents(pipe), stock)
    assert [state(m) for m in (pipe.transformer, pipe.transformer_2) if m is not None] == before
    tilewise.unpatch(pipe)  # harmless


def test_both_denoisers_of_wan22_run():
    pipe = tiny_wan.tiny_pipeline(boundary_ratio=0.8)
    tilewise.patch(pipe, SMALL, steps=(0, 1))
    latents(pipe, steps=6)
    assert {row.denoiser for row in tilewise.summary(pipe).rows} == {"transformer", "transformer_2"}


def test_image_to_video_keeps_its_image_cross_attention():
    """Wan2.1 I2V: cross-attention over image and text tokens is untouched, so a full window is dense there too."""
    model = tiny_wan.tiny_pipeline(image=True).transformer
    x = torch.randn(2, model.config.in_channels, 5, 16, 16)
    text, image = torch.randn(2, 512, tiny_wan.TEXT_DIM), torch.randn(2, 5, tiny_wan.IMAGE_DIM)
    call = {"hidden_states": x, "timestep": torch.tensor([700.0, 700.0]), "encoder_hidden_states": text}
    with torch.no_grad():
        stock = model(**call, encoder_hidden_states_image=image).sample
        tilewise.patch(model, FULL, steps=(0, 1), strict=True)
        torch.testing.assert_close(model(**call, encoder_hidden_states_image=image).sample, stock, atol=1e-4, rtol=1e-4)
        other = model(**call, encoder_hidden_states_image=-image).sample
    assert (other - stock).abs().max() > 1e-3
    assert tilewise.summary(model).calls == 2 * 2  # two forwards, attn1 of two blocks, attn2 never


def test_image_to_video_pipeline():
    """The whole I2V pipeline, image encoder and conditioning frames included."""
    from PIL import Image

    pipe = tiny_wan.tiny_pipeline(image=True)
    image = Image.effect_mandelbrot((64, 64), (-2, -1.5, 1, 1.5), 50).convert("RGB")
    embeds = torch.randn(1, 512, tiny_wan.TEXT_DIM, generator=torch.Generator().manual_seed(3))

    def run():
        return pipe(
            image=image, prompt_embeds=embeds, negative_prompt_embeds=embeds * 0, height=64, width=64, num_frames=9,
            num_inference_steps=2, guidance_scale=3.0, output_type="latent", generator=torch.Generator().manual_seed(0),
        ).frames  # fmt: skip

    stock = run()
    with tilewise.patched(pipe, FULL, steps=(0, 1), strict=True):
        torch.testing.assert_close(run(), stock, atol=1e-4, rtol=1e-4)
    assert torch.equal(run(), stock)


def test_locality_one_latent_changes_exactly_the_windows_that_hold_it():
    """In a one-layer denoiser, an output token changes if and only if its window holds the tile of the changed latent."""
    model = tiny_wan.tiny_transformer(num_layers=1)
    x = torch.randn(1, 4, 5, 16, 14)  # grid 5×8×7
    text = torch.randn(1, 16, tiny_wan.TEXT_DIM)
    t, h, w = 3, 2, 5
    changed = x.clone()
    changed[:, :, t, 2 * h : 2 * h + 2, 2 * w : 2 * w + 2] += 3.0
    tile, window = (2, 3, 3), (2, 1, 2)
    tilewise.patch(model, tilewise.STA(window=window, tile=tile), steps=(0, 1), strict=True)
    with torch.no_grad():
        out, other = (model(y, torch.tensor([500.0]), text).sample for y in (x, changed))
    moved = (out != other).any(1)[0].unflatten(1, (8, 2)).unflatten(3, (7, 2)).any(2).any(3)  # (5, 8, 7)
    expected = torch.zeros(5, 8, 7, dtype=torch.bool)
    counts = (3, 3, 3)
    for token in torch.cartesian_prod(torch.arange(5), torch.arange(8), torch.arange(7)).tolist():
        holds = True
        for i, j, size, n, wide in zip(token, (t, h, w), tile, counts, window, strict=True):
            start = min(max(i // size - wide // 2, 0), n - wide)
            holds &= start <= j // size < start + wide
        expected[tuple(token)] = holds
    assert 0 < int(expected.sum()) < expected.numel()
    assert torch.equal(moved, expected)


@pytest.mark.parametrize(("steps", "dense"), [(4, 1), (1, 1), (50, 13), (7, 2)])
def test_dense_steps_come_first_for_any_number_of_steps(tiny_pipe, steps, dense):
    tilewise.patch(tiny_pipe, SMALL)
    for _ in range(2):  # repeated calls start over
        before = kinds(tiny_pipe)
        latents(tiny_pipe, steps=steps, height=32, width=32, num_frames=5)
        after = kinds(tiny_pipe)
        assert after[DENSE_STEP] - before.get(DENSE_STEP, 0) == dense * 4
        assert after.get(SPARSE, 0) - before.get(SPARSE, 0) == (steps - dense) * 4


def test_schedule_with_a_multistep_solver_and_batches(tiny_pipe):
    tiny_pipe.scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    tilewise.patch(tiny_pipe, SMALL, steps=(0.3, 0.8))
    tiny_pipe(
        ["a red circle", "a blue star"], height=32, width=32, num_frames=5, num_inference_steps=10, guidance_scale=3.0,
        output_type="latent", max_sequence_length=16, num_videos_per_prompt=2,
    )  # fmt: skip
    assert kinds(tiny_pipe) == {DENSE_STEP: 5 * 4, SPARSE: 5 * 4}


def test_schedule_of_video_to_video_counts_from_where_it_enters(tiny_pipe):
    """With strength 0.5 the first half of the schedule is skipped, and the dense steps with it."""
    pipe = WanVideoToVideoPipeline(**{k: v for k, v in tiny_pipe.components.items() if k in (
        "tokenizer", "text_encoder", "transformer", "vae", "scheduler")})  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    tilewise.patch(pipe, SMALL, steps=(0.25, 1))
    embeds = torch.randn(1, 16, tiny_wan.TEXT_DIM)
    pipe(
        latents=torch.randn(1, 4, 5, 16, 16), prompt_embeds=embeds, negative_prompt_embeds=embeds, height=64, width=64,
        num_inference_steps=8, strength=0.5, guidance_scale=3.0, output_type="latent",
    )  # fmt: skip
    assert kinds(pipe) == {SPARSE: 4 * 4}


def test_a_bare_denoiser_goes_by_its_noise_level():
    model = tiny_wan.tiny_transformer()
    tilewise.patch(model, SMALL)
    x, text = torch.randn(1, 4, 3, 8, 8), torch.randn(1, 16, tiny_wan.TEXT_DIM)
    with torch.no_grad():
        for timestep in (1000.0, 900.0, 700.0, 10.0):
            model(x, torch.tensor([timestep]), text)
    assert kinds(model) == {DENSE_STEP: 2 * 2, SPARSE: 2 * 2}
    assert by_noise_level(torch.tensor([0.0, 250.0]))[:2] == (750, 1000)  # per-token timesteps: the noisiest counts


def test_blocks_choose_layers(tiny_pipe):
    tilewise.patch(tiny_pipe, FULL, steps=(0, 1), blocks="1:")
    stock = latents(tilewise.unpatch(tiny_pipe))
    tilewise.patch(tiny_pipe, FULL, steps=(0, 1), blocks="1:")
    torch.testing.assert_close(latents(tiny_pipe), stock, atol=1e-4, rtol=1e-4)  # dense layers run in tile order
    rows = {row.kind: row for row in tilewise.summary(tiny_pipe).rows}
    assert (rows[SPARSE].layers, rows[DENSE_LAYER].layers) == ("1", "0")
    assert rows[SPARSE].calls == rows[DENSE_LAYER].calls == 8


@pytest.mark.parametrize("shape", [(5, 8, 8), (9, 7, 11), (1, 1, 1), (1, 1, 9), (1, 6, 5), (3, 1, 4)], ids=str)
def test_any_grid_runs(shape):
    """Grids that no tile divides, one frame, one row, one token."""
    model = tiny_wan.tiny_transformer()
    t, h, w = shape
    inputs = torch.randn(2, 4, t, 2 * h, 2 * w), torch.tensor([500.0, 500.0]), torch.randn(2, 16, tiny_wan.TEXT_DIM)
    with torch.no_grad():
        stock = model(*inputs).sample
        tilewise.patch(model, "sta", steps=(0, 1), strict=True)
        assert model(*inputs).sample.isfinite().all()
        tilewise.patch(model, tilewise.STA(window=(99, 99, 99)), steps=(0, 1), strict=True)
        torch.testing.assert_close(model(*inputs).sample, stock, atol=1e-4, rtol=1e-4)


def test_a_window_a_head(tiny_pipe):
    stock = latents(tiny_pipe)
    tilewise.patch(tiny_pipe, tilewise.STA(window=((99, 99, 99), (1, 1, 1)), tile=(2, 3, 3)), steps=(0, 1), strict=True)
    mixed = latents(tiny_pipe)
    assert (mixed - stock).abs().max() > 1e-3
    density = tilewise.summary(tiny_pipe).density
    assert 0.5 < density < 0.6
    with pytest.raises(tilewise.ConfigError, match="3 windows were given, but the layer has 2 heads"):
        tilewise.patch(tiny_pipe, tilewise.STA(window=((1, 1, 1),) * 3, tile=(2, 3, 3)), steps=(0, 1))
    assert tilewise.summary(tiny_pipe).density == density  # the earlier patch is still on


def test_patching_again_replaces(tiny_pipe):
    stock = latents(tiny_pipe)
    tilewise.patch(tiny_pipe, SMALL, steps=(0, 1))
    original = tiny_pipe.transformer.blocks[0].attn1.processor.original
    tilewise.patch(tiny_pipe, FULL, steps=(0, 1))
    assert tiny_pipe.transformer.blocks[0].attn1.processor.original is original
    assert isinstance(original, WanAttnProcessor)
    torch.testing.assert_close(latents(tiny_pipe), stock, atol=1e-4, rtol=1e-4)
    tilewise.unpatch(tiny_pipe)
    assert tiny_pipe.transformer.blocks[0].attn1.processor is original


def test_patched_restores_what_was_there(tiny_pipe):
    with tilewise.patched(tiny_pipe, SMALL):
        assert tilewise.is_patched(tiny_pipe)
    assert not tilewise.is_patched(tiny_pipe)
    tilewise.patch(tiny_pipe, FULL)
    with pytest.raises(RuntimeError, match="boom"), tilewise.patched(tiny_pipe, SMALL):
        raise RuntimeError("boom")
    assert tilewise.summary(tiny_pipe).method["method"]["window"] == (99, 99, 99)


def test_an_exception_in_mid_denoise_leaves_the_pipeline_usable(tiny_pipe):
    stock = latents(tiny_pipe)
    tilewise.patch(tiny_pipe, SMALL, steps=(0, 1))

    def stop(pipe, step, timestep, tensors):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        latents(tiny_pipe, callback_on_step_end=stop)
    block = tiny_pipe.transformer.blocks[1]
    handle = block.register_forward_pre_hook(lambda module, args: 1 / 0)
    with pytest.raises(ZeroDivisionError):  # in the middle of a forward, with the tokens reordered
        latents(tiny_pipe)
    handle.remove()
    latents(tiny_pipe)
    assert torch.equal(latents(tilewise.unpatch(tiny_pipe)), stock)


class Exotic(WanAttnProcessor):
    """A processor that computes attention its own way."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        ramp = torch.linspace(0, 1, hidden_states.shape[1])[None, :, None]  # it counts on raster order
        return hidden_states * ramp + rotary_emb[0].mean((2, 3))[..., None] * ramp


def test_an_exotic_processor_stays_dense_and_is_reported(tiny_pipe):
    tiny_pipe.transformer.blocks[0].attn1.set_processor(Exotic())
    tilewise.patch(tiny_pipe, SMALL, steps=(0, 1))
    latents(tiny_pipe)
    report = tilewise.summary(tiny_pipe)
    assert report.skipped_layers == {"transformer.blocks.0.attn1": "its processor, Exotic, cannot be taken over"}
    assert "stays dense" in str(report)
    assert {row.layers for row in report.rows} == {"1"}
    tilewise.unpatch(tiny_pipe)
    with pytest.raises(tilewise.FallbackError, match="Exotic"):
        tilewise.patch(tiny_pipe, SMALL, strict=True)
    assert not tilewise.is_patched(tiny_pipe)
    assert isinstance(tiny_pipe.transformer.blocks[0].attn1.processor, Exotic)


def test_an_exotic_processor_gets_its_tokens_in_the_models_own_order(tiny_pipe):
    tiny_pipe.transformer.blocks[1].attn1.set_processor(Exotic())
    stock = latents(tiny_pipe)
    tilewise.patch(tiny_pipe, FULL, steps=(0, 1))
    torch.testing.assert_close(latents(tiny_pipe), stock, atol=1e-4, rtol=1e-4)
    before = state(tilewise.unpatch(tiny_pipe).transformer)
    assert not [hooks for _, hooks, _ in before.values() if any(hooks[:5])]


def test_a_processor_that_is_replaced_after_the_patch_is_reported(tiny_pipe):
    tilewise.patch(tiny_pipe, FULL, steps=(0, 1))
    tiny_pipe.transformer.blocks[0].attn1.set_processor(Exotic())
    patched = latents(tiny_pipe)
    assert (
        "Exotic, cannot be taken over (it was set after"
        in tilewise.summary(tiny_pipe).skipped_layers["transformer.blocks.0.attn1"]
    )
    tilewise.unpatch(tiny_pipe)
    torch.testing.assert_close(latents(tiny_pipe), patched, atol=1e-4, rtol=1e-4)
    assert isinstance(tiny_pipe.transformer.blocks[0].attn1.processor, Exotic)
    tiny_pipe.transformer.blocks[0].attn1.set_processor(WanAttnProcessor())
    tilewise.patch(tiny_pipe, FULL, steps=(0, 1), strict=True)
    tiny_pipe.transformer.blocks[0].attn1.set_processor(Exotic())
    with pytest.raises(tilewise.FallbackError, match="Exotic, cannot be taken over"):
        latents(tiny_pipe)


def test_caches_that_outlive_a_step_stay_right(tiny_pipe):
    """Pyramid attention broadcast replays a layer's output in a later step: across the first sparse step, too."""
    from diffusers import PyramidAttentionBroadcastConfig

    def run():
        tiny_pipe.transformer.enable_cache(
            PyramidAttentionBroadcastConfig(
                spatial_attention_block_skip_range=2,
                spatial_attention_timestep_skip_range=(0, 1001),
                spatial_attention_block_identifiers=("blocks",),
                current_timestep_callback=lambda: tiny_pipe.current_timestep,
            )
        )
        out = latents(tiny_pipe, steps=5)
        tiny_pipe.transformer.disable_cache()
        return out

    stock = run()
    assert not torch.equal(stock, latents(tiny_pipe, steps=5))  # the cache does something
    for start in (0.2, 0.6):
        with tilewise.patched(tiny_pipe, FULL, steps=(start, 1), strict=True):
            torch.testing.assert_close(run(), stock, atol=1e-4, rtol=1e-4)


def test_another_pipeline_with_the_same_denoiser_keeps_its_dense_steps(tiny_pipe):
    """Its own scheduler counts its steps, whatever the pipeline that was patched is at."""
    other = WanPipeline(**tiny_pipe.components | {"scheduler": FlowMatchEulerDiscreteScheduler(shift=1.0)})
    other.set_progress_bar_config(disable=True)
    tilewise.patch(tiny_pipe, SMALL, steps=(0.25, 1))
    latents(tiny_pipe, steps=8)
    assert kinds(tiny_pipe) == {DENSE_STEP: 2 * 4, SPARSE: 6 * 4}
    latents(other, steps=8)
    assert kinds(other) == {DENSE_STEP: 2 * 2 * 4, SPARSE: 2 * 6 * 4}


def test_offloading_before_and_after(tiny_pipe):
    """accelerate wraps the denoiser's forward; the patch neither sees it nor minds."""
    from accelerate import cpu_offload
    from accelerate.hooks import remove_hook_from_module

    stock = latents(tiny_pipe)
    tilewise.patch(tiny_pipe, FULL, steps=(0, 1), strict=True)
    cpu_offload(tiny_pipe.transformer, torch.device("cpu"))
    torch.testing.assert_close(latents(tiny_pipe), stock, atol=1e-4, rtol=1e-4)
    tilewise.unpatch(tiny_pipe)
    assert torch.equal(latents(tiny_pipe), stock)
    tilewise.patch(tiny_pipe, FULL, steps=(0, 1), strict=True)
    torch.testing.assert_close(latents(tiny_pipe), stock, atol=1e-4, rtol=1e-4)
    remove_hook_from_module(tiny_pipe.transformer, recurse=True)
    torch.testing.assert_close(latents(tiny_pipe), stock, atol=1e-4, rtol=1e-4)


@pytest.mark.compile
@pytest.mark.parametrize("how", ["wrapped", "blocks"])
def test_compiled_before_or_after_the_patch(tiny_pipe, how):
    """torch.compile(module) and compile_repeated_blocks(), with code that had already been compiled."""
    stock = latents(tiny_pipe)
    if how == "wrapped":
        tiny_pipe.transformer = torch.compile(tiny_pipe.transformer, backend="eager")
    else:
        tiny_pipe.transformer.compile_repeated_blocks(backend="eager")
    torch.testing.assert_close(latents(tiny_pipe), stock, atol=1e-4, rtol=1e-4)
    tilewise.patch(tiny_pipe, SMALL, steps=(0, 1))
    sparse = latents(tiny_pipe)
    assert (sparse - stock).abs().max() > 1e-2
    assert kinds(tiny_pipe) == {SPARSE: 4 * 2 * 2}
    tilewise.patch(tiny_pipe, FULL, steps=(0, 1))
    torch.testing.assert_close(latents(tiny_pipe), stock, atol=1e-4, rtol=1e-4)
    tilewise.unpatch(tiny_pipe)
    torch.testing.assert_close(latents(tiny_pipe), stock, atol=1e-4, rtol=1e-4)


def test_a_failing_family_leaves_nothing_behind(monkeypatch):
    model = tiny_wan.tiny_transformer()
    before = state(model)
    family = tilewise.plugins.models.common.registry.family_of(model)
    monkeypatch.setattr(type(family), "hooks", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        tilewise.patch(model, SMALL)
    assert state(model) == before


def test_fallbacks_are_counted_with_their_reason_and_strict_makes_them_errors():
    model = tiny_wan.tiny_transformer().double()
    x, text = torch.randn(1, 4, 5, 16, 16).double(), torch.randn(1, 16, tiny_wan.TEXT_DIM).double()
    with torch.no_grad():
        stock = model(x, torch.tensor([500.0]), text).sample
        tilewise.patch(model, SMALL, steps=(0, 1))
        torch.testing.assert_close(model(x, torch.tensor([500.0]), text).sample, stock)
        fallbacks = tilewise.summary(model).fallbacks
        assert list(fallbacks.values()) == [2]
        assert "float64" in next(iter(fallbacks))
        assert kinds(model) == {FALLBACK: 2}
        tilewise.patch(model, SMALL, steps=(0, 1), strict=True)
        with pytest.raises(tilewise.FallbackError, match=r"blocks\.0\.attn1 cannot run sta: .*float64"):
            model(x, torch.tensor([500.0]), text)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_backward_pass_says_what_to_do(checkpointing):
    """In eval mode too, where a forward with gradients is allowed."""
    model = tiny_wan.tiny_transformer()
    if checkpointing:
        model.enable_gradient_checkpointing()
    inputs = torch.randn(1, 4, 3, 8, 8), torch.tensor([500.0]), torch.randn(1, 16, tiny_wan.TEXT_DIM)
    tilewise.patch(model, SMALL, steps=(0, 1))
    loss = model(*inputs).sample.sum()
    with pytest.raises(tilewise.TilewiseError, match=r"no backward pass\. Call tilewise\.unpatch first"):
        loss.backward()
    tilewise.unpatch(model)
    model(*inputs).sample.sum().backward()


def test_an_attention_mask_is_honoured_in_the_tokens_own_order():
    """A masked call falls back to dense, with the mask brought into the order that the tokens are in."""
    model = tiny_wan.tiny_transformer(num_layers=1)
    x, text = torch.randn(1, 4, 5, 16, 16), torch.randn(1, 16, tiny_wan.TEXT_DIM)
    mask = torch.rand(1, 1, 320, 320) < 0.3
    mask |= torch.eye(320, dtype=torch.bool)
    attn = model.blocks[0].attn1
    handle = attn.register_forward_pre_hook(lambda module, args: (args[0], args[1], mask, args[3]))
    with torch.no_grad():
        stock = model(x, torch.tensor([500.0]), text).sample
        tilewise.patch(model, SMALL, steps=(0, 1))
        torch.testing.assert_close(model(x, torch.tensor([500.0]), text).sample, stock, atol=1e-4, rtol=1e-4)
    handle.remove()
    reason = "the call has an attention mask of shape (1, 1, 320, 320), which is not one of keys alone"
    assert tilewise.summary(model).fallbacks == {reason: 1}


def test_processor_shows_the_stock_signature_and_passes_settings_on(tiny_pipe):
    stock = inspect.signature(tiny_pipe.transformer.blocks[0].attn1.processor.__call__)
    tilewise.patch(tiny_pipe, SMALL)
    processor = tiny_pipe.transformer.blocks[0].attn1.processor
    assert inspect.signature(processor.__call__) == stock
    tiny_pipe.transformer.set_attention_backend("native")
    assert processor.original._attention_backend == "native"
    assert processor._parallel_config is None
    tilewise.unpatch(tiny_pipe)
    assert tiny_pipe.transformer.blocks[0].attn1.processor._attention_backend == "native"


def test_fused_projections_before_and_after(tiny_pipe):
    stock = latents(tiny_pipe)
    tilewise.patch(tiny_pipe, FULL, steps=(0, 1))
    tiny_pipe.transformer.fuse_qkv_projections()
    torch.testing.assert_close(latents(tiny_pipe), stock, atol=1e-4, rtol=1e-4)
    tilewise.unpatch(tiny_pipe)
    torch.testing.assert_close(latents(tiny_pipe), stock, atol=1e-4, rtol=1e-4)
    tilewise.patch(tiny_pipe, FULL, steps=(0, 1))
    torch.testing.assert_close(latents(tiny_pipe), stock, atol=1e-4, rtol=1e-4)


def test_dense_method_changes_nothing_but_counts(tiny_pipe):
    stock = latents(tiny_pipe)
    tilewise.patch(tiny_pipe, "dense", steps=(0, 1))
    assert torch.equal(latents(tiny_pipe), stock)
    report = tilewise.summary(tiny_pipe)
    assert report.calls == 16
    assert report.density == report.overall_density == 1.0


def test_a_patched_pipeline_can_be_collected():
    """No cycle through a global: nothing keeps a dropped pipeline alive."""
    pipe = tiny_wan.tiny_pipeline()
    tilewise.patch(pipe, SMALL)
    latents(pipe, steps=1)
    gone = weakref.ref(pipe.transformer)
    del pipe
    gc.collect()
    assert gone() is None


def test_unknown_targets_are_refused_untouched():
    class Other(torch.nn.Module):
        pass

    class Pipe:
        transformer = Other()

    for call in (lambda x: tilewise.patch(x, "sta"), lambda x: tilewise.explain(x, height=64, width=64, frames=9)):
        with pytest.raises(
            tilewise.UnsupportedModelError, match=r"Other, which no family adapter serves .*WanTransformer3D"
        ):
            call(Pipe())
        with pytest.raises(tilewise.UnsupportedModelError, match="has no denoiser"):
            call(object())
    for target in (Pipe(), object()):  # as documented: harmless where there is no patch
        assert tilewise.unpatch(target) is target and not tilewise.is_patched(target)
    assert "_tilewise" not in Pipe.transformer.__dict__


def test_blocks_that_select_nothing_are_refused(tiny_pipe):
    with pytest.raises(tilewise.ConfigError, match="selects none of the 2 blocks of transformer"):
        tilewise.patch(tiny_pipe, SMALL, blocks="7:")
    with pytest.raises(tilewise.ConfigError, match="selects none of the 2 blocks of transformer"):
        tilewise.explain(tiny_pipe, height=64, width=64, frames=9, method=SMALL, blocks="7:")
    assert not tilewise.is_patched(tiny_pipe)


def test_summary_needs_a_patch(tiny_pipe):
    with pytest.raises(tilewise.ConfigError, match="not patched"):
        tilewise.summary(tiny_pipe)


def test_fuse_is_part_of_a_config(tiny_pipe, tmp_path):
    assert resolve("sta-fast").fuse
    config = resolve("sta-fast", fuse=False)
    tilewise.save_config(config, tmp_path / "config.json")
    assert tilewise.load_config(tmp_path / "config.json") == config
    tilewise.patch(tiny_pipe, config)
    assert tilewise.summary(tiny_pipe).method["fuse"] is False
    with tilewise.patched(tiny_pipe, config, fuse=True):
        assert tilewise.summary(tiny_pipe).method["fuse"] is True
    assert tilewise.summary(tiny_pipe).method["fuse"] is False
    with pytest.raises(tilewise.ConfigError, match="fuse must be true or false, got 1"):
        resolve("sta", fuse=1)
