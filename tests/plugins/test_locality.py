"""Locality, for every family: in a one-layer denoiser, changing one video token changes exactly the outputs whose window holds
its tile, and changing a text token changes all.

What is expected comes from the method's plan, which test_block_plan.py compares with a mask by its definition; here it shows that
each family's tokens are where it says they are, all the way from its inputs to its output. Outputs that are not expected to
change must be the same bit by bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import test_allegro as allegro
import test_chroma as chroma
import test_cogvideox as cogvideox
import test_cosmos as cosmos
import test_easyanimate as easyanimate
import test_flux as flux
import test_flux2 as flux2
import test_hunyuan_framepack as framepack
import test_hunyuan_video as hunyuan_video
import test_hunyuan_video15 as hunyuan_video15
import test_kandinsky5 as kandinsky5
import test_ltx as ltx
import test_mochi as mochi
import test_qwen_image as qwen_image
import test_sd3 as sd3
import test_skyreels as skyreels
import test_unet as unet
import test_wan_animate as animate
import test_wan_vace as vace
import test_z_image as z_image
import torch
from family_checks import tilewise_layers

import tilewise
from tilewise.kernels.plans.layout import Grid
from tilewise.plugins.patching import patches_of

METHOD = tilewise.STA(window=(1, 2, 1), tile=(2, 3, 3))
VIDEO, IMAGE = (4, 5, 8), (1, 8, 11)  # neither is a multiple of the tile
TOKEN = (2, 3, 4)


@dataclass(frozen=True)
class Case:
    """A one-layer denoiser and its inputs. axes: of its latents and its output, "n" for packed tokens."""

    make: Callable[[], Any]
    inputs: Callable[[Any], dict[str, Any]]
    axes: str = "bcthw"
    latents: str = "hidden_states"
    text: str = "encoder_hidden_states"


def pixels(size: tuple[int, int, int]) -> tuple[int, int, int]:
    """Latents of a grid with patches of 2 × 2."""
    return size[0], 2 * size[1], 2 * size[2]


CASES = {
    "HunyuanVideo, two streams": Case(
        lambda: hunyuan_video.tiny(num_layers=1, num_single_layers=0),
        lambda m: hunyuan_video.inputs(None, pixels(VIDEO), (6,)),
    ),
    "HunyuanVideo, one stream": Case(
        lambda: hunyuan_video.tiny(num_layers=0, num_single_layers=1),
        lambda m: hunyuan_video.inputs(None, pixels(VIDEO), (6,)),
    ),
    "HunyuanVideo 1.5": Case(
        lambda: hunyuan_video15.tiny(num_layers=1), lambda m: hunyuan_video15.inputs(VIDEO, (6,), (2,), True)
    ),
    "FramePack": Case(
        lambda: framepack.tiny(num_layers=1, num_single_layers=0),
        lambda m: framepack.inputs(pixels(VIDEO), (6,), (1, 3, 5)),
    ),
    "LTX-Video": Case(lambda: ltx.ltx(num_layers=1), lambda m: ltx.inputs(VIDEO), "bnc"),
    "LTX-2": Case(lambda: ltx.ltx2(num_layers=1), lambda m: ltx.inputs2(m, VIDEO), "bnc"),
    **{
        f"CogVideoX {version}": Case(
            lambda version=version: cogvideox.denoiser(version, num_layers=1),
            lambda m: cogvideox.inputs(m, VIDEO),
            "btchw",
        )
        for version in ("sincos", "1.5")
    },
    "Mochi": Case(lambda: mochi.denoiser(num_layers=1), lambda m: mochi.inputs(*VIDEO, prompts=(6, 6))),
    "Cosmos": Case(lambda: cosmos.denoiser(num_layers=1), lambda m: cosmos.inputs("2", *VIDEO, per_frame=True)),
    "Allegro": Case(lambda: allegro.denoiser(num_layers=1), lambda m: allegro.inputs(m, *VIDEO)),
    "Kandinsky 5": Case(
        lambda: kandinsky5.denoiser(num_visual_blocks=1), lambda m: kandinsky5.inputs(*VIDEO), "bthwc"
    ),
    "EasyAnimate": Case(lambda: easyanimate.denoiser(num_layers=1), lambda m: easyanimate.inputs(*VIDEO)),
    "SkyReels-V2": Case(
        lambda: skyreels.denoiser(num_layers=1), lambda m: skyreels.inputs(*VIDEO, forcing=True)
    ),
    "VACE": Case(lambda: vace.denoiser(layers=1, vace_layers=(0,)), lambda m: vace.inputs(*VIDEO, scale=(0.7,))),
    "Animate": Case(lambda: animate.denoiser(layers=1, every=1), lambda m: animate.inputs(*VIDEO)),
    "Flux, two streams": Case(
        lambda: flux.tiny(num_layers=1, num_single_layers=0), lambda m: flux.inputs(*IMAGE[1:]), "bnc"
    ),
    "Flux, one stream": Case(
        lambda: flux.tiny(num_layers=0, num_single_layers=1), lambda m: flux.inputs(*IMAGE[1:]), "bnc"
    ),
    "Flux, reference image": Case(
        lambda: flux.tiny(num_layers=1, num_single_layers=0),
        lambda m: flux.inputs(*IMAGE[1:], reference=(3, 5)),
        "bnc",
    ),
    "Flux.2": Case(lambda: flux2.tiny(num_layers=1, num_single_layers=0), lambda m: flux2.inputs(*IMAGE[1:]), "bnc"),
    "Chroma": Case(
        lambda: chroma.tiny(num_layers=0, num_single_layers=1), lambda m: chroma.inputs(*IMAGE[1:], chroma.PADDED), "bnc"
    ),
    "SD 3": Case(lambda: sd3.tiny(num_layers=1), lambda m: sd3.inputs(*IMAGE[1:]), "bchw"),
    "SD 3.5": Case(lambda: sd3.tiny(**sd3.SD35 | {"num_layers": 1}), lambda m: sd3.inputs(*IMAGE[1:]), "bchw"),
    "Qwen-Image": Case(lambda: qwen_image.tiny(num_layers=1), lambda m: qwen_image.inputs(IMAGE), "bnc"),
    "Z-Image": Case(
        lambda: z_image.tiny(n_layers=1, n_refiner_layers=0),
        lambda m: z_image.inputs(*IMAGE[1:]),
        "bcthw",
        "x",
        "cap_feats",
    ),
}  # fmt: skip


def run(model: Any, given: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        out = model(**given, return_dict=False)
    out = out[0] if isinstance(out, tuple) else out
    return torch.stack(list(out)) if isinstance(out, list | tuple) else out


def tokens(x: torch.Tensor, axes: str, grid: Grid) -> torch.Tensor:
    """(B, T, H, W, everything else) of what has these axes: a view, by token of the grid."""
    if "n" in axes:
        return x[:, : grid.video].unflatten(1, grid.shape)
    if "t" not in axes:
        x, axes = x.unsqueeze(2), "bcthw"
    x = x.permute([axes.index(axis) for axis in "bthwc"])
    t, h, w = (x.shape[i + 1] // n for i, n in enumerate(grid.shape))
    x = x.unflatten(3, (grid.w, w)).unflatten(2, (grid.h, h)).unflatten(1, (grid.t, t))
    return x.permute(0, 1, 3, 5, 2, 4, 6, 7)


def seen_by(grid: Grid, heads: int, token: tuple[int, int, int]) -> torch.Tensor:
    """(T, H, W) bool: the queries whose window holds the tile of a token, by the plan."""
    layout = METHOD.layout(grid)
    mask = METHOD.plan(layout, heads, torch.device("cpu")).to_mask(heads)[0, 0]
    mask = mask[layout.inverse][:, layout.inverse]
    first = grid.text if grid.text_first else 0
    t, h, w = token
    video = slice(first, first + grid.video)
    return mask[video, video][:, (t * grid.h + h) * grid.w + w].view(grid.shape)


@pytest.mark.parametrize("name", list(CASES))
def test_one_token_changes_what_sees_it(name):
    case = CASES[name]
    model = case.make()
    given = case.inputs(model)
    with tilewise.patched(model, METHOD, steps=(0, 1), strict=True):
        base = run(model, given)
        grid = next(iter(patches_of(model).values())).state.grid
        token = tuple(min(i, n - 1) for i, n in zip(TOKEN, grid.shape, strict=True))

        latents = given[case.latents]
        moved = [x.clone() for x in latents] if isinstance(latents, list) else latents.clone()
        views = [x[None] for x in moved] if isinstance(moved, list) else [moved]
        for view in views:
            tokens(view, case.axes, grid)[(slice(None), *token)] += 1  # views of the latents: written through
        changed = tokens(run(model, given | {case.latents: moved}) != base, case.axes, grid)
        changed = changed.flatten(4).any(4) if changed.ndim > 4 else changed
        expected = seen_by(grid, tilewise_layers(model)[0].heads, token)
        assert 0 < int(expected.sum()) < grid.video
        for sample in changed:
            assert torch.equal(sample, expected)

        text = given[case.text]
        other = [x.clone() for x in text] if isinstance(text, list) else text.clone()
        for prompt in other if isinstance(other, list) else [other.flatten(0, -3)[0], other.flatten(0, -3)[-1]]:
            prompt[0] += 1
        changed = tokens(run(model, given | {case.text: other}) != base, case.axes, grid)
        assert changed.flatten(4).any(4).all()


@pytest.mark.parametrize("kind", list(unet.KINDS))
def test_one_pixel_of_a_feature_map(kind, monkeypatch):
    """UNets: convolutions and norms reach everywhere, so this looks at one self-attention layer of each resolution alone."""
    monkeypatch.setattr("tilewise.plugins.config.MIN_MAP_TOKENS", 1)
    model, given = unet.KINDS[kind](), unet.inputs_of(kind, 10, 14)
    with tilewise.patched(model, METHOD, steps=(0, 1), strict=True):
        for layer in {layer.downsample: layer for layer in tilewise_layers(model)}.values():
            grid = layer.grid(Grid(1, 10, 14))
            token = (0, 2, grid.w - 2)
            at = token[1] * grid.w + token[2]
            outputs: list[torch.Tensor] = []

            def enter(module: Any, args: Any, at: int = at, outputs: list[torch.Tensor] = outputs) -> Any:
                x = args[0].clone()
                x[:, at] += len(outputs)
                return (x, *args[1:])

            def leave(module: Any, args: Any, out: torch.Tensor, kept: list[torch.Tensor] = outputs) -> None:
                kept.append(out)

            handles = [layer.module.register_forward_pre_hook(enter), layer.module.register_forward_hook(leave)]
            unet.forward(model, given)
            unet.forward(model, given)
            for handle in handles:
                handle.remove()
            changed = (outputs[0] != outputs[1]).any(2).view(-1, *grid.shape)
            expected = seen_by(grid, layer.heads, token)
            assert all(torch.equal(sample, expected) for sample in changed)
