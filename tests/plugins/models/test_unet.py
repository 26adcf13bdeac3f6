"""UNets: spatial self-attention at each level, on grids of its own."""

from __future__ import annotations

import dataclasses
import types
from typing import Any
from unittest import mock

import peft
import pytest
import torch
import torch.nn.functional as F
from diffusers import (
    DreamLiteUNetModel,
    MotionAdapter,
    UNet2DConditionModel,
    UNetMotionModel,
    UNetSpatioTemporalConditionModel,
)
from diffusers.pipelines.free_noise_utils import AnimateDiffFreeNoiseMixin
from family_checks import traces

import tilewise
from tilewise.kernels.plans.layout import Grid
from tilewise.plugins.models.common.registry import family_of
from tilewise.plugins.runtime.call_stats import SHORT, SPARSE

FULL = tilewise.STA(window=(99, 99, 99), tile=(1, 3, 4))
SMALL = tilewise.STA(window=(1, 2, 1), tile=(1, 3, 4))


def unet_2d(**overrides: Any) -> torch.nn.Module:
    torch.manual_seed(0)
    config: dict[str, Any] = {
        "sample_size": 16, "in_channels": 4, "out_channels": 4, "block_out_channels": (32, 64), "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"), "norm_num_groups": 8,
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"), "cross_attention_dim": 32,
        "attention_head_dim": (1, 2), "transformer_layers_per_block": (1, 2),
    }  # fmt: skip
    return UNet2DConditionModel(**config | overrides).eval()


def unet_motion() -> torch.nn.Module:
    adapter = MotionAdapter(
        block_out_channels=(32, 64), motion_layers_per_block=1, motion_norm_num_groups=2, motion_num_attention_heads=4
    )
    return UNetMotionModel.from_unet2d(unet_2d(), adapter).eval()


def unet_svd() -> torch.nn.Module:
    torch.manual_seed(0)
    return UNetSpatioTemporalConditionModel(
        sample_size=16, in_channels=8, out_channels=4, block_out_channels=(32, 64), layers_per_block=1, num_frames=2,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        projection_class_embeddings_input_dim=96,
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"), cross_attention_dim=32,
        num_attention_heads=(1, 2), addition_time_embed_dim=32,
    ).eval()  # fmt: skip


def inputs_of(kind: str, h: int, w: int) -> dict:
    generator = torch.Generator().manual_seed(1)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    if kind == "2d":
        return {"sample": randn(2, 4, h, w), "timestep": 500, "encoder_hidden_states": randn(2, 5, 32)}
    if kind == "motion":
        return {"sample": randn(1, 4, 3, h, w), "timestep": torch.tensor(500), "encoder_hidden_states": randn(3, 5, 32)}
    time_ids = torch.tensor([[6.0, 127.0, 0.02]])
    sample = randn(1, 2, 8, h, w)
    return {"sample": sample, "timestep": 500, "encoder_hidden_states": randn(1, 1, 32), "added_time_ids": time_ids}


KINDS = {"2d": unet_2d, "motion": unet_motion, "svd": unet_svd}


def forward(model: torch.nn.Module, inputs: dict) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs, return_dict=False)[0]


@pytest.fixture
def every_level(monkeypatch):
    """Tiny maps are sparse too."""
    monkeypatch.setattr("tilewise.plugins.config.MIN_MAP_TOKENS", 1)


@pytest.mark.parametrize(("h", "w"), [(16, 16), (10, 14)])
@pytest.mark.parametrize("kind", list(KINDS))
def test_full_window_is_dense_and_unpatch_leaves_no_trace(kind, h, w, every_level):
    model, inputs = KINDS[kind](), inputs_of(kind, h, w)
    before, stock = traces(model), forward(model, inputs)
    tilewise.patch(model, FULL, steps=(0, 1), strict=True)
    torch.testing.assert_close(forward(model, inputs), stock, atol=2e-5, rtol=2e-5)
    assert {row.kind for row in tilewise.summary(model).rows} == {SPARSE}
    tilewise.unpatch(model)
    assert torch.equal(forward(model, inputs), stock)
    assert traces(model) == before


