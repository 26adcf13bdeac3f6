"""LTX-Video, and LTX-2's video stream, through the checks that every family must pass, and what is theirs alone."""

from __future__ import annotations

import family_checks
import pytest
import torch
from diffusers import (
    AutoencoderKLLTX2Audio,
    AutoencoderKLLTX2Video,
    AutoencoderKLLTXVideo,
    FlowMatchEulerDiscreteScheduler,
    LTX2ConditionPipeline,
    LTX2Pipeline,
    LTXImageToVideoPipeline,
    LTXPipeline,
    LTXVideoTransformer3DModel,
)
from diffusers.models.transformers.transformer_ltx2 import LTX2VideoTransformer3DModel
from diffusers.pipelines.ltx.pipeline_ltx_condition import LTXConditionPipeline
from diffusers.pipelines.ltx.pipeline_ltx_i2v_long_multi_prompt import build_video_coords_for_window
from diffusers.pipelines.ltx2.connectors import LTX2TextConnectors
from diffusers.pipelines.ltx2.pipeline_ltx2_condition import LTX2VideoCondition
from PIL import Image

import tilewise
from tilewise.kernels.plans.layout import Grid
from tilewise.plugins.errors import ConfigError, TilewiseError
from tilewise.plugins.models.ltx import grid_of_coords
from tilewise.plugins.patching import patches_of
from tilewise.plugins.runtime.call_stats import DENSE_STEP, FALLBACK, SPARSE

TEXT, AUDIO = 7, 5
GRIDS = [(5, 8, 6), (3, 5, 11)]


def seeded(kind, config):
    """Weights of variance 1 / fan-in: attention reaches the output visibly."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = kind(**config)
        for name, weight in model.named_parameters():
            if weight.ndim >= 2 and "scale_shift_table" not in name:
                weight.normal_(0.0, weight[0].numel() ** -0.5)
    return model.eval()


def ltx(**overrides):
    config = {
        "in_channels": 4,
        "out_channels": 4,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "cross_attention_dim": 32,
        "num_layers": 2,
        "caption_channels": 16,
    }
    return seeded(LTXVideoTransformer3DModel, config | overrides)


def ltx2(**overrides):
    config = {
        "in_channels": 4,
        "out_channels": 4,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "cross_attention_dim": 32,
        "audio_in_channels": 4,
        "audio_out_channels": 4,
        "audio_num_attention_heads": 2,
        "audio_attention_head_dim": 8,
        "audio_cross_attention_dim": 16,
        "num_layers": 2,
        "caption_channels": 16,
    }
    return seeded(LTX2VideoTransformer3DModel, config | overrides)


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs(grid, batch=2, extra=0):
    """What LTXPipeline gives: packed latents, a padded prompt, sizes in latents."""
    t, h, w = grid
    mask = torch.ones(batch, TEXT)
    mask[-1, 4:] = 0
    return {
        "hidden_states": noise(batch, t * h * w + extra, 4),
        "encoder_hidden_states": noise(batch, TEXT, 16, seed=1),
        "timestep": torch.full((batch,), 500.0),
        "encoder_attention_mask": mask,
        "num_frames": t,
        "height": h,
        "width": w,
        "rope_interpolation_scale": (8 / 25, 32, 32),
    }


def inputs2(model, grid, batch=2, extra=0):
    """What LTX2Pipeline gives: two streams."""
    given = inputs(grid, batch, extra)
    del given["rope_interpolation_scale"]
    frames = given["num_frames"] * model.config.patch_size_t
    height, width = (given[name] * model.config.patch_size for name in ("height", "width"))
    return given | {
        "audio_hidden_states": noise(batch, AUDIO, 4, seed=2),
        "audio_encoder_hidden_states": noise(batch, TEXT, 16, seed=3),
        "audio_encoder_attention_mask": given["encoder_attention_mask"],
        "sigma": given["timestep"],
        "audio_num_frames": AUDIO,
        "num_frames": frames,
        "height": height,
        "width": width,
        "fps": 25.0,
    }


def check(model, given, grid, atol=2e-5):
    family_checks.full_window_is_dense(model, given, grid, atol)
    family_checks.sparse_is_masked_stock(model, given, grid, atol=atol)


@pytest.fixture
def both_streams(monkeypatch):
    """The checks look at LTX-2's video and audio, not at the first output alone."""

    def forward(model, given):
        with torch.no_grad():
            return torch.cat([out.flatten(1) for out in model(**given, return_dict=False)], dim=1)

    monkeypatch.setattr(family_checks, "forward", forward)


