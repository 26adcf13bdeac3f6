"""CogVideoX's VAE latent by latent, exactly; other VAEs with frames in windows that are cross-faded."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch

import tilewise
from tests.helpers.tiny_unets import tiny_vae
from tilewise.plugins.autoencoders.blended import SERVED, BlendedStreamingDecoder
from tilewise.plugins.autoencoders.streaming import streaming_decoder, streaming_encoder

COGVIDEOX: dict[str, Any] = {
    "block_out_channels": (8, 8, 8, 8), "latent_channels": 4, "layers_per_block": 1, "norm_num_groups": 2,
    "down_block_types": ("CogVideoXDownBlock3D",) * 4, "up_block_types": ("CogVideoXUpBlock3D",) * 4,
}  # fmt: skip
BLENDED: dict[str, dict[str, Any]] = {
    "AutoencoderKLHunyuanVideo": {
        "latent_channels": 4, "block_out_channels": (8, 8, 8, 8), "layers_per_block": 1, "norm_num_groups": 4,
    },
    "AutoencoderKLHunyuanVideo15": {"latent_channels": 4, "block_out_channels": (8,) * 5, "layers_per_block": 1},
    "AutoencoderKLLTXVideo": {
        "latent_channels": 4, "block_out_channels": (8, 8, 8, 8), "decoder_block_out_channels": (8, 8, 8, 8),
        "layers_per_block": (1,) * 5, "decoder_layers_per_block": (1,) * 5, "upsample_residual": (False,) * 4,
        "spatio_temporal_scaling": (True, True, False, False), "decoder_inject_noise": (False,) * 5,
        "decoder_spatio_temporal_scaling": (True, True, False, False), "upsample_factor": (1,) * 4, "patch_size": 1,
        "patch_size_t": 1,
    },
    "AutoencoderKLLTX2Video": {
        "latent_channels": 4, "block_out_channels": (8,) * 4, "decoder_block_out_channels": (8,), "layers_per_block": (1,) * 5,
        "decoder_layers_per_block": (1, 1), "decoder_spatio_temporal_scaling": (True,), "decoder_inject_noise": (False,) * 2,
        "upsample_type": ("spatiotemporal",), "upsample_residual": (False,), "upsample_factor": (1,), "patch_size": 1,
        "spatial_compression_ratio": 2, "temporal_compression_ratio": 2,
    },
    "AutoencoderKLMochi": {
        "latent_channels": 4, "encoder_block_out_channels": (32,) * 4, "decoder_block_out_channels": (32,) * 4,
        "layers_per_block": (1,) * 5, "latents_mean": [0.0] * 4, "latents_std": [1.0] * 4,
    },
    "AutoencoderKLCosmos": {
        "latent_channels": 4, "encoder_block_out_channels": (8,) * 4, "decode_block_out_channels": (8,) * 4,
        "attention_resolutions": (8,), "resolution": 32, "num_layers": 1,
    },
    "AutoencoderKLMagvit": {
        "latent_channels": 4, "block_out_channels": (8, 8, 8, 8), "layers_per_block": 1, "norm_num_groups": 2,
        "down_block_types": ("SpatialDownBlock3D", *("SpatialTemporalDownBlock3D",) * 3),
        "up_block_types": ("SpatialUpBlock3D", *("SpatialTemporalUpBlock3D",) * 3),
    },
}  # fmt: skip


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


def made(name: str, options: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    return getattr(diffusers, name)(**options).eval()


def latents(frames: int) -> torch.Tensor:
    return torch.randn(1, 4, frames, 3, 4)


class TestCogVideoX:
    @pytest.mark.parametrize("chunks", [[5], [1, 1, 1, 1, 1], [2, 3], [4, 1]])
    def test_chunks_of_any_size_give_the_bits_of_a_whole_decode(self, chunks):
        vae, z = made("AutoencoderKLCogVideoX", COGVIDEOX), latents(5)
        whole = vae.decode(z, return_dict=False)[0].clamp(-1, 1)
        decoder = streaming_decoder(vae)
        parts = [decoder.decode(part) for part in z.split(chunks, 2)]
        assert all(part.shape[3:] == whole.shape[3:] for part in parts)
        assert decoder.exact and torch.equal(torch.cat(parts, 2), whole)
        assert decoder.flush() is None
        assert torch.equal(decoder.decode(z), whole)  # flush began a new clip

    @pytest.mark.parametrize("frames", [1, 2])
    def test_a_clip_shorter_than_a_group(self, frames):
        vae, z = made("AutoencoderKLCogVideoX", COGVIDEOX), latents(frames)
        decoder = streaming_decoder(vae)
        assert decoder.decode(z).shape[2] == 0
        assert torch.equal(decoder.flush(), vae.decode(z, return_dict=False)[0].clamp(-1, 1))

    @pytest.mark.parametrize("after", [0, 2, 4])
    def test_the_state_comes_back(self, after):
        vae, z = made("AutoencoderKLCogVideoX", COGVIDEOX), latents(5)
        one, two = streaming_decoder(vae), streaming_decoder(vae)
        if after:
            one.decode(z[:, :, :after])
        two.load_state_dict({name: tensor.clone() for name, tensor in one.state_dict().items()})
        assert torch.equal(two.decode(z[:, :, after:]), one.decode(z[:, :, after:]))

    def test_bad_input(self):
        decoder = streaming_decoder(made("AutoencoderKLCogVideoX", COGVIDEOX))
        with pytest.raises(tilewise.ConfigError, match=r"needs \(B, 4, T"):
            decoder.decode(torch.zeros(1, 3, 1, 2, 2))
        with pytest.raises(tilewise.ConfigError, match="no state of a CogVideoX decoder: it has begun"):
            decoder.load_state_dict({"begun": torch.tensor(True)})


def test_pictures_are_decoded_and_encoded_one_by_one():
    """Of AnimateDiff: as each alone, in any batch of them."""
    vae, z = tiny_vae(), latents(7)
    decoder, encoder = streaming_decoder(vae), streaming_encoder(vae)
    frames = torch.cat([decoder.decode(part) for part in z.split([1, 6], 2)], 2)
    wanted = torch.stack([vae.decode(z[:, :, i], return_dict=False)[0].clamp(-1, 1) for i in range(7)], 2)
    torch.testing.assert_close(frames, wanted)
    own = torch.cat([encoder.encode(part) for part in frames.split([2, 5], 2)], 2)
    wanted = torch.stack([vae.encode(frames[:, :, i]).latent_dist.mode() for i in range(7)], 2)
    torch.testing.assert_close(own, wanted)
    assert decoder.exact and encoder.group == 1 and decoder.flush() is None and decoder.state_dict() == {}
    with pytest.raises(tilewise.ConfigError, match=r"needs \(B, 4, T"):
        decoder.decode(z[:, :3])
    with pytest.raises(tilewise.ConfigError, match="no state of a VAE of pictures: it has x"):
        decoder.load_state_dict({"x": z})


def test_every_class_that_is_served_is_tested():
    assert set(SERVED) == set(BLENDED)


@pytest.mark.parametrize("name", BLENDED)
def test_blended(name):
    """As many frames as of a whole decode; the first call, which has no window before it, gives the same frames."""
    vae, z = made(name, BLENDED[name]), latents(6)
    whole = vae.decode(z, return_dict=False)[0].clamp(-1, 1)
    decoder = streaming_decoder(vae)
    assert (decoder.name, decoder.exact) == ("blended", False)
    first = decoder.decode(z)
    assert torch.equal(torch.cat([first, decoder.flush()], 2), whole)
    parts = [decoder.decode(part) for part in z.split([2, 3, 1], 2)]
    video = torch.cat([*parts, decoder.flush()], 2)
    assert video.shape == whole.shape
    assert video.abs().max() <= 1
    assert decoder.flush() is None


def test_a_decoder_that_is_told_the_noise_is_told_none():
    vae, z = (
        made("AutoencoderKLLTXVideo", {**BLENDED["AutoencoderKLLTXVideo"], "timestep_conditioning": True}),
        latents(4),
    )
    whole = vae.decode(z, torch.zeros(1), return_dict=False)[0].clamp(-1, 1)
    decoder = streaming_decoder(vae)
    assert torch.equal(torch.cat([decoder.decode(z), decoder.flush()], 2), whole)


class Plain:
    """A VAE of 2 frames a latent whose frames are its latents, plus what ``window`` says of those of the window."""

    temporal_compression_ratio = 2

    def __init__(self, window: Any = lambda count: 0.0) -> None:
        self.window = window
        self.config: dict[str, Any] = {}

    def decode(self, z: torch.Tensor, return_dict: bool) -> tuple[torch.Tensor]:
        return (z.repeat_interleave(2, 2)[:, :, 1:] + self.window(z.shape[2]),)


@pytest.mark.parametrize("chunks", [[9], [1] * 9, [2, 3, 4], [5, 1, 1, 2]])
@pytest.mark.parametrize("overlap", [2, 3, 4])
def test_each_frame_is_where_it_belongs(overlap, chunks):
    z = torch.linspace(-1, 1, 9).view(1, 1, 9, 1, 1).expand(1, 3, 9, 2, 2)
    decoder: Any = BlendedStreamingDecoder(Plain(), overlap)
    video = torch.cat([*(decoder.decode(part) for part in z.split(chunks, 2)), decoder.flush()], 2)
    torch.testing.assert_close(video, z.repeat_interleave(2, 2)[:, :, 1:])


def test_the_overlap_fades_from_one_window_into_the_next():
    z = torch.zeros(1, 3, 8, 1, 1)
    decoder: Any = BlendedStreamingDecoder(Plain(lambda count: {4: 0.0, 7: 0.5}[count]), 3)
    first = decoder.decode(z[:, :, :4])
    assert first.shape[2] == 1 + 3 * 2 - 2 * 2  # two latents wait
    state = decoder.state_dict()
    second = decoder.decode(z[:, :, 4:])
    assert torch.allclose(second[0, 0, :, 0, 0], torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5, 0.5, 0.5, 0.5]))
    decoder.load_state_dict(state)
    assert torch.equal(decoder.decode(z[:, :, 4:]), second)


def test_what_cannot_be_decoded_in_parts_is_refused():
    with pytest.raises(tilewise.UnsupportedModelError, match="Linear cannot decode a clip bit by bit: it is not known"):
        streaming_decoder(torch.nn.Linear(1, 1))
    with pytest.raises(tilewise.UnsupportedModelError, match="cannot encode"):
        streaming_encoder(made("AutoencoderKLCogVideoX", COGVIDEOX))
    with pytest.raises(tilewise.ConfigError, match="at least 2"):
        BlendedStreamingDecoder(Plain(), 1)
    with pytest.raises(tilewise.ConfigError, match="no state of a blended decoder: it has cache/x"):
        BlendedStreamingDecoder(Plain()).load_state_dict({"cache/x": torch.zeros(1)})
    odd: Any = SimpleNamespace(
        temporal_compression_ratio=4, config={}, decode=lambda z, return_dict: (torch.zeros(1, 3, 7, 1, 1),)
    )
    with pytest.raises(tilewise.ConfigError, match="neither 9 nor 12"):
        BlendedStreamingDecoder(odd).decode(torch.zeros(1, 4, 3, 1, 1))
