"""HunyuanVideo: text joined to the video, prompts of different lengths in one batch, and images in three ways."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import family_checks
import pytest
import torch
from diffusers import (
    AutoencoderKLHunyuanVideo,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
)
from diffusers.hooks import FirstBlockCacheConfig
from diffusers.models.transformers.transformer_hunyuan_video import HunyuanVideoAttnProcessor2_0
from torch._dynamo.utils import counters

import tilewise
from tilewise.kernels.plans.layout import Grid
from tilewise.plugins.errors import ConfigError, FallbackError
from tilewise.plugins.runtime.call_stats import DENSE_LAYER, DENSE_STEP, SPARSE

PROMPT = 9
KINDS = [None, "latent_concat", "token_replace"]


def randomised(make: Callable[[], Any]) -> Any:
    """A model whose weights have variance 1 / fan-in: attention reaches the output visibly."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make()
        with torch.no_grad():
            for weight in model.parameters():
                if weight.ndim >= 2:
                    weight.normal_(0.0, weight[0].numel() ** -0.5)
    return model.eval()


def padded(tokens: int, lengths: tuple[int, ...]) -> torch.Tensor:
    """(samples, tokens) int64: 1 for the first tokens of each sample, 0 for its padding."""
    return (torch.arange(tokens)[None] < torch.tensor(lengths)[:, None]).long()


def tiny(kind: str | None = None, **overrides: Any) -> HunyuanVideoTransformer3DModel:
    config: dict[str, Any] = {
        "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2,
        "num_single_layers": 2, "num_refiner_layers": 1, "text_embed_dim": 16, "pooled_projection_dim": 8,
        "rope_axes_dim": (4, 6, 6), "image_condition_type": kind, "guidance_embeds": kind is None,
    }  # fmt: skip
    return randomised(lambda: HunyuanVideoTransformer3DModel(**config | overrides))