def condition_coords(segments, frame_rate=25, batch=2):
    """LTXConditionPipeline's: (B, 3, S) for segments of (frame_index, frames, height, width)."""
    ids = []
    for frame_index, *sizes in segments:
        one = LTXConditionPipeline._prepare_video_ids(batch, *sizes)
        ids.append(LTXConditionPipeline._scale_video_ids(one, 32, 8, frame_index))
    coords = torch.cat(ids, dim=2).float()
    coords[:, 0] /= frame_rate
    return coords


# ── LTX-Video ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("grid", GRIDS)
def test_ltx(grid):
    check(ltx(), inputs(grid), Grid(*grid))


@pytest.mark.parametrize("grid", [(1, 6, 7), (4, 1, 9)])
def test_ltx_full_window_on_thin_grids(grid):
    family_checks.full_window_is_dense(ltx(), inputs(grid), Grid(*grid))


@pytest.mark.parametrize("shape", ["(B, S)", "(B, S, 1)"])
def test_ltx_with_a_timestep_per_token(shape):
    given = inputs(GRIDS[0])
    tokens = given["hidden_states"].shape[1]
    given["timestep"] = noise(2, tokens).abs() * 500
    if shape == "(B, S, 1)":
        given["timestep"] = given["timestep"][..., None]
    check(ltx(), given, Grid(*GRIDS[0]))


def test_ltx_with_positional_arguments():
    model, given = ltx(), inputs(GRIDS[1])
    stock = family_checks.forward(model, given)
    with tilewise.patched(model, family_checks.FULL, steps=(0, 1), strict=True), torch.no_grad():
        torch.testing.assert_close(model(*given.values(), return_dict=False)[0], stock, atol=2e-5, rtol=2e-5)
        assert patches_of(model)["denoiser"].state.grid == Grid(*GRIDS[1])


@pytest.mark.parametrize("extra", [0, 2])
def test_ltx_condition_pipelines_call(extra):
    """No sizes, positions alone; conditions stand before the video, with timesteps of their own."""
    t, h, w = GRIDS[1]
    segments = [*[(24, 1, h, w), (40, 1, h, w)][:extra], (0, t, h, w)]
    given = inputs(GRIDS[1], extra=extra * h * w)
    tokens = given["hidden_states"].shape[1]
    for name in ("num_frames", "height", "width", "rope_interpolation_scale"):
        del given[name]
    given["video_coords"] = condition_coords(segments)
    given["timestep"] = torch.full((2, 1), 500.0) if not extra else noise(2, tokens).abs() * 500
    check(ltx(), given, Grid(t, h, w, text=extra * h * w, text_first=extra > 0))


def test_ltx_window_of_a_long_video():
    """The long-video pipeline gives sizes of 1 and puts frames to continue after the window, as tokens with other positions."""
    t, h, w = GRIDS[1]
    given = inputs((t + 2, h, w))
    latents = torch.empty(2, 4, t + 2, h, w)
    given["video_coords"] = build_video_coords_for_window(latents, 1, 0, 1, (8, 32, 32), 25)
    given |= {"num_frames": 1, "height": 1, "width": 1}
    check(ltx(), given, Grid(t, h, w, text=2 * h * w))


def test_grid_of_positions():
    assert grid_of_coords(condition_coords([(0, 4, 3, 5)])) == Grid(4, 3, 5)
    assert grid_of_coords(condition_coords([(0, 1, 1, 6)])) == Grid(1, 1, 6)
    assert grid_of_coords(condition_coords([(0, 3, 6, 1)])) == Grid(3, 6, 1)
    assert grid_of_coords(condition_coords([(0, 1, 1, 1)])) == Grid(1, 1, 1)
    assert grid_of_coords(condition_coords([(16, 2, 3, 5), (0, 4, 3, 5)])) == Grid(4, 3, 5, text=30, text_first=True)
    for guiding, overlap, negative, extra in [(0, 0, 0, 0), (0, 2, 0, 2), (1, 2, 1, 4), (2, 0, 0, 2), (0, 0, 1, 1)]:
        latents = torch.empty(1, 4, 5 + extra, 3, 4)
        coords = build_video_coords_for_window(latents, overlap, guiding, negative, (8, 32, 32), 25)
        assert grid_of_coords(coords) == Grid(5, 3, 4, text=extra * 12), (guiding, overlap, negative)


