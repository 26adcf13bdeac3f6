"""HunyuanVideo 1.5: three kinds of text tokens with padding of their own, and never a mask over pairs of tokens."""

from __future__ import annotations

from typing import Any

import family_checks
import pytest
import torch
from diffusers import (
    AutoencoderKLHunyuanVideo15,
    ClassifierFreeGuidance,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideo15Pipeline,
    HunyuanVideo15Transformer3DModel,
)
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.transformers.transformer_hunyuan_video15 import HunyuanVideo15AttnProcessor2_0
from test_hunyuan_video import padded, randomised
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

import tilewise
from tilewise.kernels.plans.layout import Grid
from tilewise.plugins.errors import ConfigError, FallbackError
from tilewise.plugins.runtime.call_stats import DENSE_STEP, SPARSE

PROMPT, GLYPHS, IMAGE = 9, 5, 7
TEXT = PROMPT + GLYPHS + IMAGE


@pytest.fixture(scope="module")
def model():
    return tiny()


def tiny(**overrides: Any) -> HunyuanVideo15Transformer3DModel:
    config: dict[str, Any] = {
        "in_channels": 9, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 3,
        "num_refiner_layers": 1, "text_embed_dim": 16, "text_embed_2_dim": 12, "image_embed_dim": 10,
        "rope_axes_dim": (4, 6, 6),
    }  # fmt: skip
    return randomised(lambda: HunyuanVideo15Transformer3DModel(**config | overrides))


def inputs(
    latent: tuple[int, int, int],
    prompts: tuple[int, ...],
    glyphs: tuple[int, ...],
    image: bool,
    timestep: float = 500.0,
) -> dict[str, Any]:
    """Prompt and glyph tokens that are not padding, a sample; with an image, or without (which masks its tokens)."""
    generator = torch.Generator().manual_seed(0)
    batch = len(prompts)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(batch, *shape, generator=generator)

    return {
        "hidden_states": normal(9, *latent),
        "timestep": torch.full((batch,), timestep),
        "encoder_hidden_states": normal(PROMPT, 16),
        "encoder_attention_mask": padded(PROMPT, prompts),
        "encoder_hidden_states_2": normal(GLYPHS, 12),
        "encoder_attention_mask_2": padded(GLYPHS, glyphs),
        "image_embeds": normal(IMAGE, 10) * float(image),
    }


SHAPES = [
    ((5, 7, 7), (9, 4), (0, 3)),
    ((3, 5, 11), (6,), (2,)),
    ((4, 11, 3), (9, 9), (5, 5)),
    ((1, 4, 7), (2, 7), (0, 0)),
]


@pytest.mark.parametrize("image", [False, True])
@pytest.mark.parametrize(("latent", "prompts", "glyphs"), SHAPES)
def test_every_grid_and_padding(model, latent, prompts, glyphs, image):
    given, grid = inputs(latent, prompts, glyphs, image), Grid(*latent, text=TEXT)
    family_checks.full_window_is_dense(model, given, grid)
    family_checks.sparse_is_masked_stock(model, given, grid)


class Sizes(TorchDispatchMode):
    """Shapes of all tensors that any operator makes."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor):
                self.shapes.add(tuple(x.shape))
        return out

    def pairs(self, tokens: int) -> bool:
        return any(shape[-2:] == (tokens, tokens) for shape in self.shapes)


@pytest.mark.parametrize("method", [family_checks.SMALL, "dense"])
@pytest.mark.parametrize("steps", [(0, 1), (0, 0)])
def test_no_mask_over_pairs_of_tokens(model, method, steps):
    """Sparse or dense, no layer makes a tensor over all pairs of tokens; and the mask over keys is made once."""
    given, grid = inputs((3, 5, 11), (9, 4), (0, 3), True), Grid(3, 5, 11, TEXT)
    with Sizes() as stock:
        want = family_checks.forward(model, given)
    assert stock.pairs(grid.tokens)
    with tilewise.patched(model, method, steps=steps, strict=True), Sizes() as ours:
        got = family_checks.forward(model, given)
    assert not ours.pairs(grid.tokens)
    if method == "dense" or steps == (0, 0):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_the_mask_is_one_tensor_in_all_layers(model, monkeypatch):
    """Reading a mask waits for the GPU, so it is remembered by where it lies."""
    from tilewise.plugins.masks import padding_mask as key_padding
    from tilewise.plugins.runtime import attention_call

    reads = []
    read = key_padding.visible_keys
    for place in (attention_call, key_padding):
        monkeypatch.setattr(place, "visible_keys", lambda *args: reads.append(1) or read(*args), raising=False)
    with tilewise.patched(model, family_checks.SMALL, steps=(0, 1), strict=True):
        for prompts in ((9, 4), (3, 2), (9, 4)):
            family_checks.forward(model, inputs((3, 5, 11), prompts, (0, 3), True))
    assert len(reads) == 3


class Ramp(HunyuanVideo15AttnProcessor2_0):
    """One that cannot be taken over and counts on the model's own order, of tokens and of rotary tables, and on its mask."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, image_rotary_emb=None):
        ramp = torch.linspace(0, 1, hidden_states.shape[1])[:, None] * image_rotary_emb[0].mean(1, keepdim=True)
        return hidden_states * ramp, encoder_hidden_states * attention_mask[:, :, None]


