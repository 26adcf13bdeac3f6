"""Wan Animate: face adapters between the blocks, through the checks that every family must pass."""

import family_cases
import family_checks
import pytest
import torch
from diffusers import WanAnimateTransformer3DModel

import tilewise
from tilewise.kernels.plans.layout import Grid
from tilewise.plugins.models.common.registry import family_of
from tilewise.plugins.runtime.call_stats import DENSE_LAYER, SPARSE

LATENT, TEXT_DIM, IMAGE_DIM, FACE = 4, 16, 16, 16


def denoiser(layers=3, every=2):
    """Face adapters after blocks 0, ``every``, …: with 3 layers and 2 there is one after the last block."""
    model = WanAnimateTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=2 * LATENT + 4,
        latent_channels=LATENT,
        out_channels=LATENT,
        text_dim=TEXT_DIM,
        freq_dim=16,
        ffn_dim=32,
        num_layers=layers,
        image_dim=IMAGE_DIM,
        added_kv_proj_dim=32,
        rope_max_seq_len=64,
        motion_encoder_channel_sizes={"4": 8, "8": 8, "16": 8},
        motion_encoder_size=FACE,
        motion_style_dim=8,
        motion_dim=4,
        motion_encoder_dim=16,
        face_encoder_hidden_dim=16,
        face_encoder_num_heads=2,
        inject_face_latents_blocks=every,
    )
    # The library makes layers // every adapters, and wants one more where that does not come out even.
    while len(model.face_adapter) * every < layers:
        extra = type(model.face_adapter[0])
        model.face_adapter.append(extra(dim=32, heads=2, dim_head=16, cross_attention_dim_head=16))
    family_cases.weights(model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.motion_encoder.parameters():  # scaled in the forward
            if weight.ndim >= 2:
                weight.normal_(generator=generator)
    return model


def inputs(t, h, w, batch=2):
    faces = 4 * (t - 1) - 3  # one face feature a latent frame, the reference frame excepted
    return {
        "hidden_states": family_cases.noise(batch, 2 * LATENT + 4, t, 2 * h, 2 * w),
        "timestep": torch.full((batch,), 500.0),
        "encoder_hidden_states": family_cases.noise(batch, 512, TEXT_DIM, seed=1),
        "encoder_hidden_states_image": family_cases.noise(batch, 5, IMAGE_DIM, seed=2),
        "pose_hidden_states": family_cases.noise(batch, LATENT, t - 1, 2 * h, 2 * w, seed=3),
        "face_pixel_values": 10 * family_cases.noise(batch, 3, faces, FACE, FACE, seed=4),
    }


@pytest.mark.parametrize("every", [1, 2], ids=["an adapter after every block", "after every other"])
@pytest.mark.parametrize("grid", [(5, 8, 8), (3, 5, 11)])
def test_animate(grid, every):
    family_cases.check(denoiser(every=every), inputs(*grid), Grid(*grid), atol=5e-5)


def test_no_adapter_after_the_last_block():
    family_cases.check(denoiser(layers=2), inputs(3, 5, 7), Grid(3, 5, 7), atol=5e-5)


def test_each_frame_has_its_own_face():
    """Or the checks above would not see tokens of one frame given the face of another."""
    model, given = denoiser(), inputs(4, 5, 7)
    mixed = {**given, "face_pixel_values": given["face_pixel_values"].flip(2)}
    assert (family_checks.forward(model, given) - family_checks.forward(model, mixed)).abs().max() > 1e-2


def test_cross_attention_and_adapters_are_no_layers_of_ours():
    model = denoiser()
    with tilewise.patched(model, family_checks.SMALL, steps=(0, 1), blocks="1:"):
        family_checks.forward(model, inputs(3, 5, 7))
        rows = {row.kind: row.calls for row in tilewise.summary(model).rows}
    assert rows == {SPARSE: 2, DENSE_LAYER: 1}


def test_a_foreign_processor_gets_raster_order():
    family_cases.foreign_layer_is_stock(denoiser(), inputs(3, 5, 7))


@pytest.mark.compile
def test_compiled():
    family_cases.compiled_is_eager(denoiser(layers=2), inputs(3, 5, 7))


def test_blocks_are_copies_of_wans_and_not_fused():
    model = denoiser()
    assert family_of(model).fuse(model, None) == []


def test_explain_counts_the_reference_frame():
    told = tilewise.explain(denoiser(), height=480, width=832, frames=77, method="sta").rows[0]
    assert told.grid == "21×30×52"
    with pytest.raises(tilewise.ConfigError, match="frames=80 must be 4·k"):
        tilewise.explain(denoiser(), height=480, width=832, frames=80, method="sta")
