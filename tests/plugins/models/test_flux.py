"""Flux.1 through the checks that every family must pass, and its own: reference images, ControlNet, IP-Adapter, guidance."""

from __future__ import annotations

import family_checks
import image_checks
import pytest
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from peft import LoraConfig

import tilewise
from tilewise.kernels.plans.layout import Grid
from tilewise.plugins.errors import ConfigError, TilewiseError
from tilewise.plugins.models.common.position_ids import image_shape, read_image_shape
from tilewise.plugins.runtime.call_stats import FALLBACK, SPARSE

CHANNELS, TEXT_DIM, TEXT = 8, 12, 7


def tiny(**overrides):
    config = {
        "in_channels": CHANNELS,
        "num_layers": 1,
        "num_single_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": TEXT_DIM,
        "pooled_projection_dim": 8,
        "axes_dims_rope": (4, 6, 6),
    }
    return image_checks.random_weights(FluxTransformer2DModel(**config | overrides))


def inputs(h, w, batch=2, text=TEXT, reference=None, guidance=False):
    generator = torch.Generator().manual_seed(0)
    ids = image_checks.positions(h, w)
    if reference is not None:
        ids = torch.cat([ids, image_checks.positions(*reference, number=1)])
    given = {
        "hidden_states": torch.randn(batch, len(ids), CHANNELS, generator=generator),
        "encoder_hidden_states": torch.randn(batch, text, TEXT_DIM, generator=generator),
        "pooled_projections": torch.randn(batch, 8, generator=generator),
        "timestep": torch.full((batch,), 0.5),
        "img_ids": ids,
        "txt_ids": torch.zeros(text, 3),
    }
    return given | ({"guidance": torch.full((batch,), 3.5)} if guidance else {})


@pytest.fixture(scope="module")
def model():
    return tiny()


@pytest.mark.parametrize("shape", [(8, 10), (11, 7), (1, 40), (40, 1)])
def test_flux(model, shape):
    grid = Grid(1, *shape, text=TEXT, text_first=True)
    family_checks.full_window_is_dense(model, inputs(*shape), grid)
    family_checks.sparse_is_masked_stock(model, inputs(*shape), grid)


def test_reference_images_are_seen_by_all(model):
    x = inputs(8, 9, reference=(5, 6))
    grid = Grid(1, 8, 9, text=TEXT + 30, text_first=True, opposite=30)
    family_checks.full_window_is_dense(model, x, grid)
    image_checks.masked_stock(model, x, grid)


def test_guidance_and_positional_arguments():
    model = tiny(guidance_embeds=True)
    x = inputs(8, 10, guidance=True)
    family_checks.full_window_is_dense(model, x, Grid(1, 8, 10, text=TEXT, text_first=True))
    want = image_checks.output(model, x)
    with tilewise.patched(model, family_checks.FULL, steps=(0, 1), strict=True), torch.no_grad():
        names = (
            "hidden_states",
            "encoder_hidden_states",
            "pooled_projections",
            "timestep",
            "img_ids",
            "txt_ids",
            "guidance",
        )
        ours = model(*(x[name] for name in names), return_dict=False)[0]
    torch.testing.assert_close(ours, want, atol=2e-5, rtol=2e-5)


def test_controlnet_samples_follow_the_order(model):
    x = inputs(8, 10)
    samples = torch.randn(2, 80, 32, generator=torch.Generator().manual_seed(1))
    x |= {"controlnet_block_samples": [samples], "controlnet_single_block_samples": [samples * 2, samples]}
    image_checks.masked_stock(model, x, Grid(1, 8, 10, text=TEXT, text_first=True))


@pytest.mark.parametrize("number", [0, 2])
@pytest.mark.parametrize("reference", [None, (5, 6)])
def test_own_processor(model, number, reference):
    image_checks.own_processor(model, inputs(8, 9, reference=reference), number)