def inputs(
    kind: str | None, latent: tuple[int, int, int], lengths: tuple[int, ...], timestep: float = 500.0
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    batch = len(lengths)
    given: dict[str, Any] = {
        "hidden_states": torch.randn(batch, 4, *latent, generator=generator),
        "timestep": torch.full((batch,), timestep),
        "encoder_hidden_states": torch.randn(batch, PROMPT, 16, generator=generator),
        "encoder_attention_mask": padded(PROMPT, lengths),
        "pooled_projections": torch.randn(batch, 8, generator=generator),
    }
    if kind is None:
        given["guidance"] = torch.full((batch,), 6000.0)
    return given


SHAPES = [((5, 14, 14), (9, 4)), ((3, 10, 22), (6,)), ((4, 22, 6), (9, 9)), ((1, 8, 14), (2, 7))]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("latent", "lengths"), SHAPES)
def test_every_grid_and_prompt_length(kind, latent, lengths):
    model, given = tiny(kind), inputs(kind, latent, lengths)
    t, h, w = latent
    grid = Grid(t, h // 2, w // 2, PROMPT)
    family_checks.full_window_is_dense(model, given, grid)
    family_checks.sparse_is_masked_stock(model, given, grid)


def test_positional_arguments():
    model, given = tiny(), inputs(None, (3, 10, 14), (9, 4))
    with torch.no_grad(), tilewise.patched(model, family_checks.SMALL, steps=(0, 1), strict=True):
        assert torch.equal(model(*given.values()).sample, family_checks.forward(model, given))


@pytest.mark.parametrize("kind", KINDS)
def test_locality(kind):
    """In one layer a video token reaches those whose window holds it; a prompt token that is not padding reaches everything."""
    given, grid = inputs(kind, (4, 14, 10), (6,)), Grid(4, 7, 5, PROMPT)
    layout = family_checks.SMALL.layout(grid)
    seen = family_checks.SMALL.plan(layout, 2, torch.device("cpu")).to_mask(2)[0, 0]
    at = layout.inverse
    for layers in ({"num_layers": 1, "num_single_layers": 0}, {"num_layers": 0, "num_single_layers": 1}):
        model = tiny(kind, **layers)

        def changed(name: str, where: tuple, model: Any = model) -> torch.Tensor:
            other = dict(given, **{name: given[name].clone()})
            other[name][where] += 1
            difference = family_checks.forward(model, other) - family_checks.forward(model, given)
            return difference.abs().amax((0, 1))[:, ::2, ::2] > 0

        with tilewise.patched(model, family_checks.SMALL, steps=(0, 1), strict=True):
            token = (1 * 7 + 5) * 5 + 2  # frame 1, row 5, column 2
            got = changed("hidden_states", (slice(None), slice(None), 1, 10, 4))
            assert torch.equal(got, seen[at[: grid.video]][:, at[token]].reshape(grid.shape))
            assert changed("encoder_hidden_states", (slice(None), 5)).all()
            assert not changed("encoder_hidden_states", (slice(None), 8)).any()


class Ramp(HunyuanVideoAttnProcessor2_0):
    """One that cannot be taken over and counts on the model's own order, of tokens and of rotary tables."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, image_rotary_emb=None):
        ramp = torch.linspace(0, 1, hidden_states.shape[1])[:, None] * image_rotary_emb[0].mean(1, keepdim=True)
        return hidden_states * ramp, encoder_hidden_states


@pytest.mark.parametrize("kind", [None, "token_replace"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_another_processor_gets_the_models_own_order(kind, when):
    model, given = tiny(kind), inputs(kind, (3, 10, 14), (9, 4))

    def replace() -> None:
        for block in (model.transformer_blocks[1], model.single_transformer_blocks[0]):
            block.attn.set_processor(Ramp())

    replace()
    want = family_checks.forward(model, given)
    if when == "after":
        model = tiny(kind)
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


def test_strict():
    model = tiny()
    model.transformer_blocks[0].attn.set_processor(Ramp())
    before = family_checks.traces(model)
    with pytest.raises(FallbackError, match="Ramp"):
        tilewise.patch(model, family_checks.SMALL, strict=True)
    assert family_checks.traces(model) == before


def test_blocks_are_counted_over_both_stacks():
    model, given = tiny(), inputs(None, (3, 10, 14), (9, 4))
    with tilewise.patched(model, family_checks.SMALL, steps=(0, 1), blocks="1:3"):
        family_checks.forward(model, given)
        rows = [(row.layers, row.kind) for row in tilewise.summary(model).rows]
    assert sorted(rows) == [("0,3", DENSE_LAYER), ("1-2", SPARSE)]


@pytest.mark.parametrize("kind", KINDS)
def test_the_dense_method_is_stock_bit_by_bit(kind):
    model, given = tiny(kind), inputs(kind, (3, 10, 14), (9, 4))
    stock = family_checks.forward(model, given)
    with tilewise.patched(model, "dense", strict=True):
        assert torch.equal(family_checks.forward(model, given), stock)


@pytest.mark.compile
@pytest.mark.parametrize("kind", [None, "token_replace"])
@pytest.mark.parametrize("how", ["whole", "blocks"])
def test_compile(kind, how):
    """One graph for steps that run sparse and steps that do not, and for prompts of other lengths."""
    torch.compiler.reset()
    counters.clear()
    model = tiny(kind, num_layers=1, num_single_layers=1)
    steps = [
        inputs(kind, (3, 10, 14), lengths, t) for t, lengths in ((999.0, (9, 4)), (500.0, (9, 4)), (500.0, (2, 7)))
    ]
    with tilewise.patched(model, family_checks.SMALL, steps=(0.25, 1), strict=True):
        want = [family_checks.forward(model, given) for given in steps]
        kinds = {row.kind for row in tilewise.summary(model).rows}
    assert kinds == {SPARSE, DENSE_STEP}
    with tilewise.patched(model, family_checks.SMALL, steps=(0.25, 1), strict=True):
        if how == "whole":
            call = torch.compile(model, backend="eager", fullgraph=True)
        else:
            call = model
            for block in [*model.transformer_blocks, *model.single_transformer_blocks]:
                block.compile(backend="eager", fullgraph=True)
        graphs = []
        for given, expected in zip(steps, want, strict=True):
            torch.testing.assert_close(family_checks.forward(call, given), expected, atol=1e-5, rtol=1e-5)
            graphs.append(counters["stats"]["unique_graphs"])
        assert graphs[0] == graphs[-1]
    assert not counters["graph_break"]
    torch.compiler.reset()


def pipeline() -> HunyuanVideoPipeline:
    vae = AutoencoderKLHunyuanVideo(
        latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4
    )
    return HunyuanVideoPipeline(None, None, tiny(), vae, FlowMatchEulerDiscreteScheduler(shift=7.0), None, None)


def generate(pipe: HunyuanVideoPipeline, **options: Any) -> Any:
    generator = torch.Generator().manual_seed(1)
    given: dict[str, Any] = {}
    for sign in ("", "negative_"):
        given[f"{sign}prompt_embeds"] = torch.randn(2, PROMPT, 16, generator=generator)
        given[f"{sign}pooled_prompt_embeds"] = torch.randn(2, 8, generator=generator)
        given[f"{sign}prompt_attention_mask"] = padded(PROMPT, (9, 4))
    pipe.set_progress_bar_config(disable=True)
    return pipe(
        **given, height=112, width=176, num_frames=9, num_inference_steps=4, true_cfg_scale=2.0, generator=generator, **options
    ).frames  # fmt: skip


@pytest.mark.slow
def test_a_pipeline_with_guidance_in_two_calls():
    pipe = pipeline()
    stock = generate(pipe, output_type="np")
    tilewise.patch(pipe, family_checks.FULL, steps=(0.5, 1), strict=True)
    ours = generate(pipe, output_type="np")
    assert ours.shape == (2, 9, 112, 176, 3)
    assert abs(ours - stock).max() < 1e-4
    rows = {row.kind: row for row in tilewise.summary(pipe).rows}
    assert (rows[DENSE_STEP].calls, rows[SPARSE].calls) == (2 * 2 * 4, 2 * 2 * 4)
    tilewise.patch(pipe, family_checks.SMALL, steps=(0.5, 1), strict=True)
    assert abs(generate(pipe, output_type="np") - stock).max() > 1e-3
    tilewise.unpatch(pipe)
    assert (generate(pipe, output_type="np") == stock).all()


@pytest.mark.parametrize("first", ["cache", "patch"])
def test_first_block_cache(first):
    """A cache that skips blocks keeps tensors in the order in force, whichever of the two came first."""
    want = None
    for method in (None, family_checks.FULL):
        pipe = pipeline()
        if first == "cache":
            pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=9.0))
        if method is not None:
            tilewise.patch(pipe, method, steps=(0, 1), strict=True)
        if first == "patch":
            pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=9.0))
        got = generate(pipe, output_type="latent")
        if want is None:
            want = got
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    (row,) = tilewise.summary(pipe).rows
    assert row.calls < 4 * 2 * 4, "the cache must skip some"


@pytest.mark.parametrize(("kind", "text"), [(None, 256), ("latent_concat", 288 + 252), ("token_replace", 144 + 252)])
def test_sizes(kind, text):
    made = tilewise.explain(tiny(kind), height=720, width=1280, frames=129, method="sta")
    assert made.rows[0].grid == str(Grid(33, 45, 80, text))
    assert made.rows[0].sparse_blocks == "0-3"


def test_wrong_sizes():
    with pytest.raises(
        ConfigError, match=r"height=725 must be a multiple of 16, the nearest is 720; frames=128 .* is 129"
    ):
        tilewise.explain(pipeline(), height=725, width=1280, frames=128, method="sta")
