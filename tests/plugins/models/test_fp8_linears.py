"""Linear layers with torchao's fp8 weights: the layer's product against float64, and which layers are taken."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import tilewise
from tests.helpers.tiny_wan import tiny_transformer
from tilewise.kernels.fused.quantize_rows import quantize_rows_reference
from tilewise.plugins.models.common.fp8_linears import fp8_linear, is_fp8


class PerRow:
    pass


class Float8Tensor(SimpleNamespace):
    """The attributes of torchao's weights."""


def weight_of(w: torch.Tensor, **changes: Any) -> Float8Tensor:
    data, scale = quantize_rows_reference(w)
    inputs = {"float8_dtype": torch.float8_e4m3fn, "granularity": PerRow(), "hp_value_lb": None, "hp_value_ub": None}
    weight = Float8Tensor(qdata=data, scale=scale, mm_config=None, act_quant_kwargs=SimpleNamespace(**inputs))
    for name, value in changes.items():
        setattr(weight, name, value)
    return weight


@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_is_as_exact_as_its_8_bits(bias):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and torch.__version__ < "2.13":
        pytest.skip("torch._scaled_mm has no scales of rows on a CPU before PyTorch 2.13")
    x, w = torch.randn(2, 19, 48, device=device).bfloat16(), torch.randn(32, 48, device=device)
    b = torch.randn(32, device=device).bfloat16() if bias else None
    weight = weight_of(w)
    rows, scale = quantize_rows_reference(x.view(-1, 48))
    want = (rows.double() * scale.double()) @ (weight.qdata.double() * weight.scale.double()).T
    want = (want + (0 if b is None else b.double())).view(2, 19, 32)
    got = fp8_linear(x, weight, b)
    assert got.shape == want.shape and got.dtype == torch.bfloat16
    assert (got.double() - want).abs().max() <= 2**-7 * want.abs().max()  # rounded to bfloat16
    exact = x.double() @ w.double().T + (0 if b is None else b.double())
    assert (got.double() - exact).norm() < 0.05 * exact.norm()


@pytest.mark.parametrize(
    "changes",
    [
        {"act_quant_kwargs": None},  # weights alone are in 8 bits
        {"scale": torch.ones(1, 1)},  # one scale for all
        {"qdata": torch.zeros(32, 48, dtype=torch.float8_e5m2)},
        {"qdata": torch.zeros(32, 40, dtype=torch.float8_e4m3fn)},  # no multiple of 16
    ],
)
def test_other_weights_are_left_to_torchao(changes):
    assert is_fp8(weight_of(torch.randn(32, 48)))
    assert not is_fp8(weight_of(torch.randn(32, 48), **changes))
    assert not is_fp8(nn.Parameter(torch.randn(32, 48)))


@pytest.mark.gpu
def test_torchao_on_a_gpu():
    """As torchao's own operators compute it, and undone with the patch."""
    quantization = pytest.importorskip("torchao.quantization")
    config = quantization.Float8DynamicActivationFloat8WeightConfig(
        granularity=quantization.PerRow(), set_inductor_config=False  # it sets the precision of float32 too
    )  # fmt: skip
    model = tiny_transformer(2, num_attention_heads=2, attention_head_dim=64).to("cuda", torch.bfloat16)
    quantization.quantize_(model.blocks, config)
    linears = [module for module in model.modules() if type(module) is nn.Linear and is_fp8(module.weight)]
    assert len(linears) > 10
    x = torch.randn(77, linears[0].in_features, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        stock = linears[0](x)
        tilewise.patch(model, "dense")
        ours = linears[0](x)
        assert (ours - stock).norm() < 0.02 * stock.norm()  # torchao rounds its scales to bfloat16
        calls = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
        with calls:
            linears[0](x)
            torch.cuda.synchronize()
        assert any("quantize_rows" in event.key for event in calls.key_averages())
        tilewise.unpatch(model)
        assert torch.equal(linears[0](x), stock)
