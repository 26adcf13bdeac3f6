"""The published layout of tiny video autoencoders: names of the weights, and the size of the decoder from their shapes.

Published modules are numbered, those without weights too. Source: https://github.com/madebyollin/taehv at 1f14a56.

    plain   0 tanh, 1 conv, 2 ReLU; a stage from 3, 9, 15: three blocks, upsampling, growth, conv; 21 ReLU, 22 conv
    super   0 conv; a stage from 1, 8, 15: three blocks, conv, ReLU, pixel shuffle, growth; 22 conv
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from tilewise.plugins.autoencoders.tiny import BLOCKS, RGB, STAGES, TinyDecoder, TinyShape
from tilewise.plugins.errors import ConfigError

ENCODER = "encoder."  # is not read
LAST = 22  # module, of both variants
_PLAIN_PARTS = {"first": "conv.0", "second": "conv.2", "third": "conv.4"}
_WIDE_PARTS = {"depthwise": "conv.0", "wider": "conv.1", "narrower": "conv.3"}
_WIDE_MARK = "decoder.0.weight"  # of the super variant alone


def published_names(decoder: TinyDecoder) -> dict[str, str]:
    """Name of each weight of a decoder → its name in a published file."""
    wide = decoder.shape.wide
    begin, step = (1, 7) if wide else (3, 6)
    places = {"conv_in": "0" if wide else "1", "conv_out": str(LAST)}
    for stage in range(STAGES):
        first = begin + step * stage
        for block in range(BLOCKS):
            for own, part in (_WIDE_PARTS if wide else _PLAIN_PARTS).items():
                places[f"stages.{stage}.blocks.{block}.{own}"] = f"{first + block}.{part}"
        conv, grow = (3, 6) if wide else (5, 4)
        places[f"stages.{stage}.conv"] = str(first + conv)
        places[f"stages.{stage}.grow"] = f"{first + grow}.conv"
    named = {}
    for name in decoder.state_dict():
        module, kind = name.rsplit(".", 1)
        named[name] = f"decoder.{places[module]}.{kind}"
    return named


def shape_of(weights: Mapping[str, torch.Tensor]) -> TinyShape:
    """The size of a decoder, from the shapes of its published weights.

    Raises:
        ConfigError: weights that say it are missing or of another number of dimensions; these are no tiny video decoder.
    """
    wide = _WIDE_MARK in weights

    def sides(name: str) -> tuple[int, int]:
        """Output and input channels of a convolution."""
        name = f"decoder.{name}.weight"
        if name not in weights:
            raise ConfigError(f"there is no {name}, which every tiny video decoder has")
        if weights[name].ndim != 4:
            raise ConfigError(f"{name} is {tuple(weights[name].shape)}, not the weight of a 2D convolution")
        return weights[name].shape[0], weights[name].shape[1]

    first, channels = sides("0" if wide else "1")
    begin, step, grow, conv = (1, 7, 6, 3) if wide else (3, 6, 4, 5)
    widths, growth = [first], []
    for stage in range(STAGES):
        at = begin + step * stage
        frames, of_one = sides(f"{at + grow}.conv")
        growth.append(max(1, frames // max(1, of_one)))
        widths.append(of_one if wide else sides(str(at + conv))[0])
    pixels, _ = sides(str(LAST))
    patch = math.isqrt(max(RGB, pixels) // RGB)
    return TinyShape(
        channels, (widths[0], widths[1], widths[2], widths[3]), (growth[0], growth[1], growth[2]), patch, wide
    )


def tiny_decoder(weights: Mapping[str, torch.Tensor]) -> TinyDecoder:
    """A decoder with published weights, in float32 on the CPU.

    Args:
        weights: by their published names; those of the encoder may be there too.

    Raises:
        ConfigError: weights that are missing, too much, of another size or not of floating point.
    """
    weights = {name: weight for name, weight in weights.items() if not name.startswith(ENCODER)}
    shape = shape_of(weights)
    with torch.device("meta"):
        decoder = TinyDecoder(shape)
    wanted = {name: decoder.state_dict()[own] for own, name in published_names(decoder).items()}
    found = {
        "missing": [name for name in wanted if name not in weights],
        "too much": [name for name in weights if name not in wanted],
        "of another size": [
            f"{name} is {tuple(weights[name].shape)}, not {tuple(weight.shape)}"
            for name, weight in wanted.items()
            if name in weights and weights[name].shape != weight.shape
        ],
        "not of floating point": [name for name in wanted if name in weights and not weights[name].is_floating_point()],
    }
    if problems := [f"{len(names)} {what}: {_first(names)}" for what, names in found.items() if names]:
        raise ConfigError(f"weights of the tiny decoder do not fit: {'; '.join(problems)}")
    own = {own: weights[name].to(torch.float32, copy=True) for own, name in published_names(decoder).items()}
    decoder.load_state_dict(own, assign=True)
    return decoder.requires_grad_(False).eval()


def _first(names: list[str], count: int = 4) -> str:
    return ", ".join(names[:count]) + (", …" if len(names) > count else "")
