"""HunyuanVideo FramePack: a history before the video that every query sees, of any size, with and without a mask."""

from __future__ import annotations

from typing import Any
from unittest import mock

import family_checks
import pytest
import torch
from diffusers import (
    AutoencoderKLHunyuanVideo,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoFramepackPipeline,
    HunyuanVideoFramepackTransformer3DModel,
)
from diffusers.models.transformers import transformer_hunyuan_video
from diffusers.models.transformers.transformer_hunyuan_video import HunyuanVideoAttnProcessor2_0
from PIL import Image
from test_hunyuan_video import padded, randomised
from torch._dynamo.utils import counters
from transformers import SiglipImageProcessorPil, SiglipVisionConfig, SiglipVisionModel

import tilewise
from tilewise.kernels.plans.layout import Grid
from tilewise.plugins.errors import ConfigError, FallbackError
from tilewise.plugins.runtime.call_stats import DENSE_STEP, SPARSE

PROMPT, IMAGE = 8, 5


@pytest.fixture(scope="module")
def model():
    return tiny()


def tiny(**overrides: Any) -> HunyuanVideoFramepackTransformer3DModel:
    config: dict[str, Any] = {
        "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2,
        "num_single_layers": 2, "num_refiner_layers": 1, "text_embed_dim": 16, "pooled_projection_dim": 8,
        "rope_axes_dim": (4, 6, 6), "has_image_proj": True, "image_proj_dim": 12, "has_clean_x_embedder": True,
    }  # fmt: skip
    return randomised(lambda: HunyuanVideoFramepackTransformer3DModel(**config | overrides))


def inputs(latent: tuple[int, int, int], lengths: tuple[int, ...], history: tuple[int, int, int]) -> dict[str, Any]:
    """Frames (t, h, w) to denoise after a history of that many clean, halved and quartered frames; prompt tokens a sample."""
    generator = torch.Generator().manual_seed(0)
    (t, h, w), batch = latent, len(lengths)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(batch, *shape, generator=generator)

    clean, half, quarter = history
    given: dict[str, Any] = {
        "hidden_states": normal(4, t, h, w),
        "timestep": torch.full((batch,), 500.0),
        "encoder_hidden_states": normal(PROMPT, 16),
        "encoder_attention_mask": padded(PROMPT, lengths),
        "pooled_projections": normal(8),
        "image_embeds": normal(IMAGE, 12),
        "indices_latents": torch.arange(20, 20 + t),
        "guidance": torch.full((batch,), 6000.0),
        "latents_clean": normal(4, clean, h, w),
        "indices_latents_clean": torch.arange(clean),
    }
    for name, frames, start in (("2x", half, 8), ("4x", quarter, 10)):
        given[f"latents_history_{name}"] = normal(4, frames, h, w)
        given[f"indices_latents_history_{name}"] = torch.arange(start, start + frames)
    return given


# As many clean frames as video frames in the first: their rotary tables have the same shape. Sizes that 4 and 8 do not divide.
CASES = [
    (
        inputs((3, 12, 20), (8, 3), (3, 2, 4)),
        Grid(3, 6, 10, 3 * 60 + 15 + 6 + IMAGE + PROMPT, opposite=3 * 60 + 15 + 6),
        3 * 60 + 15 + 6,
    ),
    (
        inputs((4, 14, 10), (5,), (1, 3, 5)),
        Grid(4, 7, 5, 35 + 2 * 12 + 2 * 4 + IMAGE + 5, opposite=35 + 2 * 12 + 2 * 4),
        35 + 2 * 12 + 2 * 4,
    ),
]


@pytest.mark.parametrize(("given", "grid", "history"), CASES)
def test_full_window(model, given, grid, history):
    family_checks.full_window_is_dense(model, given, grid)


def masked_stock(model: torch.nn.Module, given: dict[str, Any], seen: torch.Tensor) -> torch.Tensor:
    """Stock's output with ``seen``, over tokens in the model's own order, as its mask."""
    stock = transformer_hunyuan_video.dispatch_attention_fn
    calls = []

    def dispatch(query: Any, key: Any, value: Any, attn_mask: Any = None, **options: Any) -> Any:
        calls.append(1)
        return stock(query, key, value, seen if attn_mask is None else seen & attn_mask, **options)

    with mock.patch.object(transformer_hunyuan_video, "dispatch_attention_fn", dispatch):
        out = family_checks.forward(model, given)
    assert len(calls) == 4
    return out


def raster_mask(grid: Grid, history: int) -> torch.Tensor:
    """The plan of ``family_checks.SMALL`` as a mask over [history, video, rest]."""
    assert grid.opposite == history
    layout = family_checks.SMALL.layout(grid)
    plan = family_checks.SMALL.plan(layout, 2, torch.device("cpu"))
    assert plan.density < 1
    at = layout.inverse
    return plan.to_mask(2)[:, :, at][:, :, :, at]


@pytest.mark.parametrize(("given", "grid", "history"), CASES)
def test_a_window_is_stock_with_a_mask(model, given, grid, history):
    want = masked_stock(model, given, raster_mask(grid, history))
    assert float((want - family_checks.forward(model, given)).abs().max()) > 1e-3
    with tilewise.patched(model, family_checks.SMALL, steps=(0, 1), strict=True):
        ours = family_checks.forward(model, given)
    torch.testing.assert_close(ours, want, atol=2e-5, rtol=2e-5)


