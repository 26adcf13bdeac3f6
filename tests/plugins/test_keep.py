"""keep="condition" and "ends": latent frames that see all and that all see, whatever a method selects."""

from __future__ import annotations

import family_cases
import family_checks
import pytest
import test_wan_vace as vace
import tiny_wan
import torch
from every_family import CASES

import tilewise
from tilewise.kernels.plans.layout import Grid
from tilewise.plugins.config import Config
from tilewise.plugins.errors import ConfigError
from tilewise.plugins.models.common.registry import family_of
from tilewise.plugins.runtime.attention_call import AttentionCalls
from tilewise.plugins.runtime.call_stats import SPARSE

FRAMES = {"condition": (1, 0), "ends": (1, 1)}


def wan_inputs(t, h, w):
    return {
        "hidden_states": family_cases.noise(2, tiny_wan.Z_CHANNELS, t, 2 * h, 2 * w),
        "timestep": torch.full((2,), 500.0),
        "encoder_hidden_states": family_cases.noise(2, 16, tiny_wan.TEXT_DIM, seed=1),
    }


def seen(grid: Grid, keep: str, method: tilewise.STA) -> torch.Tensor:
    """(S, S) bool in the model's order: the method's window among the frames between, and all for the others."""
    first, last = FRAMES[keep]
    between = Grid(grid.t - first - last, grid.h, grid.w)
    layout = method.layout(between)
    window = method.plan(layout, 1, torch.device("cpu")).to_mask(1)[0, 0][layout.inverse][:, layout.inverse]
    mask = torch.ones(grid.tokens, grid.tokens, dtype=torch.bool)
    start = grid.video_start + first * grid.h * grid.w
    mask[start : start + between.video, start : start + between.video] = window
    return mask


@pytest.mark.parametrize("keep", FRAMES)
@pytest.mark.parametrize("kind", ["wan", "vace", "cogvideox"])
def test_kept_frames_see_all_and_are_seen_by_all(kind, keep):
    """As stock attention with that mask; text before the video, and none."""
    size = (5, 4, 6)
    if kind == "wan":
        model, inputs = tiny_wan.tiny_transformer(), wan_inputs(*size)
    elif kind == "vace":
        model, inputs = vace.denoiser(), vace.inputs(*size)
    else:
        case = CASES["CogVideoX sincos"]
        model = case.make()
        inputs = case.inputs(model)
    family = family_of(model)
    grid = family.grid(model, (), inputs)
    layers = family_checks.tilewise_layers(model)
    mask = seen(grid, keep, family_checks.SMALL).expand(1, layers[0].heads, -1, -1)
    with family_cases.masked_attention(model, mask, grid.tokens) as calls:
        want = family_checks.forward(model, inputs)
    assert len(calls) >= len(layers)
    stock = family_checks.forward(model, inputs)
    with tilewise.patched(model, family_checks.SMALL, steps=(0, 1), strict=True):
        without = family_checks.forward(model, inputs)
    with tilewise.patched(model, family_checks.SMALL, steps=(0, 1), strict=True, keep=keep):
        ours = family_checks.forward(model, inputs)
        assert {row.kind for row in tilewise.summary(model).rows} == {SPARSE}
    torch.testing.assert_close(ours, want, atol=5e-5, rtol=5e-5)
    assert float((ours - without).abs().max()) > 1e-3 and float((ours - stock).abs().max()) > 1e-3
    assert torch.equal(family_checks.forward(model, inputs), stock)


def test_fused_code_keeps_frames(monkeypatch):
    """Wan's queries and keys are made in the layout's order at once, which has the kept frames first."""
    model, inputs = tiny_wan.tiny_transformer(), wan_inputs(5, 4, 6)
    with tilewise.patched(model, family_checks.SMALL, steps=(0, 1), strict=True, keep="ends"):
        want = family_checks.forward(model, inputs)
        used = []
        monkeypatch.setattr(AttentionCalls, "fused_here", lambda self, x: used.append(1) or True)
        fused = family_checks.forward(model, inputs)
    assert len(used) >= 2
    torch.testing.assert_close(fused, want, atol=5e-5, rtol=5e-5)


@pytest.mark.parametrize("name", CASES)
def test_every_family_keeps_frames(name):
    """A full window beside them is dense attention, with text, references and padding where the family has them."""
    case = CASES[name]
    model = case.make()
    inputs = case.inputs(model)
    stock = family_checks.forward(model, inputs)
    for keep in FRAMES:
        with tilewise.patched(model, family_checks.FULL, steps=(0, 1), strict=True, keep=keep):
            torch.testing.assert_close(family_checks.forward(model, inputs), stock, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("method", [tilewise.Draft(density=0.3, tile=(1, 4, 4), min_tokens=0), "inward", "xattention"])
def test_other_methods_keep_frames(method):
    pipe = tiny_wan.tiny_pipeline()
    inputs = wan_inputs(5, 8, 8)
    config = tilewise.resolve(method, steps=(0, 1), strict=True, keep="condition")
    with tilewise.patched(pipe, config):
        family_checks.forward(pipe.transformer, inputs)
        kept = tilewise.summary(pipe)
    with tilewise.patched(pipe, tilewise.resolve(method, steps=(0, 1), strict=True)):
        family_checks.forward(pipe.transformer, inputs)
        assert tilewise.summary(pipe).density <= kept.density
    assert not kept.fallbacks


def test_grids_where_text_stands_on_either_side():
    config = Config(tilewise.STA(), keep="ends")
    assert config.kept(Grid(5, 2, 3)) == Grid(3, 2, 3, text=12, text_first=True, opposite=6)
    assert config.kept(Grid(5, 2, 3, text=4)) == Grid(3, 2, 3, text=16, text_first=False, opposite=6)
    assert config.kept(Grid(5, 2, 3, 4, True, 1)) == Grid(3, 2, 3, 16, True, 7)
    for grid in (Grid(2, 2, 3), Grid(1, 8, 8, text=4)):  # nothing would be left, or an image
        assert config.kept(grid) == grid
    assert Config(tilewise.STA()).kept(Grid(5, 2, 3)) == Grid(5, 2, 3)


def test_keep_is_said_stored_and_checked():
    pipe = tiny_wan.tiny_pipeline()
    config = tilewise.resolve("sta", keep="condition")
    assert Config.from_dict(config.to_dict()) == config and "keep" not in tilewise.resolve("sta").to_dict()
    assert tilewise.resolve("sta").with_options({"keep": "ends"}).keep == "ends"
    told = str(tilewise.explain(pipe, height=64, width=64, frames=9, method=config))
    assert "keep=condition: 1 latent frame of 8×8 tokens counted as text, which all see" in told
    assert "4×8×8 + 64 text" in told
    with pytest.raises(ConfigError, match="unknown keep 'first'"):
        tilewise.patch(pipe, "sta", keep="first")
    tilewise.patch(pipe, tilewise.Inward(native=(4, 4)), keep="condition")
    with pytest.raises(ConfigError, match="keep='condition' is for one path"), tilewise.two_paths(pipe):
        pass
