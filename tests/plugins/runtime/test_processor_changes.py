"""Another processor on a patched layer, set by diffusers or by hand: the patch stays on, and takes it over as well."""

from __future__ import annotations

from typing import Any

import family_checks
import pytest
import test_cogvideox
import test_sd3
import test_unet
import torch
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0, FusedAttnProcessor2_0

import tilewise
from tilewise.plugins.patching import patches_of
from tilewise.plugins.runtime.call_stats import SPARSE

FULL = tilewise.STA(window=(99, 99, 99), tile=(1, 3, 4))


@pytest.fixture(autouse=True)
def every_level(monkeypatch):
    """Tiny maps are sparse too."""
    monkeypatch.setattr("tilewise.plugins.config.MIN_MAP_TOKENS", 1)


def unet(kind: str = "2d") -> tuple[Any, dict[str, Any]]:
    return test_unet.KINDS[kind](), test_unet.inputs_of(kind, 12, 20)


def sd3() -> tuple[Any, dict[str, Any]]:
    return test_sd3.tiny(), test_sd3.inputs(8, 10)


def cogvideox() -> tuple[Any, dict[str, Any]]:
    model = test_cogvideox.denoiser()
    return model, test_cogvideox.inputs(model, (4, 8, 6))


def patched(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    """The output of a forward in which every layer of ours is sparse."""
    before = tilewise.summary(model).calls
    out = family_checks.forward(model, inputs)
    summary = tilewise.summary(model)
    assert {row.kind for row in summary.rows} == {SPARSE} and not summary.skipped_layers
    assert summary.calls - before == len(family_checks.tilewise_layers(model))
    return out


@pytest.mark.parametrize("kind", list(test_unet.KINDS))
def test_default_processors(kind):
    model, inputs = unet(kind)
    before, stock = {name: type(p) for name, p in model.attn_processors.items()}, family_checks.forward(model, inputs)
    tilewise.patch(model, FULL, steps=(0, 1), strict=True)
    assert {name: p.__class__ for name, p in model.attn_processors.items()} == before
    patched(model, inputs)
    model.set_default_attn_processor()
    torch.testing.assert_close(patched(model, inputs), stock, atol=2e-5, rtol=2e-5)
    tilewise.unpatch(model)
    assert {type(p) for p in model.attn_processors.values()} == {AttnProcessor}


def test_default_processors_in_dense_steps():
    model, inputs = unet()
    model.set_default_attn_processor()
    stock = family_checks.forward(model, inputs)
    with tilewise.patched(model, FULL, steps=(0, 0)):
        torch.testing.assert_close(family_checks.forward(model, inputs), stock, atol=2e-5, rtol=2e-5)
    assert torch.equal(family_checks.forward(model, inputs), stock)


@pytest.mark.parametrize("make", [unet, sd3, cogvideox], ids=["unet", "sd3", "cogvideox"])
def test_fused_projections(make):
    model, inputs = make()
    stock, processors = family_checks.forward(model, inputs), list(model.attn_processors.values())
    tilewise.patch(model, FULL, steps=(0, 1), strict=True)
    patched(model, inputs)
    model.fuse_qkv_projections()
    torch.testing.assert_close(patched(model, inputs), stock, atol=2e-5, rtol=2e-5)
    model.unfuse_qkv_projections()
    torch.testing.assert_close(patched(model, inputs), stock, atol=2e-5, rtol=2e-5)
    tilewise.unpatch(model)
    assert torch.equal(family_checks.forward(model, inputs), stock)
    assert all(p is q for p, q in zip(model.attn_processors.values(), processors, strict=True))


def test_unfused_after_unpatch():
    model, inputs = unet()
    stock, processors = family_checks.forward(model, inputs), list(model.attn_processors.values())
    tilewise.patch(model, FULL, steps=(0, 1), strict=True)
    model.fuse_qkv_projections()
    patched(model, inputs)
    tilewise.unpatch(model)
    assert {type(p) for p in model.attn_processors.values()} == {FusedAttnProcessor2_0}
    model.unfuse_qkv_projections()
    assert torch.equal(family_checks.forward(model, inputs), stock)
    assert all(p is q for p, q in zip(model.attn_processors.values(), processors, strict=True))


def test_one_processor_for_all_layers():
    model, inputs = unet()
    stock = family_checks.forward(model, inputs)
    tilewise.patch(model, FULL, steps=(0, 1), strict=True)
    modules: list[Any] = [layer.module for layer in family_checks.tilewise_layers(model)]
    model.set_attn_processor(AttnProcessor2_0())
    torch.testing.assert_close(patched(model, inputs), stock, atol=2e-5, rtol=2e-5)
    for module in modules:
        module.set_processor(modules[0].processor)  # ours, of another layer
    torch.testing.assert_close(patched(model, inputs), stock, atol=2e-5, rtol=2e-5)
    assert [module.processor.number for module in modules] == list(range(len(modules)))


def test_processors_of_an_earlier_patch():
    model, inputs = unet()
    stock = family_checks.forward(model, inputs)
    tilewise.patch(model, FULL, steps=(0, 1), strict=True)
    earlier = model.attn_processors
    tilewise.patch(model, FULL, steps=(0, 1), strict=True)
    model.set_attn_processor(earlier)
    torch.testing.assert_close(patched(model, inputs), stock, atol=2e-5, rtol=2e-5)
    tilewise.unpatch(model)
    assert torch.equal(family_checks.forward(model, inputs), stock)


def test_a_layer_that_was_left_alone_is_taken_over_when_it_can_be():
    class Own(AttnProcessor2_0):
        pass  # has no __call__ of its own

    model, inputs = unet()
    layer = family_checks.tilewise_layers(model)[0]
    layer.module.set_processor(Own())
    tilewise.patch(model, FULL, steps=(0, 1))
    family_checks.forward(model, inputs)
    assert list(tilewise.summary(model).skipped_layers) == [f"denoiser.{layer.name}"]
    layer.module.set_processor(AttnProcessor2_0())
    patched(model, inputs)
    (patch,) = patches_of(model).values()
    assert not patch.left_alone