class Ramp(HunyuanVideoAttnProcessor2_0):
    """One that cannot be taken over and counts on the model's own order: video fades along the sequence, rotated or not."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, image_rotary_emb=None):
        ramp = torch.linspace(0, 1, hidden_states.shape[1])[:, None] * image_rotary_emb[0].mean(1, keepdim=True)
        return hidden_states * ramp, encoder_hidden_states


@pytest.mark.parametrize("when", ["before", "after"])
def test_another_processor_gets_the_models_own_order(when):
    model, (given, _, _) = tiny(), CASES[0]

    def replace() -> None:
        for block in (model.transformer_blocks[1], model.single_transformer_blocks[0]):
            block.attn.set_processor(Ramp())

    replace()
    want = family_checks.forward(model, given)
    if when == "after":
        model = tiny()
    tilewise.patch(model, family_checks.FULL, steps=(0, 1))
    if when == "after":
        replace()
    torch.testing.assert_close(family_checks.forward(model, given), want, atol=2e-5, rtol=2e-5)
    skipped = tilewise.summary(model).skipped_layers
    assert [name.split(".", 1)[1] for name in skipped] == [
        "transformer_blocks.1.attn",
        "single_transformer_blocks.0.attn",
    ]
    tilewise.unpatch(model)
    assert torch.equal(family_checks.forward(model, given), want)


def test_the_dense_method_is_stock_bit_by_bit(model):
    given, _, _ = CASES[0]
    stock = family_checks.forward(model, given)
    with tilewise.patched(model, "dense", strict=True):
        assert torch.equal(family_checks.forward(model, given), stock)


def test_history_is_seen_by_every_query(model):
    """One history token changed reaches all of the video at once; one video token only the queries whose window holds it."""
    one = tiny(num_layers=1, num_single_layers=0)
    given, grid, history = CASES[1]
    with tilewise.patched(one, family_checks.SMALL, steps=(0, 1), strict=True):
        base = family_checks.forward(one, given)
        other = dict(given, latents_history_4x=given["latents_history_4x"].clone())
        other["latents_history_4x"][:, :, 0, :8, :8] += 1
        assert bool(((family_checks.forward(one, other) - base).abs().amax(1) > 0).all())

        other = dict(given, hidden_states=given["hidden_states"].clone())
        other["hidden_states"][:, :, 0, 0, 0] += 1
        changed = (family_checks.forward(one, other) - base).abs().amax((0, 1)) > 0
        seen = raster_mask(grid, history)[0, 0, history : history + grid.video, history].reshape(grid.shape)
        assert torch.equal(changed[:, ::2, ::2], seen)


@pytest.mark.compile
def test_blocks_compile():
    """Stock cuts the prompt to its length and so breaks the whole model's graph, patched or not; its blocks compile."""
    given, _, _ = CASES[0]
    graphs = []
    for layers in (2, 3):
        torch.compiler.reset()
        counters.clear()
        model = tiny(num_layers=layers, num_single_layers=layers)
        with tilewise.patched(model, family_checks.SMALL, steps=(0, 1), strict=True):
            want = family_checks.forward(model, given)
            for block in [*model.transformer_blocks, *model.single_transformer_blocks]:
                block.compile(backend="eager", fullgraph=True)
            torch.testing.assert_close(family_checks.forward(model, given), want, atol=1e-5, rtol=1e-5)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] == graphs[1], "blocks of a kind share a graph"
    torch.compiler.reset()


def test_a_pipeline():
    """Two windows of frames, one after the other; the second has the first as its history."""
    vae = AutoencoderKLHunyuanVideo(
        latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4
    )
    encoder = SiglipVisionModel(
        SiglipVisionConfig(
            hidden_size=12,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=28,
            patch_size=14,
        )
    )
    pipe = HunyuanVideoFramepackPipeline(
        None, None, tiny(), vae, FlowMatchEulerDiscreteScheduler(), None, None, encoder,
        SiglipImageProcessorPil(size={"height": 28, "width": 28}),
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)

    def generate() -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        return pipe(
            image=Image.new("RGB", (112, 80), (200, 30, 40)), height=96, width=112, num_frames=18, latent_window_size=3,
            prompt_embeds=torch.randn(1, PROMPT, 16, generator=generator), prompt_attention_mask=padded(PROMPT, (5,)),
            pooled_prompt_embeds=torch.randn(1, 8, generator=generator), num_inference_steps=4, generator=generator,
            output_type="latent",
        ).frames  # fmt: skip

    stock = generate()
    tilewise.patch(pipe, family_checks.FULL, steps=(0.5, 1), strict=True)
    for ours, theirs in zip(generate(), stock, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    calls = {row.kind: row.calls for row in tilewise.summary(pipe).rows}
    assert calls == {DENSE_STEP: 2 * 2 * 4, SPARSE: 2 * 2 * 4}
    made = tilewise.explain(pipe, height=96, width=112, frames=18)
    assert made.rows[0].grid == str(Grid(9, 6, 7, 2 * 42 + 12 + 4 * 4 + 4 + 256))
    tilewise.unpatch(pipe)
    assert all(torch.equal(again, theirs) for again, theirs in zip(generate(), stock, strict=True))


def test_sizes(model):
    made = tilewise.explain(model, height=640, width=608, frames=90, method="sta")
    history = 2 * 40 * 38 + 20 * 19 + 4 * 10 * 10
    assert made.rows[0].grid == str(Grid(9, 40, 38, history + 729 + 256))
    with pytest.raises(ConfigError, match="height=650 must be a multiple of 16, the nearest is 656"):
        tilewise.explain(model, height=650, width=608, frames=90, method="sta")


def test_strict():
    model = tiny()
    model.transformer_blocks[0].attn.set_processor(Ramp())
    before = family_checks.traces(model)
    with pytest.raises(FallbackError, match="Ramp"):
        tilewise.patch(model, family_checks.SMALL, strict=True)
    assert family_checks.traces(model) == before
