"""The fused forward of Wan's autoencoder on a GPU, with its Triton kernels and cuDNN's convolutions."""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKLWan

from tests.plugins.autoencoders.test_wan_fused import random_gains
from tilewise.kernels.fused.rms_norm_silu import rms_norm_silu, rms_norm_silu_reference
from tilewise.kernels.fused.upsample_nearest import upsample_nearest, upsample_nearest_reference
from tilewise.plugins.autoencoders.patched_vae import VaePatch
from tilewise.plugins.autoencoders.streaming import streaming_decoder, streaming_encoder
from tilewise.plugins.autoencoders.wan_checks import why_stock

pytestmark = pytest.mark.gpu

OPTIONS = {
    "2.1": {"base_dim": 96},
    "2.2": {"base_dim": 32, "decoder_base_dim": 64, "is_residual": True, "patch_size": 2, "in_channels": 12,
            "out_channels": 12, "scale_factor_spatial": 16},
}  # fmt: skip


@pytest.fixture(scope="module", params=OPTIONS)
def vae(request):
    torch.manual_seed(0)
    return random_gains(AutoencoderKLWan(**OPTIONS[request.param]).eval()).cuda()


@pytest.fixture(autouse=True)
def exact_products_and_no_gradients():
    with torch.no_grad(), torch.backends.cudnn.flags(allow_tf32=False):
        yield


def latents(vae: AutoencoderKLWan, dtype: torch.dtype, frames: int = 4, batch: int = 1) -> torch.Tensor:
    return torch.randn(batch, 16, frames, 14, 18, device="cuda").to(dtype)


@pytest.mark.parametrize("batch", [1, 2])
def test_float32_equals_stock_and_chunks_the_whole(vae, batch):
    z = latents(vae.float(), torch.float32, batch=batch)
    assert why_stock(vae.decoder, z) is None
    want = vae.decode(z, return_dict=False)[0]
    whole = streaming_decoder(vae).decode(z)
    torch.testing.assert_close(whole, want, rtol=0, atol=2e-5)
    for chunks in ([1, 3], [2, 2], [1, 1, 1, 1]):
        decoder = streaming_decoder(vae)
        assert torch.equal(torch.cat([decoder.decode(part) for part in z.split(chunks, 2)], 2), whole)
    again = streaming_encoder(vae).encode(want)
    torch.testing.assert_close(again, vae.encode(want).latent_dist.mode(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_patched_vae_gives_the_bits_of_a_stream(vae, dtype):
    z = latents(vae.to(dtype), dtype)
    want = streaming_decoder(vae).decode(z)
    stock = vae.decode(z, return_dict=False)[0]
    patch = VaePatch(vae)
    try:
        frames = vae.decode(z, return_dict=False)[0]
        moments = vae.encode(frames).latent_dist.mode()
        assert patch.calls == {("decoder", ""): 4, ("encoder", ""): 4}
    finally:
        patch.remove(vae)
    assert torch.equal(frames, want)
    assert torch.equal(moments, streaming_encoder(vae).encode(frames))
    assert torch.equal(vae.decode(z, return_dict=False)[0], stock)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bits_are_no_less_exact_than_stock(vae, dtype):
    z = latents(vae, dtype)
    vae.to(dtype)
    stock, fused = vae.decode(z, return_dict=False)[0], streaming_decoder(vae).decode(z)
    want = vae.float().decode(z.float(), return_dict=False)[0]
    errors = [(x.float() - want).square().mean().sqrt().item() for x in (fused, stock)]
    assert errors[0] < 1.05 * errors[1], errors


def test_nothing_waits_for_the_gpu(vae):
    z = latents(vae.bfloat16(), torch.bfloat16)
    decoder = streaming_decoder(vae)
    decoder.decode(z)
    torch.cuda.set_sync_debug_mode("error")
    try:
        decoder.decode(z)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("S", "C"), [(100_003, 96), (1_001, 384), (77, 1024), (5, 12)])
def test_rms_norm_silu(S, C, dtype):
    x, residual = torch.randn(2, 2, S, C, device="cuda").to(dtype).unbind()
    weight, bias = torch.rand(C, device="cuda") + 0.5, torch.randn(C, device="cuda").to(dtype)
    s, n = rms_norm_silu_reference(x, weight, bias, residual, True, 1e-12)
    assert n is not None
    got = rms_norm_silu(x, weight, bias=bias, residual=residual, keep_sum=True)
    tolerance = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10, torch.float32: 1e-5}[dtype]
    torch.testing.assert_close(x.float(), s.float(), rtol=tolerance, atol=1e-6)
    torch.testing.assert_close(got.float(), n, rtol=2 * tolerance, atol=2 * tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("frames", [1, 2])
@pytest.mark.parametrize("size", [(31, 17), (1, 1), (1, 5), (5, 1)])
def test_upsample_nearest(size, frames, dtype):
    x = torch.randn(2, 3, *size, frames * 192, device="cuda").to(dtype)
    assert torch.equal(upsample_nearest(x, frames), upsample_nearest_reference(x, frames))


def test_offsets_pass_two_to_the_31():
    x = torch.zeros(1, 2, 2300, 2400, 96, device="cuda", dtype=torch.bfloat16)
    x[0, -1, -1, -1] = 1
    up = upsample_nearest(x)
    assert up.numel() > 2**31 and up[0, -1, -2:, -2:].sum() == 4 * 96 and up[0, 0].count_nonzero() == 0
    rows = up.view(1, -1, 96)
    n = rms_norm_silu(rows, torch.ones(96, device="cuda"))
    assert n[0, -1, 0] > 0.7 and n[0, : rows.shape[1] // 2].count_nonzero() == 0
