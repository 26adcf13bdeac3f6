"""The inward window: the mask that FreeSwim's paper means, its temperature, and the native size it finds by itself."""

from __future__ import annotations

import math

import pytest
import tiny_wan
import torch
from diffusers.models.transformers.transformer_wan import WanAttnProcessor

import tilewise
from tilewise.kernels.attention.naive import masked_attention
from tilewise.kernels.plans.layout import Grid
from tilewise.plugins.config import Config
from tilewise.plugins.errors import ConfigError
from tilewise.plugins.methods.base import make_method
from tilewise.plugins.methods.inward import Inward
from tilewise.plugins.models.common.family import Size
from tilewise.plugins.models.common.native_size import native_pixels

GRIDS = [
    (Grid(3, 9, 14), (4, 6)),
    (Grid(2, 13, 7), (5, 3)),  # portrait, odd
    (Grid(1, 11, 10), (3, 4)),  # one frame
    (Grid(3, 6, 20), (9, 5)),  # native larger on one axis
    (Grid(2, 4, 5), (8, 8)),  # on both: dense
    (Grid(2, 8, 9, text=5), (3, 3)),
    (Grid(2, 8, 9, text=7, text_first=True), (1, 4)),
]


def naive_mask(grid, native):
    """Token by token, in raster order: distances from the query, widened on one side by what is cut off on the other."""
    half_h, half_w = native[0] // 2, native[1] // 2
    size = grid.tokens
    mask = torch.zeros(size, size, dtype=torch.bool)
    at = grid.text if grid.text_first else 0
    tokens = [(t, y, x) for t in range(grid.t) for y in range(grid.h) for x in range(grid.w)]

    def reach(i, length, half):
        low, high = i - half - max(0, half + i - length + 1), i + half + max(0, half - i)
        return max(low, 0), min(high, length - 1)

    for q, (_, y, x) in enumerate(tokens):
        (top, bottom), (left, right) = reach(y, grid.h, half_h), reach(x, grid.w, half_w)
        for k, (_, v, u) in enumerate(tokens):
            mask[at + q, at + k] = top <= v <= bottom and left <= u <= right
    text = torch.ones(size, dtype=torch.bool)
    text[at : at + grid.video] = False
    return mask | text[:, None] | text[None, :]


@pytest.mark.parametrize(("grid", "native"), GRIDS, ids=[str(g) for g, _ in GRIDS])
def test_mask_is_the_inward_window(grid, native):
    method = Inward(native=native)
    layout = method.layout(grid)
    plan = method.plan(layout, 2, torch.device("cpu"))
    mask = naive_mask(grid, native)
    found = plan.to_mask(2)[0, 1][layout.inverse][:, layout.inverse]
    assert torch.equal(found, mask)
    assert plan.density == pytest.approx(float(mask.float().mean()))


def test_temperature_is_the_papers():
    method = Inward(native=(30, 52))
    layout = method.layout(Grid(3, 68, 120))
    tokens = 30 * 52
    assert method.scale(layout, 128) == pytest.approx(math.sqrt(math.log(2 * tokens) / math.log(tokens) / 128))
    assert method.scale(layout, 128) > 1 / math.sqrt(128)
    # At the native size nothing is extrapolated, and the method is dense attention as it is.
    assert method.scale(method.layout(Grid(3, 30, 52)), 128) is None
    assert Inward(native=(30, 52), temperature=False).scale(layout, 128) is None


@pytest.mark.parametrize("temperature", [False, True])
def test_in_a_wan_layer(temperature):
    """A patched one-layer denoiser's attention against the naive mask, scale included."""
    model = tiny_wan.tiny_transformer(num_layers=1)
    x = torch.randn(1, 4, 3, 18, 22, generator=torch.Generator().manual_seed(1))  # grid 3×9×11
    text = torch.randn(1, 16, tiny_wan.TEXT_DIM, generator=torch.Generator().manual_seed(2))
    method = Inward(native=(4, 5), temperature=temperature)
    mask = naive_mask(Grid(3, 9, 11), (4, 5))
    scale = method.scale(method.layout(Grid(3, 9, 11)), 16)
    assert (scale is not None) is temperature

    class Masked(WanAttnProcessor):
        def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
            from diffusers.models.transformers import transformer_wan

            def attention(query, key, value, **options):
                return masked_attention(query, key, value, mask, scale)[0].to(query.dtype)

            stock, transformer_wan.dispatch_attention_fn = transformer_wan.dispatch_attention_fn, attention
            try:
                return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb)
            finally:
                transformer_wan.dispatch_attention_fn = stock

    with torch.no_grad():
        stock = model(x, torch.tensor([500.0]), text).sample
        model.blocks[0].attn1.set_processor(Masked())
        wanted = model(x, torch.tensor([500.0]), text).sample
        model.blocks[0].attn1.set_processor(WanAttnProcessor())
        tilewise.patch(model, method, steps=(0, 1), strict=True)
        found = model(x, torch.tensor([500.0]), text).sample
    torch.testing.assert_close(found, wanted, atol=2e-5, rtol=2e-5)
    assert (wanted - stock).abs().max() > 1e-3
    assert tilewise.summary(model).density == pytest.approx(float(mask.float().mean()))


def test_native_size_is_found(tmp_path):
    """From tilewise.json of a model's folder, from the call's defaults, and never for a bare denoiser."""
    pipe = tiny_wan.tiny_pipeline()
    assert native_pixels(pipe) == Size(480, 832, 81)
    tilewise.patch(pipe, "inward")
    (patch,) = (pipe.transformer._tilewise,)
    assert patch.config.method.native == (60, 104)  # the tiny VAE has 4 pixels a latent
    tilewise.patch(pipe, Inward(native=(3, 3)))
    assert pipe.transformer._tilewise.config.method.native == (3, 3)
    tilewise.unpatch(pipe)

    from diffusers import WanPipeline

    folder = tiny_wan.save_tiny_pipeline(tmp_path / "model")
    pipe = WanPipeline.from_pretrained(folder)
    assert native_pixels(pipe) == Size(64, 64, 9)
    tilewise.patch(pipe, "inward", steps=(0, 1), strict=True)
    assert pipe.transformer._tilewise.config.method.native == (8, 8)
    pipe.set_progress_bar_config(disable=True)
    call = {"num_inference_steps": 1, "guidance_scale": 1.0, "output_type": "latent", "max_sequence_length": 16}
    pipe("a star", height=128, width=96, num_frames=5, **call)
    assert tilewise.summary(pipe).density == pytest.approx(0.5625 * 0.75)  # 9 of 16 rows, 9 of 12 columns
    with pytest.raises(ConfigError, match=r"native=\(h, w\)"):
        tilewise.patch(pipe.transformer, "inward")
    assert tilewise.is_patched(pipe)  # nothing was changed
    tilewise.unpatch(pipe)


def test_feature_maps_of_several_sizes_are_refused():
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 8), norm_num_groups=4, cross_attention_dim=8, attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    with pytest.raises(ConfigError, match="several sizes"):
        tilewise.patch(unet, Inward(native=(4, 4)))
    assert not tilewise.is_patched(unet)


@pytest.mark.parametrize("native", [3, (3,), (0, 4), (2.0, 2), "ab", (True, 2)])
def test_bad_sizes(native):
    with pytest.raises(ConfigError, match="native must be two whole numbers"):
        make_method("inward", {"native": native})


def test_round_trip():
    config = Config(Inward(native=[8, 9], temperature=False), steps=(0.0, 1.0))
    assert Config.from_dict(config.to_dict()) == config