def test_grid_of_positions_is_read_anew_when_they_change():
    coords = condition_coords([(0, 4, 3, 5)])
    assert grid_of_coords(coords) == Grid(4, 3, 5)
    coords.copy_(condition_coords([(0, 5, 2, 6)]))
    assert grid_of_coords(coords) == Grid(5, 2, 6)
    with torch.inference_mode():
        coords = condition_coords([(0, 4, 3, 5)])
        assert grid_of_coords(coords) == Grid(4, 3, 5)
        coords.copy_(condition_coords([(0, 5, 2, 6)]))
        assert grid_of_coords(coords) == Grid(5, 2, 6)


def test_positions_without_a_grid_are_refused():
    coords = condition_coords([(0, 4, 3, 5)])
    with pytest.raises(TilewiseError, match="not those of a video's latents"):
        grid_of_coords(coords[:, :, torch.randperm(60, generator=torch.Generator().manual_seed(0))])
    model, given = ltx(), inputs(GRIDS[1])
    del given["height"]  # stock cannot run either
    with tilewise.patched(model, "sta"), pytest.raises(TilewiseError, match="no video_coords"):
        family_checks.forward(model, given)


def test_tokens_in_another_order_stay_dense_and_are_counted():
    model, given = ltx(), inputs((4, 3, 5))
    coords = condition_coords([(0, 4, 3, 5)])
    given |= {"num_frames": 1, "height": 1, "width": 1}  # as the long-video pipeline gives them
    given["video_coords"] = coords[:, :, torch.randperm(60, generator=torch.Generator().manual_seed(0))]
    family_checks.refused_is_stock(model, given, "not those of a video's latents")


def touched(model, given, token):
    """Raster numbers of the output tokens that change with one input token."""
    base = family_checks.forward(model, given)
    moved = given["hidden_states"].clone()
    moved[:, token] += 1
    other = family_checks.forward(model, given | {"hidden_states": moved})
    return set((base != other).any(2).any(0).nonzero()[:, 0].tolist())


def test_ltx_locality():
    """With one layer, a token changes exactly the outputs whose window holds its tile."""
    shape, tile = (4, 6, 9), (2, 3, 3)
    model = ltx(num_layers=1)
    method = tilewise.STA(window=(1, 2, 1), tile=tile)
    layout = method.layout(Grid(*shape))
    mask = method.plan(layout, 2, torch.device("cpu")).to_mask(2)[0, 0][layout.inverse][:, layout.inverse]
    token = 3 * 54 + 4 * 9 + 5
    with tilewise.patched(model, method, steps=(0, 1), strict=True):
        changed = touched(model, inputs(shape), token)
    assert changed == set(mask[:, token].nonzero()[:, 0].tolist())
    assert len(changed) < len(mask)


