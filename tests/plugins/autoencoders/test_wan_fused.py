"""The fused forward of Wan's decoder and encoder equals the stock one to rounding, and goes on where that one stopped.

It runs here on the CPU, where only tests let it, with the naive formulas of its kernels.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan
from torch import nn
from torch.nn.utils import parametrizations

import tilewise
from tests.helpers.tiny_wan import tiny_vae
from tests.plugins.autoencoders.test_streaming_decode import wan22_vae
from tilewise.plugins.autoencoders import wan_checks
from tilewise.plugins.autoencoders.streaming import streaming_decoder, streaming_encoder
from tilewise.plugins.autoencoders.wan_checks import why_stock


def wan21_vae(**options: Any) -> AutoencoderKLWan:
    """Its proportions: three upsamplings, two of them in time, and a block whose shortcut is a convolution."""
    torch.manual_seed(0)
    return AutoencoderKLWan(
        base_dim=4, z_dim=4, dim_mult=[1, 2, 4, 4], num_res_blocks=1, latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4, **options,
    ).eval()  # fmt: skip


def random_gains(vae: AutoencoderKLWan) -> AutoencoderKLWan:
    """As made, the gains are all 1 and biases near 0, and a fused kernel that left them out would pass."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in vae.named_parameters():
            if name.endswith("gamma"):
                weight.copy_(0.5 + torch.rand(weight.shape, generator=generator))
            elif name.endswith("bias"):
                weight.copy_(torch.randn(weight.shape, generator=generator) / 4)
    return vae


VAES = {"tiny": tiny_vae, "2.1": wan21_vae, "2.2": wan22_vae}


@pytest.fixture(params=VAES)
def vae(request):
    return random_gains(VAES[request.param]())


@pytest.fixture(autouse=True)
def fused_on_the_cpu(monkeypatch):
    monkeypatch.setattr(wan_checks, "fuses_on", lambda device: True)


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


def latents(vae: AutoencoderKLWan, frames: int = 4, batch: int = 2, size: tuple[int, int] = (3, 4)) -> torch.Tensor:
    return torch.randn(batch, vae.config.z_dim, frames, *size)


def stock(vae: AutoencoderKLWan, z: torch.Tensor) -> torch.Tensor:
    return vae.decode(z, return_dict=False)[0]


