"""CogVideoX 1.0 and 1.5 through the checks that every family must pass, and what is theirs alone."""

from __future__ import annotations

import contextlib
from unittest import mock

import family_checks
import pytest
import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    ConsisIDTransformer3DModel,
)

import tilewise
from tilewise.kernels.plans.layout import Grid
from tilewise.plugins.errors import ConfigError
from tilewise.plugins.runtime.call_stats import DENSE_STEP, FALLBACK, SPARSE

TEXT = 6
GRIDS = [(4, 8, 6), (3, 5, 11)]
VERSIONS = {
    "sincos": {},  # 2b: positions are added, no rotary tables
    "rotary": {"use_rotary_positional_embeddings": True},  # 5b
    "1.5": {"use_rotary_positional_embeddings": True, "patch_size_t": 2, "patch_bias": False},
    "1.5 I2V": {"use_rotary_positional_embeddings": True, "patch_size_t": 2, "ofs_embed_dim": 8},
}


@contextlib.contextmanager
def masked_dispatch(model, mask, tokens):
    """``family_checks.masked_dispatch`` for processors that call PyTorch's attention themselves, (B, H, S, D)."""
    stock = torch.nn.functional.scaled_dot_product_attention
    calls = []

    def attention(query, key, value, attn_mask=None, **options):
        if query.shape[2] == key.shape[2] == tokens:
            calls.append(1)
            attn_mask = mask if attn_mask is None else torch.where(mask, attn_mask, -torch.inf)
        return stock(query, key, value, attn_mask=attn_mask, **options)

    with mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", attention):
        yield calls


@pytest.fixture(autouse=True)
def masks(monkeypatch):
    monkeypatch.setattr(family_checks, "masked_dispatch", masked_dispatch)


def denoiser(version="rotary", kind=CogVideoXTransformer3DModel, **overrides):
    """A CogVideoX denoiser: 2 layers, 2 heads x 16. Weights of variance 1 / fan-in: attention reaches the output visibly."""
    config = {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "in_channels": 4,
        "out_channels": 4,
        "time_embed_dim": 8,
        "text_embed_dim": 16,
        "num_layers": 2,
        "sample_width": 8,
        "sample_height": 8,
        "sample_frames": 9,
        "patch_size": 2,
        "max_text_seq_length": TEXT,
    }
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = kind(**{**config, **VERSIONS[version], **overrides})
        for weight in model.parameters():
            if weight.ndim >= 2:
                weight.normal_(0.0, weight[0].numel() ** -0.5)
    return model.eval()


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs(model, grid, batch=2, text=TEXT):
    """What CogVideoXPipeline gives, for a grid of tokens."""
    t, h, w = grid
    config = model.config
    given = {
        "hidden_states": noise(batch, t * (getattr(config, "patch_size_t", None) or 1), 4, 2 * h, 2 * w),
        "encoder_hidden_states": noise(batch, text, 16, seed=1),
        "timestep": torch.full((batch,), 500),
    }
    if getattr(config, "ofs_embed_dim", None):
        given["ofs"] = torch.full((1,), 2.0)
    if config.use_rotary_positional_embeddings:
        angles = noise(t * h * w, 8, seed=2).repeat_interleave(2, dim=1)
        given["image_rotary_emb"] = (angles.cos(), angles.sin())
    return given


def expected(grid, text=TEXT):
    return Grid(*grid, text=text, text_first=True)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("grid", GRIDS)
def test_cogvideox(grid, version):
    model = denoiser(version)
    given = inputs(model, grid)
    family_checks.full_window_is_dense(model, given, expected(grid))
    family_checks.sparse_is_masked_stock(model, given, expected(grid))


def consisid(version="rotary", num_attention_heads=2):
    """Face tokens are looked at after each block here, the last included."""
    return denoiser(
        version, ConsisIDTransformer3DModel, is_train_face=True, cross_attn_interval=1, cross_attn_dim_head=8,
        cross_attn_num_heads=2, LFE_id_dim=8, LFE_vit_dim=12, LFE_depth=5, LFE_dim_head=8, LFE_num_heads=2,
        LFE_num_id_token=2, LFE_num_querie=3, LFE_output_dim=16 * num_attention_heads * 2 // 3,
        num_attention_heads=num_attention_heads,
    )  # fmt: skip


def consisid_inputs(model, grid):
    faces = {"id_cond": noise(2, 8, seed=3), "id_vit_hidden": [noise(2, 4, 12, seed=4 + i) for i in range(5)]}
    return inputs(model, grid) | faces


@pytest.mark.parametrize("version", ["sincos", "rotary"])
def test_consisid(version):
    model = consisid(version)
    given = consisid_inputs(model, GRIDS[1])
    family_checks.full_window_is_dense(model, given, expected(GRIDS[1]))
    family_checks.sparse_is_masked_stock(model, given, expected(GRIDS[1]))


