"""Locality, for every family: in a one-layer denoiser, changing one video token changes exactly the outputs whose window holds
its tile, and changing a text token changes all.

What is expected comes from the method's plan, which test_block_plan.py compares with a mask by its definition; here it shows that
each family's tokens are where it says they are, all the way from its inputs to its output. Outputs that are not expected to
change must be the same bit by bit.
"""

from __future__ import annotations

from typing import Any

import pytest
import test_unet as unet
import torch
from every_family import CASES, run
from family_checks import tilewise_layers

import tilewise
from tilewise.kernels.plans.layout import Grid
from tilewise.plugins.patching import patches_of

METHOD = tilewise.STA(window=(1, 2, 1), tile=(2, 3, 3))
TOKEN = (2, 3, 4)


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
    t, h, w = token
    video = slice(grid.video_start, grid.video_start + grid.video)
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