def ran_fused(vae: AutoencoderKLWan, call) -> torch.Tensor:
    """The result of ``call``, and sure that no module's own forward ran."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (vae.decoder, vae.encoder):
            patch.setattr(type(module), "forward", lambda *_, **__: pytest.fail("the stock forward ran"))
        return call()


@pytest.mark.parametrize("batch", [1, 2])
def test_frames_of_the_stock_decode_from_chunks_of_any_size(vae, batch):
    z = latents(vae, batch=batch)
    want = stock(vae, z)
    whole = ran_fused(vae, lambda: streaming_decoder(vae).decode(z))
    assert whole.shape == want.shape and whole.is_contiguous()
    assert want.std() > 0.05 and want.abs().max() <= 1
    torch.testing.assert_close(whole, want, rtol=0, atol=1e-5)
    for chunks in ([1, 3], [2, 2], [1, 1, 2]):
        decoder = streaming_decoder(vae)
        assert torch.equal(torch.cat([decoder.decode(part) for part in z.split(chunks, 2)], 2), whole)


def test_latents_of_the_stock_encode_from_frames_that_come_in_any_number(vae):
    ratio = vae.config.scale_factor_spatial
    frames = torch.rand(1, 3, 9, 3 * ratio, 2 * ratio) * 2 - 1
    want = vae.encode(frames).latent_dist.mode()
    whole = ran_fused(vae, lambda: streaming_encoder(vae).encode(frames))
    torch.testing.assert_close(whole, want, rtol=0, atol=1e-5)
    plain = streaming_encoder(vae, fuse=False).encode(frames)
    torch.testing.assert_close(plain, want, rtol=0, atol=1e-6)
    for fuse, exact in ((True, whole), (False, plain)):
        encoder = streaming_encoder(vae, fuse=fuse)
        assert encoder.encode(frames[:, :, :3]).shape[2] == 1
        assert encoder.encode(frames[:, :, 3:4]).shape == (1, 4, 0, 3, 2)
        other = streaming_encoder(vae, fuse=fuse)
        other.load_state_dict(encoder.state_dict())
        assert torch.equal(other.encode(frames[:, :, 4:]), exact[:, :, 1:])
        other.reset()
        assert torch.equal(other.encode(frames), exact)


def test_an_encoder_with_attention_on_the_way():
    """The stock encoder has no such with a feature cache; one frame needs none."""
    vae, frame = random_gains(wan21_vae(attn_scales=[0.5])), torch.rand(1, 3, 1, 24, 16)
    want = vae.quant_conv(vae.encoder(frame))[:, :4]
    got = ran_fused(vae, lambda: streaming_encoder(vae).encode(frame))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("before", [True, False])
def test_one_forward_goes_on_where_the_other_stopped(vae, before):
    z = latents(vae, frames=5)
    decoder = streaming_decoder(vae, fuse=before)
    parts = []
    for i, part in enumerate(z.split([1, 1, 2, 1], 2)):
        decoder.fuse = before == (i % 2 == 0)
        parts.append(decoder.decode(part))
    torch.testing.assert_close(torch.cat(parts, 2), stock(vae, z), rtol=0, atol=1e-5)


@pytest.mark.parametrize("after", [1, 2])
def test_the_state_comes_back_bit_for_bit(vae, after):
    z = latents(vae)
    one, two = streaming_decoder(vae), streaming_decoder(vae)
    one.decode(z[:, :, :after])
    two.load_state_dict({name: tensor.clone() for name, tensor in one.state_dict().items()})
    assert torch.equal(two.decode(z[:, :, after:]), one.decode(z[:, :, after:]))


def test_the_memory_of_a_clip_is_known_before(vae):
    z = latents(vae, frames=3)
    ratio = vae.config.scale_factor_spatial
    decoder = streaming_decoder(vae)
    before = decoder.memory_bytes(3 * ratio, 4 * ratio, batch=2)
    decoder.decode(z)
    assert before == sum(tensor.nbytes for name, tensor in decoder.state_dict().items() if name.isdigit())


def test_after_an_exception_a_clip_goes_on_from_a_state_only(vae, monkeypatch):
    z = latents(vae)
    whole = streaming_decoder(vae).decode(z)
    decoder = streaming_decoder(vae)
    first = decoder.decode(z[:, :, :1])
    state = decoder.state_dict()
    calls = iter([False, True])
    real = vae.post_quant_conv.forward

    def fails(*args):
        if next(calls, False):
            raise RuntimeError("out of memory")
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(type(vae.post_quant_conv), "forward", lambda self, *args: fails(*args))
        with pytest.raises(RuntimeError, match="out of memory"):
            decoder.decode(z[:, :, 1:])
    with pytest.raises(tilewise.TilewiseError, match="failed half-way"):
        decoder.decode(z[:, :, 1:])
    decoder.load_state_dict(state)
    assert torch.equal(torch.cat([first, decoder.decode(z[:, :, 1:])], 2), whole)
    with monkeypatch.context() as patch:
        patch.setattr(type(vae.post_quant_conv), "forward", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            decoder.decode(z)
    decoder.reset()
    assert torch.equal(decoder.decode(z), whole)


def test_weights_that_change_in_mid_clip_are_seen():
    vae, z = tiny_vae(), latents(tiny_vae(), frames=2)
    fused, want = streaming_decoder(vae), streaming_decoder(vae, fuse=False)
    for part in z.split(1, 2):
        torch.testing.assert_close(fused.decode(part), want.decode(part), rtol=0, atol=1e-5)
        vae.decoder.conv_in.weight.mul_(-1)
        vae.decoder.conv_out.weight.data = vae.decoder.conv_out.weight.data.flip(0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_no_less_exact_in_16_bits_than_stock(vae, dtype):
    z = latents(vae).to(dtype)
    want = stock(copy.deepcopy(vae).to(dtype).double(), z.double())
    low = copy.deepcopy(vae).to(dtype)
    errors = [(x.double() - want).square().mean().sqrt() for x in (streaming_decoder(low).decode(z), stock(low, z))]
    assert errors[0] < 1.02 * errors[1]


class Subclass(nn.Conv2d):
    pass


def changed(name: str, vae: AutoencoderKLWan) -> torch.Tensor:
    """Change a decoder so that fused code would be wrong, and return an input."""
    decoder = vae.decoder
    x = latents(vae, frames=1)
    if name == "training":
        decoder.train()
    elif name == "module":
        decoder.mid_block.attentions[0].proj.__class__ = Subclass
    elif name == "parametrized":
        parametrizations.weight_norm(decoder.conv_in)
    elif name == "hook":
        decoder.mid_block.register_forward_hook(lambda *_: None)
    elif name == "activation":
        decoder.nonlinearity = nn.GELU()
    elif name == "upsampling":
        decoder.up_blocks[0].upsamplers[0].resample[0].mode = "bilinear"
    elif name == "parameter":
        decoder.conv_in.weight = type("Quantized", (nn.Parameter,), {})(decoder.conv_in.weight.data)
    elif name == "dtype":
        decoder.conv_out.half()
    elif name == "input":
        x = x.double()
    return x


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("training", "training mode"),
        ("module", "mid_block.attentions.0.proj is a Subclass"),
        ("parametrized", "conv_in is a"),
        ("hook", "mid_block has a hook"),
        ("activation", "it has GELU"),
        ("upsampling", "upsamples by"),
        ("parameter", "conv_in.weight is a Quantized"),
        ("dtype", "conv_out.weight is torch.float16"),
        ("input", "torch.float64"),
    ],
)
def test_what_the_fused_code_would_not_compute_runs_stock(name, reason):
    vae = tiny_vae()
    assert why_stock(vae.decoder, latents(vae)) is None
    x = changed(name, vae)
    assert reason in why_stock(vae.decoder, x)


def test_gradients_and_autocast_run_stock(monkeypatch):
    vae = tiny_vae()
    with torch.enable_grad():
        assert "gradients" in why_stock(vae.decoder, latents(vae))
    with torch.autocast("cpu"):
        assert "autocast" in why_stock(vae.decoder, latents(vae))
    monkeypatch.undo()
    assert "on cpu" in why_stock(vae.decoder, latents(vae))
