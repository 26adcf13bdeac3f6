"""IP-Adapters: an image beside the prompt, through processors with weights of their own. Before the patch and after it."""

from __future__ import annotations

from typing import Any

import family_checks
import image_checks
import pytest
import test_flux
import test_unet
import torch
from diffusers.models.attention_processor import AttnProcessor2_0, IPAdapterAttnProcessor2_0
from diffusers.models.embeddings import ImageProjection
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor, FluxIPAdapterAttnProcessor

import tilewise
from tilewise.plugins.runtime.call_stats import SPARSE

IMAGE = 6  # width of an image embedding
WEIGHTS = "has weights of its own"
FULL = tilewise.STA(window=(99, 99, 99), tile=(1, 3, 4))


def projection(width: int) -> dict[str, torch.Tensor]:
    names = {"image_embeds": "proj", "norm": "norm"}
    weights = ImageProjection(IMAGE, width, num_image_text_embeds=4).state_dict()
    return {f"{names[name.split('.')[0]]}.{name.split('.')[1]}": weight for name, weight in weights.items()}


def load(model: Any) -> None:
    """As ``pipe.load_ip_adapter`` does, with weights that are drawn."""
    torch.manual_seed(7)
    flux = hasattr(model, "single_transformer_blocks")
    weights: dict[str, torch.Tensor] = {}
    if flux:
        width = model.config.joint_attention_dim
        for i in range(len(model.transformer_blocks)):
            drawn = FluxIPAdapterAttnProcessor(model.inner_dim, width).state_dict()
            weights |= {f"{i}.{name.replace('_ip.0.', '_ip.')}": 5 * weight for name, weight in drawn.items()}
    else:
        width = model.config.cross_attention_dim
        crossing = [name for name in model.attn_processors if name.endswith("attn2.processor")]
        for i, name in enumerate(crossing):
            inner = model.get_submodule(name.removesuffix(".processor")).inner_dim
            drawn = IPAdapterAttnProcessor2_0(inner, width).state_dict()
            weights |= {f"{2 * i + 1}.{n.replace('_ip.0.', '_ip.')}": 5 * weight for n, weight in drawn.items()}
    model._load_ip_adapter_weights([{"image_proj": projection(width), "ip_adapter": weights}], low_cpu_mem_usage=False)


def unload(model: Any) -> None:
    """As ``pipe.unload_ip_adapter`` does."""
    stock, ours = (
        (FluxAttnProcessor, FluxIPAdapterAttnProcessor)
        if hasattr(model, "single_transformer_blocks")
        else (AttnProcessor2_0, IPAdapterAttnProcessor2_0)
    )
    model.encoder_hid_proj = None
    model.config["encoder_hid_dim_type"] = None
    model.set_attn_processor(
        {name: stock() if isinstance(p, ours) else p.__class__() for name, p in model.attn_processors.items()}
    )


def run(model: Any, given: dict[str, Any]) -> torch.Tensor:
    """With the image where there is an adapter."""
    image = [image_checks.random(2, 1, IMAGE)]
    on = getattr(model, "encoder_hid_proj", None) is not None
    if hasattr(model, "single_transformer_blocks"):
        more = {"joint_attention_kwargs": {"ip_adapter_image_embeds": image}} if on else {}
    else:
        more = {"added_cond_kwargs": {"image_embeds": image}} if on else {}
    return image_checks.output(model, given | more)


@pytest.fixture(params=["flux", "unet"])
def case(request: Any, monkeypatch: Any) -> tuple[Any, dict[str, Any], int]:
    """(denoiser, inputs, layers that an adapter's processors are on)"""
    if request.param == "flux":
        return test_flux.tiny(), test_flux.inputs(7, 11), 1
    monkeypatch.setattr("tilewise.plugins.config.MIN_MAP_TOKENS", 1)
    return test_unet.unet_2d(), test_unet.inputs_of("2d", 12, 20), 0


def test_before_the_patch(case):
    model, given, own = case
    plain = run(model, given)
    load(model)
    stock, before = run(model, given), model.state_dict().keys()
    assert not torch.equal(stock, plain), "the adapter must do something"
    tilewise.patch(model, FULL, steps=(0, 1), strict=own == 0)
    torch.testing.assert_close(run(model, given), stock, atol=2e-5, rtol=2e-5)
    summary = tilewise.summary(model)
    assert {row.kind for row in summary.rows} == {SPARSE}
    assert len(summary.skipped_layers) == own and all(WEIGHTS in why for why in summary.skipped_layers.values())
    assert model.state_dict().keys() == before
    # Its strength is set on the processors, and reaches them.
    for processor in model.attn_processors.values():
        if hasattr(processor, "scale") and hasattr(processor, "to_k_ip"):
            processor.scale = [0.0]
    torch.testing.assert_close(run(model, given), plain, atol=2e-5, rtol=2e-5)
    tilewise.unpatch(model)
    assert model.state_dict().keys() == before
    if own:
        with pytest.raises(tilewise.FallbackError, match=WEIGHTS):
            tilewise.patch(model, FULL, strict=True)


def test_after_the_patch_and_away_again(case):
    """diffusers puts new processors on all layers: those without weights of their own are taken over again."""
    model, given, own = case
    plain = run(model, given)
    load(model)
    stock = run(model, given)
    unload(model)
    tilewise.patch(model, FULL, steps=(0, 1))
    load(model)
    torch.testing.assert_close(run(model, given), stock, atol=2e-5, rtol=2e-5)
    summary = tilewise.summary(model)
    assert len(summary.skipped_layers) == own
    assert summary.calls == len(family_checks.tilewise_layers(model)) - own
    unload(model)
    torch.testing.assert_close(run(model, given), plain, atol=2e-5, rtol=2e-5)
    assert not tilewise.summary(model).skipped_layers
    tilewise.unpatch(model)
    assert torch.equal(run(model, given), plain)
