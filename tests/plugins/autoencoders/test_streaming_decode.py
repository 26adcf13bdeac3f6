"""Latents that are decoded as they come give the frames of a whole decode, bit for bit."""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKLWan, VQModel

import tilewise
from tests.helpers.tiny_wan import tiny_vae
from tilewise.plugins.autoencoders.streaming import streaming_decoder


def wan22_vae() -> AutoencoderKLWan:
    torch.manual_seed(0)
    return AutoencoderKLWan(
        base_dim=8, decoder_base_dim=8, z_dim=4, dim_mult=[1, 2, 2], num_res_blocks=1, temperal_downsample=[False, True],
        is_residual=True, patch_size=2, in_channels=12, out_channels=12, latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
        scale_factor_temporal=2, scale_factor_spatial=8,
    ).eval()  # fmt: skip


VAES = {"2.1": tiny_vae, "2.2": wan22_vae}


def latents(frames: int) -> torch.Tensor:
    return torch.randn(1, 4, frames, 5, 6, generator=torch.Generator().manual_seed(frames))


@torch.no_grad()
@pytest.mark.parametrize("kind", VAES)
@pytest.mark.parametrize("chunks", [[1, 1, 1, 1, 1], [3, 2], [5], [2, 3]])
def test_chunks_of_any_size_give_the_bits_of_a_whole_decode(kind, chunks):
    vae, z = VAES[kind](), latents(5)
    whole = vae.decode(z, return_dict=False)[0]
    decoder = streaming_decoder(vae)
    got = torch.cat([decoder.decode(part) for part in z.split(chunks, 2)], 2)
    assert got.shape == whole.shape and torch.equal(got, whole)


@torch.no_grad()
def test_streams_and_ordinary_decodes_do_not_disturb_each_other():
    vae, (a, b) = tiny_vae(), (latents(4), latents(5))
    wanted = vae.decode(a, return_dict=False)[0], vae.decode(b, return_dict=False)[0]
    one, two = streaming_decoder(vae), streaming_decoder(vae)
    got: tuple[list, list] = ([], [])
    for i in range(4):
        got[0].append(one.decode(a[:, :, i : i + 1]))
        got[1].append(two.decode(b[:, :, i : i + 1]))
        assert torch.equal(vae.decode(b, return_dict=False)[0], wanted[1])
    assert torch.equal(torch.cat(got[0], 2), wanted[0])
    assert torch.equal(torch.cat(got[1], 2), wanted[1][:, :, : 1 + 3 * 2])
    one.reset()
    assert torch.equal(one.decode(b), wanted[1])


@torch.no_grad()
@pytest.mark.parametrize("after", [0, 1, 3])
def test_the_state_comes_back(after):
    vae, z = tiny_vae(), latents(5)
    one, two = streaming_decoder(vae), streaming_decoder(vae)
    if after:
        one.decode(z[:, :, :after])
    two.load_state_dict({name: tensor.clone() for name, tensor in one.state_dict().items()})
    assert torch.equal(two.decode(z[:, :, after:]), one.decode(z[:, :, after:]))


def test_other_autoencoders_are_refused():
    with pytest.raises(tilewise.UnsupportedModelError, match="VQModel cannot decode"):
        streaming_decoder(VQModel(block_out_channels=(8,), norm_num_groups=4))
