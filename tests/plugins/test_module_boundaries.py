"""Tokens are in tile order within a sparse attention call and nowhere else, for every family: what stands outside of it, modules,
hooks, caches, control networks, finds them in the model's own order.

A recorder at every module of a denoiser, the parts of attention modules included, must see the same in a denoiser patched with a
window that holds everything as in the stock one.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import every_family
import pytest
import test_chroma as chroma
import test_hunyuan_video as hunyuan_video
import test_hunyuan_video15 as hunyuan_video15
import test_unet as unet
import tiny_wan
import torch
from diffusers import WanTransformer3DModel
from every_family import IMAGE, VIDEO, pixels
from family_checks import FULL, tilewise_layers

import tilewise
from tilewise.plugins.runtime.call_stats import SPARSE

CASES = {
    **{name: (case.make, case.inputs, every_family.run) for name, case in every_family.CASES.items()},
    **{kind: (make, lambda m, kind=kind: unet.inputs_of(kind, 10, 14), unet.forward) for kind, make in unet.KINDS.items()},
    "Wan": (
        lambda: tiny_wan.tiny_transformer(num_layers=2),
        lambda m: {
            "hidden_states": torch.randn(2, 4, 3, 8, 12, generator=torch.Generator().manual_seed(0)),
            "timestep": torch.tensor([500.0, 500.0]),
            "encoder_hidden_states": torch.randn(2, 16, tiny_wan.TEXT_DIM, generator=torch.Generator().manual_seed(1)),
        },
        every_family.run,
    ),
}  # fmt: skip


# What a hidden token of padding gets, which none reads, is not what stock gives it: here nothing is padded.
NOT_PADDED = {
    "HunyuanVideo, two streams": lambda m: hunyuan_video.inputs(None, pixels(VIDEO), (hunyuan_video.PROMPT,)),
    "HunyuanVideo, one stream": lambda m: hunyuan_video.inputs(None, pixels(VIDEO), (hunyuan_video.PROMPT,)),
    "HunyuanVideo 1.5": lambda m: hunyuan_video15.inputs(VIDEO, (hunyuan_video15.PROMPT,), (hunyuan_video15.GLYPHS,), True),
    "Chroma": lambda m: chroma.inputs(*IMAGE[1:]),
}  # fmt: skip


def tensors(value: Any) -> list[torch.Tensor]:
    """The floating-point tensors in arguments or an output: masks are made once a forward by some families."""
    if isinstance(value, torch.Tensor):
        return [value.detach().clone(memory_format=torch.preserve_format)] if value.is_floating_point() else []
    values = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [x for item in values for x in tensors(item)]


def record(model: torch.nn.Module, run: Any) -> dict[str, list[torch.Tensor]]:
    """What went into and out of every module, all calls of it."""
    seen: dict[str, list[torch.Tensor]] = defaultdict(list)
    handles = []
    for name, module in model.named_modules():

        def before(module: Any, args: Any, kwargs: Any, name: str = name) -> None:
            seen[f"into {name}"] += tensors([args, kwargs])

        def after(module: Any, args: Any, output: Any, name: str = name) -> None:
            seen[f"out of {name}"] += tensors(output)

        handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(module.register_forward_hook(after))
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return seen


@pytest.mark.parametrize("name", list(CASES))
def test_everything_outside_attention_sees_the_models_own_order(name, monkeypatch):
    monkeypatch.setattr("tilewise.plugins.config.MIN_MAP_TOKENS", 1)
    make, inputs, run = CASES[name]
    model = make()
    given = NOT_PADDED.get(name, inputs)(model)
    stock = record(model, lambda: run(model, given))
    with tilewise.patched(model, FULL, steps=(0, 1), strict=True):
        ours = record(model, lambda: run(model, given))
        summary = tilewise.summary(model)
    assert {row.kind for row in summary.rows} == {SPARSE}
    assert sum(row.calls for row in summary.rows) >= len(tilewise_layers(model))
    assert ours.keys() == stock.keys()
    for where, wanted in stock.items():
        for x, y in zip(ours[where], wanted, strict=True):
            torch.testing.assert_close(x, y, atol=5e-5, rtol=5e-5, msg=lambda text, where=where: f"{where}: {text}")


class Controlled(WanTransformer3DModel):
    """A subclass with a forward of its own, as control networks for Wan have: it adds to the hidden states between the blocks."""

    def forward(self, hidden_states, timestep, encoder_hidden_states, residuals, return_dict=True):
        _, proj, text, _ = self.condition_embedder(timestep, encoder_hidden_states, None)
        rotary = self.rope(hidden_states)
        x = self.patch_embedding(hidden_states).flatten(2).transpose(1, 2)
        for block, residual in zip(self.blocks, residuals, strict=True):
            x = block(x, text, proj.unflatten(1, (6, -1)), rotary) + residual
        return (self.proj_out(self.norm_out(x)),)


def ramp(x: torch.Tensor) -> torch.Tensor:
    """Something that depends on where a token is: (1, S, 1)."""
    return torch.linspace(-1, 1, x.shape[1])[None, :, None]


def test_a_subclass_that_adds_residuals_between_the_blocks():
    model = tiny_wan.tiny_transformer(num_layers=2)
    model.__class__ = Controlled
    _, inputs, _ = CASES["Wan"]
    residuals = torch.randn(2, 1, 72, 32, generator=torch.Generator().manual_seed(2))  # of two blocks, (1, S, C) each
    given = inputs(model) | {"residuals": list(residuals)}
    stock = every_family.run(model, given)
    without = every_family.run(model, given | {"residuals": list(0 * residuals)})
    assert float((stock - without).abs().max()) > 0.1
    with tilewise.patched(model, FULL, steps=(0, 1), strict=True):
        torch.testing.assert_close(every_family.run(model, given), stock, atol=5e-5, rtol=5e-5)
        assert {row.kind for row in tilewise.summary(model).rows} == {SPARSE}


@pytest.mark.parametrize("patched_first", [True, False])
@pytest.mark.parametrize("name", ["Wan", "LTX-Video", "CogVideoX 1.5", "Mochi", "Flux, two streams", "SD 3"])
def test_hooks_of_others_that_change_what_a_block_returns(name, patched_first):
    make, inputs, run = CASES[name]
    model = make()
    given = inputs(model)
    block = getattr(model, "blocks", None) or model.transformer_blocks

    def fade(module: Any, args: Any, output: Any) -> Any:
        return (
            tuple(x if x is None else x * ramp(x) for x in output)
            if isinstance(output, tuple)
            else output * ramp(output)
        )

    plain = run(model, given)
    handle = block[0].register_forward_hook(fade)
    stock = run(model, given)
    assert float((stock - plain).abs().max()) > 1e-2
    if patched_first:
        handle.remove()
    tilewise.patch(model, FULL, steps=(0, 1), strict=True)
    if patched_first:
        block[0].register_forward_hook(fade)
    torch.testing.assert_close(run(model, given), stock, atol=5e-5, rtol=5e-5)


@pytest.mark.parametrize("name", list(CASES))
def test_blocks_get_contiguous_hidden_states(name):
    """A patch embedding leaves the channels of a token apart in memory, where additions keep them, slowly."""
    make, inputs, run = CASES[name]
    model = make()
    strides: list[int] = []

    def see(module: Any, args: Any, kwargs: Any) -> None:
        strides.extend(x.stride(-1) for x in tensors([args, kwargs])[:1] if x.ndim == 3)

    with tilewise.patched(model, FULL, steps=(0, 1)):
        for layer in tilewise_layers(model):
            if layer.downsample is None:
                model.get_submodule(layer.name.rpartition(".")[0]).register_forward_pre_hook(see, with_kwargs=True)
        run(model, inputs(model))
    assert set(strides) <= {1}