@pytest.mark.parametrize("when", ["before", "after"])
def test_another_processor_gets_the_models_own_order(when):
    model, given = tiny(), inputs((3, 5, 7), (9, 4), (0, 3), True)
    model.transformer_blocks[1].attn.set_processor(Ramp())
    want = family_checks.forward(model, given)
    if when == "after":
        model = tiny()
    tilewise.patch(model, family_checks.FULL, steps=(0, 1))
    if when == "after":
        model.transformer_blocks[1].attn.set_processor(Ramp())
    torch.testing.assert_close(family_checks.forward(model, given), want, atol=2e-5, rtol=2e-5)
    assert [name.split(".", 1)[1] for name in tilewise.summary(model).skipped_layers] == ["transformer_blocks.1.attn"]
    tilewise.unpatch(model)
    assert torch.equal(family_checks.forward(model, given), want)


def test_strict():
    model = tiny()
    model.transformer_blocks[0].attn.set_processor(Ramp())
    before = family_checks.traces(model)
    with pytest.raises(FallbackError, match="Ramp"):
        tilewise.patch(model, family_checks.SMALL, strict=True)
    assert family_checks.traces(model) == before


@pytest.mark.compile
def test_blocks_compile():
    """Stock looks at whether there is an image, and so breaks the whole model's graph, patched or not; its blocks compile."""
    steps = [
        inputs((3, 5, 7), prompts, (0, 3), image, t)
        for t, prompts, image in ((999.0, (9, 4), True), (500.0, (9, 4), True), (500.0, (2, 7), False))
    ]
    graphs = []
    for layers in (2, 3):
        torch.compiler.reset()
        counters.clear()
        model = tiny(num_layers=layers)
        with tilewise.patched(model, family_checks.SMALL, steps=(0.25, 1), strict=True):
            want = [family_checks.forward(model, given) for given in steps]
            assert {row.kind for row in tilewise.summary(model).rows} == {SPARSE, DENSE_STEP}
            model.compile_repeated_blocks(backend="eager", fullgraph=True)
            for given, expected in zip(steps, want, strict=True):
                torch.testing.assert_close(family_checks.forward(model, given), expected, atol=1e-5, rtol=1e-5)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] == graphs[1], "blocks share a graph"
    torch.compiler.reset()


def pipeline() -> HunyuanVideo15Pipeline:
    vae = AutoencoderKLHunyuanVideo15(latent_channels=4, block_out_channels=(8, 8, 8, 8, 8), layers_per_block=1)
    guider = ClassifierFreeGuidance(guidance_scale=3.0)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=5.0)
    return HunyuanVideo15Pipeline(None, None, tiny(), vae, scheduler, None, None, guider)


def generate(pipe: HunyuanVideo15Pipeline) -> Any:
    generator = torch.Generator().manual_seed(1)
    given: dict[str, Any] = {}
    for sign in ("", "negative_"):
        for number, tokens, width, lengths in (("", PROMPT, 16, (9, 4)), ("_2", GLYPHS, 12, (0, 3))):
            given[f"{sign}prompt_embeds{number}"] = torch.randn(2, tokens, width, generator=generator)
            given[f"{sign}prompt_embeds_mask{number}"] = padded(tokens, lengths)
    pipe.set_progress_bar_config(disable=True)
    return pipe(
        **given, height=80, width=112, num_frames=9, num_inference_steps=4, generator=generator, output_type="latent"
    ).frames


@pytest.mark.slow
def test_a_pipeline_with_guidance():
    """Text to video: 729 image tokens, all masked."""
    pipe = pipeline()
    stock = generate(pipe)
    tilewise.patch(pipe, family_checks.FULL, steps=(0.5, 1), strict=True)
    ours = generate(pipe)
    assert ours.shape == (2, 4, 3, 5, 7)
    torch.testing.assert_close(ours, stock, atol=1e-4, rtol=1e-4)
    rows = {row.kind: row for row in tilewise.summary(pipe).rows}
    assert (rows[DENSE_STEP].calls, rows[SPARSE].calls) == (2 * 2 * 3, 2 * 2 * 3)
    tilewise.unpatch(pipe)
    assert torch.equal(generate(pipe), stock)


def test_sizes(model):
    made = tilewise.explain(model, height=720, width=1280, frames=121, method="sta")
    assert made.rows[0].grid == str(Grid(31, 45, 80, 1000 + 256 + 729))
    with pytest.raises(
        ConfigError, match=r"width=1270 must be a multiple of 16, the nearest is 1264; frames=120 .* is 121"
    ):
        tilewise.explain(model, height=720, width=1270, frames=120, method="sta")


def doubled(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, image_rotary_emb=None):
    """Attention of another kind: queries for everything, and no mask."""
    joined = torch.cat([attn.to_q(hidden_states), attn.add_q_proj(encoder_hidden_states)], dim=1)
    query = joined.unflatten(2, (attn.heads, -1))
    out = dispatch_attention_fn(query, query, query).flatten(2)
    return out.split([hidden_states.shape[1], encoder_hidden_states.shape[1]], dim=1)


def test_a_processor_of_the_same_name_keeps_its_own_code():
    """The stock processor is known by its class: another of that name, as other libraries and forks have, does another thing."""
    namesake = type(HunyuanVideo15AttnProcessor2_0.__name__, (HunyuanVideo15AttnProcessor2_0,), {"__call__": doubled})
    model, given = tiny(), inputs((3, 5, 7), (9, 4), (0, 3), True)
    for block in model.transformer_blocks:
        block.attn.set_processor(namesake())
    want = family_checks.forward(model, given)
    with tilewise.patched(model, family_checks.FULL, steps=(0, 1), strict=True):
        got = family_checks.forward(model, given)
        assert "3 of 3 layers attend with a mask over all pairs of tokens" in str(tilewise.summary(model))
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