@pytest.mark.parametrize("grid", [(1, 6, 7), (4, 1, 9)])
def test_full_window_on_thin_grids(grid):
    model = denoiser()
    family_checks.full_window_is_dense(model, inputs(model, grid), expected(grid))


@pytest.mark.parametrize("text", [1, 150])
def test_text_lengths(text):
    """One token, and more than a block holds."""
    model = denoiser()
    given = inputs(model, GRIDS[0], text=text)
    family_checks.full_window_is_dense(model, given, expected(GRIDS[0], text))
    family_checks.sparse_is_masked_stock(model, given, expected(GRIDS[0], text))


def test_positional_arguments():
    model = denoiser()
    given = inputs(model, GRIDS[1])
    stock = family_checks.forward(model, given)
    latents, text, timestep, rotary = given.values()
    with tilewise.patched(model, family_checks.FULL, steps=(0, 1), strict=True), torch.no_grad():
        ours = model(latents, text, timestep, None, None, rotary, return_dict=False)[0]
    torch.testing.assert_close(ours, stock, atol=2e-5, rtol=2e-5)


def test_locality():
    """With one layer: a video token changes the text, which the output does not hold, and the outputs whose window holds its
    tile; a text token changes all."""
    model = denoiser(num_layers=1)
    grid = expected((4, 6, 9))
    method = tilewise.STA(window=(1, 2, 1), tile=(2, 3, 3))
    layout = method.layout(grid)
    mask = method.plan(layout, 2, torch.device("cpu")).to_mask(2)[0, 0][layout.inverse][:, layout.inverse][TEXT:, TEXT:]
    given = inputs(model, grid.shape)
    frame, row, column = 3, 4, 5
    moved = given["hidden_states"].clone()
    moved[:, frame, :, 2 * row, 2 * column] += 1
    prompt = given["encoder_hidden_states"].clone()
    prompt[:, 0] += 1

    def tokens(given):
        return family_checks.forward(model, given)[:, :, :, ::2, ::2]

    with tilewise.patched(model, method, steps=(0, 1), strict=True):
        base = tokens(given)
        one, all_ = ((tokens(given | change) != base).any(2).any(0).flatten() for change in (
            {"hidden_states": moved}, {"encoder_hidden_states": prompt}))  # fmt: skip
    assert torch.equal(one, mask[:, (frame * 6 + row) * 9 + column])
    assert not one.all()
    assert all_.all()