def test_a_full_mask_falls_back_in_its_own_order(model):
    for reference in (None, (5, 6)):
        x = inputs(8, 9, reference=reference)
        tokens = TEXT + x["hidden_states"].shape[1]
        mask = torch.rand(2, 1, tokens, tokens, generator=torch.Generator().manual_seed(2)) > 0.3
        x["joint_attention_kwargs"] = {"attention_mask": mask}
        want = image_checks.output(model, x)
        with tilewise.patched(model, family_checks.SMALL, steps=(0, 1)):
            ours = image_checks.output(model, x)
            assert {row.kind for row in tilewise.summary(model).rows} == {FALLBACK}
        torch.testing.assert_close(ours, want, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("patched_first", [True, False])
def test_lora_on_the_embedder_and_the_output(patched_first):
    model = tiny()
    lora = LoraConfig(r=4, target_modules=["x_embedder", "proj_out", "to_q"], init_lora_weights=False)
    torch.manual_seed(0)
    if patched_first:
        tilewise.patch(model, family_checks.FULL, steps=(0, 1), strict=True)
        model.add_adapter(lora)
    else:
        model.add_adapter(lora)
        tilewise.patch(model, family_checks.FULL, steps=(0, 1), strict=True)
    ours = image_checks.output(model, inputs(8, 9))
    tilewise.unpatch(model)
    torch.testing.assert_close(ours, image_checks.output(model, inputs(8, 9)), atol=2e-5, rtol=2e-5)


@pytest.mark.compile
def test_blocks_compiled_one_by_one():
    model = tiny()
    with tilewise.patched(model, family_checks.SMALL, steps=(0, 1)):
        want = image_checks.output(model, inputs(8, 9))
        model.compile_repeated_blocks(fullgraph=True, backend="eager")
        torch.testing.assert_close(image_checks.output(model, inputs(8, 9)), want, atol=1e-5, rtol=1e-5)
    torch.compiler.reset()


@pytest.mark.compile
def test_compiled():
    one = tiny(num_single_layers=1)
    image_checks.compiled_is_eager(one, inputs(8, 10), inputs(8, 9, reference=(5, 6)), inputs(7, 11))


def test_in_inference_mode(model):
    want = image_checks.output(model, inputs(7, 9))
    with tilewise.patched(model, family_checks.FULL, steps=(0, 1), strict=True), torch.inference_mode():
        ours = model(**inputs(7, 9), return_dict=False)[0]
    torch.testing.assert_close(ours.clone(), want, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1), (1, 700), (300, 2), (3, 513)])
def test_shape_from_positions_in_any_precision(dtype, shape):
    ids = image_checks.positions(*shape).to(dtype)
    assert read_image_shape(ids) == (*shape, 0)
    both = torch.cat([ids, image_checks.positions(4, 5, number=1).to(dtype)])
    assert read_image_shape(both[None].expand(2, -1, -1)) == (*shape, 20)


def test_positions_are_read_once_and_again_when_they_change():
    ids = image_checks.positions(4, 6)
    assert image_shape(ids) == (4, 6, 0)
    ids.copy_(image_checks.positions(6, 4))
    assert image_shape(ids) == (6, 4, 0)


@pytest.mark.parametrize("reference", [None, (3, 5)])
def test_tokens_that_are_no_image_stay_dense_and_are_counted(model, reference):
    x = inputs(8, 9, reference=reference)
    x["img_ids"] = x["img_ids"].flip(0)
    family_checks.refused_is_stock(model, x, "not an image in raster order", image_checks.output)
    # Compiled, they are an error: what a graph was made for cannot hang on values.
    tilewise.patch(model, family_checks.FULL, steps=(0, 1))
    with torch.no_grad(), pytest.raises(TilewiseError, match="raster order"):
        torch.compile(model, backend="eager")(**x)
    tilewise.unpatch(model)
    torch.compiler.reset()


def pipeline(**overrides):
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=CHANNELS // 4,
        norm_num_groups=4,
    )
    parts = dict.fromkeys(["text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"])
    return FluxPipeline(scheduler=FlowMatchEulerDiscreteScheduler(), vae=vae, transformer=tiny(**overrides), **parts)


def test_pipeline():
    pipe = pipeline(guidance_embeds=True)
    generator = torch.Generator().manual_seed(0)
    call = {
        "prompt_embeds": torch.randn(1, TEXT, TEXT_DIM, generator=generator),
        "pooled_prompt_embeds": torch.randn(1, 8, generator=generator),
        "height": 36,
        "width": 44,
        "num_inference_steps": 4,
        "num_images_per_prompt": 2,
    }
    image_checks.pipeline_full_window_is_dense(pipe, call)


def test_explain():
    pipe = pipeline()
    row = tilewise.explain(pipe, height=36, width=44, frames=1, method=family_checks.SMALL).rows[0]
    assert row.grid == "1×9×11 + 512 text"
    for wrong, said in (
        ({"height": 38}, "height=38 must be a multiple of 4"),
        ({"num_frames": 5}, "frames=5 must be 1"),
    ):
        with pytest.raises(ConfigError, match=said):
            tilewise.explain(pipe, **{"height": 36, "width": 44, "num_frames": 1} | wrong, method="sta")
    assert tilewise.explain(tiny(), height=1024, width=1024, frames=1, method="sta").rows[0].tokens == 64 * 64 + 512


def test_a_dense_step_is_dense(model):
    x = inputs(8, 9, reference=(5, 6))
    want = image_checks.output(model, x)
    with tilewise.patched(model, family_checks.SMALL, steps=(0.6, 1)):  # timestep 0.5: step 0.5
        torch.testing.assert_close(image_checks.output(model, x), want, atol=2e-5, rtol=2e-5)
    with tilewise.patched(model, family_checks.SMALL, steps=(0.4, 1)):
        assert float((image_checks.output(model, x) - want).abs().max()) > 1e-3
        assert {row.kind for row in tilewise.summary(model).rows} == {SPARSE}
