"""Tiny video autoencoders: published weights give what the published modules give, in chunks of any size."""

from __future__ import annotations

import pytest
import torch
from tiny_autoencoders import plain_decode, published_weights

import tilewise
from tilewise.plugins.autoencoders.tiny_layout import tiny_decoder
from tilewise.plugins.autoencoders.tiny_streaming import TinyStreamingDecoder

KINDS = {
    "2.1": {},
    "2.2": {"patch": 2, "channels": 6},
    "2.2 super": {"patch": 2, "channels": 6, "wide": True},
    "of 8 frames": {"growth": (2, 2, 2)},
}


def latents(channels: int, frames: int, dtype=torch.float64) -> torch.Tensor:
    return 2 * torch.randn(2, channels, frames, 3, 5, generator=torch.Generator().manual_seed(frames), dtype=dtype)


@pytest.mark.parametrize("kind", KINDS)
def test_a_clip_is_that_of_the_published_modules(kind):
    weights = published_weights(1, **KINDS[kind])
    decoder = tiny_decoder(weights).double()
    shape = decoder.shape
    z = latents(shape.channels, 4)
    got = TinyStreamingDecoder(decoder).decode(z)
    assert got.shape == (2, 3, 1 + 3 * shape.temporal, 3 * shape.spatial, 5 * shape.spatial)
    assert (shape.spatial, shape.temporal) == (16 if "patch" in KINDS[kind] else 8, 8 if "8" in kind else 4)
    torch.testing.assert_close(got, plain_decode(weights, z), rtol=0, atol=1e-12)
    inside = (got.abs() < 1).double().mean()
    assert inside > 0.3 and got.std() > 0.1


@pytest.mark.parametrize("kind", ["2.1", "2.2 super"])
@pytest.mark.parametrize("chunks", [[1, 1, 1, 1], [3, 1], [1, 3]])
def test_chunks_of_any_size_give_the_bits_of_a_whole_decode(kind, chunks):
    decoder = tiny_decoder(published_weights(2, **KINDS[kind]))
    z = latents(decoder.shape.channels, 4, torch.float32)
    one, other = TinyStreamingDecoder(decoder), TinyStreamingDecoder(decoder)
    parts = [one.decode(part) for part in z.split(chunks, 2)[:1]]
    whole = other.decode(z)  # another clip of the same decoder, in between
    parts += [one.decode(part) for part in z.split(chunks, 2)[1:]]
    assert torch.equal(torch.cat(parts, 2), whole) and one.flush() is None
    one.reset()
    assert torch.equal(one.decode(z), whole)


@pytest.mark.parametrize("after", [0, 1, 3])
def test_the_state_comes_back(after):
    decoder = tiny_decoder(published_weights(3))
    z = latents(4, 5, torch.float32)
    one, two = TinyStreamingDecoder(decoder), TinyStreamingDecoder(decoder)
    if after:
        one.decode(z[:, :, :after])
    state = {name: tensor.clone() for name, tensor in one.state_dict().items()}
    assert sum(tensor.numel() for tensor in state.values()) == (0 if not after else 2 * 15 * 3 * (6 + 5 * 4 + 4 * 16))
    two.load_state_dict(state)
    assert torch.equal(two.decode(z[:, :, after:]), one.decode(z[:, :, after:]))
    with pytest.raises(tilewise.ConfigError, match="no state of a tiny decoder"):
        two.load_state_dict({"waiting": torch.zeros(1)})


def test_latents_that_cannot_be():
    decoder = TinyStreamingDecoder(tiny_decoder(published_weights(4)))
    with pytest.raises(tilewise.ConfigError, match=r"needs \(B, 4, T, height, width\)"):
        decoder.decode(torch.zeros(1, 5, 2, 3, 3))
    z = latents(4, 3, torch.float32)
    first = decoder.decode(z[:, :, :2])
    with pytest.raises(tilewise.ConfigError, match=r"\(2, 3, 5\) cannot go on with \(2, 3, 4\)"):
        decoder.decode(z[:, :, 2:, :, :4])
    got = torch.cat([first, decoder.decode(z[:, :, 2:])], 2)
    decoder.reset()
    assert torch.equal(got, decoder.decode(z))


def test_a_call_that_fails_leaves_the_clip_as_it_was():
    module = tiny_decoder(published_weights(5))
    z = latents(4, 4, torch.float32)
    whole = TinyStreamingDecoder(module).decode(z)
    decoder = TinyStreamingDecoder(module)
    first = decoder.decode(z[:, :, :2])
    calls = []

    def fail(*_):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("no memory")

    handle = module.conv_out.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="no memory"):
        decoder.decode(z[:, :, 2:])
    handle.remove()
    assert torch.equal(torch.cat([first, decoder.decode(z[:, :, 2:])], 2), whole)


def without(name: str) -> dict[str, torch.Tensor]:
    weights = published_weights(6)
    del weights[name]
    return weights


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (without("decoder.4.conv.2.weight"), r"1 missing: decoder\.4\.conv\.2\.weight$"),
        (without("decoder.1.weight"), r"there is no decoder\.1\.weight, which every tiny video decoder has"),
        ({**published_weights(6), "decoder.23.weight": torch.zeros(1)}, r"1 too much: decoder\.23\.weight"),
        ({**published_weights(6), "decoder.8.bias": torch.zeros(5)}, r"1 too much: decoder\.8\.bias"),
        (
            {**published_weights(6), "decoder.9.conv.2.weight": torch.zeros(5, 5, 1, 1)},
            r"1 of another size: decoder\.9\.conv\.2\.weight is \(5, 5, 1, 1\), not \(5, 5, 3, 3\)",
        ),
        ({**published_weights(6), "decoder.22.bias": torch.zeros(3, dtype=torch.int8)}, "1 not of floating point"),
        ({**published_weights(6), "decoder.1.weight": torch.zeros(3)}, "not the weight of a 2D convolution"),
        ({"taesd_decoder.1.weight": torch.zeros(1)}, "there is no"),
    ],
    ids=["missing", "no first", "layer too much", "bias too much", "size", "integers", "not 2D", "other model"],
)
def test_other_weights_are_refused(weights, message):
    with pytest.raises(tilewise.ConfigError, match=message):
        tiny_decoder(weights)