@pytest.mark.parametrize("steps", [(0, 1), (0, 0)])
def test_mask_of_text_padding(steps):
    """A mask given as an attention option: CogVideoX's processor makes it (B, H, 1, S)."""
    model = denoiser()
    given = inputs(model, GRIDS[1])
    tokens = expected(GRIDS[1]).tokens
    mask = torch.zeros(2, 1, tokens)
    mask[1, :, 2:TEXT] = -torch.inf
    given["attention_kwargs"] = {"attention_mask": mask}
    stock = family_checks.forward(model, given)
    with tilewise.patched(model, family_checks.FULL, steps=steps):
        ours = family_checks.forward(model, given)
        kinds = {row.kind for row in tilewise.summary(model).rows}
    assert kinds <= ({SPARSE, FALLBACK} if steps == (0, 1) else {DENSE_STEP})
    torch.testing.assert_close(ours, stock, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("version", ["sincos", "rotary"])
def test_a_processor_of_another_kind_gets_raster_order(version):
    """Kept dense, reported, and given tokens and tables in the model's own order."""
    model = denoiser(version)
    given = inputs(model, GRIDS[1])
    stock = family_checks.forward(model, given)
    seen = []

    class Foreign:
        def __init__(self, stock):
            self.stock = stock

        def __call__(self, attn, hidden_states, encoder_hidden_states, attention_mask=None, image_rotary_emb=None):
            seen.append(hidden_states)
            return self.stock(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)

    attn = model.transformer_blocks[1].attn1
    attn.processor = Foreign(attn.processor)
    assert torch.equal(family_checks.forward(model, given), stock)
    with tilewise.patched(model, family_checks.FULL, steps=(0, 1)):
        ours = family_checks.forward(model, given)
        assert list(tilewise.summary(model).skipped_layers) == ["denoiser.transformer_blocks.1.attn1"]
    torch.testing.assert_close(ours, stock, atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(seen[1], seen[0], atol=2e-5, rtol=2e-5)


def test_fused_projections():
    """Fused before the patch or after it, they run sparse."""
    model = denoiser()
    given = inputs(model, GRIDS[1])
    model.fuse_qkv_projections()
    family_checks.full_window_is_dense(model, given, expected(GRIDS[1]))
    family_checks.sparse_is_masked_stock(model, given, expected(GRIDS[1]))

    with tilewise.patched(model, family_checks.SMALL, steps=(0, 1), strict=True):
        before = family_checks.forward(model, given)
    model = denoiser()
    with tilewise.patched(model, family_checks.SMALL, steps=(0, 1), strict=True):
        model.fuse_qkv_projections()
        torch.testing.assert_close(family_checks.forward(model, given), before, atol=2e-5, rtol=2e-5)
        assert {row.kind for row in tilewise.summary(model).rows} == {SPARSE}


@pytest.mark.compile
def test_compiles_to_one_graph():
    model = denoiser()
    given = inputs(model, GRIDS[1])
    torch.compiler.reset()
    with tilewise.patched(model, family_checks.SMALL, steps=(0, 1), strict=True), torch.no_grad():
        plain = family_checks.forward(model, given)
        ours = torch.compile(model, backend="eager", fullgraph=True)(**given, return_dict=False)[0]
        assert {row.kind for row in tilewise.summary(model).rows} == {SPARSE}
    torch.compiler.reset()
    torch.testing.assert_close(ours, plain, atol=1e-5, rtol=1e-5)


def pipeline(version="rotary"):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vae = AutoencoderKLCogVideoX(
            block_out_channels=(8, 8, 8, 8), latent_channels=4, layers_per_block=1, norm_num_groups=2,
            down_block_types=("CogVideoXDownBlock3D",) * 4, up_block_types=("CogVideoXUpBlock3D",) * 4,
        )  # fmt: skip
    pipe = CogVideoXPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=vae,
        transformer=denoiser(version, sample_height=16, sample_width=16),
        scheduler=CogVideoXDDIMScheduler(),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("version", ["rotary", "1.5"])
def test_pipeline(version):
    """Text-to-video with guidance in one batch; 13 frames are 4 latent ones, 17 are 5, which 1.5 makes 6."""
    pipe = pipeline(version)
    frames = 13 if version == "rotary" else 17

    def run(steps=4):
        return pipe(
            prompt_embeds=noise(1, TEXT, 16, seed=5), negative_prompt_embeds=noise(1, TEXT, 16, seed=6), height=80,
            width=112, num_frames=frames, num_inference_steps=steps, generator=torch.Generator().manual_seed(0),
            output_type="latent",
        ).frames  # fmt: skip

    stock = run()
    grid = tilewise.explain(pipe, height=80, width=112, frames=frames, method="sta").rows[0]
    tilewise.patch(pipe, family_checks.FULL, steps=(0, 1), strict=True)
    torch.testing.assert_close(run(), stock, atol=1e-4, rtol=1e-4)
    summary = tilewise.summary(pipe)
    assert {row.kind for row in summary.rows} == {SPARSE}
    ran = next(iter(tilewise.plugins.patching.patches_of(pipe).values())).state.grid
    assert (grid.grid, grid.tokens) == (str(ran), ran.tokens)
    assert ran == expected((4, 5, 7) if version == "rotary" else (3, 5, 7))
    tilewise.patch(pipe, family_checks.SMALL, steps=(0.5, 1))
    assert float((run() - stock).abs().max()) > 1e-3
    assert {row.kind for row in tilewise.summary(pipe).rows} == {SPARSE, DENSE_STEP}
    tilewise.unpatch(pipe)
    assert torch.equal(run(), stock)


def test_sizes():
    model = denoiser(sample_height=60, sample_width=90, max_text_seq_length=226)
    row = tilewise.explain(model, height=480, width=720, frames=49, method="sta").rows[0]
    assert (row.grid, row.tokens) == ("13×30×45 + 226 text", 13 * 30 * 45 + 226)
    later = denoiser("1.5", sample_height=300, sample_width=300)
    row = tilewise.explain(later, height=768, width=1360, frames=81, method="sta").rows[0]
    assert row.grid == f"11×48×85 + {TEXT} text"
    with pytest.raises(ConfigError, match=r"height=488 must be a multiple of 16, the nearest is 4(80|96)") as error:
        tilewise.explain(model, height=488, width=720, frames=50, method="sta")
    assert "frames=50 must be 4·k + 1, the nearest is 49" in str(error.value)
    with pytest.raises(ConfigError, match="width=2560 must be at most 2400, the nearest is 2400"):
        tilewise.explain(later, height=768, width=2560, frames=81, method="sta")
    learned = denoiser(sample_height=60, sample_width=90, use_learned_positional_embeddings=True)
    assert tilewise.explain(learned, height=480, width=720, frames=49, method="sta").rows
    with pytest.raises(ConfigError, match="height=768 must be the size that its positions were learned for"):
        tilewise.explain(learned, height=768, width=720, frames=49, method="sta")