@pytest.mark.parametrize("make", [ltx, ltx2])
def test_a_processor_of_another_kind_gets_raster_order(make):
    """Kept dense, reported, and given tokens, tables and masks in the model's own order."""
    model = make()
    given = inputs(GRIDS[1]) if make is ltx else inputs2(model, GRIDS[1])
    stock = family_checks.forward(model, given)
    seen = []

    class Foreign:
        def __init__(self, stock):
            self.stock = stock

        def __call__(self, attn, hidden_states, *args, **kwargs):
            seen.append(hidden_states)
            return self.stock(attn, hidden_states, *args, **kwargs)

    attn = model.transformer_blocks[0].attn1
    original = attn.processor
    attn.processor = Foreign(original)
    expected = family_checks.forward(model, given)
    assert torch.equal(expected, stock)
    with tilewise.patched(model, family_checks.FULL, steps=(0, 1)):
        ours = family_checks.forward(model, given)
        assert list(tilewise.summary(model).skipped_layers) == ["denoiser.transformer_blocks.0.attn1"]
    torch.testing.assert_close(ours, stock, atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(seen[1], seen[0], atol=2e-5, rtol=2e-5)


def same_compiled(model, given, **options):
    """Compiled, a patched forward runs sparse in all layers and gives what it gives uncompiled."""
    torch.compiler.reset()
    with tilewise.patched(model, family_checks.SMALL, steps=(0, 1), strict=True):
        plain = family_checks.forward(model, given)
        compiled = torch.compile(model, backend="eager", **options)
        with torch.no_grad():
            ours = compiled(**given, return_dict=False)[0]
        assert {row.kind for row in tilewise.summary(model).rows} == {SPARSE}
    torch.compiler.reset()
    torch.testing.assert_close(ours, plain, atol=1e-5, rtol=1e-5)


@pytest.mark.compile
def test_ltx_compiles_to_one_graph():
    """With a timestep per token."""
    given = inputs(GRIDS[1])
    given["timestep"] = noise(2, given["hidden_states"].shape[1]).abs() * 500
    same_compiled(ltx(), given, fullgraph=True)


@pytest.mark.compile
def test_ltx_compiles_with_a_break_where_positions_are_read():
    given = inputs(GRIDS[1]) | {"video_coords": condition_coords([(0, *GRIDS[1])])}
    for name in ("num_frames", "height", "width", "rope_interpolation_scale"):
        del given[name]
    same_compiled(ltx(num_layers=1), given)


def test_explain_and_sizes():
    explained = tilewise.explain(ltx(), height=512, width=704, frames=161, method="sta")
    assert explained.rows[0].grid == "21×16×22"
    for model in (ltx(), ltx2()):
        with pytest.raises(ConfigError, match=r"height=500 must be a multiple of 32, the nearest is 512") as error:
            tilewise.explain(model, height=500, width=704, frames=160, method="sta")
        assert "frames=160 must be 8·k + 1, the nearest is 161" in str(error.value)


# ── pipelines ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def pipeline(kind):
    """One without a text encoder. Spatial factor 4 and temporal factor 4 in the VAE."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vae = AutoencoderKLLTXVideo(
            latent_channels=4, block_out_channels=(8, 8, 8, 8), decoder_block_out_channels=(8, 8, 8, 8),
            layers_per_block=(1,) * 5, decoder_layers_per_block=(1,) * 5, upsample_residual=(False,) * 4,
            spatio_temporal_scaling=(True, True, False, False), decoder_spatio_temporal_scaling=(True, True, False, False),
            decoder_inject_noise=(False,) * 5, upsample_factor=(1,) * 4, patch_size=1, patch_size_t=1,
        ).eval()  # fmt: skip
    pipe = kind(
        scheduler=FlowMatchEulerDiscreteScheduler(), vae=vae, text_encoder=None, tokenizer=None, transformer=ltx()
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("kind", [LTXPipeline, LTXImageToVideoPipeline, LTXConditionPipeline])
@pytest.mark.slow
def test_pipeline(kind):
    """With guidance in one batch. An image makes timesteps per token; one for a later frame comes before the video's tokens."""
    pipe = pipeline(kind)
    image = Image.effect_mandelbrot((96, 64), (-2, -1.5, 1, 1.5), 50).convert("RGB")
    extra = {LTXPipeline: {}, LTXImageToVideoPipeline: {"image": image}}.get(
        kind, {"image": [image, image], "frame_index": [0, 4], "strength": [1.0, 0.8], "video": [None, None]}
    )
    mask = torch.ones(1, TEXT, dtype=torch.int64)

    def run():
        return pipe(
            prompt_embeds=noise(1, TEXT, 16, seed=5), negative_prompt_embeds=noise(1, TEXT, 16, seed=6),
            prompt_attention_mask=mask, negative_prompt_attention_mask=mask, height=64, width=96, num_frames=9,
            num_inference_steps=4, generator=torch.Generator().manual_seed(0), output_type="latent", **extra,
        ).frames  # fmt: skip

    stock = run()
    row = tilewise.explain(pipe, height=64, width=96, frames=9, method="sta").rows[0]
    assert row.grid == "3×16×24"
    tilewise.patch(pipe, family_checks.FULL, steps=(0, 1), strict=True)
    torch.testing.assert_close(run(), stock, atol=1e-4, rtol=1e-4)
    assert {row.kind for row in tilewise.summary(pipe).rows} == {SPARSE}
    conditions = 16 * 24 if kind is LTXConditionPipeline else 0
    expected = Grid(3, 16, 24, text=conditions, text_first=conditions > 0)
    assert patches_of(pipe)["transformer"].state.grid == expected
    tilewise.patch(pipe, family_checks.SMALL, steps=(0.5, 1))
    assert float((run() - stock).abs().max()) > 1e-3
    summary = tilewise.summary(pipe)
    assert {row.kind: row.calls for row in summary.rows} == {SPARSE: 4, DENSE_STEP: 4}
    tilewise.unpatch(pipe)
    assert torch.equal(run(), stock)


# ── LTX-2 ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("rope_type", ["interleaved", "split"])
@pytest.mark.parametrize("grid", GRIDS)
def test_ltx2(both_streams, grid, rope_type):
    model = ltx2(rope_type=rope_type)
    check(model, inputs2(model, grid), Grid(*grid))


def test_ltx2_later_versions(both_streams):
    """LTX-2.3 and later: gates, modulated cross-attention, perturbed attention."""
    model = ltx2(
        gated_attn=True, cross_attn_mod=True, audio_gated_attn=True, audio_cross_attn_mod=True, perturbed_attn=True
    )
    given = inputs2(model, GRIDS[1]) | {"use_cross_timestep": True}
    check(model, given, Grid(*GRIDS[1]))


def test_ltx2_perturbed_samples(both_streams):
    """Spatio-temporal guidance replaces attention by its values, in some blocks, for some samples."""
    model = ltx2(perturbed_attn=True)
    given = inputs2(model, GRIDS[1])
    given |= {"spatio_temporal_guidance_blocks": [1], "perturbation_mask": torch.tensor([0.0, 1.0])}
    check(model, given, Grid(*GRIDS[1]))


@pytest.mark.parametrize("cross_timestep", [False, True])
def test_ltx2_with_conditions_after_the_video(both_streams, cross_timestep):
    """A timestep per token, positions given, and key frames that follow the video's tokens."""
    t, h, w = GRIDS[1]
    model = ltx2()
    given = inputs2(model, GRIDS[1], extra=h * w)
    tokens = given["hidden_states"].shape[1]
    video = model.rope.prepare_video_coords(2, t, h, w, "cpu", fps=25.0)
    key_frame = model.rope.prepare_video_coords(2, 1, h, w, "cpu", fps=25.0)
    key_frame[:, 0] += 9 / 25
    given |= {
        "video_coords": torch.cat([video, key_frame], dim=2),
        "timestep": noise(2, tokens).abs() * 500,
        "audio_timestep": torch.full((2,), 500.0),
        "use_cross_timestep": cross_timestep,
    }
    grid = Grid(t, h, w, text=h * w)
    check(model, given, grid)
    for name in ("num_frames", "height", "width"):  # as the DFR pipelines call it
        del given[name]
    check(model, given, grid)


def test_ltx2_grid_of_positions_with_a_last_key_frame():
    """A key frame at the video's last pixel frame begins later than its last latent frame, and is no frame of the video."""
    rope = ltx2().rope
    for frames in (2, 4):
        video = rope.prepare_video_coords(1, frames, 3, 5, "cpu", fps=25.0)
        key_frame = rope.prepare_video_coords(1, 1, 3, 5, "cpu", fps=25.0)
        key_frame[:, 0] += (frames - 1) * 8 / 25
        reference = rope.prepare_video_coords(1, frames, 2, 2, "cpu", fps=25.0)
        coords = torch.cat([video, key_frame, reference], dim=2)
        assert grid_of_coords(coords) == Grid(frames, 3, 5, text=15 + 4 * frames)
        tile = torch.cat([video[:, :, 15:], key_frame], dim=2) - video[:, :, 15:16, :1]
        if frames > 2:
            assert grid_of_coords(tile) == Grid(frames - 1, 3, 5, text=15)


def test_ltx2_patches(both_streams):
    """Sizes are those of the latents before patchify."""
    model = ltx2(patch_size=2)
    given = inputs2(model, GRIDS[1])
    assert given["height"] == 2 * GRIDS[1][1]
    check(model, given, Grid(*GRIDS[1]))


def test_ltx2_mask_over_video_tokens_falls_back(both_streams):
    model = ltx2()
    given = inputs2(model, GRIDS[1])
    tokens = given["hidden_states"].shape[1]
    given["video_self_attention_mask"] = (noise(2, tokens, tokens) > 0).float()
    stock = family_checks.forward(model, given)
    with tilewise.patched(model, family_checks.SMALL, steps=(0, 1)):
        ours = family_checks.forward(model, given)
        rows = tilewise.summary(model).rows
    assert {row.kind for row in rows} == {FALLBACK}
    assert all("mask" in row.reason for row in rows)
    torch.testing.assert_close(ours, stock, atol=2e-5, rtol=2e-5)


def test_ltx2_audio_layers_stay_stock():
    model = ltx2()
    processors = {name: id(p) for name, p in model.attn_processors.items()}
    with tilewise.patched(model, "sta"):
        changed = {name for name, p in model.attn_processors.items() if id(p) != processors[name]}
    assert changed == {f"transformer_blocks.{i}.attn1.processor" for i in range(2)}


@pytest.mark.compile
def test_ltx2_compiles_to_one_graph():
    model = ltx2()
    same_compiled(model, inputs2(model, GRIDS[1]), fullgraph=True)


def pipeline2(kind):
    """One without a text encoder. Spatial and temporal factor 8 in the VAE."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vae = AutoencoderKLLTX2Video(
            latent_channels=4, block_out_channels=(8,) * 4, decoder_block_out_channels=(8,), layers_per_block=(1,) * 5,
            decoder_layers_per_block=(1, 1), decoder_spatio_temporal_scaling=(True,), decoder_inject_noise=(False,) * 2,
            upsample_type=("spatiotemporal",), upsample_residual=(False,), upsample_factor=(1,), patch_size=1,
            spatial_compression_ratio=8, temporal_compression_ratio=8,
        ).eval()  # fmt: skip
        audio_vae = AutoencoderKLLTX2Audio(
            base_channels=4, ch_mult=(1,), num_res_blocks=1, latent_channels=2, mel_bins=8
        )
        connectors = LTX2TextConnectors(
            caption_channels=16, text_proj_in_factor=3,
            video_connector_num_attention_heads=2, video_connector_attention_head_dim=8, video_connector_num_layers=1,
            audio_connector_num_attention_heads=2, audio_connector_attention_head_dim=8, audio_connector_num_layers=1,
            video_connector_num_learnable_registers=None, audio_connector_num_learnable_registers=None,
        )  # fmt: skip
    pipe = kind(
        scheduler=FlowMatchEulerDiscreteScheduler(), vae=vae, audio_vae=audio_vae, text_encoder=None, tokenizer=None,
        connectors=connectors, transformer=ltx2(perturbed_attn=True), vocoder=None,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("kind", [LTX2Pipeline, LTX2ConditionPipeline])
@pytest.mark.slow
def test_ltx2_pipeline(kind):
    """With all its guidances: prompt, perturbed attention, isolated streams. A later key frame comes after the video's tokens."""
    pipe = pipeline2(kind)
    extra = {}
    if kind is LTX2ConditionPipeline:
        image = Image.effect_mandelbrot((96, 64), (-2, -1.5, 1, 1.5), 50).convert("RGB")
        extra["conditions"] = [LTX2VideoCondition(image, 0, 1.0, crf=0), LTX2VideoCondition(image, 1, 0.8, crf=0)]
    mask = torch.ones(1, TEXT, dtype=torch.int64)

    def run():
        made = pipe(
            prompt_embeds=noise(1, TEXT, 48, seed=5), negative_prompt_embeds=noise(1, TEXT, 48, seed=6),
            prompt_attention_mask=mask, negative_prompt_attention_mask=mask, height=64, width=96, num_frames=17,
            frame_rate=16.0, stg_scale=1.0, modality_scale=3.0, spatio_temporal_guidance_blocks=[1], num_inference_steps=4,
            generator=torch.Generator().manual_seed(0), output_type="latent", **extra,
        )  # fmt: skip
        return torch.cat([made.frames.flatten(), made.audio.flatten()])

    stock = run()
    method = tilewise.STA(window=(1, 2, 1), tile=(2, 2, 3))
    tilewise.patch(pipe, family_checks.FULL, steps=(0, 1), strict=True)
    torch.testing.assert_close(run(), stock, atol=1e-3, rtol=1e-3)
    # Three forwards a step; perturbed attention is none at all in one block of the second.
    assert {row.kind: row.calls for row in tilewise.summary(pipe).rows} == {SPARSE: 4 * 5}
    key_frame = 8 * 12 if extra else 0
    assert patches_of(pipe)["transformer"].state.grid == Grid(3, 8, 12, text=key_frame)
    tilewise.patch(pipe, method, steps=(0.5, 1))
    assert float((run() - stock).abs().max()) > 1e-2
    assert {row.kind: row.calls for row in tilewise.summary(pipe).rows} == {SPARSE: 10, DENSE_STEP: 10}
    tilewise.unpatch(pipe)
    assert torch.equal(run(), stock)