@pytest.mark.parametrize("kind", list(KINDS))
def test_sparse_is_masked_stock(kind, every_level):
    """What stock gives with each level's window as an explicit mask on its self-attention."""
    h, w = 12, 20
    model, inputs = KINDS[kind](), inputs_of(kind, h, w)
    family = family_of(model)
    masks: dict[int, torch.Tensor] = {}
    for layer in family.layers(model):
        grid = layer.grid(Grid(1, h, w))
        layout = SMALL.layout(grid)
        at = layout.inverse
        masks[grid.tokens] = SMALL.plan(layout, layer.heads, torch.device("cpu")).to_mask(1)[:, :, at][:, :, :, at]
    stock_sdpa = F.scaled_dot_product_attention
    calls = []

    def sdpa(query, key, value, attn_mask=None, *args, **kwargs):
        tokens = query.shape[2]
        if tokens in masks and key.shape[2] == tokens:
            calls.append(tokens)
            attn_mask = masks[tokens]
        return stock_sdpa(query, key, value, attn_mask, *args, **kwargs)

    stock = forward(model, inputs)
    with mock.patch.object(F, "scaled_dot_product_attention", sdpa):
        want = forward(model, inputs)
    assert len(calls) == len(family.layers(model))
    assert float((want - stock).abs().max()) > 1e-3
    tilewise.patch(model, SMALL, steps=(0, 1), strict=True)
    torch.testing.assert_close(forward(model, inputs), want, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_far_field_of_single_tokens_is_dense(kind, every_level):
    """Nothing is approximated with cells of one token, whatever the map's size; larger ones are nearer to it than none."""
    model, inputs = KINDS[kind](), inputs_of(kind, 12, 20)
    stock = forward(model, inputs)
    away = {}
    for name, more in {"none": {}, "tiles": {"far": "tiles"}, "tokens": {"far": "cells", "cell": (1, 1, 1)}}.items():
        with tilewise.patched(model, dataclasses.replace(SMALL, **more), steps=(0, 1), strict=True):
            away[name] = float((forward(model, inputs) - stock).norm() / stock.norm())
            report = tilewise.summary(model)
            assert report.cost >= report.density
    assert away["tokens"] < 1e-5 < away["tiles"] < away["none"]


def test_levels_too_small_to_pay_stay_dense_and_are_counted():
    model, inputs = unet_2d(), inputs_of("2d", 16, 16)
    tilewise.patch(model, SMALL, steps=(0, 1), strict=True, min_tokens=200)
    forward(model, inputs)
    rows = tilewise.summary(model).rows
    assert {row.kind: row.calls for row in rows} == {
        SPARSE: 3,
        SHORT: 8,
    }  # 256 tokens at the first level, 64 at the second
    assert [row.reason for row in rows if row.kind == SHORT] == ["64 tokens, fewer than min_tokens=200"]


def test_a_level_too_small_by_default_is_an_error_with_strict():
    """Nobody chose that limit; with a number it is a choice."""
    model, inputs = unet_2d(), inputs_of("2d", 16, 16)
    tilewise.patch(model, SMALL, steps=(0, 1), strict=True)
    with pytest.raises(tilewise.FallbackError, match="fewer than min_tokens=4096"):
        forward(model, inputs)
    tilewise.patch(model, SMALL, steps=(0, 1))
    forward(model, inputs)
    assert {(row.kind, row.calls) for row in tilewise.summary(model).rows} == {(SHORT, 3), (SHORT, 8)}  # two reasons


@pytest.mark.parametrize("sparse_from", [1, 200], ids=["both levels", "first level"])
def test_density_is_a_share_of_token_pairs(sparse_from):
    """Not a mean over calls, by which the small maps would weigh as much as the large ones."""
    model, method = unet_2d(), tilewise.STA(window=(1, 2, 2), tile=(1, 4, 4))
    tilewise.patch(model, method, steps=(0, 1), strict=True, min_tokens=sparse_from)
    forward(model, inputs_of("2d", 16, 16))
    # 3 calls over 16×16 tokens: 2×2 of 4×4 tiles, a quarter. 8 calls over 8×8: 2×2 tiles are all. Two samples each.
    large, small = 2 * 3 * 256**2, 2 * 8 * 64**2
    report = tilewise.summary(model)
    assert report.overall_density == pytest.approx((large / 4 + small) / (large + small))  # 0.357; over calls: 0.795
    assert sum(row.pairs for row in report.rows) == large + small
    assert sum(row.queries for row in report.rows) == 2 * (3 * 256 + 8 * 64)
    assert sum(row.calls for row in report.rows) == 11
    assert report.density == (pytest.approx(report.overall_density) if sparse_from == 1 else 0.25)
    told = tilewise.explain(model, height=128, width=128, frames=1)
    assert told.density == pytest.approx(report.density)
    assert [row.sparse_layers for row in told.rows] == ([3, 8] if sparse_from == 1 else [3, 0])


def test_explain_shows_each_level():
    rows = tilewise.explain(
        unet_2d(), height=1024, width=1280, frames=1, method=tilewise.STA(window=(1, 3, 3)), steps=(0, 1)
    ).rows
    assert [(row.denoiser, row.grid) for row in rows] == [("denoiser, 1/1", "1×128×160"), ("denoiser, 1/2", "1×64×80")]
    assert all(row.density < 1 for row in rows)
    with pytest.raises(tilewise.ConfigError, match="height=500 must be a multiple of 8, the nearest is 496"):
        tilewise.explain(unet_2d(), height=500, width=512, frames=1, method="sta")


@pytest.mark.compile
def test_compiles_without_graph_breaks(every_level):
    # One level with attention will do; tracing the others takes seconds.
    blocks = {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "mid_block_type": None}
    blocks |= {"up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "transformer_layers_per_block": 1}
    model, inputs = unet_2d(**blocks), inputs_of("2d", 16, 16)
    tilewise.patch(model, SMALL, steps=(0, 1), strict=True)
    eager = forward(model, inputs)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(**inputs, return_dict=False)[0], eager)


def test_blocks_in_split_inference_are_found_inside(every_level):
    """FreeNoise's memory option, before the patch: every module that it splits runs on a part of the frames at a time."""
    model, inputs = unet_motion(), inputs_of("motion", 8, 12)
    plain = [layer.block for layer in family_of(model).layers(model)]
    pipe: Any = types.SimpleNamespace(unet=model)
    want = forward(model, inputs)
    for block in [*model.down_blocks, *model.up_blocks, model.mid_block]:
        AnimateDiffFreeNoiseMixin._enable_split_inference_attentions_(pipe, block.attentions, 2)
    assert [layer.block for layer in family_of(model).layers(model)] == plain
    tilewise.patch(pipe, FULL, steps=(0, 1))
    torch.testing.assert_close(forward(model, inputs), want, atol=1e-4, rtol=1e-4)
    rows = tilewise.summary(pipe).rows
    assert {row.kind for row in rows} == {SPARSE}
    assert sum(row.calls for row in rows) == 2 * len(plain)  # the 3 frames in parts of 2 and 1
    tilewise.unpatch(pipe)


def test_the_model_inside_a_peft_model_is_patched(every_level):
    model, inputs = unet_2d(), inputs_of("2d", 8, 12)
    lora = peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
    pipe: Any = types.SimpleNamespace(unet=peft.get_peft_model(model, lora))
    want, before = forward(pipe.unet, inputs), traces(model)
    for target in (pipe, pipe.unet):
        tilewise.patch(target, FULL, steps=(0, 1))
        assert tilewise.is_patched(pipe) and tilewise.is_patched(pipe.unet)
        torch.testing.assert_close(forward(pipe.unet, inputs), want, atol=1e-4, rtol=1e-4)
        assert {row.kind for row in tilewise.summary(target).rows} == {SPARSE}
        tilewise.unpatch(target)
        assert traces(model) == before and not tilewise.is_patched(pipe)


def test_text_keys_beside_the_pictures_are_refused_as_such():
    """DeepFloyd IF's blocks: attention is there, over the text's keys and the picture's in one softmax."""
    model = unet_2d(
        down_block_types=("SimpleCrossAttnDownBlock2D",) * 2, up_block_types=("SimpleCrossAttnUpBlock2D",) * 2,
        mid_block_type="UNetMidBlock2DSimpleCrossAttn", attention_head_dim=16, transformer_layers_per_block=1,
    )  # fmt: skip
    with pytest.raises(
        tilewise.UnsupportedModelError, match=r"keys of its text beside the picture's own.*DeepFloyd IF"
    ):
        tilewise.patch(model, "sta")
    assert not tilewise.is_patched(model)


def test_another_model_of_diffusers_is_not_served_as_its_base_class():
    assert issubclass(DreamLiteUNetModel, UNet2DConditionModel)
    model = DreamLiteUNetModel.__new__(DreamLiteUNetModel)
    torch.nn.Module.__init__(model)
    with pytest.raises(tilewise.UnsupportedModelError, match="DreamLiteUNetModel, which no family adapter serves"):
        tilewise.patch(model, "sta")


def test_your_own_subclass_is_served_as_its_base_class():
    model = unet_2d()
    model.__class__ = type("MyUNet", (UNet2DConditionModel,), {})
    assert family_of(model) is not None


@pytest.mark.parametrize("target", [torch.nn.Linear(1, 1), types.SimpleNamespace(unet=torch.nn.Linear(1, 1)), object()])
def test_what_is_not_served_is_not_patched_and_unpatched_as_it_is(target):
    assert not tilewise.is_patched(target)
    assert tilewise.unpatch(target) is target
