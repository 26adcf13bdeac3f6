"""Read a tiny video autoencoder from its file."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch

from tilewise.pipelines.errors import ModelError
from tilewise.pipelines.loading.weight_files import SUFFIXES, read_weights
from tilewise.plugins.autoencoders.tiny import TinyDecoder
from tilewise.plugins.autoencoders.tiny_layout import tiny_decoder
from tilewise.plugins.errors import ConfigError


@dataclass(frozen=True)
class TinyFile:
    """A file that was read. sha256: of its bytes, 64 hex digits. decoder: float32, on the CPU."""

    path: Path
    sha256: str
    decoder: TinyDecoder


def read_tiny_file(path: str | Path) -> TinyFile:
    """The decoder in a published file (taew2_1.safetensors, taew2_2.pth and the like); its encoder is not read.

    Raises:
        ModelError: there is no such file, it is damaged, holds Python objects, or its weights are not those of such a decoder.
    """
    path = Path(path).expanduser().absolute()
    if not path.is_file():
        raise ModelError(
            f"there is no file {path} of a tiny autoencoder: give decode as tiny=PATH with its path. taew2_1 (Wan "
            "2.1) and taew2_2 (Wan 2.2 5B) are published at https://github.com/madebyollin/taehv"
        )
    if path.suffix not in SUFFIXES:
        raise ModelError(f"{path} is no file of weights: its name ends in none of {', '.join(SUFFIXES)}")
    read = read_weights((path,))
    weights = {str(name): value for name, value in read.items() if isinstance(value, torch.Tensor)}
    if other := sorted(str(name) for name in read if name not in weights):
        raise ModelError(f"{path} is no tiny video autoencoder: it holds {other[0]}, which is no tensor")
    try:
        decoder = tiny_decoder(weights)
    except ConfigError as error:
        raise ModelError(
            f"{path} is no tiny video autoencoder as taew2_1 or taew2_2: {error}. Give the file as it was published"
        ) from error
    with path.open("rb") as file:
        return TinyFile(path, hashlib.file_digest(file, "sha256").hexdigest(), decoder)
