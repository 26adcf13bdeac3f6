"""``precision``: 8-bit products where they run, 16 bits with the reason where not; the kernels have tests of their own."""

import pytest
import tiny_wan
import torch

import tilewise
from tilewise.plugins.runtime import dense_backend, sparse_call


def test_where_it_cannot_run_16_bits_do_and_it_is_said(tiny_pipe):
    tilewise.patch(tiny_pipe, tilewise.STA(window=(1, 1, 1), tile=(1, 2, 2)), steps=(0, 1), precision="int8")
    tiny_pipe("a", height=64, width=64, num_frames=9, num_inference_steps=2)
    rows = tilewise.summary(tiny_pipe).rows
    assert {(row.kind, row.reason) for row in rows} == {
        ("sparse", "not in int8: Triton kernels need a CUDA device, not cpu")
    }


def test_strict_refuses(tiny_pipe):
    method = tilewise.STA(window=(1, 1, 1), tile=(1, 2, 2))
    tilewise.patch(tiny_pipe, method, steps=(0, 1), precision="fp8", strict=True)
    with pytest.raises(tilewise.FallbackError, match="not in fp8: Triton kernels need a CUDA device, not cpu"):
        tiny_pipe("a", height=64, width=64, num_frames=9, num_inference_steps=2)


def test_where_it_runs_it_is_what_runs(tiny_pipe, monkeypatch):
    """The choice, on a CPU that passes for a GPU; the call itself is answered here."""
    asked = []

    def in_8_bits(q, k, v, plan, *, precision, scale=None, return_lse=False):
        asked.append(precision)
        return sparse_call.block_sparse_attention(q, k, v, plan, scale=scale, return_lse=return_lse)

    monkeypatch.setattr(sparse_call, "choose", lambda qkv, plan, precision: (sparse_call.Choice(precision, ""), ""))
    monkeypatch.setattr(sparse_call, "block_sparse_attention_8bit", in_8_bits)
    monkeypatch.setattr("tilewise.plugins.runtime.call_planner.choose", sparse_call.choose)
    config = tilewise.Config(tilewise.STA(window=(1, 1, 1), tile=(1, 2, 2)), steps=(0, 1), precision="int8")
    tilewise.patch(tiny_pipe, tilewise.Config.from_dict(config.to_dict()))
    tiny_pipe("a", height=64, width=64, num_frames=9, num_inference_steps=2)
    assert set(asked) == {"int8"}
    assert {row.backend for row in tilewise.summary(tiny_pipe).rows} == {"int8"}


def test_what_stays_dense_runs_in_8_bits(monkeypatch):
    """The first step and the first block, on a CPU that passes for a GPU, by the naive form of the 8-bit product."""
    pipe = tiny_wan.tiny_pipeline(num_attention_heads=1, attention_head_dim=64)
    pipe.transformer.to(torch.bfloat16)
    call = {
        "prompt": "a", "height": 64, "width": 64, "num_frames": 9, "num_inference_steps": 2, "output_type": "latent",
        "guidance_scale": 1.0,
    }  # fmt: skip
    config = tilewise.Config.from_dict(tilewise.presets()["draft-few-steps"].to_dict())
    assert config.dense_precision == "int8" and not tilewise.Config(tilewise.Dense(), dense_precision="fp8").is_stock
    found = {}
    for where in ("a CPU", "a GPU"):
        if where == "a GPU":
            monkeypatch.setattr(dense_backend, "not_in_8_bits", lambda request: None)
        tilewise.patch(pipe, config, min_tokens=0, steps="1:")
        found[where] = pipe(**call, generator=torch.Generator().manual_seed(0)).frames.float()
        rows = [row for row in tilewise.summary(pipe).rows if row.kind.startswith("dense")]
        assert {row.kind for row in rows} == {"dense step", "dense layer"}
        said = ("int8", "") if where == "a GPU" else ("stock", "not in int8: needs a Hopper GPU")
        assert {(row.backend, row.reason) for row in rows} == {said}
        assert not tilewise.summary(pipe).fallbacks
    error = float((found["a GPU"] - found["a CPU"]).norm() / found["a CPU"].norm())
    assert 1e-4 < error < 0.05


@pytest.mark.gpu
def test_what_stays_dense_runs_in_8_bits_on_hopper():
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs a Hopper GPU")
    model = tiny_wan.tiny_transformer(num_attention_heads=2, attention_head_dim=64).to("cuda", torch.bfloat16)
    generator = torch.Generator("cuda").manual_seed(0)
    latents = torch.randn(1, 4, 5, 64, 64, generator=generator, device="cuda", dtype=torch.bfloat16)
    text = torch.randn(1, 16, tiny_wan.TEXT_DIM, generator=generator, device="cuda", dtype=torch.bfloat16)
    found = {}
    for precision in (None, "int8", "fp8"):
        with tilewise.patched(model, "dense", dense_precision=precision), torch.no_grad():
            found[precision] = model(latents, torch.tensor([500.0], device="cuda"), text).sample.float()
            (row,) = tilewise.summary(model).rows
            assert precision is None or (row.backend, row.reason) == (precision, "")
    for precision in ("int8", "fp8"):
        error = float((found[precision] - found[None]).norm() / found[None].norm())
        assert 1e-4 < error < 0.05


def test_the_method_dense_runs_in_its_precision(tiny_pipe):
    config = tilewise.Config(tilewise.Dense(), precision="int8")
    assert config.precision_of_dense == "int8" and not config.is_stock
    tilewise.patch(tiny_pipe, config)
    tiny_pipe("a", height=64, width=64, num_frames=9, num_inference_steps=1)
    assert {row.reason for row in tilewise.summary(tiny_pipe).rows} == {"not in int8: needs a Hopper GPU"}


def test_unknown_precision_is_refused():
    with pytest.raises(tilewise.ConfigError, match="unknown precision 'int4'"):
        tilewise.Config(tilewise.STA(), precision="int4")
