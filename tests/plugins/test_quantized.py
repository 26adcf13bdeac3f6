"""Denoisers that diffusers' quantizers load: patched they give what stock gives with the same weights, fused kernels included.

Where a library is missing its cases are skipped; those that diffusers loads on a GPU alone are marked so. What a quantized layer
computes is its own: the fused kernels read no weight of it, and what they leave to it is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_wan
import torch
from diffusers import BitsAndBytesConfig, GGUFQuantizationConfig, TorchAoConfig, WanTransformer3DModel

import tilewise
from tilewise.plugins.runtime.attention_call import AttentionCalls

FULL = tilewise.STA(window=(99, 99, 99), tile=(2, 3, 3))
SMALL = tilewise.STA(window=(1, 1, 1), tile=(2, 3, 3))


def stored(folder: Path) -> Path:
    tiny_wan.tiny_transformer().save_pretrained(folder)
    return folder


def torchao(folder: Path, name: str, **options: Any) -> Any:
    quantization = pytest.importorskip("torchao.quantization")
    config = TorchAoConfig(getattr(quantization, name)(**options))
    return WanTransformer3DModel.from_pretrained(stored(folder), quantization_config=config, torch_dtype=torch.bfloat16)


def torchao_rows(folder: Path) -> Any:
    row = pytest.importorskip("torchao.quantization").PerRow()
    return torchao(folder, "Float8DynamicActivationFloat8WeightConfig", granularity=row, set_inductor_config=False)


def bits_and_bytes(folder: Path) -> Any:
    pytest.importorskip("bitsandbytes")
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=["condition_embedder", "proj_out"],
    )  # fmt: skip
    return WanTransformer3DModel.from_pretrained(stored(folder), quantization_config=config, torch_dtype=torch.bfloat16)


def gguf(folder: Path) -> Any:
    """Matrices of the blocks in 8 bits, the rest as it is: what converters of Wan make."""
    library = pytest.importorskip("gguf")
    model = tiny_wan.tiny_transformer()
    model.save_config(folder)
    kind = library.GGMLQuantizationType.Q8_0
    writer = library.GGUFWriter(folder / "model.gguf", "wan")
    for name, weight in model.state_dict().items():
        values = weight.numpy()
        if name.startswith("blocks.") and weight.ndim == 2:
            writer.add_tensor(name, library.quants.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, values)
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    return WanTransformer3DModel.from_single_file(
        str(folder / "model.gguf"), config=str(folder), torch_dtype=torch.bfloat16,
        quantization_config=GGUFQuantizationConfig(compute_dtype=torch.bfloat16),
    )  # fmt: skip


# How a model is loaded, and what the report says of the first layer of each feed-forward.
CASES = {
    "torchao int8 weights": (lambda folder: torchao(folder, "Int8WeightOnlyConfig"), "weight is a Int8Tensor"),
    "torchao int8": (
        lambda folder: torchao(folder, "Int8DynamicActivationInt8WeightConfig"),
        "weight is a Int8Tensor",
    ),
    "torchao fp8 weights": (lambda folder: torchao(folder, "Float8WeightOnlyConfig"), "weight is a Float8Tensor"),
    "GGUF": (gguf, "is a GGUFLinear, not PyTorch's Linear"),
}
ON_A_GPU = {
    "torchao fp8, a scale a row": (torchao_rows, "weight is a Float8Tensor"),
    "bitsandbytes nf4": (bits_and_bytes, "is a Linear4bit, not PyTorch's Linear"),
}


@torch.no_grad()
def output(model: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, tiny_wan.Z_CHANNELS, 5, 16, 16, generator=generator)
    text = torch.randn(2, 16, tiny_wan.TEXT_DIM, generator=generator)
    device = model.device
    call = (
        latents.to(device, torch.bfloat16),
        torch.tensor([500.0, 20.0], device=device),
        text.to(device, torch.bfloat16),
    )
    return model(*call).sample.float()


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got - want).norm() / want.norm())


def check(model: Any, said: str, tolerance: float = 0.02) -> None:
    stock = output(model)
    before = {name: type(module) for name, module in model.named_modules()}
    for method, fuse in ((FULL, True), (FULL, False), (SMALL, True)):
        with tilewise.patched(model, method, steps=(0, 1), strict=True, fuse=fuse):
            ours = output(model)
            counted = tilewise.summary(model)
            assert counted.fused_calls == (counted.calls if fuse else 0) and counted.calls == 2
            assert [said in note for note in counted.notes] == [True] * fuse
            if method is FULL:  # bfloat16, rounded elsewhere
                assert error(ours, stock) < tolerance
            else:
                assert error(ours, stock) > 0.05, "the window must matter"
    assert torch.equal(output(model), stock)
    assert {name: type(module) for name, module in model.named_modules()} == before
    told = tilewise.explain(model, method="sta", height=64, width=64, frames=9, num_inference_steps=4)
    assert [said in note for note in told.notes] == [True]


@pytest.mark.parametrize("name", CASES)
def test_a_quantized_denoiser(tmp_path, monkeypatch, name):
    monkeypatch.setattr(AttentionCalls, "fused_here", lambda self, x: self.state.config.fuse)
    load, said = CASES[name]
    model = load(tmp_path).eval()
    plain = tiny_wan.tiny_transformer().to(torch.bfloat16)
    assert 0 < error(output(model), output(plain)) < 0.3
    check(model, said)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ON_A_GPU)
def test_a_quantized_denoiser_on_a_gpu(tmp_path, name):
    load, said = ON_A_GPU[name]
    # Where the input of a layer is fp8 too, what is rounded elsewhere before it moves by a step of e4m3, a sixteenth.
    check(load(tmp_path).to("cuda").eval(), said, tolerance=0.05 if "fp8" in name else 0.02)


def test_a_lora_on_quantized_layers(tmp_path, monkeypatch):
    """Beside 8-bit weights an adapter is called as it is beside others, loaded before the patch or after it."""
    from peft import LoraConfig

    monkeypatch.setattr(AttentionCalls, "fused_here", lambda self, x: self.state.config.fuse)
    plain = output(gguf(tmp_path).eval())
    config = LoraConfig(r=4, init_lora_weights=False, target_modules=["to_q", "to_v", "ffn.net.0.proj"])
    wanted = None
    for late in (False, True):
        other = gguf(tmp_path).eval()
        if late:
            tilewise.patch(other, FULL, steps=(0, 1), strict=True)
        torch.manual_seed(3)
        other.add_adapter(config)
        if not late:
            wanted = output(other)
            assert error(wanted, plain) > 0.05
            tilewise.patch(other, FULL, steps=(0, 1), strict=True)
        assert error(output(other), wanted) < 0.02
        assert tilewise.summary(other).fused_calls == 2
        tilewise.unpatch(other)
        assert torch.equal(output(other), wanted)
