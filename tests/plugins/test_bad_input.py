"""What cannot be patched is refused with a reason and left untouched; what can be is patched whatever its weights are."""

from __future__ import annotations

import io
import pickle
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import test_flux
import tiny_wan
import torch
from diffusers import UNet1DModel, UNet2DConditionModel
from family_checks import FULL, SMALL, forward, traces

import tilewise
from tilewise.plugins.runtime.call_stats import SPARSE


class FusedStack(torch.nn.Module):
    """All blocks in one module, as in nunchaku's first Flux."""

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return hidden_states


class FusedAttention(torch.nn.Module):
    """Attention of another library's: no processor to replace."""

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return hidden_states


def fused_stack() -> Any:
    model = test_flux.tiny()
    model.transformer_blocks = torch.nn.ModuleList([FusedStack()])
    model.single_transformer_blocks = torch.nn.ModuleList()
    return model


def fused_attention() -> Any:
    model = tiny_wan.tiny_transformer()
    model.blocks[1].attn1 = FusedAttention()
    return model


def without_attention() -> Any:
    return UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4, cross_attention_dim=8,
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"), mid_block_type=None,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (fused_stack, r"FusedStack.* has no attribute 'attn'.*Load the model with diffusers alone"),
        (fused_attention, r"blocks\.1\.attn1 is a FusedAttention without an attention processor"),
        (without_attention, r"no self-attention layer"),
        (lambda: UNet1DModel(sample_size=8, block_out_channels=(8,), down_block_types=("DownBlock1D",),
            up_block_types=("UpBlock1D",), mid_block_type="UNetMidBlock1D", extra_in_channels=0),
         r"UNet1DModel, which no family adapter serves.*register_family"),
    ],
    ids=["fused stack", "fused attention", "no attention", "another class"],
)  # fmt: skip
@pytest.mark.parametrize("method", ["sta", "dense"])
def test_what_cannot_be_patched_is_refused_untouched(make, said, method):
    model = make()
    before = traces(model)
    for target in (model, SimpleNamespace(transformer=model)):
        with pytest.raises(tilewise.TilewiseError, match=said) as refused:
            tilewise.patch(target, method)
        assert isinstance(refused.value, tilewise.UnsupportedModelError)
        assert traces(model) == before


def test_a_pipeline_with_one_such_denoiser_keeps_the_patch_of_the_other():
    pipe: Any = SimpleNamespace(transformer=tiny_wan.tiny_transformer(), transformer_2=tiny_wan.tiny_transformer())
    tilewise.patch(pipe, FULL)
    pipe.transformer_2.blocks[1].attn1 = FusedAttention()
    before = traces(pipe.transformer)
    with pytest.raises(tilewise.UnsupportedModelError, match=r"transformer_2\.blocks\.1\.attn1"):
        tilewise.patch(pipe, SMALL)
    assert traces(pipe.transformer) == before


def test_no_denoiser_at_all():
    for target in (SimpleNamespace(vae=torch.nn.Linear(1, 1)), object()):
        with pytest.raises(tilewise.UnsupportedModelError, match="has no denoiser"):
            tilewise.patch(target, "sta")


def test_quantised_linear_layers_run_sparse():
    """PyTorch's own int8 layers, in place of every Linear of the blocks: projections are the stock processor's to call."""
    model = tiny_wan.tiny_transformer().eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.ao.quantization.quantize_dynamic(model.blocks, {torch.nn.Linear}, inplace=True)
    assert type(model.blocks[0].attn1.to_q) is not torch.nn.Linear
    given = {"hidden_states": torch.randn(1, 4, 3, 12, 10, generator=torch.Generator().manual_seed(0))}
    given |= {"timestep": torch.tensor([500.0]), "encoder_hidden_states": torch.zeros(1, 16, tiny_wan.TEXT_DIM)}
    before, stock = traces(model), forward(model, given)
    tilewise.patch(model, FULL, steps=(0, 1), strict=True)
    torch.testing.assert_close(forward(model, given), stock, atol=1e-4, rtol=1e-4)
    assert {row.kind for row in tilewise.summary(model).rows} == {SPARSE}
    tilewise.unpatch(model)
    assert torch.equal(forward(model, given), stock) and traces(model) == before


def training_inputs() -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(1, 4, 3, 12, 10, generator=torch.Generator().manual_seed(0)),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": torch.zeros(1, 16, tiny_wan.TEXT_DIM),
        "return_dict": False,
    }


@pytest.mark.parametrize("method", [SMALL, "dense"], ids=["sta", "dense"])
def test_training_is_refused_at_the_call(method):
    model = tilewise.patch(tiny_wan.tiny_transformer().train(), method, steps=(0, 1))
    refused = r"for inference.*eval\(\).*unpatch before training"
    with pytest.raises(tilewise.TilewiseError, match=refused):
        model(**training_inputs())
    with torch.no_grad():  # as pipelines call it
        with pytest.raises(tilewise.TilewiseError, match=refused):
            model(**training_inputs())
        model.eval()(**training_inputs())  # a sample in between, as training scripts make
    model.train()
    tilewise.unpatch(model)(**training_inputs())[0].sum().backward()
    assert model.blocks[0].attn1.to_q.weight.grad is not None


@pytest.mark.parametrize("save", [pickle.dumps, lambda it: torch.save(it, io.BytesIO())], ids=["pickle", "torch.save"])
@pytest.mark.parametrize("part", ["pipeline", "transformer", "vae"])
def test_what_is_patched_cannot_be_pickled(part, save):
    pipe = tilewise.patch(tiny_wan.tiny_pipeline(), SMALL)
    with pytest.raises(tilewise.TilewiseError, match=r"tilewise\.unpatch first"):
        save(pipe if part == "pipeline" else getattr(pipe, part))
    save(getattr(tilewise.unpatch(pipe), "vae" if part == "pipeline" else part))


def test_gradients_of_an_evaluated_model_are_refused_where_they_are_asked_for():
    """Without torch.no_grad() a forward still runs; what it gives does not pretend to have gradients."""
    model = tilewise.patch(tiny_wan.tiny_transformer().eval(), SMALL, steps=(0, 1))
    out = model(**training_inputs())[0]
    with torch.no_grad():
        assert torch.equal(model(**training_inputs())[0], out)
    with pytest.raises(tilewise.TilewiseError, match="no backward pass"):
        out.sum().backward()
